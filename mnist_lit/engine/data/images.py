"""Image files to predict: named one by one, by their folders, or by patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from mnist_lit.engine.errors import DatasetError
from mnist_lit.engine.images import SUFFIXES


def find_images(patterns: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Find image files by file, folder or pattern such as ``digits/*.png``, sorted within each.

    A folder stands for its images or, if it has none, for those of its subfolders, such as one for each class. What
    exists is taken literally, whatever characters are in its name. Files whose names start with a dot are ignored.

    Returns:
        the images, and the files of folders that were passed over because they have another suffix.

    Raises:
        DatasetError: naming the pattern that matches nothing.
    """
    found: list[Path] = []
    passed_over: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files, others = _in_folder(path)
            passed_over += others
        elif path.exists():
            files = [path]
        else:
            files = []
            for match in sorted(map(Path, glob.glob(pattern, recursive=True))):
                inner, others = _in_folder(match) if match.is_dir() else ([match], [])
                files += [file for file in inner if not file.name.startswith(".")]
                passed_over += others
        if not files:
            raise DatasetError(
                f"--data.images={pattern}: no such image; expected a file, a folder or a pattern of "
                f"{', '.join(SUFFIXES)} files"
            )
        found += files
    return list(dict.fromkeys(found)), list(dict.fromkeys(passed_over))


def _in_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and other files of a folder, or of its subfolders if it has no image itself."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    passed_over = [file for file in files if file.suffix.lower() not in SUFFIXES]
    if not found:
        for subfolder in (entry for entry in entries if entry.is_dir()):
            inner, others = _in_folder(subfolder)
            found += inner
            passed_over += others
    return found, passed_over
