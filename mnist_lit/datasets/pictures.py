"""Image files of single digits, brought into MNIST's form."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mnist_lit.datasets.folders import ImageError
from mnist_lit.engine.errors import DatasetError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SIDE, BOX = 28, 20  # pixels
NOISE = 0.15  # of the darkest stroke; compression and scanners leave less than that on the background
MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class DigitForm:
    side: int = 28
    box: int = 20
    light_on_dark: bool = True
    centred_by: str = "mass"


class PictureError(ImageError):
    """An image file in which no digit can be found; the message tells why."""


def find_pictures(patterns: Iterable[str]) -> list[Path]:
    """Find image files by file, folder or pattern such as ``digits/*.png``, sorted within each.

    Raises:
        DatasetError: naming the pattern that matches nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        else:
            files = [path] if path.exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not files:
            raise DatasetError(
                f"--data.images={pattern}: no such image; expected a file, a folder or a pattern of "
                f"{', '.join(SUFFIXES)} files"
            )
        found += files
    return list(dict.fromkeys(found))


def read_picture(path: str | os.PathLike[str], form: DigitForm = DigitForm()) -> tuple[Tensor, str]:
    """Read one digit into MNIST's form (https://yann.lecun.com/exdb/mnist): it fills a box of 20 x 20 pixels,
    placed in 28 x 28 so that the digit's centre of mass is in the middle.

    Args:
        path: a PNG, JPEG, BMP or WebP of any size and mode; light on dark or dark on light.

    Returns:
        uint8 (28, 28), 0 background and 255 foreground.

    Raises:
        PictureError: if the file is not an image, or nothing is on it.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            lossless = image.format not in ("JPEG", "WEBP")
            grey = _grey(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except Exception as error:  # a damaged file can make Pillow's decoders raise just about anything
        raise PictureError(f"not a readable image ({error or type(error).__name__})") from error
    edge = _edge(grey)
    clean = lossless and edge.min() == edge.max()
    return _in_mnist_form(_foreground(grey), 0.0 if clean else NOISE), ""


def _grey(image: Image.Image) -> np.ndarray:
    """Brightness float32 (H, W) in 0..1. Transparent pixels get the background of highest contrast."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel
        values = np.asarray(image, np.float32)
        return values / max(float(values.max()), 1.0)
    rgba = np.asarray(image.convert("RGBA"), np.float32) / 255  # (H, W, 4)
    brightness = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's L
    alpha = rgba[..., 3]
    drawn = float((brightness * alpha).sum() / max(float(alpha.sum()), 1e-6))
    background = 1.0 if drawn < 0.5 else 0.0
    return brightness * alpha + background * (1 - alpha)


def _foreground(grey: np.ndarray) -> np.ndarray:
    """Foreground float32 (H, W): 0 background, 1 the darkest stroke. Most of the edge is background."""
    difference = grey - np.median(_edge(grey))
    if -difference.min() > difference.max():
        difference = -difference
    strongest = float(difference.max())
    if strongest < 0.05:
        raise PictureError("nothing is on it")
    return np.clip(difference / (strongest if strongest < 0.95 else 1), 0, 1)


def _edge(grey: np.ndarray) -> np.ndarray:
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _in_mnist_form(foreground: np.ndarray, noise: float) -> Tensor:
    rows, columns = (np.flatnonzero((foreground > noise).any(axis)) for axis in (1, 0))
    cut = foreground[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = cut.shape
    scale = BOX / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        resized = Image.fromarray(cut).resize(size, Image.Resampling.BICUBIC)
        cut = np.clip(np.asarray(resized), 0, 1)
        cut = cut / cut.max()
    # In MNIST's own images the centre of mass lies from 0 to 1 pixel right of and below the middle.
    centre = [float(cut.sum(1 - axis) @ (np.arange(cut.shape[axis]) + 0.5) / cut.sum()) for axis in (0, 1)]
    down, across = (math.ceil(SIDE / 2 - place) for place in centre)
    # The box stays inside the image, however far off centre the mass is.
    down, across = (min(max(shift, 0), SIDE - length) for shift, length in zip((down, across), cut.shape, strict=True))
    field = np.zeros((SIDE, SIDE), np.float32)
    field[down : down + cut.shape[0], across : across + cut.shape[1]] = cut
    return torch.from_numpy((field * 255).round().astype(np.uint8))
