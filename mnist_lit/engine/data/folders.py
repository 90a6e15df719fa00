"""Folders of image files, one for each class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from mnist_lit.engine.data.arrays import Splits, stratified
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.images import SUFFIXES, Size, open_image, read_image
from mnist_lit.engine.threads import available_cpus

SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}

T = TypeVar("T")


class Format(NamedTuple):
    """The form to which image files are brought, each None for their own: channels; height and width."""

    channels: Any = None
    size: Any = None


class ImageFolder(NamedTuple):
    """The image files of a folder."""

    class_names: list[str]  # the folders of the classes
    splits: Splits  # paths as bytes (n,), sorted by class and name, and labels int64 (n,)
    digest: str  # of names and sizes, which are the same in a copy of the folder
    fingerprint: str  # of these, of the place and of the times of change

    @property
    def paths(self) -> list[str]:
        """Of all splits."""
        return [os.fsdecode(path) for paths, _ in self.splits.values() for path in paths]


def find_folder(root: Path, valid: float = 0.1, test: float = 0.1, seed: int = 0) -> ImageFolder:
    """Find the image files of a folder, and hold some out where it has no splits.

    Args:
        root: with a folder of images for each class, or with ``train`` and ``valid`` (or ``val``) and ``test``
            above the classes.
        valid: fraction of each class to validate on, unless there is a folder for that.
        test: fraction of each class to test on, unless there are folders of splits.
        seed: of the choice of those images.

    Raises:
        UserError: if there are no images, or the classes of two splits differ.
    """
    folders = {SPLITS[path.name.lower()]: path for path in _folders(root) if path.name.lower() in SPLITS}
    if "train" not in folders:
        folders = {"train": root}
    found = {split: {path.name: _images(path) for path in _folders(folder)} for split, folder in folders.items()}
    names = [name for name, files in found["train"].items() if files]
    if not names:
        raise UserError(
            f"{root}: no images ({', '.join(SUFFIXES)}) in folders of their own for each class, such as "
            f"{root / 'cats' / '1.jpg'}"
        )
    splits: Splits = {}
    listing, times = [f"{valid} {test} {seed}"], []
    for split, classes in found.items():
        if unknown := {name for name, files in classes.items() if files} - set(names):
            raise UserError(f"{folders[split]}: {min(unknown)} is not a class of {folders['train']}")
        files = [(label, path) for label, name in enumerate(names) for path in classes.get(name, [])]
        # An array and not a list, whose objects every worker would copy one by one as it looks at them.
        paths = np.array([os.fsencode(path) for _, path in files])
        splits[split] = paths, torch.tensor([label for label, _ in files])
        for _, path in files:
            status = os.lstat(path) if os.path.islink(path) else os.stat(path)
            listing.append(f"{path[len(str(root)) :]} {status.st_size}")
            times.append(str(status.st_mtime_ns))
    total = len(splits["train"][1])
    for split, fraction in (("valid", valid), ("test", test if len(folders) == 1 else 0)):
        if split not in splits:
            paths, labels = splits["train"]
            chosen = stratified(labels, fraction * total / len(labels), seed)  # of those that are left
            splits["train"], splits[split] = (paths[~chosen], labels[~chosen]), (paths[chosen], labels[chosen])
    digest = _digest(listing)
    splits = {split: splits[split] for split in ("train", "valid", "test")}
    return ImageFolder(names, splits, digest, f"{root.resolve()} {digest} {_digest(times)}")


def _digest(lines: list[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[str]:
    """All image files below a folder, sorted by path. Links to other folders are not followed: they may be circles."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{parent}/{name}" for name in names if name.lower().endswith(SUFFIXES) and name[0] != "."]
    return sorted(found)


def find_format(folder: ImageFolder, form: Format) -> Format:
    """Find out channels and size of a folder's images, where they are not given: grey only if all images are.

    Raises:
        UserError: if the images are of several sizes and none is given, or one cannot be read.
    """
    if form.channels not in (None, 1, 3):
        raise UserError(f"--data.channels={form.channels}: image files have 1 channel (grey) or 3 (colour)")
    paths = folder.paths
    found = list(_each(_probe, paths, "Looking at images"))
    sizes = {size: path for path, (_, size) in zip(paths, found, strict=True)}
    if not form.size and len(sizes) > 1:
        (one, path), (other, path2), *_ = sizes.items()
        raise UserError(
            f"images of {len(sizes)} sizes, such as {one[0]} x {one[1]} ({path}) and {other[0]} x {other[1]} "
            f"({path2}); choose one with --data.image_size, such as --data.image_size=64"
        )
    grey = all(grey for grey, _ in found)
    return Format(form.channels or (1 if grey else 3), form.size or next(iter(sizes)))


def _probe(path: str) -> tuple[bool, Size]:
    """Whether an image file is grey, and its height and width, by its header."""
    with open_image(path) as image:
        return image.mode in ("1", "L", "LA", "I", "F", "I;16", "I;16B"), (image.height, image.width)


def decode_folder(folder: ImageFolder, form: Format) -> Splits:
    """Decode all images of a folder, on all processors."""
    splits: Splits = {}
    for split, (paths, labels) in folder.splits.items():
        files = ImageFiles(paths, labels, form)
        images = torch.empty(len(paths), form.channels, *form.size, dtype=torch.uint8)
        for index, (image, _) in enumerate(_each(files.__getitem__, range(len(files)), f"Decoding {split} images")):
            images[index] = image
        splits[split] = images, labels
    return splits


def _each(function: Callable[[Any], T], items: Sequence[Any], what: str) -> Iterator[T]:
    """Call a function with each item, on all processors, in order, with a progress bar where that takes time."""
    console = Console(stderr=True)
    hidden = len(items) < 1000 or not console.is_terminal
    with ThreadPool(available_cpus()) as threads:  # Pillow decodes and scales without Python's lock
        results = threads.imap(function, items, chunksize=50)
        yield from track(results, what, len(items), console=console, disable=hidden, transient=True)


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files, by paths as bytes (n,) and labels int64 (n,), that a data loader's workers decode."""

    def __init__(self, paths: np.ndarray, labels: Tensor, form: Format) -> None:
        self.paths, self.labels, self.form = paths, labels, form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (C, H, W) and label ()."""
        return torch.from_numpy(read_image(os.fsdecode(self.paths[index]), *self.form)), self.labels[index]
