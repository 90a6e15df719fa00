"""Image files as arrays of pixels. Without torch, so that what serves an ONNX file need not import it."""

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
    path = f"{file}: " if isinstance(file, (str, os.PathLike)) else ""
    try:
        if isinstance(file, (str, os.PathLike)) and not os.path.isfile(file):
            raise ValueError("a device, a pipe, or a link to nothing")
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except Image.UnidentifiedImageError as error:  # which would name an object in memory
        raise UserError(f"{path}not a readable image") from error
    except Exception as error:  # a damaged file can make Pillow's decoders raise just about anything
        raise UserError(f"{path}not a readable image ({error or type(error).__name__})") from error


def read_image(file: File, channels: int, size: Size | None = None) -> np.ndarray:
    """Read an image file.

    Args:
        file: of one of ``FORMATS`` and any mode; of several frames the first.
        channels: 1 for grey, 3 for colour.
        size: height and width. The image is scaled to cover it, and what is over is cut off evenly.

    Returns:
        uint8 (C, H, W). Transparent pixels are white.
    """
    with open_image(file) as opened:
        if size and opened.format == "JPEG":
            # Decodes 1/2, 1/4 or 1/8 of the pixels where that is still twice what is asked for.
            opened.draft(None, (2 * max(size), 2 * max(size)))
        ImageOps.exif_transpose(opened, in_place=True)
        image, mode = _opaque(opened), "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)  # which copies in any case
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


def find_images(patterns: Iterable[str]) -> list[Path]:
    """Find image files by file, folder or pattern such as ``digits/*.png``, sorted within each.

    A folder stands for all images in it and in its subfolders. What exists is taken literally, whatever characters are
    in its name. Raises ``UserError`` for a pattern that matches nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        files: list[Path] = []
        for match in [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True)):
            files += map(Path, images_in(match) if os.path.isdir(match) else [match])
        if not files:
            raise UserError(f"--data.images={pattern}: no such image; expected a file, a folder or a pattern of files")
        found += files
    return list(dict.fromkeys(found))


def images_in(folder: str | Path) -> list[str]:
    """All image files below a folder, sorted by path, without names that start with a dot. Links to other folders are
    not followed: they may be circles.
    """
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [os.path.join(parent, name) for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
    return sorted(found)
