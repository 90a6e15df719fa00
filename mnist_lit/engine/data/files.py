"""Dataset files: read and checked without trusting them, with a fast copy for the next start.

No code runs out of a file, memory is bounded, and a copy that is kept is checked first.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import open as open_with_progress
from torch import Tensor

from mnist_lit.engine.data import idx
from mnist_lit.engine.errors import DatasetError
from mnist_lit.engine.storage import atomic_save, locked_directory
from mnist_lit.engine.threads import available_cpus

MAX_CLASSES = 1000  # a larger label is damage
MAX_DECODED_BYTES = 1_500_000_000  # MNIST decodes to 220 MB, pickled in protocol 0 to 1.2 GB
FORM = "images (n, C, H, W)"  # of fast copies; one of another form is made again
HELD_OUT = 1 / 6  # of the training images to validate on, as in the tutorial: 10,000 of 60,000

Pair = tuple[np.ndarray, np.ndarray]


class Splits(NamedTuple):
    """A dataset. Each split has images uint8 (n, C, H, W), C 1 or 3, and targets (n,): classes int64, or values
    float32.
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


def read_dataset(path: Path, other: Callable[[Path], Mapping[str, Pair]] | None = None) -> Splits:
    """Read a dataset file, or the folder of one, and check what is in it. Its kind is told by its content.

    Args:
        path: an ``.npz`` with ``x_train, y_train`` and optionally ``x_valid, y_valid, x_test, y_test``
            (Keras' has no ``valid``); or MNIST's four IDX files, by the first of them or by their folder
            (torchvision's). Images (n, H, W), (n, 1 or 3, H, W), (n, H, W, 1 or 3) or rows (n, H * H), as uint8 or
            as floats k/256 (the tutorial's) or k/255 with integer k. Targets (n,): integers from 0 are classes;
            floats, in an ``.npz``, are values to regress on.
        other: reads the arrays of each split from a file of another kind, which has classes; it may raise anything.

    Returns:
        the dataset. Without a validation split it is held out of the training images: the last sixth of them, as
        in the tutorial, or one of each class's images where the last sixth lacks a class.

    Raises:
        DatasetError: naming the file and what is wrong with it.
    """
    try:
        arrays, kinds = _read(path, other)
        splits = {name: _tensors(name, *pair, kinds) for name, pair in arrays.items()}
        if "valid" not in splits:
            splits["train"], splits["valid"] = _hold_out(*splits["train"])
        if "test" not in splits:
            splits["test"] = (splits["train"][0][:0], splits["train"][1][:0])
        if len({targets.dtype for images, targets in splits.values() if len(images)}) > 1:
            raise ValueError("targets of one type in every split expected, found integers and floats")
        sizes = {tuple(images.shape[1:]) for images, _ in splits.values() if len(images)}
        if len(sizes) > 1:
            raise ValueError(f"images of one size in every split expected, found {sorted(sizes)}")
        return Splits(**splits)
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
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = np.moveaxis(x, 3, 1)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape[1:]:
        raise ValueError(
            f"{split}: images (n, H, W), (n, H, W, 1 or 3), (n, 1 or 3, H, W) or rows (n, H * H) expected, "
            f"found shape {x.shape}"
        )
    if y.shape != (len(x),) or y.dtype.kind not in kinds:
        raise ValueError(f"{split}: {len(x)} whole-number labels expected, found {y.dtype} {y.shape}")
    images = torch.from_numpy(np.ascontiguousarray(_to_uint8(split, x)))
    if y.dtype.kind == "f":
        if not np.isfinite(y).all():
            raise ValueError(f"{split}: finite targets expected, found infinite ones or NaN")
        return images, torch.from_numpy(y.astype(np.float32))
    if len(y) and not (y.min() >= 0 and y.max() < MAX_CLASSES):
        raise ValueError(f"{split}: labels 0..{MAX_CLASSES - 1} expected, found {y.min()}..{y.max()}")
    return images, torch.from_numpy(y.astype(np.int64))


