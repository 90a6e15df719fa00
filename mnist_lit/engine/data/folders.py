"""Folders of image files, one for each class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from mnist_lit.engine.data.arrays import Arrays, Splits, stratified
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.images import FORMATS, SUFFIXES, ImageError, Size, read_image, unreadable
from mnist_lit.engine.threads import available_cpus

SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
NAMED = 5  # files in a message
BLOCK = 1000  # files that threads are given at a time

T = TypeVar("T")


class Format(NamedTuple):
    """The form to which image files are brought, each None for their own: channels; height and width."""

    channels: Any = None
    size: Any = None


class ImageFolder(NamedTuple):
    """The image files of a folder.

    Args:
        class_names: the folders of the classes.
        splits: ``train``, ``valid`` and ``test``: paths as bytes (n,), sorted by class and name, and labels int64 (n,).
        digest: of names and sizes, which are the same in a copy of the folder.
        fingerprint: of these, of the place and of the times of change.
    """

    class_names: list[str]
    splits: dict[str, tuple[np.ndarray, Tensor]]
    digest: str
    fingerprint: str

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
        UserError: if there are no images, the classes of two splits differ, or a file cannot be opened at all.
    """
    folders = {SPLITS[name.lower()]: path for name, path in _folders(root).items() if name.lower() in SPLITS}
    if "train" not in folders:
        folders = {"train": str(root)}
    found = {
        split: {name: images for name, inner in _folders(path).items() if (images := _images(inner))}
        for split, path in folders.items()
    }
    names = list(found["train"])
    if not names:
        raise UserError(
            f"{root}: no images ({', '.join(SUFFIXES)}) in folders of their own for each class, such as "
            f"{root / 'cats' / '1.jpg'}"
        )
    splits, listing, times = {}, [f"{valid} {test} {seed}"], []
    for split, classes in found.items():
        if unknown := classes.keys() - set(names):
            raise UserError(f"{folders[split]}: {min(unknown)} is not a class of {folders['train']}")
        files = [(label, entry) for label, name in enumerate(names) for entry in classes.get(name, [])]
        # An array and not a list, whose objects every worker would copy one by one as it looks at them.
        paths = np.array([os.fsencode(entry.path) for _, entry in files])
        splits[split] = paths, torch.tensor([label for label, _ in files])
        listing += [f"{entry.path[len(str(root)) :]} {entry.stat().st_size}" for _, entry in files]
        times += [str(entry.stat().st_mtime_ns) for _, entry in files]
    total = len(splits["train"][1])
    wanted = {"test": test} if len(folders) == 1 else {}
    for split, fraction in ({"valid": valid} | wanted if "valid" not in folders else wanted).items():
        paths, labels = splits["train"]
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        if fraction:
            chosen = stratified(labels, fraction * total / len(labels), seed)  # of those that are left
        splits["train"], splits[split] = (paths[~chosen], labels[~chosen]), (paths[chosen], labels[chosen])
    for split in Splits._fields:
        splits.setdefault(split, (splits["train"][0][:0], splits["train"][1][:0]))
    digest = _digest(listing)
    return ImageFolder(names, splits, digest, f"{root.resolve()} {digest} {_digest(times)}")


