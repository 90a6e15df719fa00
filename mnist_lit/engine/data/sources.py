"""An open dataset: its splits, its folds, the names of its classes."""

import math
import os
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mnist_lit.engine.data.loaders import BatchTensorDataset
from mnist_lit.engine.images import read_image

Splits = dict[str, tuple[Any, Tensor]]  # by "train", "valid" and "test"; one that is missing has no samples
Task = Literal["multiclass", "multilabel", "regression"]
Shape = tuple[int, int, int]  # channels, height, width


class Source(NamedTuple):
    """An open dataset.

    Images are (n, C, H, W), uint8 where they are bytes, else floats; or paths of image files as bytes (n,). Targets
    are, by ``task``: classes from 0, int64 (n,) or masks (n, H, W); several labels, float32 (n, K) of 0 and 1; or
    values to regress on, float32 (n,) or (n, K).
    """

    digest: str  # identifies its content
    splits: Splits
    shape: Shape  # of the images
    task: Task = "multiclass"
    class_names: list[str] | None = None  # of classes that are not 0, 1, ...

    @property
    def datasets(self) -> dict[str, Dataset]:
        """The splits as ``BatchTensorDataset``, or as ``ImageFiles``."""
        return {
            split: BatchTensorDataset(x, y) if isinstance(x, Tensor) else ImageFiles(x, y, self.shape)
            for split, (x, y) in self.splits.items()
        }

    @property
    def num_classes(self) -> int:
        """Number of classes, labels or values."""
        if self.task != "multiclass":
            return math.prod(self.splits["train"][1].shape[1:])
        return max(len(self.class_names or ()), *(int(y.max()) + 1 for _, y in self.splits.values() if len(y)))

    def numbered(self, names: list[str]) -> "Source":
        """Number the classes by their places in a list of names that has all of theirs."""
        ours = self.class_names or list(map(str, range(self.num_classes)))
        numbers = torch.tensor([names.index(name) for name in ours])
        return self._replace(splits={split: (x, numbers[y]) for split, (x, y) in self.splits.items()})

    def fold(self, fold: int, folds: int, seed: int) -> "Source":
        """Validate on one of several folds of the training and validation images, each class evenly."""
        images, targets = zip(self.splits["train"], self.splits["valid"], strict=True)
        x, y = torch.cat(images) if isinstance(images[0], Tensor) else np.concatenate(images), torch.cat(targets)
        splits = {**self.splits, **split_off("valid", x, y, by_class(y, seed)[fold::folds])}
        return self._replace(splits=splits, digest=f"{self.digest} fold {fold} of {folds} by seed {seed}")


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files, by paths as bytes (n,) and labels int64 (n,), that a data loader's workers decode."""

    def __init__(self, paths: np.ndarray, labels: Tensor, shape: Shape) -> None:
        self.paths, self.labels, self.shape = paths, labels, shape

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (C, H, W) and label ()."""
        image = read_image(os.fsdecode(self.paths[index]), self.shape[0], self.shape[1:])
        return torch.from_numpy(image), self.labels[index]


def by_class(targets: Tensor, seed: int = 0) -> Tensor:
    """A random order of the samples (n,); if each is of one class, one class after the other."""
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    classes = targets.ndim == 1 and not targets.is_floating_point()
    return order[targets[order].argsort(stable=True)] if classes else order


def split_off(split: str, x: Any, y: Tensor, chosen: Tensor) -> Splits:
    """Split the chosen indices off the training images and their targets."""
    held_out = torch.zeros(len(y), dtype=torch.bool)
    held_out[chosen] = True
    return {"train": (x[~held_out], y[~held_out]), split: (x[held_out], y[held_out])}


def hold_out(split: str, x: Any, y: Tensor, number: int, seed: int = 0) -> Splits:
    """Split a number of samples off the training images, chosen at random and of each class evenly."""
    places = (torch.arange(number) + 0.5) * len(y) / max(number, 1)
    return split_off(split, x, y, by_class(y, seed)[places.long()])
