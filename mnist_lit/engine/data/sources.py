"""Any dataset by its name or path: opened from its fast copy, or read from its files as they are needed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mnist_lit.engine.data import idx
from mnist_lit.engine.data.files import Splits, cached, file_fingerprint, read_dataset
from mnist_lit.engine.data.folders import Format, ImageFiles, ImageFolder, Size, decode_folder, find_format
from mnist_lit.engine.data.loaders import BatchTensorDataset
from mnist_lit.engine.errors import DatasetError
from mnist_lit.engine.storage import atomic_write, locked_directory


class Source(NamedTuple):
    """An open dataset.

    ``datasets`` has ``train``, ``valid`` and ``test``, each a ``BatchTensorDataset`` of images uint8 (n, C, H, W) and
    targets (n,), or ``ImageFiles``; ``targets`` the same targets; ``image_size`` height and width.
    """

    name: str
    digest: str
    datasets: dict[str, Dataset]
    targets: dict[str, Tensor]
    channels: int
    image_size: Size
    class_names: list[str] | None = None


class FolderOptions(NamedTuple):
    """How folders of images are read, see ``MNISTDataModule``."""

    channels: int | None = None
    image_size: Size | None = None
    valid_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    memory_limit: float = 2.0  # GiB


def open_dataset(
    name: str, data_dir: Path, options: FolderOptions, read: Callable[[Path], Splits] = read_dataset
) -> Source:
    """Open a dataset, and make its fast copy first if there is none.

    Args:
        name: the path of a dataset file or of a folder.
        data_dir: of the fast copies.
        options: of a folder of images.
        read: reads a dataset file.

    Raises:
        DatasetError: if there is no such dataset, it is damaged, or its copy cannot be written.
    """
    path = Path(name).resolve()
    copy = data_dir / "copies" / f"{path.name}-{hashlib.sha256(bytes(path)).hexdigest()[:8]}.pt"
    train = _find_idx(path)
    if path.is_dir() and train is None:
        return _open_folder(name, path, copy, options)
    source = in_memory(name, *cached(copy, file_fingerprint(train or path), lambda: read(path)))
    return source._replace(class_names=idx.class_names(train)) if train else source


def _find_idx(path: Path) -> Path | None:
    try:
        return idx.find_idx(path)
    except ValueError as error:
        raise DatasetError(f"{path}: {error}") from error


def in_memory(name: str, splits: Splits, digest: str) -> Source:
    """Wrap a dataset in memory, whose content the digest identifies."""
    pairs = splits._asdict()
    datasets: dict[str, Dataset] = {split: BatchTensorDataset(*pair) for split, pair in pairs.items()}
    _, channels, height, width = splits.train[0].shape
    targets = {split: targets for split, (_, targets) in pairs.items()}
    return Source(name, digest, datasets, targets, channels, (height, width))


def _open_folder(name: str, path: Path, copy: Path, options: FolderOptions) -> Source:
    folder = ImageFolder(path, options.valid_fraction, options.test_fraction, options.split_seed)
    form = _format_of(folder, copy.with_suffix(".json"), options)
    size = sum(map(len, folder.files.values())) * form.channels * math.prod(form.size)
    digest = f"{folder.content} {form.channels} {form.size}"
    if size <= options.memory_limit * 2**30:
        splits, _ = cached(copy, f"{folder.fingerprint} {form}", lambda: decode_folder(folder, form))
        return in_memory(name, splits, digest)._replace(class_names=folder.class_names)
    datasets: dict[str, Dataset] = {split: ImageFiles(folder, split, form) for split in Splits._fields}
    empty = torch.empty(0, dtype=torch.int64)
    targets = {split: folder.labels.get(split, empty) for split in datasets}
    return Source(name, digest, datasets, targets, *form, folder.class_names)


def _format_of(folder: ImageFolder, note: Path, options: FolderOptions) -> Format:
    """Channels and size of a folder's images, noted for the next start because every file has to be looked at."""
    source = f"{folder.fingerprint} {options.channels} {options.image_size}"
    with locked_directory(note.parent):
        try:
            noted = json.loads(note.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            noted = {}
        if noted.get("source") != source:
            form, broken = find_format(folder, options.channels, options.image_size)
            noted = {"source": source, "channels": form.channels, "size": form.size, "broken": broken}
            with atomic_write(note) as part:
                part.write_text(json.dumps(noted), "utf-8")
    folder.leave_out(noted["broken"])
    return Format(noted["channels"], tuple(noted["size"]))
