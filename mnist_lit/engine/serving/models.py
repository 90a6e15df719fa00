"""What is served: an ONNX file of ``export``, or a checkpoint. Each is loaded in the worker that computes with it."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mnist_lit.engine.errors import ENGINE as PROJECT
from mnist_lit.engine.errors import CheckpointError, ConfigurationError
from mnist_lit.engine.project import Project

if TYPE_CHECKING:
    from torch import nn

Predict = Callable[[np.ndarray], np.ndarray]  # images uint8 (n, C, H, W) to predictions (n, ...)


@dataclass
class Served:
    """A model with what has to be known of it.

    Attributes:
        path: of its file.
        name: of the network's class.
        data: hyperparameters of the data module that it was trained with.
        classes: names of the classes, or None if the predictions are values.
        threads: to compute with.
    """

    path: Path
    name: str
    data: dict[str, Any]
    classes: list[str] | None
    threads: int

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file."""
        with self.path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()

    def load(self, device: str) -> Predict:
        """Make the function that predicts, in this process."""
        raise NotImplementedError


@dataclass
class OnnxFile(Served):
    """A file of ``export``; it needs onnxruntime, and no torch."""

    content: bytes = field(repr=False, default=b"")  # so that a worker that starts later has the same model

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file as it was."""
        return hashlib.sha256(self.content).hexdigest()

    @classmethod
    def open(cls, path: Path, threads: int) -> OnnxFile:
        """Read what the file says of itself.

        Raises:
            CheckpointError: if it cannot be read, or is of another program.
            ConfigurationError: if onnxruntime is missing.
        """
        if find_spec("onnxruntime") is None:
            raise ConfigurationError(f"{path} needs onnxruntime: pip install '{PROJECT}[export]'")
        if not path.is_file():
            raise CheckpointError(f"--ckpt_path={path}: no such file; python -m {PROJECT} export makes one")
        content = path.read_bytes()
        try:
            meta = _session(content, 1).get_modelmeta()
        except Exception as error:  # onnxruntime has several, without a common class
            raise CheckpointError(f"{path} is no ONNX file that can be used ({str(error).splitlines()[0]})") from error
        try:
            name, data = meta.custom_metadata_map["model"], json.loads(meta.custom_metadata_map["data"])
            classes = json.loads(meta.custom_metadata_map.get("classes", "null"))
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{path} does not say how it takes images; python -m {PROJECT} export writes files that do"
            ) from error
        return cls(path, name, data, classes and [str(name) for name in classes], threads, content)

    def load(self, device: str) -> Predict:
        session = _session(self.content, self.threads)
        (images,) = session.get_inputs()
        squeezed = len(images.shape) == 3  # (n, H, W): a data module whose grey images have no channel

        def predict(pixels: np.ndarray) -> np.ndarray:
            return session.run(None, {images.name: pixels[:, 0] if squeezed else pixels})[0]

        return predict


def _session(content: bytes, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@dataclass
class Checkpoint(Served):
    """A checkpoint, with the model and the data module of its run."""

    predictor: bytes = field(repr=False, default=b"")  # pickled

    @classmethod
    def open(cls, project: Project, path: str, args: list[str]) -> Checkpoint:
        """Build the model as ``predict`` does, without its dataset.

        Args:
            project: that runs.
            path: of the checkpoint.
            args: further options of ``predict``.

        Raises:
            CheckpointError: if the checkpoint cannot be read, or is of another model.
            ConfigurationError: if the model cannot be served.
        """
        import torch

        from mnist_lit.engine.cli import build
        from mnist_lit.engine.export import Predictor
        from mnist_lit.engine.outputs import are_probabilities, class_names

        built = build(project, path, args)
        assert built.checkpoint is not None
        checkpoint = built.checkpoint.content
        known = {**checkpoint.get("hyper_parameters", {}), **checkpoint.get("datamodule_hyper_parameters", {})}
        model, data = built.model.eval(), built.datamodule
        name = type(model).__name__
        if not known.get("image_size") or not known.get("channels"):
            raise ConfigurationError(
                f"{path} does not say how large the model's images are; let {type(data).__name__} save it: "
                'self.save_hyperparameters({"channels": 3, "image_size": [64, 64]})'
            )
        model.load_state_dict(checkpoint["state_dict"], strict=model.strict_loading)
        example = torch.zeros(2, int(known["channels"]), *map(int, known["image_size"]), dtype=torch.uint8)
        precision = built.trainer.precision_plugin
        precision.convert_module(model.cpu())
        predictor = Predictor(model, data, (example, None), precision)
        try:
            pickled = pickle.dumps(predictor)
            with torch.inference_mode():
                predictions = predictor(example)
        except Exception as error:  # whatever a model does that cannot be pickled, or wants another batch
            raise ConfigurationError(
                f"{name} cannot be served: a worker gets it pickled, and calls {type(data).__name__}."
                f"on_after_batch_transfer and predict_step with (images uint8 {tuple(example.shape)}, None), which "
                f"raised {type(error).__name__}: {error}"
            ) from error
        classes = None
        if are_probabilities(predictions):
            classes = class_names(data, predictions.shape[1], checkpoint)
        return cls(Path(path), name, known, classes, torch.get_num_threads(), pickled)

    def load(self, device: str) -> Predict:
        import torch

        torch.set_num_threads(self.threads)
        network: nn.Module = pickle.loads(self.predictor).to(device).eval()

        def predict(pixels: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return network(torch.from_numpy(pixels).to(device)).float().cpu().numpy()

        return predict
