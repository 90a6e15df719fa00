"""Image files to predict: named one by one, by their folders, or by patterns."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from mnist_lit.engine.errors import UserError
from mnist_lit.engine.images import SUFFIXES


def find_images(patterns: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """Find image files by file, folder or pattern such as ``digits/*.png``, sorted within each.

    A folder stands for all images in it and in its subfolders. What exists is taken literally, whatever characters are
    in its name. Names that start with a dot are ignored.

    Returns:
        the images, and the files of folders that were passed over because they have another suffix.

    Raises:
        UserError: naming the pattern that matches nothing.
    """
    found: list[Path] = []
    passed_over: list[Path] = []
    for pattern in patterns:
        files = []
        for match in [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True)):
            inside = sorted(path for path in Path(match).rglob("[!.]*") if path.is_file())
            inside = [path for path in inside if not any(part[0] == "." for part in path.relative_to(match).parts)]
            files += [path for path in inside if path.suffix.lower() in SUFFIXES]
            passed_over += [path for path in inside if path.suffix.lower() not in SUFFIXES]
            files += [Path(match)] if Path(match).is_file() else []
        if not files:
            raise UserError(
                f"--data.images={pattern}: no such image; expected a file, a folder or a pattern of "
                f"{', '.join(SUFFIXES)} files"
            )
        found += files
    return list(dict.fromkeys(found)), list(dict.fromkeys(passed_over))
