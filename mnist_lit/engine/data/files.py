"""Dataset files, read without trusting them: no code runs out of a file, and memory is bounded."""

from __future__ import annotations

import gzip
import io
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import open as open_with_progress

from mnist_lit.engine.data import idx
from mnist_lit.engine.data.arrays import Arrays, Pair, make_arrays
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.storage import atomic_save, locked_directory

MAX_DECODED_BYTES = 4 * 2**30

FOREIGN = {  # what people name instead of a dataset, by its first bytes
    b"<": "HTML: the server sent a page",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: git lfs pull",
    b"\x93NUMPY": "a single array: put images and labels into one .npz with numpy.savez",
    b"\x89PNG": "an image: use --data.dataset=FOLDER of one folder of images per class",
    b"\xff\xd8": "an image: use --data.dataset=FOLDER of one folder of images per class",
}


def read_dataset(path: Path, other: Callable[[bytes], Mapping[str, Pair]] | None = None) -> Arrays:
    """Read a dataset file, or the folder of one. Its kind is told by its content.

    Args:
        path: an ``.npz`` with ``x_train, y_train`` and optionally ``x_valid, y_valid, x_test, y_test`` (Keras' has no
            ``valid``), of any arrays that ``make_arrays`` takes; or MNIST's four IDX files, by the first of them or by
            their folder (torchvision's).
        other: makes the arrays of each split out of the bytes of any other file, gzipped or not.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        pairs = _read(path, other)
    except PermissionError as error:
        raise UserError(f"{path}: not allowed to read it") from error
    except Exception as error:  # hostile bytes can make gzip, zipfile and pickle raise just about anything
        raise UserError(
            f"{path}: damaged, or not a dataset ({error or type(error).__name__}); "
            "replace the file, or delete it if it was downloaded and run again"
        ) from error
    try:
        return make_arrays(pairs)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _read(path: Path, other: Callable[[bytes], Mapping[str, Pair]] | None) -> Mapping[str, Pair]:
    if (train := idx.find_idx(path)) is not None:
        return idx.read_idx(train, read_bytes)
    with path.open("rb") as file:
        if file.read(2) == b"PK":
            return _read_npz(path)
    content = read_bytes(path)
    for magic, kind in FOREIGN.items():
        if content[:99].lstrip().startswith(magic):
            raise ValueError(f"this is {kind}")
    if other is None:
        raise ValueError("neither an .npz nor an IDX file")
    return other(content)


def _read_npz(path: Path) -> dict[str, Pair]:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if not all(member.filename.endswith(".npy") for member in members):
        raise ValueError("this is a ZIP archive: unpack it, and use --data.dataset=FOLDER")
    _check_size(sum(member.file_size for member in members))
    with np.load(path, allow_pickle=False) as arrays:
        splits = [s for s in ("train", "valid", "test") if f"x_{s}" in arrays or f"y_{s}" in arrays or s == "train"]
        expected = [f"{axis}_{name}" for name in splits for axis in "xy"]
        if set(arrays) != set(expected):
            raise ValueError(f"arrays {sorted(expected)} expected, found {sorted(arrays)}")
        return {name: (arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in splits}


def read_bytes(path: Path) -> bytes:
    """Read a file, decompressed if it is gzipped, with a progress bar if that takes time.

    Raises:
        ValueError: if it is too large.
    """
    console, content = Console(stderr=True), io.BytesIO()
    quiet = not console.is_terminal
    with open_with_progress(path, "rb", description="Decoding", console=console, disable=quiet) as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.open(raw) if zipped else nullcontext(raw) as file:
            while chunk := file.read(1 << 20):
                _check_size(content.tell() + len(chunk))
                content.write(chunk)
    return content.getvalue()


def _check_size(size: int) -> None:
    if size > MAX_DECODED_BYTES:
        raise ValueError(f"it decodes to more than {MAX_DECODED_BYTES:,} bytes")


def cached(copy: Path, source: str, make: Callable[[], Any]) -> Any:
    """Open what was made of a dataset, and make it first if it is not there.

    Args:
        copy: a file of tensors that opens in milliseconds, memory-mapped, so that processes share it.
        source: identifies what it was made of; a copy of anything else is replaced.
        make: returns tensors and plain values in tuples, lists and dicts.

    Raises:
        UserError: if ``make`` raises it, or if the copy cannot be written.
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
    try:
        saved = torch.load(copy, mmap=True, weights_only=True)
        return saved if saved["source"] == source else None
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can make torch.load raise just about anything
        warnings.warn(f"{copy} is damaged and will be made again: {error}", stacklevel=2)
        return None


def file_fingerprint(path: Path) -> str:
    """Identify the content of a file by its path, size and time of change, as a ``source`` for ``cached``.

    Raises:
        UserError: if there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: no such dataset ({error.strerror})") from error
    if not path.is_file():
        raise UserError(f"{path}: a device or a pipe; expected a file or a folder")
    return f"{path} {status.st_size} {status.st_mtime_ns}"
