"""The server: LitServe's, with a page, and with answers that say what they are of."""

# No `from __future__ import annotations`: FastAPI and LitServe look at these annotations while they run.
import base64
import io
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

import anyio
import litserve
import numpy as np
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from litserve.loops.simple_loops import BatchedLoop
from PIL import Image
from pydantic import BaseModel, Field

from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.engine.images import ImageReader
from mnist_lit.engine.serving.models import Predict, Served
from mnist_lit.engine.serving.uploads import READERS, Images, receive

MOST = 1000  # images that are computed at once
# The page talks to this server alone.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


class Prediction(BaseModel):
    """Of one image."""

    name: str = Field(description="of the image's file, empty if it has none")
    class_: str | None = Field(alias="class", description="the most probable one, if the model tells classes apart")
    confidence: float | None = Field(description="its probability")
    probabilities: dict[str, float] | None = Field(description="of each class")
    values: list[float] | None = Field(description="what a model predicts that does not tell classes apart")
    warning: str = Field(description="why the prediction may be of something else than is meant; mostly empty")
    input: str | None = Field(description="with ?input=true the image that the model sees, as a data URL")


class ModelName(BaseModel):
    """Which model has answered."""

    name: str
    digest: str = Field(description="SHA-256 of its file")


class Answer(BaseModel):
    """To one request."""

    predictions: list[Prediction]
    model: ModelName


async def _images(request: Request, input: bool = False) -> tuple[Images, bool]:
    """Images of a request, and whether they shall be in the answer."""
    state = request.app.state
    return await receive(request, state.reader, state.limiter), input


class _Ahead:
    """A queue with one more item at its head."""

    def __init__(self, first: Any, queue: Any) -> None:
        self.first, self.queue = [first], queue

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        return self.first.pop() if self.first else self.queue.get(block, timeout)

    def get_nowait(self) -> Any:
        return self.get(block=False)


class WaitingLoop(BatchedLoop):
    """LitServe's, which asks again and again for a batch and has a core busy with that; here the first request is
    waited for.
    """

    def get_batch_requests(self, lit_api: litserve.LitAPI, request_queue: Any, transport: Any) -> tuple[list, list]:
        first = self.get_request(request_queue, timeout=1.0)
        if first is None:
            return [], []
        return super().get_batch_requests(lit_api, _Ahead(first, request_queue), transport)


class API(litserve.LitAPI):
    """Images of several requests in one batch."""

    def __init__(self, served: Served, max_batch_size: int, batch_timeout: float) -> None:
        loop = WaitingLoop() if max_batch_size > 1 else "auto"
        super().__init__(max_batch_size=max_batch_size, batch_timeout=batch_timeout, loop=loop)
        self.served = served

    def setup(self, device: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C: the server ends its workers after the last answer
        self.model: Predict = self.served.load(str(device))

    def decode_request(self, request: Annotated[tuple[Images, bool], Depends(_images)]) -> tuple[Images, bool]:
        return request

    def predict(self, x: Any) -> Any:
        """Answers to a list of requests, or to one."""
        requests = x if isinstance(x, list) else [x]
        pixels = np.concatenate([images.pixels for images, _ in requests])
        parts = [self.model(pixels[start : start + MOST]) for start in range(0, len(pixels), MOST)]
        rows = iter(np.concatenate(parts))
        answers = [self._answer(images, shown, [next(rows) for _ in images.names]) for images, shown in requests]
        return answers if isinstance(x, list) else answers[0]

    def encode_response(self, output: Answer) -> Answer:
        return output

    def _answer(self, images: Images, shown: bool, rows: list[np.ndarray]) -> Answer:
        classes, predictions = self.served.classes, []
        for pixels, name, warning, row in zip(images.pixels, images.names, images.warnings, rows, strict=True):
            values = np.ravel(row).tolist()
            best = int(np.argmax(row)) if classes else 0
            predictions.append(
                Prediction(
                    name=name,
                    **{"class": classes[best] if classes else None},
                    confidence=values[best] if classes else None,
                    probabilities=dict(zip(classes, values, strict=True)) if classes else None,
                    values=None if classes else values,
                    warning=warning,
                    input=_data_url(pixels) if shown else None,
                )
            )
        return Answer(predictions=predictions, model=ModelName(name=self.served.name, digest=self.served.digest))


def _data_url(pixels: np.ndarray) -> str:
    """An image uint8 (C, H, W) as a PNG in a URL."""
    file = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


class Server(litserve.LitServer):
    """LitServe's server with a page at ``/``. It says where it is once it answers.

    Args:
        served: the model.
        reader: of the pictures that are sent.
        url: to print.
        max_batch_size: requests that are computed at once.
        batch_timeout: seconds to wait for further requests.
        options: of LitServe's server.
    """

    def __init__(
        self, served: Served, reader: ImageReader, url: str, max_batch_size: int, batch_timeout: float, **options: Any
    ) -> None:
        about = {
            "name": served.name,
            "digest": served.digest,
            "file": str(served.path),
            "classes": served.classes,
            "channels": reader.channels,
            "image_size": list(reader.size),
            "draws": reader.draws,
        }
        super().__init__(API(served, max_batch_size, batch_timeout), model_metadata=about, **options)
        self.url, self.name = url, served.name
        self.app.title, self.app.version = f"{served.name}, {served.path.name}", served.digest[:12]
        self.app.state.reader, self.app.state.limiter = reader, anyio.CapacityLimiter(READERS)
        page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        page = page.replace("{{about}}", json.dumps(about).replace("<", "\\u003c"))
        routes = self.app.router.routes
        routes[:] = [route for route in routes if getattr(route, "path", "") != "/"]  # LitServe's "litserve running"

        @self.app.get("/", response_class=HTMLResponse, include_in_schema=False)
        async def index() -> Response:
            return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

        for route in routes:
            if getattr(route, "path", "") == "/predict":
                route.openapi_extra = {"requestBody": {"required": True, "content": _BODIES}}

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with super().lifespan(app):
            if getattr(app, "response_queue_id", 0) == 0:
                print(f"Serving {self.name} at {self.url}, a page to try it; with /predict and /docs", flush=True)
            yield


_BODIES = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
        }
    },
    "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
    "application/json": {
        "schema": {
            "type": "object",
            "required": ["images"],
            "properties": {
                "images": {
                    "type": "array",
                    "description": "Files in base64, or arrays of pixels of the model's size, whole numbers to 255.",
                    "items": {"anyOf": [{"type": "string"}, {"type": "array", "items": {}}]},
                }
            },
        }
    },
}


def check_port(host: str, port: int) -> None:
    """Find out before anything is loaded whether the server may have its port.

    Raises:
        ConfigurationError: if it may not.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"--port={port} cannot be had on {host} ({os.strerror(error.errno or 0)}); stop what has it, or choose "
                "another one"
            ) from error


def stop_on_signals() -> None:
    """Let SIGTERM, like Ctrl+C, end this process after the answers that are under way."""
    server = os.getpid()

    def stop(signum: int, _: Any) -> None:
        if os.getpid() != server:  # a process of the server, which has got it from there
            os._exit(0)
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
