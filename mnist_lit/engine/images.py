"""Image files as arrays of pixels. Without torch, so that what serves an ONNX file need not import it."""

from __future__ import annotations

import os
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")  # of Pillow's others, EPS starts a program
MAX_PIXELS = 100_000_000  # of one image; more is a bomb

Size = tuple[int, int]  # height, width
File = str | os.PathLike[str] | IO[bytes]


class ImageError(Exception):
    """An image file that cannot be read; the message tells why."""


def read_image(file: File, channels: int, size: Size | None = None) -> np.ndarray:
    """Read an image file.

    Args:
        file: of one of ``FORMATS`` and any mode; of several frames the first.
        channels: 1 for grey, 3 for colour.
        size: height and width. The image is scaled to cover it, and what is over is cut off evenly.

    Returns:
        uint8 (C, H, W). Transparent pixels are white.

    Raises:
        ImageError: if it is no image.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ImageError(f"{opened.width} x {opened.height} pixels are more than {MAX_PIXELS:,}")
            if size and opened.format == "JPEG":
                # Decodes 1/2, 1/4 or 1/8 of the pixels where that is still twice what is asked for.
                opened.draft(None, (2 * max(size), 2 * max(size)))
            image = _opaque(ImageOps.exif_transpose(opened)).convert("L" if channels == 1 else "RGB")
            if size and (image.height, image.width) != tuple(size):
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    except ImageError:
        raise
    except Exception as error:  # a damaged file can make Pillow's decoders raise just about anything
        raise unreadable(error) from error
    pixels = np.array(image).reshape(image.height, image.width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def unreadable(error: Exception) -> ImageError:
    """What is said of a file for which Pillow has raised this."""
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError("not a readable image (cannot identify image file)")  # Pillow would name an object in memory
    return ImageError(f"not a readable image ({str(error) or type(error).__name__})")


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits a pixel
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image


class ImageReader:
    """Reads images for a model that takes them as they are, only scaled. Called with a file it returns the image uint8
    (C, H, W), and a warning or "".

    Args:
        data: hyperparameters of the data module in the model's checkpoint, with ``channels`` and ``image_size``.
    """

    draws = False  # whether a digit that someone draws is such an image

    def __init__(self, data: dict[str, Any]) -> None:
        height, width = data["image_size"]
        self.channels, self.size = int(data["channels"]), (int(height), int(width))

    def __call__(self, file: File) -> tuple[np.ndarray, str]:
        return read_image(file, self.channels, self.size), ""