def _hold_out(images: Tensor, targets: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    held_out[len(targets) - int(len(targets) * HELD_OUT) :] = True
    if not targets.is_floating_point() and len(targets[held_out].unique()) < len(targets.unique()):
        held_out = stratified(targets, HELD_OUT)
    return (images[~held_out], targets[~held_out]), (images[held_out], targets[held_out])


def stratified(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Choose a fraction of each class at random, and at least one of each class that has two.

    Args:
        labels: int64 (n,).
        fraction: of each class.
        seed: of the choice.

    Returns:
        bool (n,), True for those chosen.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        places = (labels == label).nonzero()[:, 0]
        number = min(max(round(len(places) * fraction), 1), len(places) - 1)
        chosen[places[torch.randperm(len(places), generator=generator)[:number]]] = True
    return chosen


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


# By the first bytes of a file: what it is, where that is no dataset.
FOREIGN = {
    b"<": "HTML, not a gzip: the server sent a page",
    idx.MAGIC: "an IDX file: name it as it was published, with its three siblings beside it, and use "
    "--data.dataset=FOLDER",
    b"PK": "a ZIP archive: unpack it, and use --data.dataset=FOLDER",
    b"\xfd7zXZ": "an XZ archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it",
    b"\x93NUMPY": "a single array: put images and labels into one .npz with numpy.savez",
    b"\x89HDF": "an HDF5 file: put its arrays into an .npz with numpy.savez",
    b"\x89PNG": "an image: use --data.dataset=FOLDER of one folder of images per class",
    b"\xff\xd8": "an image: use --data.dataset=FOLDER of one folder of images per class",
    b"\x1f\x8b": "a gzip of a gzip: unpack it once",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: git lfs pull",
}


def _read(path: Path, other: Callable[[Path], Mapping[str, Pair]] | None) -> tuple[Mapping[str, Pair], str]:
    """The arrays of each split, and the kinds of numbers that its targets may be."""
    if (train := idx.find_idx(path)) is not None:
        return dict(zip(("train", "test"), idx.read_idx(train, read_bytes), strict=True)), "iu"
    if path.is_dir():
        raise ValueError("a folder with neither MNIST's IDX files nor a folder of images for each class")
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith(b"PK"):
        return _read_npz(path), "iuf"
    if other is not None:
        return other(path), "iu"
    check_kind(head)
    raise ValueError("neither an .npz nor an IDX file")


def _read_npz(path: Path) -> dict[str, Pair]:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if not all(member.filename.endswith(".npy") for member in archive.infolist()):
            raise ValueError(f"this is {FOREIGN[b'PK']}")
    _check_size(size)
    with np.load(path, allow_pickle=False) as arrays:
        splits = [name for name in Splits._fields if f"x_{name}" in arrays or f"y_{name}" in arrays or name == "train"]
        expected = [f"{axis}_{name}" for name in splits for axis in "xy"]
        if set(arrays) != set(expected):
            raise ValueError(f"arrays {sorted(expected)} expected, found {sorted(arrays)}")
        return {name: (arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in splits}


def read_bytes(path: Path) -> bytes:
    """The bytes of a file, decompressed if it is gzipped, with a progress bar if that takes time."""
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


def check_kind(head: bytes) -> None:
    """Raise a ValueError that says what a file is, if its first bytes are those of a well-known other kind."""
    for magic, kind in FOREIGN.items():
        if head.lstrip().startswith(magic) if magic == b"<" else head.startswith(magic):
            raise ValueError(f"this is {kind}")
    if head[257:262] == b"ustar":
        raise ValueError("this is a tar archive: unpack it, and use --data.dataset=FOLDER")


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
    source = f"{FORM} of {source}"
    found = _load(copy, source)
    if found is None:
        with locked_directory(copy.parent):
            found = _load(copy, source)  # another process may have made it in the meantime
            if found is None:
                splits = make()
                digest = content_digest(splits)
                content = {"source": source, "digest": digest, "splits": tuple(splits), "checksums": _checksums(splits)}
                atomic_save(content, copy)
                found = _load(copy, source)
    if found is None:
        raise DatasetError(f"{copy} was written and does not read back; is the disk all right?")
    return found


def _checksums(splits: Splits) -> list[int]:
    """Of every 16 MiB, which tell damage on all processors: SHA-256 takes several times as long."""
    tensors = [tensor.flatten().view(torch.uint8) for pair in splits for tensor in pair if len(tensor)]
    blocks = [block for tensor in tensors for block in tensor.split(1 << 24)]
    with ThreadPoolExecutor(available_cpus()) as threads:
        return list(threads.map(lambda block: zlib.crc32(block.numpy().data), blocks))


def _load(copy: Path, source: str) -> tuple[Splits, str] | None:
    try:
        saved = torch.load(copy, mmap=True, weights_only=True)
        splits = Splits(*saved["splits"])
        if saved["source"] != source:
            return None
        if saved["checksums"] != _checksums(splits):
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
        raise DatasetError(f"{path}: no such dataset ({error.strerror})") from error
    return f"{path} {status.st_size} {status.st_mtime_ns}"
