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
import signal
import socket
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, NamedTuple
from urllib.parse import urlsplit

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
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, UploadFile
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BYTES = 16 * 2**20  # of a request, five times a phone's photo
MAX_IMAGES = 1000  # of a request
MAX_VALUES = 2**20  # commas and brackets in JSON: to parse them takes a tenth of a second, in which nothing else runs
PATIENCE = 20  # seconds for a request to arrive
DECODING = 2  # pictures at a time: each may need 200 MB
THREADS = 32  # requests at a time
TOGETHER = 64  # images that are computed at once
EXPECTED = 'send an image, a form with files, or {"images": [...]} with files in base64 or arrays of pixels'
# The page talks to this server alone.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
JSON = "application/json"
Predict = Callable[[np.ndarray], np.ndarray]  # images uint8 (n, C, H, W) to predictions (n, ...)
Item = bytes | list[Any]  # an image file, or its pixels


class Sent(BaseModel):
    """JSON: files in base64, or arrays of pixels of the model's size, whole numbers up to 255."""

    images: list[str | list[Any]] = []
    image: str | list[Any] | None = None


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
    """To one request, with the name of the model and the digest of its file."""

    predictions: list[Prediction]
    model: dict[str, str]


class Served(NamedTuple):
    """A model and what is known of it."""

    predict: Predict
    name: str
    digest: str  # SHA-256 of its file
    shape: tuple[int, ...]  # channels, height and width of its images
    data: dict[str, Any]  # hyperparameters of its data module
    classes: list[str] | None  # None if it predicts values


def open_onnx(path: Path, threads: int | None) -> Served:
    """Read a file of ``export``, which needs onnxruntime and not torch."""
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
        raise UserError(f"{path} is not an ONNX file that export has written ({str(error).splitlines()[0]})") from error
    if images.type != "tensor(uint8)":
        raise UserError(f"{path} takes {images.type}, and pictures are uint8")
    grey = len(images.shape) == 3  # images of some data modules have no channel: (n, H, W)
    channels = 1 if grey else images.shape[1]

    def predict(pixels: np.ndarray) -> np.ndarray:
        return session.run(None, {images.name: pixels[:, 0] if grey else pixels})[0]

    size = data.get("image_size") or images.shape[-2:]
    digest = hashlib.sha256(content).hexdigest()
    return Served(predict, name, digest, (channels, *size), data, classes and [*map(str, classes)])


