"""``python -m mnist_lit serve``: who reads the pictures that are sent."""

from __future__ import annotations

from mnist_lit.datasets.pictures import PictureReader
from mnist_lit.engine import serving


def main(args: list[str]) -> None:
    """Serve until it is stopped."""
    serving.main(args, PictureReader)
