"""``serve``: a model behind HTTP, and a page to try it.

One process: an event loop receives requests, and threads decode pictures and compute what has gathered. An ONNX file
is served without torch.
"""

# ruff: noqa: E402
# No `from __future__ import annotations`: FastAPI reads these annotations while it runs.
import argparse
import asyncio
import hashlib
import io
import json
import logging
import os
import shlex
import socket
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Semaphore
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mnist_lit.engine.errors import ENGINE, UserError, require
from mnist_lit.engine.images import Fit, FitPictures, read_picture
from mnist_lit.engine.project import Project
from mnist_lit.engine.threads import available_cpus

require("serve", "fastapi", "uvicorn", "python_multipart")

import anyio
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

MAX_BYTES = 16 * 2**20  # of a request, five times a phone's photo
MAX_IMAGES = 1000  # of a request
MAX_VALUES = 2**20  # commas and brackets in JSON: to parse them takes a tenth of a second, in which nothing else runs
PATIENCE = 20  # seconds for a request to arrive
DECODING = 2  # pictures at a time: each may need 200 MB
THREADS = 32  # requests at a time
TOGETHER = 64  # images that are computed at once
# The page talks to this server alone.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
JSON = "application/json"
Item = bytes | list[Any]  # an image file, or pixels (H, W), (C, H, W) or (H, W, C)
Predict = Callable[[np.ndarray], np.ndarray]  # images uint8 (n, C, H, W) to predictions (n, ...)


class Sent(BaseModel):
    """JSON: files in base64, or arrays of pixels of the model's size, whole numbers up to 255."""

    images: list[str | list[Any]]


class Prediction(BaseModel):
    """Of one image: probabilities if the model is a classifier, or else values."""

    name: str  # of the image's file, or ""
    class_: str | None = Field(default=None, serialization_alias="class")
    confidence: float | None = None
    probabilities: dict[str, float] | None = None
    values: list[float] | None = None
    warning: str = ""  # why the prediction may be of something else than is meant
    input: str | None = None  # with ?input=true the image that the model sees, as a data URL


class Answer(BaseModel):
    """To one request."""

    predictions: list[Prediction]


class Served(NamedTuple):
    """A model and what is known of it."""

    predict: Predict
    name: str
    shape: tuple[int, ...]  # channels, height and width of its images
    data: dict[str, Any]  # hyperparameters of its data module
    classes: list[str] | None  # None if it predicts values


