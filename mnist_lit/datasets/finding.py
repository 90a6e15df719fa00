"""Image files to predict."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from mnist_lit.engine.errors import DatasetError
from mnist_lit.engine.images import SUFFIXES


def find_pictures(patterns: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Find image files by file, folder or pattern such as ``digits/*.png``, sorted within each.

    A folder stands for its images or, if it has none, for those of its subfolders, such as one for each class. What
    exists is taken literally, whatever characters are in its name. Files whose names start with a dot are ignored.

    Returns:
        the images, and the files of folders that were passed over because they have another suffix.

    Raises:
        DatasetError: naming the pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    passed_over: dict[Path, None] = {}
    for pattern in patterns:
        literal = Path(pattern)
        matches = [literal] if literal.exists() else map(Path, sorted(glob.glob(pattern, recursive=True)))
        files = [(file, match) for match in matches for file in (_inside(match) if match.is_dir() else [match])]
        images = [file for file, match in files if file == match or file.suffix.lower() in SUFFIXES]
        if not images:
            expected = f"a file, a folder or a pattern of {', '.join(SUFFIXES)} files"
            raise DatasetError(f"--data.images={pattern}: no such image; expected {expected}")
        found |= dict.fromkeys(images)
        passed_over |= dict.fromkeys(file for file, _ in files if file not in found)
    return list(found), list(passed_over)


def _inside(folder: Path) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    if not any(file.suffix.lower() in SUFFIXES for file in files):
        files += [file for entry in entries if entry.is_dir() for file in _inside(entry)]
    return files
