"""Your data: a folder of image files for each class, or a file of arrays."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from mnist_lit.engine import ImageDataModule

EXAMPLE = Path("data/example.npz")


class DataModule(ImageDataModule):
    """Images and their classes. Replace the default of ``dataset`` by yours, and delete what makes up the example.

    Args:
        dataset: path of a folder with a folder of image files for each class, or with ``train``, ``valid`` and
            ``test`` above them; or of an ``.npz`` with arrays ``x_train`` (n, H, W) or (n, H, W, 3) and ``y_train``
            (n,), and likewise ``_valid`` and ``_test``.
        options: as in ``ImageDataModule``; ``image_size`` is the size to which image files are scaled.
    """

    def __init__(self, dataset: str = str(EXAMPLE), **options: Any) -> None:
        super().__init__(dataset, **options)

    def prepare_data(self) -> None:
        if Path(self.dataset) == EXAMPLE and not EXAMPLE.exists():
            rank_zero_warn(f"{EXAMPLE} is made up: discs, squares and crosses. Put your own data in {__file__}")
            make_example()
        super().prepare_data()


def make_example() -> None:
    """Make up grey images (n, 24, 24) with a disc, a square or a cross somewhere in noise."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", 2000), ("valid", 500), ("test", 500)):
        labels = np.arange(n) % 3
        x = abs(np.arange(24) - rng.uniform(7, 17, (n, 1, 1)))  # (n, 1, 24), the distance from the middle
        y = abs(np.arange(24)[:, None] - rng.uniform(7, 17, (n, 1, 1)))  # (n, 24, 1)
        near, far = np.minimum(x, y), np.maximum(x, y)  # (n, 24, 24)
        shapes = np.stack([x**2 + y**2 < 25, far < 4.5, (near < 1.5) & (far < 6)])  # (3, n, 24, 24)
        images = 100 * shapes[labels, np.arange(n)] + rng.uniform(0, 50, (n, 24, 24))
        arrays |= {f"x_{split}": images.astype(np.uint8), f"y_{split}": labels}
    EXAMPLE.parent.mkdir(exist_ok=True)
    part = EXAMPLE.with_suffix(f".{os.getpid()}.npz")  # complete whenever another process looks
    np.savez(part, **arrays)
    part.replace(EXAMPLE)
