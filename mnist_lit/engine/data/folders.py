"""Folders of image files, one for each class."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import ExifTags, Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mnist_lit.engine.data.files import MAX_CLASSES, Splits, stratified
from mnist_lit.engine.errors import DatasetError
from mnist_lit.engine.images import FORMATS, SUFFIXES, ImageError, Size, read_image, unreadable
from mnist_lit.engine.threads import available_cpus

SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
NAMED = 5  # files in a message
BLOCK = 500  # files, fewer than which are quickly read without further processes

T = TypeVar("T")
File = tuple[str, int, int]  # path, bytes, time of change in nanoseconds


@dataclass
class ImageFolder:
    """The image files of a folder, by split and class.

    Args:
        root: with a folder of images for each class, or with ``train`` and ``valid`` (or ``val``) and ``test``
            above the classes.
        valid: fraction of each class to validate on, unless there is a folder for that.
        test: fraction of each class to test on, unless there are folders of splits.
        seed: of the choice of those images.

    Raises:
        DatasetError: if there are no images, or the classes of two splits differ.

    Example:
        >>> ImageFolder(Path("pets")).class_names
        ['cats', 'dogs']
    """

    root: Path
    valid: float = 0.1
    test: float = 0.1
    seed: int = 0
    class_names: list[str] = field(init=False)
    files: dict[str, list[str]] = field(init=False)  # by split, sorted by class and name
    labels: dict[str, Tensor] = field(init=False)  # int64 (n,)
    fingerprint: str = field(init=False)  # of names, sizes and times
    content: str = field(init=False)  # of names and sizes, which are the same in a copy of the folder

    def __post_init__(self) -> None:
        folders = {entry.name: entry.path for entry in _entries(self.root) if entry.is_dir()}
        splits = {SPLITS[name.lower()]: path for name, path in folders.items() if name.lower() in SPLITS}
        if "train" not in splits:
            splits = {"train": str(self.root)}
        listed = {split: dict(_classes(Path(path))) for split, path in splits.items()}
        self.class_names = list(listed["train"])
        if not self.class_names:
            raise DatasetError(
                f"{self.root}: no images ({', '.join(SUFFIXES)}) in folders of their own for each class, such as "
                f"{self.root / 'cats' / '1.jpg'}"
            )
        if len(self.class_names) > MAX_CLASSES:
            raise DatasetError(f"{self.root}: {len(self.class_names)} folders of classes are more than {MAX_CLASSES}")
        names, times, self.files, self.labels = [], [], {}, {}
        start = len(str(self.root))
        for split, classes in listed.items():
            if unknown := classes.keys() - set(self.class_names):
                raise DatasetError(f"{splits[split]}: {min(unknown)} is no class of {splits['train']}")
            self.files[split] = [path for found in classes.values() for path, _, _ in found]
            counts = torch.tensor([len(classes.get(name, ())) for name in self.class_names])
            self.labels[split] = torch.arange(len(counts)).repeat_interleave(counts)
            names += [f"{path[start:]} {size}" for found in classes.values() for path, size, _ in found]
            times += [str(time) for found in classes.values() for _, _, time in found]
        if splits == {"train": str(self.root)}:
            self._hold_out("test", self.test)
        if "valid" not in self.files:
            self._hold_out("valid", self.valid)
        settings = f"{self.valid} {self.test} {self.seed}"
        self.content = f"{_digest(names)} {settings}"
        self.fingerprint = f"{self.root.resolve()} {self.content} {_digest(times)}"

    def leave_out(self, broken: dict[str, str]) -> None:
        """Leave files out of all splits, with a warning that names them and why.

        Raises:
            DatasetError: if nothing is left of a split.
        """
        if not broken:
            return
        listed = [f"{path}: {reason}" for path, reason in list(broken.items())[:NAMED]]
        listed += [f"and {len(broken) - NAMED:,} more"] if len(broken) > NAMED else []
        for split, files in self.files.items():
            whole = [path not in broken for path in files]
            self.files[split] = list(compress(files, whole))
            self.labels[split] = self.labels[split][torch.tensor(whole, dtype=torch.bool)]
            if files and not any(whole):
                raise DatasetError(f"{self.root}: no image of the split {split} can be read; {listed[0]}")
        rank_zero_warn(f"{self.root}: files that cannot be read are left out ({len(broken):,}): {'; '.join(listed)}")

    def _hold_out(self, split: str, fraction: float) -> None:
        files, labels = self.files["train"], self.labels["train"]
        # A fraction of all images, of which some are held out already.
        fraction *= (len(files) + len(self.files.get("test", [])) * (split == "valid")) / max(len(files), 1)
        chosen = stratified(labels, fraction, self.seed) if fraction else torch.zeros(len(labels), dtype=torch.bool)
        for name, mask in ((split, chosen), ("train", ~chosen)):
            self.files[name] = list(compress(files, mask.tolist()))
            self.labels[name] = labels[mask]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def _classes(folder: Path) -> Iterator[tuple[str, list[File]]]:
    for entry in _entries(folder):
        if entry.is_dir() and (files := sorted(_images(entry.path))):
            yield entry.name, files


def _images(folder: str) -> Iterator[File]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES) and entry.is_file():
                status = entry.stat()
                yield entry.path, status.st_size, status.st_mtime_ns
            elif entry.is_dir():
                yield from _images(entry.path)


# ------------------------------------------------------------------------------------------------ decoding


def probe(path: str) -> tuple[int, Size]:
    """Channels, height and width of an image file by its header.

    Raises:
        ImageError: if it is no image.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # Photos may be turned by a quarter, according to their Exif orientation. Of a PNG it stands at the end.
            turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
            if image.mode == "P":
                grey = all(len(set(colour)) == 1 for colour in zip(*[iter(image.getpalette() or [])] * 3, strict=False))
            size = (image.width, image.height) if turned else (image.height, image.width)
            return 1 if grey else 3, size
    except Exception as error:
        raise unreadable(error) from error


