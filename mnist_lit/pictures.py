"""Pictures: digits out of image files into MNIST's form, and sheets of digits for people to look at."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from mnist_lit.archive import ArchiveError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SIDE, BOX = 28, 20  # pixels
NOISE = 0.15  # of the strongest ink; compression and scanners leave less than that on the paper
MAX_PIXELS = 50_000_000


class PictureError(Exception):
    """An image file holds no digit that can be read; the message says why."""


def find_pictures(patterns: Iterable[str]) -> list[Path]:
    """Files, folders of files and patterns such as ``digits/*.png``, sorted within each.

    Raises:
        ArchiveError: naming the pattern that nothing fits.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        else:
            files = [path] if path.exists() else sorted(map(Path, glob.glob(pattern, recursive=True)))
        if not files:
            raise ArchiveError(
                f"--data.images={pattern}: no such image; expected a file, a folder or a pattern of "
                f"{', '.join(SUFFIXES)} files"
            )
        found += files
    return list(dict.fromkeys(found))


def read_picture(path: str | os.PathLike[str]) -> Tensor:
    """One digit in MNIST's form (https://yann.lecun.com/exdb/mnist): it fits into a box of 20 x 20 pixels,
    which lies in 28 x 28 with the digit's centre of mass in the middle.

    Args:
        path: a PNG, JPEG, BMP or WebP of any size and mode; light on dark or dark on light.

    Returns:
        uint8 (28, 28), 0 is paper and 255 is ink.

    Raises:
        PictureError: when the file is no image, or has nothing on it.
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
        raise PictureError(f"no image that can be read ({error or type(error).__name__})") from error
    edge = _edge(grey)
    clean = lossless and edge.min() == edge.max()
    return _in_mnist_form(_ink(grey), 0.0 if clean else NOISE)


def _grey(image: Image.Image) -> np.ndarray:
    """Brightness, float32 (H, W) in 0..1; what is transparent shows the paper that contrasts most."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel
        values = np.asarray(image, np.float32)
        return values / max(float(values.max()), 1.0)
    rgba = np.asarray(image.convert("RGBA"), np.float32) / 255  # (H, W, 4)
    brightness = rgba[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's L
    alpha = rgba[..., 3]
    drawn = float((brightness * alpha).sum() / max(float(alpha.sum()), 1e-6))
    paper = 1.0 if drawn < 0.5 else 0.0
    return brightness * alpha + paper * (1 - alpha)


def _ink(grey: np.ndarray) -> np.ndarray:
    """Ink, float32 (H, W): 0 is paper, 1 the strongest stroke. Most of the edge shows the paper."""
    difference = grey - np.median(_edge(grey))
    if -difference.min() > difference.max():
        difference = -difference
    strongest = float(difference.max())
    if strongest < 0.05:
        raise PictureError("nothing is on it")
    return np.clip(difference / (strongest if strongest < 0.95 else 1), 0, 1)


def _edge(grey: np.ndarray) -> np.ndarray:
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _in_mnist_form(ink: np.ndarray, noise: float) -> Tensor:
    rows, columns = (np.flatnonzero((ink > noise).any(axis)) for axis in (1, 0))
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
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
    # The box stays in the picture, however far from its middle the ink lies.
    down, across = (
        min(max(shift, 0), SIDE - length) for shift, length in zip((down, across), cut.shape, strict=True)
    )
    field = np.zeros((SIDE, SIDE), np.float32)
    field[down : down + cut.shape[0], across : across + cut.shape[1]] = cut
    return torch.from_numpy((field * 255).round().astype(np.uint8))


def contact_sheet(images: Tensor, captions: Sequence[str], columns: int = 10) -> Image.Image:
    """Images with a line of text under each.

    Args:
        images: uint8 (n, H, W), n > 0.
        captions: n texts of a dozen letters.
        columns: how many stand side by side.
    """
    width, height, margin = 84, 84, 16
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("L", (columns * width, rows * (height + margin)), 255)
    draw = ImageDraw.Draw(sheet)
    for place, (pixels, caption) in enumerate(zip(images.numpy(), captions, strict=True)):
        left, top = place % columns * width, place // columns * (height + margin)
        digit = Image.fromarray(255 - pixels).resize((width - 4, height - 4), Image.Resampling.NEAREST)
        sheet.paste(digit, (left + 2, top + 2))
        draw.text((left + width / 2, top + height + 6), caption, fill=0, anchor="mm")
    return sheet


def confusion_sheet(counts: Tensor) -> Image.Image:
    """A confusion matrix: a row for each true class, a column for each predicted one.

    Args:
        counts: int64 (n, n), how often a true class was predicted as each.
    """
    margin, number = 48, len(counts)
    cell = max(650 // number, 4)
    side = margin + number * cell
    # Of each row the shares; their square roots, so that rare mistakes show.
    shades = (counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt()  # (n, n) in 0..1
    pixels = (255 * (1 - shades)).round().to(torch.uint8).numpy()
    sheet = Image.new("L", (side, side), 255)
    sheet.paste(
        Image.fromarray(pixels).resize((number * cell,) * 2, Image.Resampling.NEAREST), (margin, margin)
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)

    def write(x: float, y: float, text: str, fill: int = 0) -> None:
        draw.text((x, y), text, fill, font, anchor="mm")

    write(margin + number * cell / 2, 12, "predicted")
    write(margin / 2, 12, "true")
    if cell < 20:
        return sheet  # no room for numbers
    centres = [margin + (place + 0.5) * cell for place in range(number)]
    for place, centre in enumerate(centres):
        write(centre, margin - 14, str(place))
        write(margin - 14, centre, str(place))
    for y, row, row_shades in zip(centres, counts.tolist(), shades.tolist(), strict=True):
        for x, count, shade in zip(centres, row, row_shades, strict=True):
            write(x, y, str(count), 255 if shade > 0.5 else 0)
    return sheet
