"""Atomic writes, and folders that one process at a time writes to."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mnist_lit.engine.errors import UserError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    r"""Yield a temporary path; the file written there replaces ``path`` atomically.

    Example:
        >>> with atomic_write(Path("table.csv")) as part:
        ...     part.write_text("a,b\n", encoding="utf-8")
    """
    part = path.with_name(f".part-{path.name}")  # keeps the suffix, which names the kind of file
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def printable(path: str | Path) -> str:
    r"""A file's name as text; bytes that are not UTF-8 are written as ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def atomic_save(content: Any, path: Path) -> None:
    """``torch.save``, atomically.

    Raises:
        OSError: such as a full disk, which torch.save itself would hide in a RuntimeError.
    """
    data = io.BytesIO()
    torch.save(content, data)
    with atomic_write(path) as part, part.open("wb") as file:
        # Not in a variable, which a traceback would keep: Python 3.12.1 crashes on it at exit.
        file.write(data.getbuffer())


@contextmanager
def locked_directory(folder: Path) -> Iterator[None]:
    """Make a data folder and lock it, so that one process at a time writes in it.

    Raises:
        UserError: if the folder cannot be made or written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        raise UserError(
            f"cannot write in the data folder {folder} ({error.strerror or error}); "
            "make room or make it writable; or choose another one with --data.data_dir and, if the dataset is there "
            "already, name its file or folder with --data.dataset"
        ) from error
