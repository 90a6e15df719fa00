"""Pictures of single digits, brought into the form of a training set's images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mnist_lit.engine import UserError

SIDE = 400  # pixels; a digit a fifth as high still has three times the pixels of MNIST's
SMALL = 64  # pixels, shorter side; smaller pictures are not photos
FAINTEST = 0.05  # contrast; fainter ink than that is not told from an empty paper's texture
INK = 0.45  # of full ink; smudges and shades have less
NOISE = 0.15  # of full ink; compression and scanners leave less than that around the strokes

# How the digits of a training set lie in its images: pixels of the side and of the digit's longer side, whether ink is
# 255 on 0, and what is in the middle, the centre of "mass" or the "box".
MNIST_FORM: dict[str, Any] = {"side": 28, "box": 20, "light_on_dark": True, "centred_by": "mass"}


def find_digit_form(images: Any) -> dict[str, Any] | None:
    """Find out whether images are of single digits in a common form, as MNIST's are, and in which.

    Args:
        images: of the training split, uint8 (n, C, H, W).

    Returns:
        a form such as ``MNIST_FORM``, or None: pictures to predict are then only scaled.
    """
    if images.ndim != 4 or images.shape[1] != 1 or images.shape[2] != images.shape[3]:
        return None
    sample = np.asarray(images[:: max(1, len(images) // 1000), 0], np.float32)  # (m, H, W)
    side = sample.shape[1]
    light_on_dark = bool(sample[:, [0, -1]].mean() < 128)
    sample = sample if light_on_dark else 255 - sample
    drawn = sample > 0.2 * sample.max((1, 2), keepdims=True)  # blurred rims of strokes are not
    places = np.arange(side) + 0.5
    longer, off = np.zeros(len(sample)), {"mass": 0.0, "box": 0.0}
    for axis in (1, 2):
        occupied = drawn.any(axis)  # (m, side)
        first, last = np.where(occupied, places, side).min(1), np.where(occupied, places, 0).max(1)
        longer = np.maximum(longer, last - first + 1)
        mass = sample.sum(axis) @ places / np.maximum(sample.sum((1, 2)), 1)
        off["mass"] += abs(mass - side / 2).mean() / 2
        off["box"] += abs((first + last) / 2 - side / 2).mean() / 2
    box, by = int(np.median(longer)), min(off, key=off.__getitem__)
    edge = np.maximum(sample[:, [0, -1]].max((1, 2)), sample[:, :, [0, -1]].max((1, 2)))
    alike = (edge <= 8) & (abs(longer - box) <= max(1, round(0.06 * side)))
    if alike.mean() < 0.95 or not 0.2 * side <= box < side or off[by] > 0.04 * side:
        return None
    return {"side": side, "box": box, "light_on_dark": light_on_dark, "centred_by": by}


def fit_pictures(data: Mapping[str, Any]) -> Callable[[np.ndarray], tuple[np.ndarray, str]] | None:
    """What brings pictures of digits into the form of the training images.

    Args:
        data: hyperparameters of the data module: ``digit_form``, or at least ``image_size`` for data of another kind.
            Without both it is MNIST's form.

    Returns:
        a function from pixels uint8 (1, H, W) to the image uint8 (1, side, side), and a warning if the digit may not be
        what is meant, or else ""; None if the training images are not of digits.

    Example:
        >>> image, warning = fit_pictures({})(pixels)
    """
    if data.get("image_size") and not data.get("digit_form"):
        return None
    if find_spec("cv2") is None:
        extra = "pip install 'mnist_lit[photos]'"
        warnings.warn(f"digits are read from even scans and drawings; from photos as well after {extra}", stacklevel=2)
    return partial(_fit, data.get("digit_form") or MNIST_FORM)


def _fit(form: dict[str, Any], pixels: np.ndarray) -> tuple[np.ndarray, str]:
    image = Image.fromarray(pixels[0])
    grey = np.asarray(image.reduce(math.ceil(max(image.size) / SIDE)), np.float32) / 255  # (H, W)
    ink, warning = _even_ink(grey), ""
    if min(grey.shape) >= SMALL and find_spec("cv2"):
        from mnist_lit.datasets.photos import find_digit  # OpenCV takes a while to import

        ink, warning = find_digit(grey, ink)
    elif min(grey.shape) >= SMALL:
        strokes = Image.fromarray(ink > INK).convert("L").filter(ImageFilter.MedianFilter(3))  # without specks
        ink = ink * (np.asarray(strokes.filter(ImageFilter.MaxFilter(5))) > 0)
    if not ink.any():
        raise UserError("nothing is on it")
    return _in_form(ink, **form)[None], warning


def _even_ink(grey: np.ndarray) -> np.ndarray:
    """Ink float32 (H, W) in 0..1 on paper of one brightness, that of most of the edge; 0 where there is none."""
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = grey - np.median(edge)
    ink = np.maximum(ink if ink.max() > -ink.min() else -ink, 0)
    ink = ink / max(float(ink.max()), FAINTEST)
    # A small digit on even paper, as a training image is, keeps its palest pixels.
    return ink * (ink > (0 if min(grey.shape) < SMALL and edge.min() == edge.max() else NOISE)) * (ink.max() >= 1)


def _in_form(ink: np.ndarray, side: int, box: int, light_on_dark: bool, centred_by: str) -> np.ndarray:
    """The ink float32 (H, W) in 0..1 as an image uint8 (side, side), as MNIST's digits were: in its middle is the
    centre of mass (https://yann.lecun.com/exdb/mnist), which is 0 to 1 pixel right of and below the middle.
    """
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = box / max(cut.shape)
    height, width = (max(1, round(length * scale)) for length in cut.shape)
    if (height, width) != cut.shape:
        cut = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
        cut = cut / cut.max()
    field, corner = np.zeros((side, side), np.float32), []
    for axis, length in enumerate(cut.shape):
        mass = float(cut.sum(1 - axis) @ (np.arange(length) + 0.5) / cut.sum())
        place = math.ceil(side / 2 - mass) if centred_by == "mass" else (side - length) // 2
        corner.append(min(max(place, 0), side - length))  # the box stays inside the image
    field[corner[0] : corner[0] + height, corner[1] : corner[1] + width] = cut
    return ((field if light_on_dark else 1 - field) * 255).round().astype(np.uint8)
