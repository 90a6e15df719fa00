"""An open dataset, by its path: from its fast copy, or from image files that are read as they are needed."""

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

from mnist_lit.engine.data import idx
from mnist_lit.engine.data.arrays import Arrays, Splits, Task, fold_of
from mnist_lit.engine.data.files import cached, file_fingerprint, read_dataset
from mnist_lit.engine.data.folders import Format, ImageFiles, ImageFolder, decode_folder, find_folder, find_format
from mnist_lit.engine.data.loaders import BatchTensorDataset
from mnist_lit.engine.errors import UserError

ANY = Format()


class Source(NamedTuple):
    """An open dataset.

    Args:
        name: of the dataset.
        digest: identifies its content.
        splits: ``train``, ``valid`` and ``test``: images (n, C, H, W) or paths of image files (n,), and targets as in
            ``Arrays``.
        form: channels, height and width of the images.
        task: what the targets are.
        class_names: of classes that are not 0, 1, ...
    """

    name: str
    digest: str
    splits: dict[str, tuple[Any, Tensor]]
    form: Format
    task: Task = "multiclass"
    class_names: list[str] | None = None

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
        """Validate on one of several folds of the training and validation images, and train on the others."""
        images, targets = zip(self.splits["train"], self.splits["valid"], strict=True)
        x, y = torch.cat(images) if isinstance(images[0], Tensor) else np.concatenate(images), torch.cat(targets)
        held_out = fold_of(y, folds, seed) == fold
        splits = {**self.splits, "train": (x[~held_out], y[~held_out]), "valid": (x[held_out], y[held_out])}
        return self._replace(splits=splits, digest=f"{self.digest} fold {fold} of {folds} by seed {seed}")


def open_arrays(name: str, copy: Path, source: str, make: Callable[[], Arrays]) -> Source:
    """Open a dataset in memory from its fast copy, and make the copy first if there is none of this source."""

    def content() -> Any:  # plain tuples, which load safely
        splits, task, class_names = make()
        return content_digest(splits), tuple(splits), task, class_names

    digest, splits, task, class_names = cached(copy, source, content)
    _, channels, height, width = splits[0][0].shape
    named = dict(zip(Splits._fields, splits, strict=True))
    return Source(name, digest, named, Format(channels, (height, width)), task, class_names)


def content_digest(splits: Splits) -> str:
    """SHA-256 over all images, then all targets, classes as uint8."""
    digest = hashlib.sha256()
    for images, _ in splits:
        digest.update(images.contiguous().numpy().data)
    for _, targets in splits:
        compact = targets if targets.is_floating_point() else targets.to(torch.uint8)
        digest.update(compact.contiguous().numpy().data)
    return digest.hexdigest()


def open_dataset(
    name: str,
    data_dir: Path,
    form: Format = ANY,
    held_out: tuple[float, float, int] = (0.1, 0.1, 0),
    memory_limit: float = 2.0,
    read: Callable[[Path], Arrays] = read_dataset,
) -> Source:
    """Open a dataset by its path, and make its fast copy first if there is none.

    Args:
        name: the path of a dataset file or of a folder.
        data_dir: of the fast copies.
        form: of the images of a folder, where it is not theirs.
        held_out: of a folder, see ``find_folder``.
        memory_limit: GiB of images of a folder, above which they stay in their files.
        read: reads a dataset file.

    Raises:
        UserError: if there is no such dataset, it is damaged, or its copy cannot be written.
    """
    path = Path(name).resolve()
    copy = data_dir / "copies" / f"{path.name}-{hashlib.sha256(bytes(path)).hexdigest()[:8]}.pt"
    try:
        train = idx.find_idx(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    if path.is_dir() and train is None:
        return _open_folder(name, find_folder(path, *held_out), copy, form, memory_limit)
    source = open_arrays(name, copy, file_fingerprint(train or path), lambda: read(path))
    return source._replace(class_names=idx.class_names(train)) if train else source


def _open_folder(name: str, folder: ImageFolder, copy: Path, form: Format, memory_limit: float) -> Source:
    channels, size = cached(  # for which every file has to be looked at
        copy.with_suffix(".form.pt"), f"{folder.fingerprint} {form}", lambda: tuple(find_format(folder, form))
    )
    form = Format(channels, size)
    digest = f"{folder.digest} {channels} {size}"
    if len(folder.paths) * channels * math.prod(size) <= memory_limit * 2**30:
        source = open_arrays(name, copy, f"{folder.fingerprint} {form}", lambda: decode_folder(folder, form))
        return source._replace(digest=digest)
    return Source(name, digest, folder.splits, form, "multiclass", folder.class_names)
