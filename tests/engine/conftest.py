"""The engine's tests have a dataset of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 / 300 / 300 images of ten classes, each a pattern under noise, some mislabelled.

    A dataset file that trains in a second, with shorter last batches.
    """
    random = np.random.default_rng(1)
    coarse = random.integers(0, 2, (10, 7, 7)).repeat(4, 1).repeat(4, 2)  # (10, 28, 28)
    arrays = {}
    for split, n in (("train", 1000), ("valid", 300), ("test", 300)):
        labels = random.integers(0, 10, n)
        noise = random.integers(0, 64, (n, 28, 28))
        arrays[f"x_{split}"] = (coarse[labels] * 160 + noise).astype(np.uint8)
        wrong = random.random(n) < 0.1  # so that a model can learn too much
        arrays[f"y_{split}"] = np.where(wrong, random.integers(0, 10, n), labels)
    path = tmp_path_factory.mktemp("small") / "small.npz"
    np.savez(path, **arrays)
    return path
