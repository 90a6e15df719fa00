"""Arrays as people have them, read from files without trusting these, in one form, and with a fast copy."""

import gzip
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnist_lit.engine.data.sources import Source, Splits, Task, hold_out
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.storage import atomic_save, locked_directory

MAX_BYTES = 4 * 2**30  # of a decoded file
HELD_OUT = 1 / 6  # of the training images to validate on; the tutorial's are 10,000 of 60,000

Pair = tuple[np.ndarray, np.ndarray]


def read_dataset(path: Path, other: Callable[[bytes], Mapping[str, Pair]] | None = None) -> Mapping[str, Pair]:
    """Read a dataset file of up to 4 GiB, decoded. No code in it runs.

    Args:
        path: an ``.npz`` with ``x_train, y_train`` and optionally ``x_valid, y_valid, x_test, y_test``, as Keras' has.
        other: makes the same out of the bytes of any other file, gzipped or not.

    Returns:
        by ``train``, ``valid`` and ``test`` images and targets, as they are in the file.

    Raises:
        UserError: naming the file and what is wrong with it.

    Example:
        >>> x, y = read_dataset(Path("leaves.npz"))["train"]
    """
    try:
        with path.open("rb") as file:
            start = file.peek(2)[:2]
            if start == b"PK":
                arrays = np.load(file, allow_pickle=False)
                _check_size(sum(member.file_size for member in arrays.zip.infolist()))
                splits = [name for name in ("train", "valid", "test") if name == "train" or f"x_{name}" in arrays]
                expected = {f"{axis}_{split}" for split in splits for axis in "xy"}
                if set(arrays) != expected:
                    raise ValueError(f"arrays {sorted(expected)} expected, found {sorted(arrays)}")
                return {split: (arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in splits}
            if other is None:
                raise ValueError("not an .npz")
            content = (gzip.GzipFile(fileobj=file) if start == b"\x1f\x8b" else file).read(MAX_BYTES + 1)
        _check_size(len(content))
        return other(content)
    except Exception as error:  # hostile bytes can make gzip, zipfile and pickle raise almost anything
        raise UserError(
            f"{path}: damaged, or not a dataset ({error or type(error).__name__}); "
            "replace the file, or delete it if it was downloaded and run again"
        ) from error


def _check_size(number: int) -> None:
    if number > MAX_BYTES:
        raise ValueError(f"it decodes to more than {MAX_BYTES >> 30} GiB")


def cached(copy: Path, fingerprint: str, make: Callable[[], Source]) -> Source:
    """Open the fast copy of a dataset, and make it first if it is not there.

    Args:
        copy: a file of tensors that opens in milliseconds, memory-mapped, so that processes share it.
        fingerprint: identifies what it is made of; a copy of anything else is replaced.
        make: reads the dataset.
    """
    fingerprint = " ".join([fingerprint, *Source._fields])  # versions that know other fields make their own
    content = _load(copy, fingerprint)
    if content is None:
        with locked_directory(copy.parent):
            content = _load(copy, fingerprint)  # another process may have made it in the meantime
            if content is None:
                atomic_save({"source": fingerprint, "content": tuple(make())}, copy)  # plain, so that it loads safely
                content = _load(copy, fingerprint)
    return Source(*content)


def _load(copy: Path, fingerprint: str) -> Any:
    try:
        saved = torch.load(copy, mmap=True, weights_only=True)
        return saved["content"] if saved["source"] == fingerprint else None
    except Exception:  # there is none, or a damaged one, which can make torch.load raise just about anything
        return None


# ------------------------------------------------------------------------------------------------- one form


def make_arrays(pairs: Mapping[str, Pair]) -> Source:
    """Bring the arrays of each split into the form of ``Source``.

    Args:
        pairs: by ``train`` and optionally ``valid`` and ``test``. Images (n, H, W), (n, C, H, W), (n, H, W, C) with at
            most 4 channels, or rows (n, H * H), of any numbers; whole ones up to 255 become bytes. Targets (n,) of
            integers, texts or bool, or one-hot rows (n, K), are classes; 0 and 1 in (n, K) are labels; integers
            (n, H, W) are masks; other floats are values to regress on.

    Returns:
        the dataset. Without a validation split a sixth of the training images is held out, of each class evenly.

    Raises:
        UserError: saying what is wrong with an array.
    """
    for split, (x, y) in pairs.items():
        if not len(x) or len(x) != len(y):
            raise UserError(f"as many targets as images expected in the {split} split, found {len(y)} and {len(x)}")
    images = _images([_channels_first(x) for x, _ in pairs.values()])
    every, task, names = _targets(np.concatenate([y for _, y in pairs.values()]))
    targets = every.split([len(y) for _, y in pairs.values()])
    splits = dict(zip(pairs, zip(images, targets, strict=True), strict=True))
    pixels, labels = splits["train"]
    splits.setdefault("test", (pixels[:0], labels[:0]))
    if "valid" not in splits:
        splits |= hold_out("valid", pixels, labels, math.ceil(len(labels) * HELD_OUT))
    _, channels, height, width = pixels.shape
    return Source(_digest(splits), splits, (channels, height, width), task, names)


def _digest(splits: Splits) -> str:
    """SHA-256 over all images, then all targets, classes as uint8."""
    digest, names = hashlib.sha256(), ("train", "valid", "test")
    targets = [splits[name][1] for name in names]
    compact = [y if y.is_floating_point() else y.to(torch.uint8) for y in targets]
    for tensor in [*(splits[name][0] for name in names), *compact]:
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def _channels_first(x: np.ndarray) -> np.ndarray:
    if x.ndim == 2:
        side = round(x.shape[1] ** 0.5)
        x = x.reshape(-1, side, side)
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.shape[3] <= 4 and x.shape[3] < x.shape[1]:
        x = np.moveaxis(x, 3, 1)
    if x.ndim != 4 or 0 in x.shape or x.dtype.kind not in "biuf":
        expected = "images (n, H, W), (n, C, H, W), (n, H, W, C) or rows (n, H * H) of numbers expected"
        raise UserError(f"{expected}, found {x.dtype} {x.shape}")
    return x


def _images(arrays: list[np.ndarray]) -> list[Tensor]:
    """Bytes if all are whole numbers up to 255, but not floats up to 1; else floats of at most 32 bits."""
    if not all(np.isfinite(x).all() for x in arrays):
        raise UserError("finite pixels expected, found infinite ones or NaN")
    arrays = [x * np.uint8(255) if x.dtype == bool else x for x in arrays]
    if all(x.dtype.kind in "iu" for x in arrays) or max(x.max() for x in arrays) > 1:
        with np.errstate(invalid="ignore"):  # of what is out of range
            found = [np.array(x, np.uint8, order="C") for x in arrays]
        if all((k == x).all() for k, x in zip(found, arrays, strict=True)):
            return [torch.from_numpy(k) for k in found]
    kinds = [np.float16 if x.dtype == np.float16 else np.float32 for x in arrays]
    return [torch.from_numpy(np.array(x, kind, order="C")) for x, kind in zip(arrays, kinds, strict=True)]


def _targets(y: np.ndarray) -> tuple[Tensor, Task, list[str] | None]:
    """The targets of all splits, what they are, and the names of classes that are not 0, 1, ..."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in "biuf" and np.isin(y, (0, 1)).all():
        if (y.sum(1) == 1).all():  # one-hot
            return torch.from_numpy(y.argmax(1)), "multiclass", list(map(str, range(y.shape[1])))
        return torch.from_numpy(y.astype(np.float32)), "multilabel", None
    if y.dtype.kind == "f" and y.ndim <= 2:
        if not np.isfinite(y).all():
            raise UserError("finite targets expected, found infinite ones or NaN")
        return torch.from_numpy(y.astype(np.float32)), "regression", None
    if y.dtype.kind not in "biuUS" or y.ndim not in (1, 3):
        raise UserError(f"targets (n,), (n, K) of 0 and 1, or masks (n, H, W) expected, found {y.dtype} {y.shape}")
    values, classes = np.unique(y.astype(str) if y.dtype.kind == "S" else y, return_inverse=True)
    counted = values.dtype.kind in "iu" and values[0] == 0 and values[-1] == len(values) - 1
    return torch.from_numpy(classes.reshape(y.shape)), "multiclass", None if counted else list(map(str, values))
