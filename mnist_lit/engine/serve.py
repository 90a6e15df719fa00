"""``serve``: a model behind HTTP, and a page to try it.

One process: an event loop receives requests, and answers small ones itself. Other threads decode large pictures and
compute many images. An ONNX file is served without torch.
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
import timeit
from base64 import b64decode
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_lit.engine.errors import ENGINE, UserError, no_pipe, require
from mnist_lit.engine.images import Fit, FitPictures, open_image, read_picture
from mnist_lit.engine.project import Project
from mnist_lit.engine.threads import available_cpus

require("serve", "fastapi", "uvicorn", "python_multipart")

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

MAX_BYTES = 16 * 2**20  # of a request, five times a phone's photo
MAX_IMAGES = 1000  # of a request
MAX_VALUES = 2**20  # commas in JSON: to parse so many takes a tenth of a second, in which nothing else runs
PATIENCE = 20  # seconds for a request to arrive
DECODING = 2  # pictures at a time: each may need 200 MB
TOGETHER = 64  # images that are computed at once
FEW = 2**15  # pixels: one thread is done with so few sooner than it wakes another
QUICK = 0.001  # seconds, likewise
JSON = "application/json"
Pixels = list[Any]  # (H, W), (C, H, W) or (H, W, C)
Predict = Callable[[np.ndarray], np.ndarray]  # images uint8 (n, C, H, W) to predictions (n, ...)


class Sent(BaseModel):
    """JSON: files in base64, or arrays of pixels of the model's size, whole numbers up to 255."""

    images: list[Pixels | str] = Field(max_length=MAX_IMAGES)


class Prediction(BaseModel):
    """Of one image: probabilities if the model is a classifier, or else values."""

    name: str  # of the image's file, or ""
    class_: str | None = Field(default=None, serialization_alias="class")
    confidence: float | None = None
    probabilities: dict[str, float] | None = None
    values: list[float] | None = None
    warning: str = ""  # why the prediction may be of something else than is meant
    input: Pixels | None = None  # with ?input=true what the model sees (C, H, W)


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
    session = onnxruntime.InferenceSession(no_pipe(path).read_bytes(), options, providers=["CPUExecutionProvider"])
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
    model, data, name = built.model, built.checkpoint.hparams, type(built.model).__name__
    precision, device = built.trainer.precision_plugin, built.trainer.strategy.root_device
    model.load_state_dict(built.checkpoint.weights, strict=model.strict_loading)
    precision.convert_module(model)
    model.trainer = built.trainer
    if built.datamodule:
        built.datamodule.trainer = built.trainer
    threads = torch.get_num_threads()

    @torch.inference_mode()
    def predict(pixels: np.ndarray) -> np.ndarray:
        torch.set_num_threads(threads if pixels.size > FEW else 1)
        return predictor(torch.from_numpy(pixels).to(device)).float().cpu().numpy()

    try:
        shape = (int(data["channels"]), *map(int, data["image_size"]))
        example = np.zeros((2, *shape), np.uint8)
        predictor = Predictor(model, built.datamodule, (example, None), precision).eval().to(device)
        found = torch.from_numpy(predict(example))
    except Exception as error:  # whatever a model does that wants another batch
        raise UserError(
            f"{name} cannot be served from a checkpoint, where its data module needs hyperparameters channels and "
            f"image_size, and it predicts (images uint8 (B, C, H, W), None) ({type(error).__name__}: {error}); "
            f"a file of export takes images alone: {project.command('export', '--ckpt_path', path)}"
        ) from error
    names = class_names(built.datamodule, found.shape[-1], built.checkpoint.content)
    return Served(predict, name, shape, data, names if are_probabilities(found) else None)


def together(served: Served) -> Callable[[np.ndarray], Awaitable[np.ndarray]]:
    """Compute images as they come, or where that takes long, at once those that arrive while others are computed."""
    waiting, turn = list[tuple[np.ndarray, asyncio.Future]](), asyncio.Lock()
    example = np.zeros((1, *served.shape), np.uint8)
    quick = min(timeit.repeat(lambda: served.predict(example), number=1, repeat=3)) < QUICK

    def compute(images: np.ndarray) -> np.ndarray:
        return np.concatenate([served.predict(images[i : i + TOGETHER]) for i in range(0, len(images), TOGETHER)])

    async def take_turn(images: np.ndarray) -> np.ndarray:
        if quick and len(images) == 1:
            return compute(images)
        mine = asyncio.get_running_loop().create_future()
        waiting.append((images, mine))
        async with turn:
            if not mine.done():  # by the one before
                batch, waiting[:] = waiting[:], []
                rows = await asyncio.to_thread(compute, np.concatenate([images for images, _ in batch]))
                for images, future in batch:
                    future.set_result(rows[: len(images)])
                    rows = rows[len(images) :]
        return await mine

    return take_turn


