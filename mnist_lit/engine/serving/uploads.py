"""What a request brings: image files as they are, in a form, or in JSON. All of it is bounded before it is read."""

# No `from __future__ import annotations`: FastAPI looks at these annotations while it runs.
import asyncio
import base64
import binascii
import io
import json
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

import anyio
import numpy as np
from fastapi import HTTPException, Request
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from mnist_lit.engine.images import ImageError, ImageReader

MAX_BYTES = 16 * 2**20  # of a request, five times a phone's photo
MAX_IMAGES = 1000  # of a request
MAX_VALUES = 2**20  # commas and brackets in JSON: the parser lets nobody else work, for a tenth of a second here
PATIENCE = 20.0  # seconds for a request to arrive
READERS = 2  # threads that decode in each process of the server: each may need 200 MB for a large picture

EXPECTED = (
    'send an image file, a form with files, or JSON such as {"images": [...]} with files in base64 or arrays of pixels'
)
# What is no image, and may be one all the same: curl says the last of these unless it is told otherwise.
UNKNOWN = "", "application/octet-stream", "application/x-www-form-urlencoded"


class Images(NamedTuple):
    """Images of one request, as the model takes them."""

    pixels: np.ndarray  # uint8 (n, C, H, W)
    names: list[str]  # of the files, "" where there is none
    warnings: list[str]  # "" where there is none


class Upload(NamedTuple):
    """One image of a request."""

    name: str
    content: bytes | list[Any]  # a file, or pixels


async def receive(request: Request, reader: ImageReader, limiter: anyio.CapacityLimiter) -> Images:
    """Read the images of a request.

    Raises:
        HTTPException: 4xx, with a sentence that tells what is wrong.
    """
    try:
        body = await asyncio.wait_for(_body(request), PATIENCE)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise HTTPException(408, f"the request took more than {PATIENCE:.0f} s to arrive") from error
    except ClientDisconnect as error:
        raise HTTPException(400, "the request broke off") from error
    if len(body) > MAX_BYTES:
        raise HTTPException(413, f"the request has more than {MAX_BYTES >> 20} MiB")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        uploads = await _from_form(request, body)
        return await anyio.to_thread.run_sync(_read, uploads, reader, limiter=limiter)
    if kind == "application/json":
        return await anyio.to_thread.run_sync(_read_json, body, reader, limiter=limiter)
    if kind in UNKNOWN or kind.startswith("image/"):
        return await anyio.to_thread.run_sync(_read, [Upload("", body)], reader, limiter=limiter)
    raise HTTPException(415, f"{kind[:100]} is no type of images; {EXPECTED}")


async def _body(request: Request) -> bytes:
    """What the request sends; of too much only so much that it is known, the rest is let pass by."""
    parts, size = [], 0
    async for part in request.stream():
        if size <= MAX_BYTES:
            parts.append(part)
        size += len(part)
    return b"".join(parts)


async def _from_form(request: Request, body: bytes) -> list[Upload]:
    async def whole() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        form = await MultiPartParser(
            request.headers, whole(), max_files=MAX_IMAGES, max_fields=MAX_IMAGES, max_part_size=MAX_BYTES
        ).parse()
    except (MultiPartException, KeyError, ValueError, LookupError) as error:
        reason = getattr(error, "message", "it is damaged")
        raise HTTPException(400, f"not a readable form ({reason}); {EXPECTED}") from error
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    return [Upload(file.filename or "", await file.read()) for file in files]


def _read_json(body: bytes, reader: ImageReader) -> Images:
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise HTTPException(
            413, f"more than {MAX_VALUES:,} commas and brackets in JSON; send files, or several requests"
        )
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not readable as JSON; {EXPECTED}") from error
    items = content.get("images", [content["image"]] if "image" in content else None) if type(content) is dict else None
    if not isinstance(items, list):
        raise HTTPException(422, f"no images in the JSON; {EXPECTED}")
    uploads = []
    for item in items[: MAX_IMAGES + 1]:
        if isinstance(item, str):
            try:
                content = base64.b64decode(item.rpartition("base64,")[2], validate=True)
            except (binascii.Error, ValueError) as error:
                raise HTTPException(422, f"a text in the JSON is no base64; {EXPECTED}") from error
        elif isinstance(item, list):
            content = item
        else:
            raise HTTPException(422, f"{type(item).__name__} in the JSON is no image; {EXPECTED}")
        uploads.append(Upload("", content))
    return _read(uploads, reader)


def _read(uploads: list[Upload], reader: ImageReader) -> Images:
    if not uploads or not uploads[0].content:
        raise HTTPException(422, f"no image in the request; {EXPECTED}")
    if len(uploads) > MAX_IMAGES:
        raise HTTPException(413, f"more than {MAX_IMAGES:,} images in one request")
    read: list[tuple[np.ndarray, str]] = []
    for number, (name, content) in enumerate(uploads, 1):
        try:
            if isinstance(content, list):
                read.append((_pixels(content, (reader.channels, *reader.size)), ""))
            else:
                read.append(reader(io.BytesIO(content)))
        except ImageError as error:
            which = name[-100:] or (f"image {number}" if len(uploads) > 1 else "")
            raise HTTPException(422, f"{which}: {error}" if which else str(error)) from error
    return Images(np.stack([image for image, _ in read]), [u.name for u in uploads], [warning for _, warning in read])


def _pixels(values: list[Any], shape: tuple[int, int, int]) -> np.ndarray:
    """An array (H, W), (C, H, W) or (H, W, C) as an image uint8 (C, H, W) of the model's size."""
    channels, height, width = shape
    try:
        array = np.array(values)
    except ValueError:  # rows of several lengths
        array = np.empty(0)
    if array.shape == (height, width, channels):
        array = array.transpose(2, 0, 1)
    elif array.shape == (height, width) and channels == 1:
        array = array[None]
    if array.shape != shape or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise ImageError(
            f"an array must have the model's size, {' x '.join(map(str, shape))}, and whole numbers from 0 to 255; "
            "images of other sizes come as files"
        )
    return array.astype(np.uint8)