def open_onnx(path: Path, threads: int | None) -> Served:
    """Read a file of ``export``, which needs onnxruntime and not torch."""
    require("export", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or available_cpus(), 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    about, (images,) = session.get_modelmeta().custom_metadata_map, session.get_inputs()
    classes = [*map(str, json.loads(about["classes"]))] if "classes" in about else None

    def predict(pixels: np.ndarray) -> np.ndarray:
        return session.run(None, {images.name: pixels})[0]

    return Served(predict, about["model"], tuple(images.shape[1:]), json.loads(about["data"]), classes)


def open_checkpoint(project: Project, path: Path, args: list[str]) -> Served:
    """Build the model as ``predict`` does, without its dataset."""
    import torch

    from mnist_lit.engine.cli import build
    from mnist_lit.engine.export import Predictor
    from mnist_lit.engine.outputs import are_probabilities, class_names

    built = build(project, str(path), args)
    assert built.checkpoint is not None
    model, precision, device = built.model, built.trainer.precision_plugin, built.trainer.strategy.root_device
    model.load_state_dict(built.checkpoint.weights, strict=model.strict_loading)
    data, name = built.checkpoint.hparams, type(model).__name__

    def predict(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return predictor(torch.from_numpy(pixels).to(device)).float().cpu().numpy()

    try:
        shape = (int(data["channels"]), *map(int, data["image_size"]))
        example = np.zeros((2, *shape), np.uint8)
        precision.convert_module(model)
        predictor = Predictor(model, built.datamodule, (example, None), precision).eval().to(device)
        found = torch.from_numpy(predict(example))
    except Exception as error:  # whatever a model does that wants another batch
        raise UserError(
            f"{name} cannot be served from a checkpoint: its data module has no hyperparameters channels and "
            f"image_size, or it does not predict (images uint8 (B, C, H, W), None) ({type(error).__name__}: {error}); "
            f"a file of export takes images alone: {project.command('export', '--ckpt_path', path)}"
        ) from error
    names = class_names(built.datamodule, found.shape[-1], built.checkpoint.content)
    return Served(predict, name, shape, data, names if are_probabilities(found) else None)


class Together:
    """Computes the images of several requests at once: while one thread computes, those of others gather."""

    def __init__(self, predict: Predict) -> None:
        self.predict, self.lock = predict, Lock()
        self.waiting: SimpleQueue[tuple[np.ndarray, Future[np.ndarray]]] = SimpleQueue()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Predictions (n, ...) of images uint8 (n, C, H, W)."""
        result: Future[np.ndarray] = Future()
        self.waiting.put((images, result))
        with self.lock:
            if not result.done():  # by the thread before
                batch = [self.waiting.get() for _ in range(self.waiting.qsize())]
                try:
                    images = np.concatenate([images for images, _ in batch])
                    parts = (images[start : start + TOGETHER] for start in range(0, len(images), TOGETHER))
                    rows = np.concatenate([self.predict(part) for part in parts])
                    for images, future in batch:
                        future.set_result(rows[: len(images)])
                        rows = rows[len(images) :]
                except Exception as error:  # whatever a model does
                    for _, future in batch:
                        future.set_exception(error)
        return result.result()


def from_json(body: bytes) -> list[tuple[str, Item]]:
    """Files and arrays of pixels in JSON, each with an empty name."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise UserError(f"more than {MAX_VALUES:,} commas and brackets in JSON")
    try:
        images = Sent.model_validate_json(body).images
        return [("", b64decode(i.rpartition("base64,")[2], validate=True) if isinstance(i, str) else i) for i in images]
    except ValueError as error:  # pydantic's, and that of base64
        expected = '{"images": [...]} with files in base64 or arrays of pixels'
        raise UserError(f"not the JSON that is expected: {expected}") from error


def png_url(image: np.ndarray) -> str:
    """An image uint8 (C, H, W) as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def application(served: Served, about: dict[str, Any], fit: Fit | None, hosts: list[str]) -> FastAPI:
    """Make what answers requests that call this server by one of these names."""
    app = FastAPI(title=about["name"], docs_url=None, redoc_url=None)
    # No web page elsewhere reaches the server under a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    compute, threads, decoding = Together(served.predict), ThreadPoolExecutor(THREADS), Semaphore(DECODING)
    classes, (channels, height, width) = served.classes, served.shape
    about = {**about, "classes": classes, "channels": channels, "image_size": [height, width], "draws": bool(fit)}
    info = json.dumps(about).replace("<", "\\u003c")  # no name ends the page's script
    page = files(__package__).joinpath("page.html").read_text("utf-8").replace("{{about}}", info)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return about

    def read(sent: Item) -> tuple[np.ndarray, str]:
        if isinstance(sent, bytes):
            with decoding:
                return read_picture(io.BytesIO(sent), channels, (height, width), fit)
        with suppress(ValueError):  # rows of several lengths
            pixels = np.array(sent)
            if pixels.shape == (height, width, channels):
                pixels = pixels.transpose(2, 0, 1)
            whole = pixels.dtype.kind in "iu" and pixels.shape in (served.shape, (height, width))
            if whole and pixels.min() >= 0 and pixels.max() <= 255:
                return pixels, ""
        size = f"{channels} x {height} x {width}"
        raise UserError(f"{size} whole numbers up to 255 expected; images of other sizes come as files")

    def answer(items: list[tuple[str, Item]], show: bool) -> str:
        if not 1 <= len(items) <= MAX_IMAGES:
            raise UserError(f"{len(items):,} images, expected 1 to {MAX_IMAGES:,}")
        images, predictions = np.empty((len(items), *served.shape), np.uint8), []
        for index, (name, sent) in enumerate(items):
            try:
                images[index], warning = read(sent)
            except UserError as error:
                raise UserError(f"{name[-100:] or f'image {index + 1}'}: {error}") from error
            seen = png_url(images[index]) if show else None
            predictions.append(Prediction(name=name, warning=warning, input=seen))
        for prediction, row in zip(predictions, compute(images), strict=True):  # row: (num_classes,), or any shape
            values = row.ravel().tolist()
            if classes is None:
                prediction.values = values
            else:
                prediction.class_, prediction.confidence = classes[int(row.argmax())], max(values)
                prediction.probabilities = dict(zip(classes, values, strict=True))
        return Answer(predictions=predictions).model_dump_json(by_alias=True)

    schema = {"requestBody": {"content": {JSON: {"schema": Sent.model_json_schema()}, "image/*": {}}}}

    @app.post("/predict", response_model=Answer, openapi_extra=schema)
    async def predict(request: Request) -> Response:
        if "transfer-encoding" in request.headers or int(request.headers.get("content-length", 0)) > MAX_BYTES:
            raise HTTPException(413, f"the request has no Content-Length, or more than {MAX_BYTES >> 20} MiB")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            with anyio.fail_after(PATIENCE):
                if kind == "multipart/form-data":
                    form = (await request.form(max_files=MAX_IMAGES)).multi_items()
                    uploads = [item for _, item in form if isinstance(item, UploadFile)]
                    items: list[tuple[str, Item]] = [(file.filename or "", await file.read()) for file in uploads]
                else:
                    body = await request.body()
                    items = from_json(body) if kind == JSON else [("", body)]
            show = request.query_params.get("input") == "true"
            text = await asyncio.get_running_loop().run_in_executor(threads, answer, items, show)
        except (TimeoutError, ClientDisconnect) as error:
            raise HTTPException(408, f"the request took more than {PATIENCE} s to arrive") from error
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        return Response(text, media_type=JSON)

    return app


def load(args: list[str], project: Project, fit_pictures: FitPictures | None) -> tuple[FastAPI, argparse.Namespace]:
    """Make the application for the model that the options of ``serve`` name; those of ``predict`` may follow."""
    description = "Serve a model to POST /predict, with a page at /. A checkpoint takes options of predict, too."
    parser = argparse.ArgumentParser(project.command("serve"), description=description, allow_abbrev=False)
    parser.add_argument("--ckpt_path", required=True, type=Path, help="a checkpoint, or an ONNX file of export")
    parser.add_argument("--host", default="127.0.0.1", help="address of this machine to listen at (127.0.0.1)")
    parser.add_argument("--allowed_hosts", nargs="+", default=[], help="further names by which clients may call it")
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument("--num_threads", type=int, help="to compute with; by default one for each processor")
    options, others = parser.parse_known_args(args)
    path, threads = options.ckpt_path.expanduser(), options.num_threads
    if path.suffix == ".onnx":
        parser.parse_args(args)  # ends at options of predict
        served = open_onnx(path, threads)
    else:
        served = open_checkpoint(project, path, [*others, *([f"--num_threads={threads}"] if threads else [])])
    about = {"name": served.name, "digest": hashlib.sha256(path.read_bytes()).hexdigest()}
    hosts = ["localhost", "127.0.0.1", "[::1]", socket.gethostname(), options.host, *options.allowed_hosts]
    return application(served, about, fit_pictures(served.data) if fit_pictures else None, hosts), options


def app(project: Project | None = None, fit_pictures: FitPictures | None = None) -> FastAPI:
    """Make the application in a worker of uvicorn, by options in the environment variable ``SERVE``.

    Example:
        SERVE="--ckpt_path=best.onnx --num_threads=1" uvicorn --factory mnist_lit.engine.serve:app --workers=4
    """
    return load(shlex.split(os.environ["SERVE"]), project or Project(ENGINE), fit_pictures)[0]


def main(args: list[str], project: Project, fit_pictures: FitPictures | None = None) -> None:
    """Serve until SIGTERM or Ctrl+C, and then answer what was accepted.

    ``fit_pictures`` makes what brings pictures to the model's size, from its data module's hyperparameters.
    """
    app, options = load(args, project, fit_pictures)
    host, port = options.host, options.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(f"--host={host} --port={port} cannot be had ({error}); choose others") from error
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for every damaged form
    uvicorn.run(app, host=host, port=port, access_log=False, timeout_graceful_shutdown=2 * PATIENCE)
