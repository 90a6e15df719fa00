"""Image files as arrays of pixels. Without torch, so that what serves an ONNX file need not import it."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from mnist_lit.engine.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF")  # of Pillow's others, EPS starts a program
MAX_PIXELS = 100_000_000  # of one image; more is a bomb

Size = tuple[int, int]  # height, width
File = str | os.PathLike[str] | IO[bytes]
Fit = Callable[[np.ndarray], tuple[np.ndarray, str]]  # pixels (C, H, W) to the model's image (C, h, w), and a warning
FitPictures = Callable[[Mapping[str, Any]], Fit | None]  # for the hyperparameters of a model's data module


@contextmanager
def open_image(file: File) -> Iterator[Image.Image]:
    """Open an image file, of which so far only the header is read.

    Raises:
        UserError: if it cannot be read as an image, then or within the context.
    """
    path = os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""
    try:
        if path and not os.path.isfile(path):
            raise ValueError("a device, a pipe, or a link to nothing")
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            yield image
    except Exception as error:  # a damaged file can make Pillow's decoders raise just about anything
        # Pillow would name an object in memory.
        unknown = "cannot identify image file" if isinstance(error, Image.UnidentifiedImageError) else ""
        reason = f"not a readable image ({unknown or error or type(error).__name__})"
        raise UserError(f"{path}: {reason}" if path else reason) from error


def read_image(file: File, channels: int, size: Size | None = None) -> np.ndarray:
    """Read an image file.

    Args:
        file: of one of ``FORMATS`` and any mode; of several frames the first.
        channels: 1 for grey, 3 for colour.
        size: height and width. The image is scaled to cover it, and what is over is cut off evenly.

    Returns:
        uint8 (C, H, W). Transparent pixels are white.

    Raises:
        UserError: if it cannot be read as an image.
    """
    with open_image(file) as opened:
        if size and opened.format == "JPEG":
            # Decodes 1/2, 1/4 or 1/8 of the pixels where that is still twice what is asked for.
            opened.draft(None, (2 * max(size), 2 * max(size)))
        image = _opaque(ImageOps.exif_transpose(opened)).convert("L" if channels == 1 else "RGB")
        if size and (image.height, image.width) != tuple(size):
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.array(image).reshape(image.height, image.width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits a pixel
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image


def read_picture(file: File, channels: int, size: Size | None, fit: Fit | None) -> tuple[np.ndarray, str]:
    """Read an image file for a model, and a warning or "". ``fit`` brings it to the model's size, or it is scaled."""
    return fit(read_image(file, channels)) if fit else (read_image(file, channels, size), "")


def find_images(patterns: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Find image files by file, folder or pattern such as ``digits/*.png``, sorted within each.

    A folder stands for all images in it and in its subfolders. What exists is taken literally, whatever characters are
    in its name. Names that start with a dot are ignored.

    Returns:
        the images, and the files of folders that were passed over because they have another suffix.

    Raises:
        UserError: naming the pattern that matches nothing.
    """
    found: list[Path] = []
    passed_over: list[Path] = []
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        files = [Path(match) for match in matches if not Path(match).is_dir()]
        for folder in filter(os.path.isdir, matches):
            inside = sorted(path for path in Path(folder).rglob("*") if not path.is_dir())
            inside = [path for path in inside if not any(part[0] == "." for part in path.relative_to(folder).parts)]
            files += [path for path in inside if path.suffix.lower() in SUFFIXES]
            passed_over += [path for path in inside if path.suffix.lower() not in SUFFIXES]
        if not files:
            raise UserError(f"--data.images={pattern}: no such image; expected a file, a folder or a pattern of files")
        found += files
    return list(dict.fromkeys(found)), list(dict.fromkeys(passed_over))
