"""Dataset files, read without trusting them, and their fast copies."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_lit.engine.data.arrays import Pair
from mnist_lit.engine.data.sources import Source
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.storage import atomic_save, locked_directory


def read_dataset(path: Path, other: Callable[[bytes], Mapping[str, Pair]] | None = None) -> Mapping[str, Pair]:
    """Read a dataset file. No code runs out of it.

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
        if zipfile.is_zipfile(path):
            with np.load(path, allow_pickle=False) as arrays:
                splits = [name for name in ("train", "valid", "test") if name == "train" or f"x_{name}" in arrays]
                expected = {f"{axis}_{split}" for split in splits for axis in "xy"}
                if set(arrays) != expected:
                    raise ValueError(f"arrays {sorted(expected)} expected, found {sorted(arrays)}")
                return {split: (arrays[f"x_{split}"], arrays[f"y_{split}"]) for split in splits}
        if other is None:
            raise ValueError("not an .npz")
        content = path.read_bytes()
        return other(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except Exception as error:  # hostile bytes can make gzip, zipfile and pickle raise just about anything
        raise UserError(
            f"{path}: damaged, or not a dataset ({error or type(error).__name__}); "
            "replace the file, or delete it if it was downloaded and run again"
        ) from error


def cached(copy: Path, fingerprint: str, make: Callable[[], Source]) -> Source:
    """Open the fast copy of a dataset, and make it first if it is not there.

    Args:
        copy: a file of tensors that opens in milliseconds, memory-mapped, so that processes share it.
        fingerprint: identifies what it is made of; a copy of anything else is replaced.
        make: reads the dataset.
    """
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
