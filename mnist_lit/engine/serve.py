"""``serve``: a model behind HTTP, and a page to try it.

One process: an event loop receives requests, threads decode pictures, and one thread computes what has gathered.
"""

# ruff: noqa: E402
# No `from __future__ import annotations`: FastAPI reads these annotations while it runs.
import argparse
import asyncio
import json
import logging
import os
import shlex
import signal
import socket
import sys
from base64 import b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from mnist_lit.engine.errors import ENGINE, UserError, require
from mnist_lit.engine.images import ImageError, ImageReader
from mnist_lit.engine.predictors import Served, Together, open_checkpoint, open_onnx
from mnist_lit.engine.project import Project

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
READERS = 2  # threads that decode: each may need 200 MB for a large picture
EXPECTED = 'send an image, a form with files, or {"images": [...]} with files in base64 or arrays of pixels'
# The page talks to this server alone.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
JSON = "application/json"
MakeReader = Callable[[dict[str, Any]], ImageReader]  # from the hyperparameters of the model's data module


class Sent(BaseModel):
    """JSON: files in base64, or arrays of pixels of the model's size, whole numbers up to 255."""

    images: list[str | list[Any]] = []
    image: str | list[Any] | None = None


class Prediction(BaseModel):
    """Of one image: probabilities if the model is a classifier, or else values."""

    name: str = Field(description="of the image's file, empty if it has none")
    class_: str | None = Field(None, serialization_alias="class", description="the most probable one")
    confidence: float | None = Field(None, description="its probability")
    probabilities: dict[str, float] | None = Field(None, description="of each class")
    values: list[float] | None = None
    warning: str = Field(description="why the prediction may be of something else than is meant; mostly empty")
    input: str | None = Field(description="with ?input=true the image that the model sees, as a data URL")


class Answer(BaseModel):
    """To one request, with the name of the model and the digest of its file."""

    predictions: list[Prediction]
    model: dict[str, str]


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

        if scope["type"] != "http" or self.knows(Headers(scope=scope).get("host", "")):
            await self.app(scope, bounded, send)
        else:
            detail = f"not for this server, which answers to IP addresses, {', '.join(sorted(self.names))}"
            await JSONResponse({"detail": detail}, 421)(scope, receive, send)

    def knows(self, host: str) -> bool:
        """Whether a header such as localhost:8000 or [::1]:8000 has an IP address or one of the names."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            return name in self.names or bool(ip_address(name))
        except ValueError:
            return False


def from_json(body: bytes) -> list[tuple[str, bytes | list[Any]]]:
    """Files and arrays of pixels in JSON, each with an empty name."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ImageError(f"more than {MAX_VALUES:,} commas and brackets in JSON")
    try:
        sent = Sent.model_validate_json(body)
        images = sent.images if sent.image is None else [sent.image]
        return [("", b64decode(i.rpartition("base64,")[2], validate=True) if isinstance(i, str) else i) for i in images]
    except ValueError as error:  # pydantic's, and that of base64
        raise ImageError(f"not the JSON that is expected; {EXPECTED}") from error


def application(served: Served, reader: ImageReader, names: set[str]) -> FastAPI:
    """Make what answers requests for hosts of these names."""
    app = FastAPI(title=served.name, version=served.digest[:12], docs_url=None, redoc_url=None)
    app.add_middleware(Guard, names=names)
    compute, readers, classes = Together(served.predict), ThreadPoolExecutor(READERS), served.classes
    model = {"name": served.name, "digest": served.digest}
    size = {"channels": reader.channels, "image_size": reader.size, "draws": reader.draws}
    info = json.dumps({**model, "classes": classes, **size}).replace("<", "\\u003c")  # no name ends the page's script
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

    @app.post("/predict", response_model=Answer, openapi_extra={"requestBody": {"required": True, "content": kinds}})
    async def predict(request: Request) -> Response:
        show = request.query_params.get("input") == "true"
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            with anyio.fail_after(PATIENCE):
                if kind == "multipart/form-data":
                    form = await request.form(max_files=MAX_IMAGES, max_fields=MAX_IMAGES, max_part_size=MAX_BYTES)
                    sent = [item for _, item in form.multi_items() if isinstance(item, UploadFile)]
                    uploads: Any = [(file.filename or "", await file.read()) for file in sent]
                else:
                    uploads = [("", await request.body())]
        except TimeoutError as error:
            raise HTTPException(408, f"the request took more than {PATIENCE} s to arrive") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the request broke off") from error

        def read() -> tuple[np.ndarray, list[dict[str, Any]], np.ndarray | None]:
            images, about = reader.read(from_json(uploads[0][1]) if kind == JSON else uploads, MAX_IMAGES, show)
            return images, about, compute.at_once(images)

        try:
            images, about, rows = await asyncio.get_running_loop().run_in_executor(readers, read)
        except ImageError as error:
            raise HTTPException(422, str(error)) from error
        predictions, rows = [], await compute(images) if rows is None else rows
        for row, known in zip(rows, about, strict=True):  # row: (num_classes,), or values of any shape
            if classes is None:
                predictions.append(Prediction(values=row.ravel().tolist(), **known))
            else:
                shares, best = dict(zip(classes, row.tolist(), strict=True)), classes[int(row.argmax())]
                predictions.append(Prediction(class_=best, confidence=shares[best], probabilities=shares, **known))
        return Response(Answer(predictions=predictions, model=model).model_dump_json(by_alias=True), media_type=JSON)

    return app


def parse(args: list[str], project: Project) -> tuple[argparse.Namespace, list[str]]:
    """Options of ``serve``, and those of ``predict``."""
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
    if others and options.ckpt_path.suffix == ".onnx":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    return options, others


def load(options: argparse.Namespace, others: list[str], project: Project, make_reader: MakeReader) -> FastAPI:
    """Make the application for the model that the options name."""
    path, threads = options.ckpt_path.expanduser(), options.num_threads
    if path.suffix == ".onnx":
        served = open_onnx(path, threads)
    else:
        served = open_checkpoint(project, path, [*others, *([f"--num_threads={threads}"] if threads else [])])
    names = {"localhost", options.host.lower(), socket.gethostname().lower()}
    return application(served, make_reader(served.data), names)


def app(project: Project | None = None, reader: MakeReader = ImageReader) -> FastAPI:
    """Make the application in a worker of uvicorn, by options in the environment variable ``SERVE``.

    Example:
        SERVE="--ckpt_path=best.onnx --num_threads=1" uvicorn --factory mnist_lit.engine.serve:app --workers=4
    """
    project = project or Project(ENGINE)
    return load(*parse(shlex.split(os.environ["SERVE"]), project), project, reader)


def main(args: list[str], project: Project, reader: MakeReader = ImageReader) -> None:
    """Serve until SIGTERM or Ctrl+C, and then answer what was accepted.

    Args:
        args: of the command line.
        project: that runs.
        reader: makes, from the hyperparameters of the model's data module, what reads the pictures that are sent.
    """
    options, others = parse(args, project)
    host, port = options.host, options.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        try:
            listening = socket.create_server((host, port), family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            raise UserError(f"--host={host} --port={port} cannot be had ({error}); choose others") from error
        app = load(options, others, project, reader)
    except UserError as error:
        sys.exit(f"{project.name}: error: {error}")
    for signum in (signal.SIGINT, signal.SIGTERM):  # which uvicorn raises again when the last answer is out
        signal.signal(signum, signal.default_int_handler)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a line for every damaged form
    name = f"[{host}]" if ":" in host else host
    print(f"Serving {app.title} at http://{name}:{port}, a page to try it; with /predict", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2 * PATIENCE)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
