"""Bytes on disk: download an archive, decode it without trusting it, keep a fast copy of it.

Nothing here trusts a file: no code runs out of a pickle, memory is bounded, and whatever is kept for
a later run is checked first and then renamed into place whole.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import pickletools
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import requests
import torch
from filelock import FileLock
from torch import Tensor

MAX_CLASSES = 1000  # a label beyond that is damage
MAX_DECODED_BYTES = 2**30  # MNIST decodes to 220 MB
# SHA-256 over MNIST's 70,000 images as uint8 (train, valid, test), then its labels as uint8: the same
# for every way in which the tutorial's archive may be compressed.
MNIST_DIGEST = "c2069063c1105f2bf96266aef1ff68c6e13bdda7a54e37bf19c16f1db24efc83"

HEADERS = {"Accept-Encoding": "identity"}  # a server might else send, and requests unpack, a gzip as such
ATTEMPTS = 3
BACK_OFF = 0.5  # seconds before the second attempt, twice that before the third


class ArchiveError(Exception):
    """A dataset cannot be had or is not what it should be; the message says which, why and what to do."""


class DownloadError(ArchiveError):
    """A dataset could not be downloaded."""


class Splits(NamedTuple):
    """A dataset: per split images uint8 (n, H, W), 0 is paper and 255 is ink, and labels int64 (n,)."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read_mnist(archive: Path) -> Splits:
    """Reads the tutorial's archive.

    Raises:
        ArchiveError: when the file is damaged or holds anything but MNIST.
    """
    splits = decode(archive)
    if content_digest(splits) != MNIST_DIGEST:
        raise ArchiveError(
            f"{archive}: a dataset, but not MNIST (content digest {content_digest(splits)}); delete it to "
            f"download MNIST, or use it as it is with --data.dataset={archive}"
        )
    return splits


def content_digest(splits: Splits) -> str:
    """SHA-256 over all images as uint8, then all labels as uint8, whatever file they came in."""
    digest = hashlib.sha256()
    for images, _ in splits:
        digest.update(images.contiguous().numpy().data)
    for _, labels in splits:
        digest.update(labels.to(torch.uint8).numpy().data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------ download


def download_mnist(url: str, archive: Path, timeout: float) -> None:
    """Downloads the tutorial's archive, unless it is there; of several processes one does.

    Args:
        url: where the archive is.
        archive: where it goes, once it is whole and known to hold MNIST.
        timeout: seconds to wait for the connection and then for each piece of the answer.

    Raises:
        DownloadError: when every attempt failed, or what came is not MNIST.
        ArchiveError: when the folder cannot be written.
    """
    with writing(archive.parent):
        if archive.exists():
            return
        with replacing(archive) as part:
            _download(url, part, timeout)
            try:
                read_mnist(part)
            except ArchiveError as error:
                raise DownloadError(
                    f"what came from {url} is not MNIST: {error.__cause__ or error}"
                ) from error


def _download(url: str, path: Path, timeout: float) -> None:
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACK_OFF * 2 ** (attempt - 1))
        try:
            with requests.get(url, stream=True, timeout=timeout, headers=HEADERS) as response:
                response.raise_for_status()
                _write_body(response, path)
            return
        except requests.RequestException as error:
            failure = error
            status = error.response.status_code if error.response is not None else None
            final = status is not None and status < 500 and status not in (408, 429)
            if final or isinstance(error, ValueError):  # ValueError: the address itself is wrong
                break
    raise DownloadError(f"{url} could not be downloaded: {_reason(failure)}")


def _write_body(response: requests.Response, path: Path) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    size = int(response.headers.get("Content-Length", 0))
    with Progress(*columns) as progress, path.open("wb") as file:
        task = progress.add_task("Downloading", total=size or None)
        for chunk in response.iter_content(1 << 16):
            progress.advance(task, file.write(chunk))


