"""Folders of image files, one for each class."""

import hashlib
import math
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from mnist_lit.engine.data.files import cached
from mnist_lit.engine.data.sources import Shape, Source, Splits, hold_out
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.images import Size, images_in, open_image
from mnist_lit.engine.threads import available_cpus

SPLITS = {"train": "train", "valid": "valid", "val": "valid", "validation": "valid", "test": "test"}
SAMPLE = 500  # images whose headers are looked at


def open_folder(
    root: Path, copy: Path, channels: int | None, size: Size | None, held_out: tuple[float, float, int], limit: float
) -> Source:
    """Find the image files of a folder, hold some out where it has no splits, and decode them if there is memory.

    Args:
        root: with a folder of images for each class, or with ``train`` and ``valid`` (or ``val``) and ``test``
            above the classes.
        copy: the fast copy of the decoded images.
        channels: 1 for grey, 3 for colour; by default grey only if all images are.
        size: height and width; by default that of the images.
        held_out: fractions of each class to validate and to test on, unless there are folders for that, and a seed.
        limit: GiB of decoded images; those of a larger folder stay in their files.

    Raises:
        UserError: if there are no images, they are of several sizes and none is given, or one cannot be read.
    """
    folders = {SPLITS[path.name.lower()]: path for path in _folders(root) if path.name.lower() in SPLITS}
    if "train" not in folders:
        folders = {"train": root}
    found = {split: {path.name: images_in(path) for path in _folders(folder)} for split, folder in folders.items()}
    names = [name for name, files in found["train"].items() if files]
    if not names:
        raise UserError(f"{root}: no images in folders of their own for each class, such as {root / 'cats' / '1.jpg'}")
    splits: Splits = {}
    for split, classes in found.items():
        files = [(label, path) for label, name in enumerate(names) for path in classes.get(name, [])]
        # An array and not a list, whose objects every worker would copy one by one as it looks at them.
        splits[split] = np.array([os.fsencode(path) for _, path in files]), torch.tensor([label for label, _ in files])
    paths = [os.fsdecode(path) for split, _ in splits.values() for path in split]
    valid, test, seed = held_out
    total = len(splits["train"][1])
    if "test" not in splits:  # folders of splits keep what they have to train on
        splits |= hold_out("test", *splits["train"], round(total * test) if len(folders) == 1 else 0, seed)
    if "valid" not in splits:
        splits |= hold_out("valid", *splits["train"], math.ceil(total * valid), seed)
    shape = _shape(paths, channels, size)
    # A copy of the folder elsewhere is the same dataset, though its files have other times.
    status = [os.lstat(path) for path in paths]
    listing = [f"{path[len(str(root)) :]} {each.st_size}" for path, each in zip(paths, status, strict=True)]
    source = Source(_digest(held_out, shape, *listing), splits, shape, "multiclass", names)
    if len(paths) * math.prod(shape) > limit * 2**30:
        return source
    fingerprint = f"{root} {source.digest} {_digest(*(each.st_mtime_ns for each in status))}"
    return cached(copy, fingerprint, lambda: source._replace(splits=_decode(source)))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _digest(*parts: object) -> str:
    return hashlib.sha256(os.fsencode("\n".join(map(str, parts)))).hexdigest()


def _shape(paths: list[str], channels: int | None, size: Size | None) -> Shape:
    """Find out channels, height and width where they are not given, from the headers of some images."""
    sizes, grey = {}, True
    for path in paths[:: math.ceil(len(paths) / SAMPLE)]:
        with open_image(path) as image:
            sizes[image.height, image.width] = path
            grey = grey and image.mode in ("1", "L", "LA", "I", "F", "I;16", "I;16B")
    if not size and len(sizes) > 1:
        (one, path), (other, path2), *_ = sizes.items()
        raise UserError(
            f"images of {len(sizes)} sizes, such as {one[0]} x {one[1]} ({path}) and {other[0]} x {other[1]} "
            f"({path2}); choose one with --data.image_size, such as --data.image_size=64"
        )
    return channels or (1 if grey else 3), *(size or next(iter(sizes)))


def _decode(source: Source) -> Splits:
    """Decode all images, on all processors."""
    splits: Splits = {}
    with ThreadPool(available_cpus()) as threads:  # Pillow decodes and scales without Python's lock
        for split, files in source.datasets.items():
            labels = source.splits[split][1]
            images = torch.empty(len(labels), *source.shape, dtype=torch.uint8)
            decoded = threads.imap(files.__getitem__, range(len(labels)), chunksize=50)
            bar = track(decoded, f"Decoding {split}", len(labels), transient=True, disable=len(labels) < 1000)
            for index, (image, _) in enumerate(bar):
                images[index] = image
            splits[split] = images, labels
    return splits