def open_checkpoint(project: Project, path: Path, args: list[str]) -> Served:
    """Build the model as ``predict`` does, without its dataset."""
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
        how = 'its data module has to save_hyperparameters({"channels": 3, "image_size": [64, 64]})'
        raise UserError(f"{path} does not say how large the model's images are; {how}")
    shape = (int(data["channels"]), *map(int, data["image_size"]))
    example = np.zeros((2, *shape), np.uint8)
    precision.convert_module(model)
    predictor = Predictor(model, built.datamodule, (example, None), precision).eval().to(device)

    def predict(pixels: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return predictor(torch.from_numpy(pixels).to(device)).float().cpu().numpy()

    try:
        found = torch.from_numpy(predict(example))
    except Exception as error:  # whatever a model does that wants another batch
        raise UserError(
            f"{type(model).__name__} cannot be served from a checkpoint: it does not predict the batch (images uint8 "
            f"{example.shape}, None) ({type(error).__name__}); a file of export takes images alone: "
            f"{project.command('export', '--ckpt_path', path)}"
        ) from error
    classes = class_names(built.datamodule, found.shape[1], checkpoint) if are_probabilities(found) else None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Served(predict, type(model).__name__, digest, shape, data, classes)


class Together:
    """Computes the images of several requests at once: while one thread computes, those of others gather."""

    def __init__(self, predict: Predict) -> None:
        self.predict, self.lock, self.waiting = predict, Lock(), list[tuple[np.ndarray, Future]]()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Predictions (n, ...) of images uint8 (n, C, H, W)."""
        result: Future[np.ndarray] = Future()
        self.waiting.append((images, result))
        with self.lock:
            if not result.done():  # by the thread before
                batch, self.waiting = self.waiting, []
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


class Guard:
    """Bounds requests, and refuses those for other hosts: no page elsewhere gets here by giving us its own name."""

    def __init__(self, app: ASGIApp, names: set[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BYTES:
                raise HTTPException(413, f"the request has more than {MAX_BYTES >> 20} MiB")
            return message

        known = scope["type"] == "lifespan"
        with suppress(ValueError):  # localhost:8000, [::1]:8000
            name = urlsplit(f"//{Headers(scope=scope).get('host', '')}").hostname or ""
            known = known or name in self.names or bool(ip_address(name))
        detail = f"not for this server, which answers to IP addresses, {', '.join(sorted(self.names))}"
        await (self.app if known else JSONResponse({"detail": detail}, 421))(scope, bounded, send)


def from_json(body: bytes) -> list[tuple[str, Item]]:
    """Files and arrays of pixels in JSON, each with an empty name."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise UserError(f"more than {MAX_VALUES:,} commas and brackets in JSON")
    try:
        sent = Sent.model_validate_json(body)
        images = sent.images if sent.image is None else [sent.image]
        return [("", b64decode(i.rpartition("base64,")[2], validate=True) if isinstance(i, str) else i) for i in images]
    except ValueError as error:  # pydantic's, and that of base64
        raise UserError(f"not the JSON that is expected; {EXPECTED}") from error


def from_pixels(values: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    """An image uint8 (C, H, W) of this shape out of whole numbers (C, H, W), (H, W, C) or (H, W)."""
    with suppress(ValueError):  # rows of several lengths
        array = np.array(values)
        if array.shape == (*shape[1:], shape[0]):
            array = array.transpose(2, 0, 1)
        array = array[None] if array.ndim == 2 else array
        if array.shape == shape and array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 255:
            return array.astype(np.uint8)
    size = " x ".join(map(str, shape))
    raise UserError(f"an array of {size} whole numbers up to 255 expected; images of other sizes come as files")


def png_url(image: np.ndarray) -> str:
    """An image uint8 (C, H, W) as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(file, "PNG")
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"


def application(served: Served, fit: Fit | None, names: set[str]) -> FastAPI:
    """Make what answers requests for hosts of these names."""
    app = FastAPI(title=served.name, version=served.digest[:12], docs_url=None, redoc_url=None)
    app.add_middleware(Guard, names=names)
    compute, threads, decoding = Together(served.predict), ThreadPoolExecutor(THREADS), Semaphore(DECODING)
    classes, (channels, height, width) = served.classes, served.shape
    model = {"name": served.name, "digest": served.digest}
    about = {**model, "classes": classes, "channels": channels, "image_size": [height, width], "draws": bool(fit)}
    info = json.dumps(about).replace("<", "\\u003c")  # no name ends the page's script
    page = files(__package__).joinpath("page.html").read_text("utf-8").replace("{{about}}", info)
    file = {"schema": {"type": "string", "format": "binary"}}
    kinds = {JSON: {"schema": Sent.model_json_schema()}, "multipart/form-data": file, "image/*": file}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    @app.get("/info")
    async def health() -> Response:
        return Response(info, media_type=JSON)

    def answer(items: list[tuple[str, Item]], show: bool) -> str:
        if not 1 <= len(items) <= MAX_IMAGES:
            raise UserError(f"{len(items):,} images, expected 1 to {MAX_IMAGES:,}")
        images, predictions = np.empty((len(items), *served.shape), np.uint8), []
        for index, (name, sent) in enumerate(items):
            try:
                if isinstance(sent, bytes):
                    with decoding:
                        images[index], warning = read_picture(io.BytesIO(sent), channels, (height, width), fit)
                else:
                    images[index], warning = from_pixels(sent, served.shape), ""
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
        return Answer(predictions=predictions, model=model).model_dump_json(by_alias=True)

    @app.post("/predict", response_model=Answer, openapi_extra={"requestBody": {"required": True, "content": kinds}})
    async def predict(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            with anyio.fail_after(PATIENCE):
                items: list[tuple[str, Item]] = []
                if kind == "multipart/form-data":
                    form = await request.form(max_files=MAX_IMAGES, max_fields=MAX_IMAGES, max_part_size=MAX_BYTES)
                    uploads = [item for _, item in form.multi_items() if isinstance(item, UploadFile)]
                    items += [(file.filename or "", await file.read()) for file in uploads]
                else:
                    body = await request.body()
                    items += from_json(body) if kind == JSON else [("", body)]
            show = request.query_params.get("input") == "true"
            text = await asyncio.get_running_loop().run_in_executor(threads, answer, items, show)
        except TimeoutError as error:
            raise HTTPException(408, f"the request took more than {PATIENCE} s to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the request broke off") from error
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        return Response(text, media_type=JSON)

    return app


def load(args: list[str], project: Project, fit_pictures: FitPictures | None) -> tuple[FastAPI, argparse.Namespace]:
    """Make the application for the model that the options of ``serve`` name; those of ``predict`` may follow."""
    parser = argparse.ArgumentParser(
        prog=project.command("serve"),
        description="Serve a model to POST /predict, with a page at /. A checkpoint takes options of predict, too.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ckpt_path", required=True, type=Path, help="a checkpoint, or an ONNX file of export")
    parser.add_argument("--host", default="127.0.0.1", help="name or address to answer to; 0.0.0.0: from everywhere")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--num_threads", type=int, help="to compute with; by default one for each processor")
    options, others = parser.parse_known_args(args)
    path, threads = options.ckpt_path.expanduser(), options.num_threads
    if path.suffix == ".onnx":
        if others:
            parser.error(f"unrecognized arguments: {' '.join(others)}")
        served = open_onnx(path, threads)
    else:
        served = open_checkpoint(project, path, [*others, *([f"--num_threads={threads}"] if threads else [])])
    names = {"localhost", options.host.lower(), socket.gethostname().lower()}
    return application(served, fit_pictures(served.data) if fit_pictures else None, names), options


def app(project: Project | None = None, fit_pictures: FitPictures | None = None) -> FastAPI:
    """Make the application in a worker of uvicorn, by options in the environment variable ``SERVE``.

    Example:
        SERVE="--ckpt_path=best.onnx --num_threads=1" uvicorn --factory mnist_lit.engine.serve:app --workers=4
    """
    return load(shlex.split(os.environ["SERVE"]), project or Project(ENGINE), fit_pictures)[0]


def main(args: list[str], project: Project, fit_pictures: FitPictures | None = None) -> None:
    """Serve until SIGTERM or Ctrl+C, and then answer what was accepted.

    Args:
        args: of the command line.
        project: that runs.
        fit_pictures: makes what brings pictures to the model's size from its data module's hyperparameters.
    """
    app, options = load(args, project, fit_pictures)
    host, port = options.host, options.port
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host={host} --port={port} cannot be had ({error}); choose others") from error
    for signum in (signal.SIGINT, signal.SIGTERM):  # which uvicorn raises again when the last answer is out
        signal.signal(signum, signal.default_int_handler)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for every damaged form
    print(f"Serving {app.title} at http://{host}:{port}, a page to try it; with /predict", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2 * PATIENCE)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