def _reason(error: requests.RequestException) -> str:
    """The few words of a requests error that a person can use."""
    if isinstance(error, requests.HTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut off half-way"
    if isinstance(error, requests.ConnectionError):
        if "Read timed out" in str(error):
            return "the server stopped sending half-way"
        return "no connection (is the network up? is the address right?)"
    return str(error)


# ------------------------------------------------------------------------------------------- decode


def decode(path: Path) -> Splits:
    """Reads and checks a dataset file.

    Args:
        path: a ``.pkl.gz`` in the tutorial's layout, a gzipped pickle of ``((x_train, y_train),
            (x_valid, y_valid), (x_test, y_test))``; or an ``.npz`` with ``x_train, y_train, x_valid,
            y_valid`` and, if there are any, ``x_test, y_test``. Images (n, H, W), (n, 1, H, W) or rows
            (n, H * H), as uint8 or as floats k/256 (the tutorial's) or k/255 with whole k; labels
            (n,), whole numbers from 0.

    Raises:
        ArchiveError: naming the file and what is wrong with it.
    """
    readers = {".gz": _read_pickle, ".npz": _read_npz}
    if path.suffix not in readers:
        raise ArchiveError(f"{path}: unknown kind of dataset file, expected .pkl.gz or .npz")
    try:
        arrays = readers[path.suffix](path)
        splits = [_tensors(name, *pair) for name, pair in zip(Splits._fields, arrays, strict=True)]
        sizes = {tuple(images.shape[1:]) for images, _ in splits if len(images)}
        if len(sizes) > 1:
            raise ValueError(f"images of one size in every split expected, found {sorted(sizes)}")
        return Splits(*splits)
    except PermissionError as error:
        raise ArchiveError(f"{path}: not allowed to read it") from error
    except Exception as error:  # hostile bytes can make gzip, zipfile and pickle raise just about anything
        raise ArchiveError(
            f"{path}: damaged, or not a dataset ({error or type(error).__name__}); "
            "replace the file, or delete it if it was downloaded and run again"
        ) from error


def _tensors(split: str, x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    """Checks one split's arrays and brings them into the form of ``Splits``."""
    if x.ndim == 2:
        side = round(x.shape[1] ** 0.5)
        if side * side != x.shape[1]:
            raise ValueError(f"{split}: rows of {x.shape[1]} pixels are no square images")
        x = x.reshape(-1, side, side)
    if x.ndim == 4 and x.shape[1] == 1:
        x = x[:, 0]
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise ValueError(f"{split}: images (n, H, W) or rows (n, H * H) expected, found shape {x.shape}")
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(f"{split}: {len(x)} whole-number labels expected, found {y.dtype} {y.shape}")
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
    """``x * scale`` as uint8, or None where that is not what x holds."""
    k = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), 500):  # parts that fit into the cache: four times as fast as the whole
        part = slice(start, start + 500)
        scaled = x[part] * x.dtype.type(scale)
        with np.errstate(invalid="ignore"):  # a pixel that does not fit fails the comparison
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
    from rich.console import Console
    from rich.progress import open as open_with_progress

    stream, console = io.BytesIO(), Console(stderr=True)
    quiet = not console.is_terminal
    reading = open_with_progress(path, "rb", description="Decoding", console=console, disable=quiet)
    with reading as raw, gzip.open(raw) as file:
        while chunk := file.read(1 << 20):
            _check_size(stream.tell() + len(chunk))
            stream.write(chunk)
    splits = _unpickle(stream)
    if [len(pair) for pair in splits] != [2, 2, 2]:
        raise ValueError("((x_train, y_train), (x_valid, y_valid), (x_test, y_test)) expected")
    return [(x.numpy(), y.numpy()) for x, y in splits]


def _check_size(size: int) -> None:
    if size > MAX_DECODED_BYTES:
        raise ValueError(f"it decodes to more than {MAX_DECODED_BYTES:,} bytes")


# What numpy arrays in tuples are written with. The rest is refused before anything is built: opcodes
# that make containers can nest or repeat until memory or the C stack ends, and one that stores at a
# large memo index makes the unpickler allocate for all the indices below it.
_OPCODES = frozenset(
    """PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE
    BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
    GLOBAL STACK_GLOBAL REDUCE BUILD BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET""".split()
)
_MAX_OPCODES = 1000  # the tutorial's archive has 142


