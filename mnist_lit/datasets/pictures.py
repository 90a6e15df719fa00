"""Pictures of single digits, brought into MNIST's form."""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mnist_lit.engine import UserError

# MNIST's form (https://yann.lecun.com/exdb/mnist): light on dark, the digit's longer side has 20 of 28 pixels, and its
# centre of mass is 0 to 1 pixel right of and below the middle.
SIDE, BOX = 28, 20
SMALL = 64  # pixels, shorter side; smaller pictures are not photos


def find_digit_size(images: Any) -> int:
    """Pixels of the longer side of the digits in images (n, C, H, W); 0 if they are not single digits as MNIST's."""
    if images.shape[1:] != (1, SIDE, SIDE):
        return 0
    sample = np.asarray(images[:: max(1, len(images) // 1000), 0], np.float32)  # (m, H, W)
    sample -= sample.min()
    drawn = sample > 0.2 * sample.max((1, 2), keepdims=True)  # blurred rims of strokes are not
    longer = np.maximum(drawn.any(1).sum(1), drawn.any(2).sum(1))
    drawn[:, 2:-2, 2:-2] = False  # what is left is on the margin
    size = int(np.median(longer))
    return size if ((abs(longer - size) <= 2) & ~drawn.any((1, 2))).mean() > 0.8 else 0


def fit_pictures(data: Mapping[str, Any]) -> Callable[[np.ndarray], tuple[np.ndarray, str]] | None:
    """What brings pictures of digits into MNIST's form.

    Args:
        data: hyperparameters of the data module: None is returned for an ``image_size`` without ``digit_size``.

    Returns:
        a function from pixels uint8 (1, H, W) to the image uint8 (1, 28, 28), and a warning if the digit may not be
        what is meant, or else "".
    """
    size = data.get("digit_size")
    if data.get("image_size") and not size:
        return None
    if find_spec("cv2") is None:
        warnings.warn("even scans of digits are read; photos after pip install 'mnist_lit[photos]'", stacklevel=2)
    return partial(_fit, size=size or BOX)


def _fit(pixels: np.ndarray, size: int) -> tuple[np.ndarray, str]:
    image = Image.fromarray(pixels[0])
    grey = np.asarray(image.reduce(math.ceil(max(image.size) / 400)), np.float32) / 255  # (H, W)
    ink, warning = _even_ink(grey), ""
    if min(grey.shape) >= SMALL and find_spec("cv2"):
        from mnist_lit.datasets.photos import find_digit  # OpenCV takes a while to import

        ink, warning = find_digit(grey, ink)
    elif min(grey.shape) >= SMALL:
        strokes = Image.fromarray(ink > 0.45).convert("L").filter(ImageFilter.MedianFilter(3))  # without specks
        ink = ink * (np.asarray(strokes.filter(ImageFilter.MaxFilter(5))) > 0)
    if not ink.any():
        raise UserError("nothing is on it")
    return _in_form(ink, size)[None], warning


def _even_ink(grey: np.ndarray) -> np.ndarray:
    """Ink float32 (H, W) in 0..1 on paper of one brightness, that of most of the edge; 0 where there is none."""
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = grey - np.median(edge)
    ink = np.maximum(ink if ink.max() > -ink.min() else -ink, 0)
    if ink.max() < 0.05:  # an empty paper's texture
        return np.zeros_like(ink)
    ink = ink / ink.max()
    # A small digit on even paper, as a training image is, keeps its palest pixels. Elsewhere they are noise.
    return ink * (ink > (0 if min(grey.shape) < SMALL and edge.min() == edge.max() else 0.15))


def _in_form(ink: np.ndarray, size: int) -> np.ndarray:
    """The ink float32 (H, W) in 0..1 as an image uint8 (28, 28), with its longer side of so many pixels."""
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(length * size / max(cut.shape))) for length in cut.shape)
    if (height, width) != cut.shape:
        cut = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
        cut = cut / cut.max()
    margins = []
    for axis, length in enumerate(cut.shape):
        mass = float(cut.sum(1 - axis) @ (np.arange(length) + 0.5) / cut.sum())
        before = min(max(math.ceil(SIDE / 2 - mass), 0), SIDE - length)  # the box stays inside the image
        margins.append((before, SIDE - length - before))
    return (np.pad(cut, margins) * 255).round().astype(np.uint8)
