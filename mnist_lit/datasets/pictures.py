"""Image files of single digits, brought into the form of a training set's images."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from mnist_lit.datasets.paper import edge_of
from mnist_lit.datasets.photos import find_digit
from mnist_lit.engine.errors import DatasetError
from mnist_lit.engine.images import FORMATS, SUFFIXES, File, ImageError, ImageReader, unreadable

MAX_PIXELS = 50_000_000
WORK_SIDE = 400  # pixels; a digit a fifth as high still has three times the pixels of MNIST's
NOISE = 0.15  # of full ink; compression and scanners leave less than that around the strokes


class PictureError(ImageError):
    """An image file in which no digit can be found; the message tells why."""


@dataclass(frozen=True)
class DigitForm:
    """How the digits of a training set lie in their images; the defaults are MNIST's.

    Attributes:
        side: pixels, height and width of the images.
        box: pixels, longer side of the digit.
        light_on_dark: whether the background is 0 and the ink 255, or the other way round.
        centred_by: what lies in the middle, the digit's centre of mass or its box.
    """

    side: int = 28
    box: int = 20
    light_on_dark: bool = True
    centred_by: Literal["mass", "box"] = "mass"


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
        side = DigitForm.side
        super().__init__({"channels": data.get("channels") or 1, "image_size": size or (side, side)})
        self.draws = self.form is not None

    def __call__(self, file: File) -> tuple[np.ndarray, str]:
        if self.form is None:
            return super().__call__(file)
        image, warning = read_picture(file, self.form)
        return image[None], warning


# --------------------------------------------------------------------------------------------------- finding files


def find_pictures(patterns: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Find image files by file, folder or pattern such as ``digits/*.png``, sorted within each.

    A folder stands for its images or, if it has none, for those of its subfolders, such as one for each class. What
    exists is taken literally, whatever characters are in its name. Files whose names start with a dot are ignored.

    Returns:
        the images, and the files of folders that were passed over because they have another suffix.

    Raises:
        DatasetError: naming the pattern that matches nothing.
    """
    found: list[Path] = []
    passed_over: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files, others = _in_folder(path)
            passed_over += others
        elif path.exists():
            files = [path]
        else:
            files = []
            for match in sorted(map(Path, glob.glob(pattern, recursive=True))):
                inner, others = _in_folder(match) if match.is_dir() else ([match], [])
                files += [file for file in inner if not file.name.startswith(".")]
                passed_over += others
        if not files:
            raise DatasetError(
                f"--data.images={pattern}: no such image; expected a file, a folder or a pattern of "
                f"{', '.join(SUFFIXES)} files"
            )
        found += files
    return list(dict.fromkeys(found)), list(dict.fromkeys(passed_over))


def _in_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and other files of a folder, or of its subfolders if it has no image itself."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    passed_over = [file for file in files if file.suffix.lower() not in SUFFIXES]
    if not found:
        for subfolder in (entry for entry in entries if entry.is_dir()):
            inner, others = _in_folder(subfolder)
            found += inner
            passed_over += others
    return found, passed_over


# --------------------------------------------------------------------------------------------------- reading one


def read_picture(file: File, form: DigitForm = DigitForm()) -> tuple[np.ndarray, str]:
    """Read one digit into a training set's form. MNIST's (https://yann.lecun.com/exdb/mnist) fills a box of 20 x 20
    pixels, placed in 28 x 28 so that the digit's centre of mass is in the middle.

    Args:
        file: an image of any size and mode; light on dark or dark on light, drawn, scanned or photographed.
        form: how the digit shall lie in its image.

    Returns:
        uint8 (side, side), and a warning if the digit may not be what is meant, or else "".

    Raises:
        PictureError: if the file is not an image, or nothing is on it.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            lossless = image.format not in ("JPEG", "WEBP")
            # A JPEG's decoder can leave out the finest detail, which saves most of the time and memory.
            image.draft(None, (WORK_SIDE, WORK_SIDE))
            grey = _grey(_reduced(ImageOps.exif_transpose(image)))
    except PictureError:
        raise
    except Exception as error:  # a damaged file can make Pillow's decoders raise just about anything
        raise PictureError(str(unreadable(error))) from error
    ink, warning = find_digit(grey)
    if ink is None:
        raise PictureError("nothing is on it")
    edge = edge_of(grey)
    clean = lossless and edge.min() == edge.max()
    return _in_form(ink, 0.0 if clean else NOISE, form), warning


def _reduced(image: Image.Image) -> Image.Image:
    """The image with a longer side of at most ``WORK_SIDE``. Areas are averaged, so that thin strokes survive."""
    factor = math.ceil(max(image.size) / WORK_SIDE)
    if factor == 1:
        return image
    if image.mode in ("1", "P", "PA"):  # cannot be averaged
        image = image.convert("RGBA")
    elif image.mode.startswith("I"):
        image = image.convert("F")
    return image.reduce(factor)


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


# --------------------------------------------------------------------------------------------------- the form


def _in_form(ink: np.ndarray, noise: float, form: DigitForm) -> np.ndarray:
    """The ink float32 (H, W) in 0..1 as an image uint8 (side, side); what is not above noise is cut off."""
    rows, columns = (np.flatnonzero((ink > noise).any(axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = cut.shape
    scale = form.box / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size != (width, height):
        resized = Image.fromarray(cut).resize(size, Image.Resampling.BICUBIC)
        cut = np.clip(np.asarray(resized), 0, 1)
        cut = cut / cut.max()
    if form.centred_by == "mass":
        # In MNIST's own images the centre of mass lies from 0 to 1 pixel right of and below the middle.
        centre = [float(cut.sum(1 - axis) @ (np.arange(cut.shape[axis]) + 0.5) / cut.sum()) for axis in (0, 1)]
        down, across = (math.ceil(form.side / 2 - place) for place in centre)
    else:
        down, across = ((form.side - length) // 2 for length in cut.shape)
    # The box stays inside the image, however far off centre the mass is.
    down, across = (
        min(max(shift, 0), form.side - length) for shift, length in zip((down, across), cut.shape, strict=True)
    )
    field = np.zeros((form.side, form.side), np.float32)
    field[down : down + cut.shape[0], across : across + cut.shape[1]] = cut
    if not form.light_on_dark:
        field = 1 - field
    return (field * 255).round().astype(np.uint8)