def _unpickle(stream: io.BytesIO) -> Any:
    """Unpickles tuples of numpy arrays, which come back as stand-ins with a method ``numpy()``.

    Only the opcodes above are admitted, and no global is ever looked up: the names under which numpy
    writes an array (https://github.com/numpy/numpy/blob/main/numpy/_core/src/multiarray/methods.c,
    ``array_reduce``) get functions defined here, every other name is an error.
    """
    stream.seek(0)
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if opcode.name not in _OPCODES or count >= _MAX_OPCODES:
            raise ValueError("the pickle holds more than numpy arrays")
        if "BINPUT" in opcode.name and int(argument or 0) >= _MAX_OPCODES:
            raise ValueError("the pickle's memo index is out of bounds")

    class DType:
        def __init__(self, code: str | bytes, *_: object) -> None:
            self.code, self.order = _text(code), ""

        def __setstate__(self, state: tuple[Any, ...]) -> None:
            self.order = _text(state[1])

        def numpy(self) -> np.dtype:
            if not re.fullmatch(r"[iuf][1248]", self.code) or self.order not in ("", "|", "<", ">", "="):
                raise ValueError(f"the pickle holds an array of type {self.code[:20]!r}")
            return np.dtype(self.order.strip("|=") + self.code)

    class Array:
        def __setstate__(self, state: tuple[Any, ...]) -> None:
            _, self.shape, self.dtype, self.fortran, self.data = state

        def numpy(self) -> np.ndarray:
            data = self.data.encode("latin-1") if isinstance(self.data, str) else self.data
            array = np.frombuffer(data, self.dtype.numpy())
            if self.fortran:
                return array.reshape(self.shape[::-1]).T
            return array.reshape(self.shape)

    def reconstruct(*_: object) -> Array:
        return Array()

    def frombuffer(data: bytes, dtype: DType, shape: tuple[int, ...], order: str) -> Array:
        array = Array()
        array.__setstate__((1, shape, dtype, order == "F", data))
        return array

    def encode(text: str, _: str) -> bytes:
        return text.encode("latin-1")

    admitted: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): DType,
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): lambda: b"",  # how protocol 2 writes no bytes
    }
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        admitted[f"{core}.multiarray", "_reconstruct"] = reconstruct
        admitted[f"{core}.numeric", "_frombuffer"] = frombuffer

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) not in admitted:
                raise ValueError(f"the pickle asks for {module}.{name}, which is no part of a numpy array")
            return admitted[module, name]

    stream.seek(0)
    return Unpickler(stream, encoding="bytes").load()


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


# ---------------------------------------------------------------------------------------- fast copy


def cached(copy: Path, source: str, make: Callable[[], Splits]) -> tuple[Splits, str]:
    """A dataset from its fast copy, which is made first where there is none of this source.

    Args:
        copy: a file of uint8 tensors that opens in milliseconds, memory-mapped, so that processes share it.
        source: what the copy is of; a copy of something else is made anew.
        make: makes the dataset.

    Returns:
        the dataset and its content digest.

    Raises:
        ArchiveError: what ``make`` raises, or that the copy cannot be written.
    """
    found = _load(copy, source)
    if found is None:
        with writing(copy.parent):
            found = _load(copy, source)  # another process may have made it meanwhile
            if found is None:
                splits = make()
                digest = content_digest(splits)
                save({"source": source, "digest": digest, "splits": tuple(splits)}, copy)
                found = _load(copy, source)
    if found is None:
        raise ArchiveError(f"{copy} was written and does not read back; is the disk all right?")
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


def stamp(path: Path) -> str:
    """A ``source`` for ``cached`` that changes when the file at ``path`` does.

    Raises:
        ArchiveError: when there is no such file.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise ArchiveError(f"{path}: no such dataset file ({error.strerror})") from error
    return f"{path} {status.st_size} {status.st_mtime_ns}"


def save(content: Any, path: Path) -> None:
    """``torch.save`` of which a file comes whole or not at all.

    Raises:
        OSError: such as that the disk is full, which torch.save itself would hide in a RuntimeError.
    """
    data = io.BytesIO()
    torch.save(content, data)
    with replacing(path) as part:
        part.write_bytes(data.getbuffer())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hands out a temporary path; what is written there replaces ``path`` whole, or not at all."""
    part = path.with_name(f".part-{path.name}")  # the ending says what kind of file it is
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Makes ``folder`` and lets one process at a time write in it.

    Raises:
        ArchiveError: when the folder cannot be made or written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        raise ArchiveError(
            f"cannot write in the data folder {folder} ({error.strerror or error}); "
            "make room or make it writable, or choose another one with --data.data_dir"
        ) from error
