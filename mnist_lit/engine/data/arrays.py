"""Arrays as people have them, brought into one form: images (n, C, H, W), and classes, labels or values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 1 / 6  # of the training images to validate on, as in the tutorial: 10,000 of 60,000

Pair = tuple[np.ndarray, np.ndarray]
Splits = dict[str, tuple[Any, Tensor]]  # by "train", "valid" and "test"; one that is missing has no samples
Task = Literal["multiclass", "multilabel", "regression"]


class Arrays(NamedTuple):
    """A dataset in memory.

    Images are (n, C, H, W), uint8 where they are bytes, else floats. Targets are, by ``task``: classes from 0, int64
    (n,) or masks (n, H, W); several labels, float32 (n, K) of 0 and 1; or values to regress on, float32 (n,) or
    (n, K). Classes that are not 0, 1, ... have ``class_names``.
    """

    splits: Splits
    task: Task = "multiclass"
    class_names: list[str] | None = None


def make_arrays(pairs: Mapping[str, Pair]) -> Arrays:
    """Bring the arrays of each split into the form of ``Arrays``.

    Args:
        pairs: by ``train`` and optionally ``valid`` and ``test``. Images (n, H, W), (n, C, H, W), (n, H, W, C) with at
            most 4 channels, or rows (n, H * H), of any numbers. Floats that are k/256 (the tutorial's), k/255 or k with
            whole k in 0..255 become bytes. Targets (n,) of integers, texts or bool, or one-hot rows (n, K), are
            classes; 0 and 1 in (n, K) are labels; integers (n, H, W) are masks; other floats are values to regress on.

    Returns:
        the dataset. Without a validation split it is held out of the training images: the last sixth of them, as
        in the tutorial, or one of each class's images where the last sixth lacks a class.

    Raises:
        ValueError: saying what is wrong with an array.
    """
    for split, (x, y) in pairs.items():
        if not len(x) or len(x) != len(y):
            raise ValueError(f"as many targets as images expected in the {split} split, found {len(y)} and {len(x)}")
    images = _images({split: _channels_first(x) for split, (x, _) in pairs.items()})
    every, task, names = _targets(np.concatenate([y for _, y in pairs.values()]))
    targets = every.split([len(y) for _, y in pairs.values()])
    splits = dict(zip(pairs, zip(images, targets, strict=True), strict=True))
    pixels, labels = splits["train"]
    splits.setdefault("test", (pixels[:0], labels[:0]))
    if "valid" not in splits:
        held_out = torch.arange(len(labels)) >= len(labels) - int(len(labels) * HELD_OUT)
        if are_classes(labels) and len(labels[held_out].unique()) < len(labels.unique()):
            held_out = stratified(labels, HELD_OUT)
        splits |= {"train": (pixels[~held_out], labels[~held_out]), "valid": (pixels[held_out], labels[held_out])}
    return Arrays(splits, task, names)


def _channels_first(x: np.ndarray) -> np.ndarray:
    if x.ndim == 2:
        side = round(x.shape[1] ** 0.5)
        x = x.reshape(-1, side, side)
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.shape[3] <= 4 and x.shape[3] < x.shape[1]:
        x = np.moveaxis(x, 3, 1)
    if x.ndim != 4 or 0 in x.shape or x.dtype.kind not in "biuf":
        raise ValueError(
            f"images (n, H, W), (n, C, H, W), (n, H, W, C) or rows (n, H * H) of numbers expected, found {x.dtype} "
            f"{x.shape}"
        )
    return x


def _images(arrays: dict[str, np.ndarray]) -> list[Tensor]:
    """Bytes if all splits are whole multiples of the same fraction, else floats of at most 32 bits."""
    for scale, tolerance in ((256, 0), (255, 1e-3), (1, 0)):
        found = [_bytes(x, scale, tolerance) for x in arrays.values()]
        if all(k is not None for k in found):
            return [torch.from_numpy(k) for k in found]
    images = []
    for split, x in arrays.items():
        if not np.isfinite(x).all():
            raise ValueError(f"finite pixels expected in the {split} split, found infinite ones or NaN")
        dtype = x.dtype.newbyteorder("=") if x.dtype in (np.float16, np.float32) else np.float32
        images.append(torch.from_numpy(np.array(x, dtype, order="C")))
    return images


def _bytes(x: np.ndarray, scale: int, tolerance: float) -> np.ndarray | None:
    """Return ``x * scale`` as uint8, or None if that is not whole numbers in 0..255; integers are what they are."""
    if x.dtype == np.uint8:
        return np.array(x, order="C")
    if x.dtype.kind in "iu":
        scale = 1
    k = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), 500):  # blocks that fit into the cache: four times as fast
        part = slice(start, start + 500)
        scaled = x[part] * (x.dtype.type(scale) if x.dtype.kind == "f" else scale)
        with np.errstate(invalid="ignore"):  # a pixel out of range fails the comparison
            k[part] = np.rint(scaled)
            if not (np.abs(scaled - k[part].astype(np.float32)) <= tolerance).all():
                return None
    return k


def _targets(y: np.ndarray) -> tuple[Tensor, Task, list[str] | None]:
    """The targets of all splits, what they are, and the names of classes that are not 0, 1, ..."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in "biuf" and np.isin(y, (0, 1)).all():
        if (y.sum(1) == 1).all():  # one-hot
            return torch.from_numpy(y.argmax(1)), "multiclass", list(map(str, range(y.shape[1])))
        return torch.from_numpy(y.astype(np.float32)), "multilabel", None
    if y.dtype.kind == "f" and y.ndim <= 2:
        if not np.isfinite(y).all():
            raise ValueError("finite targets expected, found infinite ones or NaN")
        return torch.from_numpy(y.astype(np.float32)), "regression", None
    if y.dtype.kind not in "biuUS" or y.ndim not in (1, 3):
        raise ValueError(f"targets (n,), (n, K) of 0 and 1, or masks (n, H, W) expected, found {y.dtype} {y.shape}")
    values, classes = np.unique(y.astype(str) if y.dtype.kind == "S" else y, return_inverse=True)
    counted = values.dtype.kind in "iu" and values[0] == 0 and values[-1] == len(values) - 1
    return torch.from_numpy(classes.reshape(y.shape)), "multiclass", None if counted else list(map(str, values))


def are_classes(targets: Tensor) -> bool:
    """Whether each sample is of one class."""
    return targets.ndim == 1 and not targets.is_floating_point()


def stratified(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Choose a fraction of each class of labels (n,) at random, and at least one of each class that has two.

    Returns:
        bool (n,), True for those chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique() if fraction else []:
        places = (labels == label).nonzero()[:, 0]
        number = min(max(round(len(places) * fraction), 1), len(places) - 1)
        chosen[places[torch.randperm(len(places), generator=generator)[:number]]] = True
    return chosen