class Format(NamedTuple):
    """The form to which all image files of a folder are brought: channels, height and width."""

    channels: int
    size: Size


def find_format(
    folder: ImageFolder, channels: int | None = None, size: Size | None = None
) -> tuple[Format, dict[str, str]]:
    """Find out channels and size of a folder's images.

    Args:
        folder: of the images.
        channels: 1 or 3; by default 1 if all images are grey.
        size: height and width; by default that of the images.

    Returns:
        the format, and the files that are no images by their headers, with the reason.

    Raises:
        DatasetError: if the images are of several sizes and none is given, or none can be read.
    """
    sizes: dict[Size, str] = {}
    grey, broken = True, {}
    paths = [path for files in folder.files.values() for path in files]
    for path, found in _each(probe, paths, "Looking at images"):
        if isinstance(found, ImageError):
            broken[path] = str(found)
        else:
            grey &= found[0] == 1
            sizes.setdefault(found[1], path)
    if not sizes:
        raise DatasetError(f"{folder.root}: no image can be read; {paths[0]}: {broken[paths[0]]}")
    if not size and len(sizes) > 1:
        (one, path), (other, path2), *_ = sizes.items()
        raise DatasetError(
            f"{folder.root}: images of {len(sizes)} sizes, such as {one[0]} x {one[1]} ({path}) and "
            f"{other[0]} x {other[1]} ({path2}); choose one with --data.image_size, such as --data.image_size=64"
        )
    return Format(channels or (1 if grey else 3), size or next(iter(sizes))), broken


class _Results(Dataset[Any]):
    """What a function returns for each path, or its ImageError."""

    def __init__(self, function: Callable[[str], Any], paths: Sequence[str]) -> None:
        self.function, self.paths = function, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.function(self.paths[index])
        except ImageError as error:
            return error


def _each(function: Callable[[str], T], paths: Sequence[str], what: str) -> Iterator[tuple[str, T | ImageError]]:
    """Call a function with each path, on all processors, in order, with a progress bar where that takes time."""
    long = len(paths) > BLOCK
    loader = DataLoader(
        _Results(function, paths),
        batch_size=32,
        collate_fn=list,
        num_workers=available_cpus() if long else 0,
        generator=torch.Generator(),  # otherwise it would draw from the model's random numbers
    )
    console = Console(stderr=True)
    results = (result for batch in loader for result in batch)
    shown = track(
        results, what, len(paths), console=console, disable=not (long and console.is_terminal), transient=True
    )
    yield from zip(paths, shown, strict=True)


def decode_folder(folder: ImageFolder, form: Format) -> Splits:
    """Decode all images of a folder, on all processors.

    Files that cannot be read are left out, with a warning that names them.

    Args:
        folder: of the images.
        form: to which they are brought.

    Raises:
        DatasetError: if no image of a split can be read.
    """
    paths = [path for files in folder.files.values() for path in files]
    images, broken = torch.empty(len(paths), form.channels, *form.size, dtype=torch.uint8), {}
    read = partial(read_image, channels=form.channels, size=form.size)
    for index, (path, pixels) in enumerate(_each(read, paths, "Decoding images")):
        if isinstance(pixels, ImageError):
            broken[path] = str(pixels)
        else:
            images[index] = torch.from_numpy(pixels)
    splits = dict(zip(folder.files, images.split([len(files) for files in folder.files.values()]), strict=True))
    if broken:
        for split, files in folder.files.items():
            splits[split] = splits[split][torch.tensor([path not in broken for path in files])]
        folder.leave_out(broken)
    empty = images[:0], torch.empty(0, dtype=torch.int64)
    pairs = {split: (images, folder.labels[split]) for split, images in splits.items()}
    return Splits(*(pairs.get(split, empty) for split in Splits._fields))


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files that are read when they are asked for: a data loader's workers decode them.

    Args:
        folder: of the images.
        split: ``train``, ``valid`` or ``test``.
        form: to which they are brought.
    """

    def __init__(self, folder: ImageFolder, split: str, form: Format) -> None:
        # Arrays and not lists, whose objects every worker would copy one by one as it looks at them.
        self.paths = np.array([os.fsencode(path) for path in folder.files.get(split, [])])
        self.labels = folder.labels.get(split, torch.empty(0, dtype=torch.int64))
        self.form = form

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image uint8 (C, H, W) and label.

        Raises:
            DatasetError: if the file cannot be read.
        """
        path = os.fsdecode(self.paths[index])
        try:
            image = read_image(path, self.form.channels, self.form.size)
            return torch.from_numpy(image), int(self.labels[index])
        except ImageError as error:
            raise DatasetError(f"{path}: {error}; delete it, or replace it") from error
