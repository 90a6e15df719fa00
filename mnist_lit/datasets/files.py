"""Dataset files: read and checked without trusting them, with a fast copy for the next start.

No code runs out of a file, memory is bounded, and a copy that is kept is checked first.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import open as open_with_progress
from torch import Tensor

from mnist_lit.datasets.pickles import unpickle_arrays
from mnist_lit.engine.errors import DatasetError
from mnist_lit.engine.storage import atomic_save, locked_directory

MAX_CLASSES = 1000  # a larger label is damage
MAX_DECODED_BYTES = 2**30  # MNIST decodes to 220 MB


class Splits(NamedTuple):
    """A dataset. Each split has images uint8 (n, H, W), 0 background and 255 foreground, and targets (n,):
    classes int64, or values float32.
    """

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def content_digest(splits: Splits) -> str:
    """SHA-256 over all images as uint8, then all classes as uint8 (values as float32), whatever the file."""
    digest = hashlib.sha256()
    for images, _ in splits:
        digest.update(images.contiguous().numpy().data)
    for _, targets in splits:
        compact = targets if targets.is_floating_point() else targets.to(torch.uint8)
        digest.update(compact.contiguous().numpy().data)
    return digest.hexdigest()


def read_dataset(path: Path) -> Splits:
    """Read a dataset file and check what is in it.

    Args:
        path: a ``.pkl.gz`` in the tutorial's layout, a gzipped pickle of ``((x_train, y_train),
            (x_valid, y_valid), (x_test, y_test))``; or an ``.npz`` with the arrays ``x_train, y_train,
            x_valid, y_valid`` and optionally ``x_test, y_test``. Images (n, H, W), (n, 1, H, W) or rows
            (n, H * H), as uint8 or as floats k/256 (the tutorial's) or k/255 with integer k. Targets (n,):
            integers from 0 are classes; floats, in an ``.npz``, are values to regress on.

    Raises:
        DatasetError: naming the file and what is wrong with it.
    """
    readers = {".gz": _read_pickle, ".npz": _read_npz}
    if path.suffix not in readers:
        raise DatasetError(f"{path}: unknown kind of dataset file, expected .pkl.gz or .npz")
    try:
        arrays = readers[path.suffix](path)
        kinds = "iuf" if path.suffix == ".npz" else "iu"  # the tutorial's layout has classes
        splits = [_tensors(name, *pair, kinds) for name, pair in zip(Splits._fields, arrays, strict=True)]
        if len({targets.dtype for images, targets in splits if len(images)}) > 1:
            raise ValueError("targets of one type in every split expected, found integers and floats")
        sizes = {tuple(images.shape[1:]) for images, _ in splits if len(images)}
        if len(sizes) > 1:
            raise ValueError(f"images of one size in every split expected, found {sorted(sizes)}")
        return Splits(*splits)
    except PermissionError as error:
        raise DatasetError(f"{path}: not allowed to read it") from error
    except Exception as error:  # hostile bytes can make gzip, zipfile and pickle raise just about anything
        raise DatasetError(
            f"{path}: damaged, or not a dataset ({error or type(error).__name__}); "
            "replace the file, or delete it if it was downloaded and run again"
        ) from error


def _tensors(split: str, x: np.ndarray, y: np.ndarray, kinds: str) -> tuple[Tensor, Tensor]:
    """Check the arrays of one split and bring them into the form of ``Splits``."""
    if x.ndim == 2:
        side = round(x.shape[1] ** 0.5)
        if side * side != x.shape[1]:
            raise ValueError(f"{split}: rows of {x.shape[1]} pixels are no square images")
        x = x.reshape(-1, side, side)
    if x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"{split}: images (n, H, W) or rows (n, H * H) expected, found shape {x.shape}")
    if y.shape != (len(x),) or y.dtype.kind not in kinds:
        raise ValueError(f"{split}: {len(x)} whole-number labels expected, found {y.dtype} {y.shape}")
    if y.dtype.kind == "f":
        if not np.isfinite(y).all():
            raise ValueError(f"{split}: finite targets expected, found infinite ones or NaN")
        return torch.from_numpy(_to_uint8(split, x)), torch.from_numpy(y.astype(np.float32))
    if len(y) and not (y.min() >= 0 and y.max() < MAX_CLASSES):
        raise ValueError(f"{split}: labels 0..{MAX_CLASSES - 1} expected, found {y.min()}..{y.max()}")
    return torch.from_numpy(_to_uint8(split, x)), torch.from_numpy(y.astype(np.int64))


def _to_uint8(split: str, x: np.ndarray) -> np.ndarray:
    if x.dtype == np.uint8:
        return x.copy()
    if x.dtype.kind == "f":
        for scale, tolerance in ((256, 0), (255, 1e-3)):
            k = _whole_multiples(x, scale, tolerance)
            if k is not None:
                return k
    raise ValueError(
        f"{split}: pixels as uint8, or as floats k/256 or k/255 with whole k in 0..255, expected; "
        f"found {x.dtype} from {x.min()} to {x.max()}"
    )


def _whole_multiples(x: np.ndarray, scale: int, tolerance: float) -> np.ndarray | None:
    """Return ``x * scale`` as uint8, or None if x holds anything but multiples of 1/scale."""
    k = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), 500):  # blocks that fit into the cache: four times as fast
        part = slice(start, start + 500)
        scaled = x[part] * x.dtype.type(scale)
        with np.errstate(invalid="ignore"):  # a pixel out of range fails the comparison
            k[part] = np.rint(scaled)
            if not (np.abs(scaled - k[part]) <= tolerance).all():
                return None
    return k


def _read_npz(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    _check_size(size)
    with np.load(path, allow_pickle=False) as arrays:
        names = [(f"x_{split}", f"y_{split}") for split in Splits._fields]
        if "x_test" not in arrays and "y_test" not in arrays:
            names = names[:2]
        expected = {name for pair in names for name in pair}
        if set(arrays) != expected:
            raise ValueError(f"arrays {sorted(expected)} expected, found {sorted(arrays)}")
        pairs = [(arrays[x], arrays[y]) for x, y in names]
    if len(pairs) == 2:
        pairs.append((pairs[0][0][:0], pairs[0][1][:0]))
    return pairs


def _read_pickle(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    stream, console = io.BytesIO(), Console(stderr=True)
    quiet = not console.is_terminal
    reading = open_with_progress(path, "rb", description="Decoding", console=console, disable=quiet)
    with reading as raw, gzip.open(raw) as file:
        while chunk := file.read(1 << 20):
            _check_size(stream.tell() + len(chunk))
            stream.write(chunk)
    splits = unpickle_arrays(stream)
    if [len(pair) for pair in splits] != [2, 2, 2]:
        raise ValueError("((x_train, y_train), (x_valid, y_valid), (x_test, y_test)) expected")
    return [(x.numpy(), y.numpy()) for x, y in splits]


def _check_size(size: int) -> None:
    if size > MAX_DECODED_BYTES:
        raise ValueError(f"it decodes to more than {MAX_DECODED_BYTES:,} bytes")


def cached(copy: Path, source: str, make: Callable[[], Splits]) -> tuple[Splits, str]:
    """Open a dataset's fast copy, and make the copy first if there is none of this source.

    Args:
        copy: a file of tensors that opens in milliseconds, memory-mapped, so that processes share it.
        source: identifies what was copied; a copy of anything else is replaced.
        make: reads the dataset.

    Returns:
        the dataset and its content digest.

    Raises:
        DatasetError: if ``make`` raises it, or if the copy cannot be written.
    """
    found = _load(copy, source)
    if found is None:
        with locked_directory(copy.parent):
            found = _load(copy, source)  # another process may have made it in the meantime
            if found is None:
                splits = make()
                digest = content_digest(splits)
                atomic_save({"source": source, "digest": digest, "splits": tuple(splits)}, copy)
                found = _load(copy, source)
    if found is None:
        raise DatasetError(f"{copy} was written and does not read back; is the disk all right?")
    return found


def _load(copy: Path, source: str) -> tuple[Splits, str] | None:
    try:
        saved = torch.load(copy, mmap=True, weights_only=True)
        splits = Splits(*saved["splits"])
        if saved["source"] != source:
            return None
        if saved["digest"] != content_digest(splits):
            raise ValueError("its content is not what was written")
        return splits, saved["digest"]
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file can make torch.load raise just about anything
        warnings.warn(f"{copy} is damaged and will be made again: {error}", stacklevel=2)
        return None


def file_fingerprint(path: Path) -> str:
    """Identify the content of a file by its path, size and time of change, as a ``source`` for ``cached``.

    Raises:
        DatasetError: if there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DatasetError(f"{path}: no such dataset file ({error.strerror})") from error
    return f"{path} {status.st_size} {status.st_mtime_ns}"