def application(served: Served, about: dict[str, Any], fit: Fit | None, hosts: list[str]) -> FastAPI:
    """Make what answers requests that call this server by one of these names."""
    app = FastAPI(title=about["name"], docs_url=None, redoc_url=None)
    # No web page elsewhere reaches the server under a name of its own.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    compute, threads = together(served), ThreadPoolExecutor(DECODING)
    classes, (channels, height, width) = served.classes, served.shape
    about = {**about, "classes": classes, "channels": channels, "image_size": [height, width], "draws": bool(fit)}
    info = json.dumps(about).replace("<", "\\u003c")  # no name ends the page's script
    page = files(__package__).joinpath("page.html").read_text("utf-8").replace("{{about}}", info)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return about

    async def receive(request: Request) -> list[tuple[str, bytes | Pixels]]:
        """Names and images of a request."""
        if "transfer-encoding" in request.headers or int(request.headers.get("content-length", 0)) > MAX_BYTES:
            raise HTTPException(413, f"the request has no Content-Length, or more than {MAX_BYTES >> 20} MiB")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        task = asyncio.current_task()
        assert task is not None
        # A timeout of asyncio's or anyio's takes ten times as long.
        patience = asyncio.get_running_loop().call_later(PATIENCE, task.cancel)
        try:
            if kind == "multipart/form-data":
                form = (await request.form(max_files=MAX_IMAGES)).multi_items()
                uploads = [item for _, item in form if isinstance(item, UploadFile)]
                return [(file.filename or "", await file.read()) for file in uploads]
            body = await request.body()
        except (asyncio.CancelledError, ClientDisconnect) as error:
            raise HTTPException(408, f"the request took more than {PATIENCE} s to arrive") from error
        finally:
            patience.cancel()
        if kind != JSON:
            return [("", body)]
        with suppress(ValueError):  # pydantic's, and that of base64
            if body.count(b",") <= MAX_VALUES:
                images = Sent.model_validate_json(body).images
                return [
                    ("", b64decode(each.rpartition("base64,")[2], validate=True) if isinstance(each, str) else each)
                    for each in images
                ]
        expected = f"files in base64, or arrays of pixels, at most {MAX_IMAGES:,} with {MAX_VALUES:,} pixels"
        raise HTTPException(422, f'not the JSON that is expected: {{"images": [...]}} with {expected}')

    async def read(sent: bytes | Pixels) -> tuple[np.ndarray, str]:
        """The image uint8 (C, H, W) that the model sees, and a warning or ""."""
        if isinstance(sent, bytes):
            decode = partial(read_picture, io.BytesIO(sent), channels, (height, width), fit)
            few = _number_of_pixels(sent) <= FEW
            return decode() if few else await asyncio.get_running_loop().run_in_executor(threads, decode)
        with suppress(ValueError):  # rows of several lengths
            pixels = np.array(sent)
            if pixels.shape == (height, width, channels):
                pixels = pixels.transpose(2, 0, 1)
            whole = pixels.dtype.kind in "iu" and pixels.shape in (served.shape, (height, width))
            if whole and not (pixels >> 8).any():  # no bit beyond the eighth, and no sign
                return pixels, ""
        raise UserError(f"expected {channels} x {height} x {width} whole numbers up to 255, or a file")

    async def predict(request: Request) -> Response:
        sent, show = await receive(request), request.query_params.get("input") == "true"
        if not sent:
            raise HTTPException(422, "there is no image in the request")
        images, predictions = np.empty((len(sent), *served.shape), np.uint8), []
        for index, (name, image) in enumerate(sent):
            if index:
                await asyncio.sleep(0)  # in which others have their turn
            try:
                images[index], warning = await read(image)
            except UserError as error:
                raise HTTPException(422, f"{name[-100:] or f'image {index + 1}'}: {error}") from error
            seen = images[index].tolist() if show else None
            predictions.append(Prediction(name=name, warning=warning, input=seen))
        rows = await compute(images)  # each (num_classes,), or any shape
        for prediction, row in zip(predictions, rows, strict=True):
            values = row.ravel().tolist()
            if classes is None:
                prediction.values = values
            else:
                prediction.class_, prediction.confidence = classes[int(row.argmax())], max(values)
                prediction.probabilities = dict(zip(classes, values, strict=True))
        return Response(Answer(predictions=predictions).model_dump_json(by_alias=True), media_type=JSON)

    app.add_route("/predict", predict, ["POST"])  # the first route is taken: Starlette's costs less than FastAPI's
    schema = {"requestBody": {"content": {JSON: {"schema": Sent.model_json_schema()}, "image/*": {}}}}
    app.post("/predict", response_model=Answer, openapi_extra=schema)(predict)  # for the description
    return app


def _number_of_pixels(file: bytes) -> int:
    """What the header of an image file says; 0 if it is none."""
    with suppress(UserError), open_image(io.BytesIO(file)) as image:
        return image.width * image.height
    return 0


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
