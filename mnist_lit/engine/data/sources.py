"""An open dataset: from its fast copy, or from image files that are read as they are needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mnist_lit.engine.data.arrays import Arrays, Splits, Task, are_classes
from mnist_lit.engine.data.files import cached
from mnist_lit.engine.data.folders import Format, ImageFiles, decode_folder, find_folder, find_format
from mnist_lit.engine.data.loaders import BatchTensorDataset
from mnist_lit.engine.errors import UserError


class Source(NamedTuple):
    """An open dataset."""

    digest: str  # identifies its content
    splits: Splits  # images (n, C, H, W) or paths of image files (n,), and targets as in Arrays
    form: Format  # channels, height and width of the images
    task: Task = "multiclass"
    class_names: list[str] | None = None  # of classes that are not 0, 1, ...

    @property
    def datasets(self) -> dict[str, Dataset]:
        """The splits as ``BatchTensorDataset``, or as ``ImageFiles``."""
        return {
            split: BatchTensorDataset(x, y) if isinstance(x, Tensor) else ImageFiles(x, y, self.form)
            for split, (x, y) in self.splits.items()
        }

    @property
    def num_classes(self) -> int:
        """Number of classes, labels or values."""
        if self.task != "multiclass":
            return math.prod(self.splits["train"][1].shape[1:])
        return max(len(self.class_names or ()), *(int(y.max()) + 1 for _, y in self.splits.values() if len(y)))

    def numbered(self, names: list[str]) -> Source:
        """Number the classes by their places in a list of names that has all of theirs."""
        ours = self.class_names or list(map(str, range(self.num_classes)))
        numbers = torch.tensor([names.index(name) for name in ours])
        return self._replace(splits={split: (x, numbers[y]) for split, (x, y) in self.splits.items()})

    def fold(self, fold: int, folds: int, seed: int) -> Source:
        """Validate on one of several folds of the training and validation images, each class evenly."""
        images, targets = zip(self.splits["train"], self.splits["valid"], strict=True)
        x, y = torch.cat(images) if isinstance(images[0], Tensor) else np.concatenate(images), torch.cat(targets)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        if are_classes(y):
            order = order[y[order].argsort(stable=True)]
        held_out = torch.zeros(len(y), dtype=torch.bool)
        held_out[order[fold::folds]] = True
        splits = {**self.splits, "train": (x[~held_out], y[~held_out]), "valid": (x[held_out], y[held_out])}
        return self._replace(splits=splits, digest=f"{self.digest} fold {fold} of {folds} by seed {seed}")


def open_arrays(copy: Path, fingerprint: str, make: Callable[[], Arrays]) -> Source:
    """Open a dataset in memory from its fast copy, and make the copy first if there is none of this fingerprint."""

    def content() -> tuple[str, tuple[Any, ...]]:
        arrays = make()
        return _content_digest(arrays.splits), tuple(arrays)  # a plain tuple, which loads safely

    digest, (splits, task, class_names) = cached(copy, fingerprint, content)
    _, channels, height, width = splits["train"][0].shape
    return Source(digest, splits, Format(channels, (height, width)), task, class_names)


def _content_digest(splits: Splits) -> str:
    """SHA-256 over all images, then all targets, classes as uint8."""
    digest = hashlib.sha256()
    for split in ("train", "valid", "test"):
        digest.update(splits[split][0].contiguous().numpy().data)
    for split in ("train", "valid", "test"):
        targets = splits[split][1]
        compact = targets if targets.is_floating_point() else targets.to(torch.uint8)
        digest.update(compact.contiguous().numpy().data)
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """Identify the content of a file, or of all files in a folder, by path, size and time of change."""
    if not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: no such dataset; expected a file or a folder, and no device or pipe")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return " ".join(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


def open_folder(
    root: Path, copy: Path, form: Format, held_out: tuple[float, float, int], memory_limit: float
) -> Source:
    """Open a folder of image files, which stay in their files if they would take more than ``memory_limit`` GiB."""
    folder = find_folder(root, *held_out)
    channels, size = cached(  # for which every file has to be looked at
        copy.with_suffix(".form.pt"), f"{folder.fingerprint} {form}", lambda: tuple(find_format(folder, form))
    )
    form, digest = Format(channels, size), f"{folder.digest} {channels} {size}"
    if len(folder.paths) * channels * math.prod(size) > memory_limit * 2**30:
        return Source(digest, folder.splits, form, "multiclass", folder.class_names)
    make = lambda: Arrays(decode_folder(folder, form), "multiclass", folder.class_names)  # noqa: E731
    return open_arrays(copy, f"{folder.fingerprint} {form}", make)._replace(digest=digest)
