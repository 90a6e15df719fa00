"""IDX, the format in which MNIST and its relatives were published, and the folders that torchvision keeps it in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnist_lit.engine.data.arrays import Pair

IMAGES, LABELS = "-images-idx3-ubyte", "-labels-idx1-ubyte"
MAGIC = b"\0\0\x08"  # http://yann.lecun.com/exdb/mnist: two zeros, 8 for uint8, and then the number of dimensions


def find_idx(path: Path) -> list[Path]:
    """Find the files of training images, one of each dataset; EMNIST's folder has several.

    Args:
        path: such a file itself, the folder that it is in, or one that has it in ``raw`` (torchvision's).
    """
    if path.is_file():
        return [path] if f"train{IMAGES}" in path.name else []
    found = (file for folder in (path, path / "raw") for file in folder.glob(f"*train{IMAGES}*"))
    return sorted({file.with_suffix(""): file for file in found}.values())  # gzipped, or not, or both


def read_idx(train: Path, read: Callable[[Path], bytes]) -> dict[str, Pair]:
    """Read the training and the test images of a dataset, EMNIST's upright, which are transposed in its files.

    Args:
        train: the file of the training images, as from ``find_idx``; the other three lie beside it.
        read: reads a file, gzipped or not.

    Returns:
        by ``train`` and ``test``: images uint8 (n, H, W) and their labels uint8 (n,).

    Raises:
        ValueError: if a file is missing or damaged.
    """
    prefix = train.name[: train.name.index("train")]
    pairs = {}
    for split, name in (("train", "train"), ("test", "test" if prefix else "t10k")):
        images, labels = (_decode(train.with_name(f"{prefix}{name}{kind}"), read) for kind in (IMAGES, LABELS))
        pairs[split] = images.swapaxes(1, 2) if prefix.startswith("emnist") else images, labels
    return pairs


def _decode(plain: Path, read: Callable[[Path], bytes]) -> np.ndarray:
    file = plain if plain.is_file() else plain.with_name(f"{plain.name}.gz")
    content, dimensions = read(file), int(plain.name[-7])
    start = 4 + 4 * dimensions
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], ">u4"))
    if content[:4] != MAGIC + bytes([dimensions]) or len(content) - start != np.prod(shape, dtype=object):
        raise ValueError(f"{file.name} is not an IDX file of {dimensions} dimensions of bytes, or is cut off")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
