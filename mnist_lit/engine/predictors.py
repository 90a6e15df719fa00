"""What predicts: an ONNX file of ``export`` or a checkpoint, behind one function from images to predictions.

Without torch at its top, so that a server of an ONNX file need not import it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from mnist_lit.engine.errors import UserError, require
from mnist_lit.engine.project import Project
from mnist_lit.engine.threads import available_cpus

TOGETHER = 64  # images that are computed at once

Predict = Callable[[np.ndarray], np.ndarray]  # images uint8 (n, C, H, W) to predictions (n, ...)


class Served(NamedTuple):
    """A model and what is known of it: its name, the SHA-256 of its file, hyperparameters of its data module."""

    predict: Predict
    name: str
    digest: str
    data: dict[str, Any]
    classes: list[str] | None  # None if it predicts values


def open_onnx(path: Path, threads: int | None) -> Served:
    """Read a file of ``export``, which needs onnxruntime and not torch.

    Raises:
        UserError: if it cannot be read, or is of another program.
        UserError: if it takes something else than pictures.
    """
    require("export", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or available_cpus(), 3
    try:
        content = path.read_bytes()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        about, (images,) = session.get_modelmeta().custom_metadata_map, session.get_inputs()
        name, data, classes = about["model"], json.loads(about["data"]), json.loads(about.get("classes", "null"))
    except Exception as error:  # onnxruntime has several, without a common class
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is not an ONNX file that export has written ({reason})") from error
    if images.type != "tensor(uint8)":
        raise UserError(
            f"{path} takes {images.type}, and pictures are uint8: convert them in the data module's "
            "on_after_batch_transfer, and not in its dataset"
        )
    if not data.get("image_size"):  # a data module that saves nothing
        data = {"channels": images.shape[1], "image_size": images.shape[-2:]}

    def predict(pixels: np.ndarray) -> np.ndarray:
        # Grey images have no channel in some data modules: (n, H, W).
        return session.run(None, {images.name: pixels[:, 0] if len(images.shape) == 3 else pixels})[0]

    return Served(predict, name, hashlib.sha256(content).hexdigest(), data, classes and [*map(str, classes)])


def open_checkpoint(project: Project, path: Path, args: list[str]) -> Served:
    """Build the model as ``predict`` does, without its dataset.

    Raises:
        UserError: if the checkpoint cannot be read, or is of another model.
        UserError: if the model takes something else than images.
    """
    import torch

    from mnist_lit.engine.cli import build
    from mnist_lit.engine.export import Predictor
    from mnist_lit.engine.outputs import are_probabilities, class_names

    built = build(project, str(path), args)
    assert built.checkpoint is not None
    checkpoint = built.checkpoint.content
    model, precision, device = built.model, built.trainer.precision_plugin, built.trainer.strategy.root_device
    model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
    data = {**checkpoint.get("hyper_parameters", {}), **checkpoint.get("datamodule_hyper_parameters", {})}
    if not data.get("image_size") or not data.get("channels"):
        raise UserError(
            f"{path} does not say how large the model's images are; let {type(built.datamodule).__name__} save it: "
            'self.save_hyperparameters({"channels": 3, "image_size": [64, 64]})'
        )
    example = np.zeros((2, int(data["channels"]), *map(int, data["image_size"])), np.uint8)
    precision.convert_module(model)
    predictor = Predictor(model, built.datamodule, (example, None), precision).eval().to(device)

    def predict(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return predictor(torch.from_numpy(pixels).to(device)).float().cpu().numpy()

    try:
        found = torch.from_numpy(predict(example))
    except Exception as error:  # whatever a model does that wants another batch
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{type(model).__name__} cannot be served from a checkpoint: predicting the batch (images uint8 "
            f"{example.shape}, None) raised {type(error).__name__}: {reason}. A file of export takes images alone: "
            f"{project.command('export', '--ckpt_path', path)}"
        ) from error
    classes = class_names(built.datamodule, found.shape[1], checkpoint) if are_probabilities(found) else None
    return Served(predict, type(model).__name__, hashlib.sha256(path.read_bytes()).hexdigest(), data, classes)


class Together:
    """Computes the images of several requests at once: while one thread computes, others gather."""

    def __init__(self, predict: Predict) -> None:
        self.predict, self.thread, self.lock = predict, ThreadPoolExecutor(1), Lock()
        self.waiting: list[tuple[np.ndarray, asyncio.Future]] = []
        self.worker: asyncio.Task | None = None

    def at_once(self, images: np.ndarray) -> np.ndarray | None:
        """Predictions computed in the thread that asks, which saves a change of threads; None if another computes."""
        if len(images) > TOGETHER or self.waiting or not self.lock.acquire(blocking=False):
            return None
        try:
            return self.predict(images)
        finally:
            self.lock.release()

    async def __call__(self, images: np.ndarray) -> np.ndarray:
        """Predictions (n, ...) of images uint8 (n, C, H, W)."""
        loop = asyncio.get_running_loop()
        starts = range(0, len(images), TOGETHER)
        parts = [(images[start : start + TOGETHER], loop.create_future()) for start in starts]
        self.waiting += parts
        if self.worker is None or self.worker.done():
            self.worker = loop.create_task(self._work())
        return np.concatenate(await asyncio.gather(*(future for _, future in parts)))

    async def _work(self) -> None:
        while self.waiting:
            sizes = np.cumsum([len(images) for images, _ in self.waiting])
            count = int((sizes <= TOGETHER).sum())
            batch, self.waiting = self.waiting[:count], self.waiting[count:]
            images = np.concatenate([images for images, _ in batch])
            try:
                rows = await asyncio.get_running_loop().run_in_executor(self.thread, self._compute, images)
                results: list[Any] = np.split(rows, sizes[: count - 1])
            except Exception as error:  # whatever a model does
                results = [error] * count
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():  # its request was given up
                    future.set_exception(result) if isinstance(result, Exception) else future.set_result(result)

    def _compute(self, images: np.ndarray) -> np.ndarray:
        with self.lock:
            return self.predict(images)