def _digest(lines: list[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _folders(folder: str | Path) -> dict[str, str]:
    return {entry.name: entry.path for entry in _entries(folder) if entry.is_dir()}


def _images(folder: str) -> list[os.DirEntry[str]]:
    """All image files below a folder, sorted by path."""
    found = []
    for entry in _entries(folder):
        if entry.is_dir():
            if entry.is_symlink():  # which may lead in a circle
                raise UserError(f"{entry.path}: a link to a folder below a class; only a class itself may be one")
            found += _images(entry.path)
        elif entry.name.lower().endswith(SUFFIXES):
            if not entry.is_file():
                raise UserError(f"{entry.path}: a link to nothing, a device or a pipe; expected an image file")
            found.append(entry)
    return sorted(found, key=lambda entry: entry.path)


def probe(path: str) -> Format:
    """Channels, height and width of an image file by its header.

    Raises:
        ImageError: if it is not an image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Photos may be turned by a quarter, according to their Exif orientation. Of a PNG it stands at the end.
            turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
            if image.mode == "P":
                grey = all(len(set(colour)) == 1 for colour in zip(*[iter(image.getpalette() or [])] * 3, strict=False))
            return Format(1 if grey else 3, (image.width, image.height) if turned else (image.height, image.width))
    except Exception as error:
        raise unreadable(error) from error


def find_format(folder: ImageFolder, form: Format) -> Format:
    """Find out channels and size of a folder's images, where they are not given: grey only if all images are.

    Raises:
        UserError: if the images are of several sizes and none is given, or some cannot be read.
    """
    if form.channels not in (None, 1, 3):
        raise UserError(f"--data.channels={form.channels}: image files have 1 channel (grey) or 3 (colour)")
    sizes: dict[Size, str] = {}
    grey = True
    for path, found in _each(probe, folder.paths, "Looking at images"):
        grey &= found.channels == 1
        sizes.setdefault(found.size, path)
    if not form.size and len(sizes) > 1:
        (one, path), (other, path2), *_ = sizes.items()
        raise UserError(
            f"images of {len(sizes)} sizes, such as {one[0]} x {one[1]} ({path}) and {other[0]} x {other[1]} "
            f"({path2}); choose one with --data.image_size, such as --data.image_size=64"
        )
    return Format(form.channels or (1 if grey else 3), form.size or next(iter(sizes)))


def decode_folder(folder: ImageFolder, form: Format) -> Arrays:
    """Decode all images of a folder, on all processors.

    Raises:
        UserError: naming the images that cannot be read.
    """
    images = torch.empty(len(folder.paths), form.channels, *form.size, dtype=torch.uint8)
    read = partial(read_image, channels=form.channels, size=form.size)
    for index, (_, pixels) in enumerate(_each(read, folder.paths, "Decoding images")):
        images[index] = torch.from_numpy(pixels)
    labels = [labels for _, labels in folder.splits.values()]
    parts = zip(images.split(list(map(len, labels))), labels, strict=True)
    splits = dict(zip(folder.splits, parts, strict=True))
    return Arrays(Splits(**splits), "multiclass", folder.class_names)


def _each(function: Callable[[str], T], paths: Sequence[str], what: str) -> Iterator[tuple[str, T]]:
    """Call a function with each path, on all processors, in order, with a progress bar where that takes time."""
    console, broken = Console(stderr=True), []

    def call(path: str) -> T | ImageError:
        try:
            return function(path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(available_cpus()) as threads:  # Pillow decodes and scales without Python's lock
        blocks = (paths[start : start + BLOCK] for start in range(0, len(paths), BLOCK))
        pairs = (pair for block in blocks for pair in zip(block, threads.map(call, block), strict=True))
        hidden = len(paths) <= BLOCK or not console.is_terminal
        for path, result in track(pairs, what, len(paths), console=console, disable=hidden, transient=True):
            if isinstance(result, ImageError):
                broken.append(f"{path}: {result}")
            else:
                yield path, result
    if broken:
        more = f" and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
        raise UserError(f"{'; '.join(broken[:NAMED])}{more}; delete or replace what cannot be read")


class ImageFiles(Dataset[tuple[Tensor, Tensor]]):
    """Image files that are read when they are asked for: a data loader's workers decode them.

    Args:
        paths: as bytes (n,).
        labels: int64 (n,).
        form: to which they are brought.
    """

    def __init__(self, paths: np.ndarray, labels: Tensor, form: Format) -> None:
        self.paths, self.labels, self.form = paths, labels, form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image uint8 (C, H, W) and label ().

        Raises:
            UserError: if the file cannot be read.
        """
        path = os.fsdecode(self.paths[index])
        try:
            return torch.from_numpy(read_image(path, *self.form)), self.labels[index]
        except ImageError as error:
            raise UserError(f"{path}: {error}; delete it, or replace it") from error
