"""How single digits lie in the images of a dataset, so that pictures to predict can be brought into the same form."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mnist_lit.datasets.pictures import DigitForm
from mnist_lit.engine.data.loaders import BatchTensorDataset

SAMPLE = 1000  # images to look at
EVEN = 8  # grey values by which a background may differ from black or white
SHARE = 0.95  # of the images that have to agree


def find_digit_form(dataset: Dataset) -> dict[str, Any] | None:
    """Find out whether images are of single digits in a common form, as MNIST's are, and in which.

    That is so if nearly all have an even background of black or white, and on it something whose longer side has
    the same length in all of them and that lies in the middle, by its centre of mass or by its bounding box.

    Args:
        dataset: of images uint8 (n, C, H, W), the training split.

    Returns:
        the arguments of ``DigitForm``, or None: pictures to predict are then only scaled.
    """
    if not isinstance(dataset, BatchTensorDataset):
        return None
    images = dataset.tensors[0]
    n, channels, height, width = images.shape
    if channels != 1 or height != width:
        return None
    sample = images[torch.linspace(0, n - 1, min(n, SAMPLE)).long(), 0].int()  # (m, H, W)
    edge = torch.cat([sample[:, 0], sample[:, -1], sample[:, :, 0], sample[:, :, -1]], 1)  # (m, 2 * (H + W))
    light_on_dark = bool(edge.float().mean() < 128)
    ink = sample if light_on_dark else 255 - sample
    edge = edge if light_on_dark else 255 - edge
    drawn = ink > ink.amax((1, 2), keepdim=True) * THRESHOLD
    rows, columns = drawn.any(2), drawn.any(1)  # (m, H), (m, W)
    sides = torch.maximum(_extent(rows), _extent(columns))
    box = int(sides.median())
    agree = (edge.amax(1) <= EVEN) & ((sides - box).abs() <= max(1, round(TOLERANCE * height)))
    if agree.float().mean() < SHARE or not SMALLEST * height <= box < height:
        return None
    off = {name: (place - height / 2).abs().mean() for name, place in _centres(ink, rows, columns).items()}
    by = min(off, key=lambda name: float(off[name]))
    if off[by] > CENTRED * height:
        return None
    return asdict(DigitForm(height, box, light_on_dark, "mass" if by == "mass" else "box"))


THRESHOLD = 0.2  # of the strongest stroke: blurred edges are not counted
TOLERANCE = 0.06  # of the side, by which the boxes may differ
SMALLEST = 0.2  # of the side, below which nothing is in the images
CENTRED = 0.04  # of the side, by which the centres may be off the middle on average


def _extent(occupied: Tensor) -> Tensor:
    """Length (m,) from the first to the last True of (m, n)."""
    places = torch.arange(occupied.shape[1])
    first = torch.where(occupied, places, occupied.shape[1]).amin(1)
    last = torch.where(occupied, places, -1).amax(1)
    return (last - first + 1).clamp(min=0)


def _centres(ink: Tensor, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Centres of mass and of the bounding box (m, 2), in pixels from the upper left corner."""
    places = torch.arange(ink.shape[1]) + 0.5
    weights = ink.sum((1, 2)).clamp(min=1)[:, None]
    mass = torch.stack([ink.sum(2).float() @ places, ink.sum(1).float() @ places], 1) / weights
    boxes = []
    for occupied in (rows, columns):
        first = torch.where(occupied, places, ink.shape[1]).amin(1)
        last = torch.where(occupied, places, 0).amax(1)
        boxes.append((first + last) / 2)
    return {"mass": mass, "box": torch.stack(boxes, 1)}
