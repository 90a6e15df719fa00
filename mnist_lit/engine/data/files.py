"""Dataset files, read without trusting them: no code runs out of a file, and memory is bounded."""

from __future__ import annotations

import gzip
import math
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_lit.engine.data import idx
from mnist_lit.engine.data.arrays import Pair
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.storage import atomic_save, locked_directory

MAX_DECODED_BYTES = 4 * 2**30


def read_dataset(path: Path, other: Callable[[bytes], Mapping[str, Pair]] | None = None) -> Mapping[str, Pair]:
    """Read a dataset file, or the folder of one. Its kind is told by its content.

    Args:
        path: an ``.npz`` with ``x_train, y_train`` and optionally ``x_valid, y_valid, x_test, y_test`` (Keras' has no
            ``valid``); or MNIST's four IDX files, by the first of them or by their folder (torchvision's).
        other: makes the same out of the bytes of any other file, gzipped or not.

    Returns:
        by ``train``, ``valid`` and ``test`` images and targets, as they are in the file.

    Raises:
        UserError: naming the file and what is wrong with it.

    Example:
        >>> x, y = read_dataset(Path("leaves.npz"))["train"]
    """
    try:
        if found := idx.find_idx(path):
            if len(found) > 1:
                raise ValueError(f"several datasets, choose one: {', '.join(map(str, found))}")
            return idx.read_idx(found[0], read_bytes)
        if zipfile.is_zipfile(path):
            return _read_npz(path)
        if other is None:
            raise ValueError("neither an .npz nor an IDX file")
        return other(read_bytes(path))
    except Exception as error:  # hostile bytes can make gzip, zipfile and pickle raise just about anything
        raise UserError(
            f"{path}: damaged, or not a dataset ({error or type(error).__name__}); "
            "replace the file, or delete it if it was downloaded and run again"
        ) from error


def _read_npz(path: Path) -> dict[str, Pair]:
    with zipfile.ZipFile(path) as archive:
        check_size(sum(member.file_size for member in archive.infolist()))
        for name in archive.namelist():  # numpy allocates what the header says before it reads
            with archive.open(name) as file:
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
                check_size(math.prod(shape) * dtype.itemsize)
    with np.load(path, allow_pickle=False) as arrays:
        splits = [s for s in ("train", "valid", "test") if f"x_{s}" in arrays or f"y_{s}" in arrays or s == "train"]
        expected = [f"{axis}_{name}" for name in splits for axis in "xy"]
        if set(arrays) != set(expected):
            raise ValueError(f"arrays {sorted(expected)} expected, found {sorted(arrays)}")
        return {name: (arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in splits}


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed if it is gzipped.

    Raises:
        ValueError: if it is too large.
    """
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as file:
        content = file.read(MAX_DECODED_BYTES + 1)
    check_size(len(content))
    return content


def check_size(size: int) -> None:
    """Refuse what would take too much memory."""
    if size > MAX_DECODED_BYTES:
        raise ValueError(f"it decodes to more than {MAX_DECODED_BYTES:,} bytes")


def cached(copy: Path, source: str, make: Callable[[], Any]) -> Any:
    """Open what was made of a dataset, and make it first if it is not there.

    Args:
        copy: a file of tensors that opens in milliseconds, memory-mapped, so that processes share it.
        source: identifies what it was made of; a copy of anything else is replaced.
        make: returns tensors and plain values in tuples, lists and dicts.
    """
    found = _load(copy, source)
    if found is None:
        with locked_directory(copy.parent):
            found = _load(copy, source)  # another process may have made it in the meantime
            if found is None:
                atomic_save({"source": source, "content": make()}, copy)
                found = _load(copy, source)
    if found is None:
        raise UserError(f"{copy} was written and cannot be read back; check the disk")
    return found["content"]


def _load(copy: Path, source: str) -> dict[str, Any] | None:
    if not copy.exists():
        return None
    try:
        saved = torch.load(copy, mmap=True, weights_only=True)
        return saved if saved["source"] == source else None
    except Exception as error:  # a damaged file can make torch.load raise just about anything
        warnings.warn(f"{copy} is damaged and will be made again: {error}", stacklevel=2)
        return None
