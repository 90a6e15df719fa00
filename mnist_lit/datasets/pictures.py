"""Image files of single digits, brought into the form of a training set's images."""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageFilter

from mnist_lit.engine import ImageError, ImageReader, read_image

SIDE = 400  # pixels; a digit a fifth as high still has three times the pixels of MNIST's
SMALL = 64  # pixels, shorter side; smaller pictures are not photos
FAINTEST = 0.05  # contrast; fainter ink than that is not told from an empty paper's texture
INK = 0.45  # of full ink; smudges and shades have less
NOISE = 0.15  # of full ink; compression and scanners leave less than that around the strokes


class PictureError(ImageError):
    """An image file in which no digit can be found; the message tells why."""


@dataclass(frozen=True)
class DigitForm:
    """How the digits of a training set lie in their images: pixels of the side and of the digit's longer side, whether
    ink is 255 on 0, and what is in the middle, the centre of mass or the box. The defaults are MNIST's.
    """

    side: int = 28
    box: int = 20
    light_on_dark: bool = True
    centred_by: Literal["mass", "box"] = "mass"


def find_digit_form(dataset: Any) -> dict[str, Any] | None:
    """Find out whether images are of single digits in a common form, as MNIST's are, and in which.

    Args:
        dataset: the training split; its first tensor holds images uint8 (n, C, H, W).

    Returns:
        the arguments of ``DigitForm``, or None: pictures to predict are then only scaled.
    """
    images = dataset.tensors[0] if hasattr(dataset, "tensors") else np.empty((0, 0, 0, 0))
    n, channels, side, width = images.shape
    if channels != 1 or side != width:
        return None
    sample = np.asarray(images[:: max(1, n // 1000), 0], np.float32)  # (m, H, W)
    light_on_dark = bool(sample[:, [0, -1]].mean() < 128)
    sample = sample if light_on_dark else 255 - sample
    drawn = sample > 0.2 * sample.max((1, 2), keepdims=True)  # blurred rims of strokes are not
    places = np.arange(side) + 0.5
    extents: list[np.ndarray] = []
    centres: dict[str, list[np.ndarray]] = {"mass": [], "box": []}
    for axis in (1, 2):
        occupied = drawn.any(axis)  # (m, side)
        first, last = np.where(occupied, places, side).min(1), np.where(occupied, places, 0).max(1)
        extents.append(last - first + 1)
        centres["box"].append((first + last) / 2)
        centres["mass"].append(sample.sum(axis) @ places / np.maximum(sample.sum((1, 2)), 1))
    longer = np.maximum(*extents)  # (m,)
    box = int(np.median(longer))
    edge = np.maximum(sample[:, [0, -1]].max((1, 2)), sample[:, :, [0, -1]].max((1, 2)))
    alike = (edge <= 8) & (abs(longer - box) <= max(1, round(0.06 * side)))
    off = {name: float(abs(np.array(centre) - side / 2).mean()) for name, centre in centres.items()}
    by: Any = min(off, key=lambda name: off[name])
    if alike.mean() < 0.95 or not 0.2 * side <= box < side or off[by] > 0.04 * side:
        return None
    return asdict(DigitForm(side, box, light_on_dark, by))


class PictureReader(ImageReader):
    """Reads image files for a model: digits are brought into the form of its training images, all else is scaled.

    Args:
        data: hyperparameters of the data module in the model's checkpoint: ``channels``, ``image_size`` and
            ``digit_form``. Without a size it is MNIST's form.

    Example:
        >>> image, warning = PictureReader({})("seven.png")
        >>> image.shape
        (1, 28, 28)
    """

    def __init__(self, data: dict[str, Any]) -> None:
        size, form = data.get("image_size"), data.get("digit_form")
        self.form = DigitForm(**(form or {})) if form or not size else None
        size = size or (DigitForm.side, DigitForm.side)
        super().__init__({"channels": data.get("channels") or 1, "image_size": size})
        self.draws = self.form is not None
        if self.draws and find_spec("cv2") is None:
            extra = "pip install 'mnist_lit[photos]'"
            warnings.warn(
                f"digits are read from even scans and drawings; from photos as well after {extra}", stacklevel=2
            )

    def __call__(self, file: str | os.PathLike[str] | IO[bytes]) -> tuple[np.ndarray, str]:
        """Read uint8 (C, H, W), and a warning if the digit may not be what is meant, or else "".

        Raises:
            ImageError: if the file is not an image, or nothing is on it.
        """
        if self.form is None:
            return super().__call__(file)
        image = Image.fromarray(read_image(file, 1)[0])
        grey = np.asarray(image.reduce(math.ceil(max(image.size) / SIDE)), np.float32) / 255  # (H, W)
        ink, warning = _even_ink(grey), ""
        if min(grey.shape) >= SMALL and find_spec("cv2"):
            from mnist_lit.datasets.photos import find_digit  # OpenCV takes a while to import

            ink, warning = find_digit(grey, ink)
        elif min(grey.shape) >= SMALL:
            strokes = Image.fromarray(ink > INK).convert("L").filter(ImageFilter.MedianFilter(3))  # without specks
            ink = ink * (np.asarray(strokes.filter(ImageFilter.MaxFilter(5))) > 0)
        if not ink.any():
            raise PictureError("nothing is on it")
        return _in_form(ink, self.form)[None], warning


def _even_ink(grey: np.ndarray) -> np.ndarray:
    """Ink float32 (H, W) in 0..1 on paper of one brightness, that of most of the edge; 0 where there is none."""
    edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    ink = grey - np.median(edge)
    ink = np.maximum(ink if ink.max() > -ink.min() else -ink, 0)
    ink = ink / max(float(ink.max()), FAINTEST)
    # A small digit on even paper, as a training image is, keeps its palest pixels.
    return ink * (ink > (0 if min(grey.shape) < SMALL and edge.min() == edge.max() else NOISE)) * (ink.max() >= 1)


def _in_form(ink: np.ndarray, form: DigitForm) -> np.ndarray:
    """The ink float32 (H, W) in 0..1 as an image uint8 (side, side), as MNIST's digits were: in its middle is the
    centre of mass (https://yann.lecun.com/exdb/mnist), which is 0 to 1 pixel right of and below the middle.
    """
    rows, columns = (np.flatnonzero(ink.any(axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = form.box / max(cut.shape)
    height, width = (max(1, round(length * scale)) for length in cut.shape)
    if (height, width) != cut.shape:
        cut = np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
        cut = cut / cut.max()
    field = np.zeros((form.side, form.side), np.float32)
    corner = []
    for axis, length in enumerate(cut.shape):
        mass = float(cut.sum(1 - axis) @ (np.arange(length) + 0.5) / cut.sum())
        place = math.ceil(form.side / 2 - mass) if form.centred_by == "mass" else (form.side - length) // 2
        corner.append(min(max(place, 0), form.side - length))  # the box stays inside the image
    field[corner[0] : corner[0] + height, corner[1] : corner[1] + width] = cut
    return ((field if form.light_on_dark else 1 - field) * 255).round().astype(np.uint8)
