"""IDX, the format in which MNIST and its relatives were published, and the folders that torchvision keeps it in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mnist_lit.engine.data.arrays import Pair

# http://yann.lecun.com/exdb/mnist: two zeros, 8 for uint8, and the number of dimensions.
MAGIC = b"\0\0\x08"
NAME = re.compile(r"(?P<set>.*?)(?P<split>train|t10k|test)-images-idx3-ubyte(?P<gz>\.gz)?")

CLASS_NAMES = {
    "FashionMNIST": ["T-shirt/top", *"Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag".split(), "Ankle boot"],
    "KMNIST": "o ki su tsu na ha ma ya re wo".split(),
}


def find_idx(path: Path) -> Path | None:
    """Find the training images of a dataset in IDX files.

    Args:
        path: the file itself, the folder that it is in, or one that has it in ``raw`` (torchvision's).

    Returns:
        the file, or None if there is none.

    Raises:
        ValueError: if there are several datasets, as in EMNIST's folder.
    """
    if path.is_file():
        return path if NAME.fullmatch(path.name) else None
    for folder in (path, path / "raw"):
        files = sorted(file for file in folder.glob("*train-images-idx3-ubyte*") if NAME.fullmatch(file.name))
        found = {file.name.removesuffix(".gz"): file for file in files}
        if len(found) > 1:
            raise ValueError(f"several datasets, choose one: {', '.join(map(str, found.values()))}")
        if found:
            return files[0]
    return None


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
        images, labels = (
            _decode(train.with_name(f"{prefix}{name}-{kind}-ubyte"), read) for kind in ("images-idx3", "labels-idx1")
        )
        pairs[split] = images.swapaxes(1, 2) if prefix.startswith("emnist") else images, labels
    return pairs


def _decode(plain: Path, read: Callable[[Path], bytes]) -> np.ndarray:
    file = next((path for path in (plain, plain.with_name(f"{plain.name}.gz")) if path.is_file()), None)
    if file is None:
        raise ValueError(f"there is no {plain.name} or {plain.name}.gz")
    content, dimensions = read(file), int(plain.name[-7])
    start = 4 + 4 * dimensions
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], ">u4"))
    if content[:4] != MAGIC + bytes([dimensions]) or len(content) - start != np.prod(shape, dtype=object):
        raise ValueError(f"{file.name} is not an IDX file of {dimensions} dimensions of bytes, or is cut off")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def class_names(train: Path) -> list[str] | None:
    """The names of the classes where they are known: FashionMNIST's, KMNIST's, EMNIST's by its mapping file."""
    mapping = train.with_name(train.name.partition("-train")[0] + "-mapping.txt")
    if mapping.is_file():
        codes = {int(line.split()[0]): line.split()[1:] for line in mapping.read_text("utf-8").splitlines() if line}
        return ["/".join(map(chr, map(int, codes.get(index, [])))) or str(index) for index in range(max(codes) + 1)]
    return next((CLASS_NAMES[folder.name] for folder in train.parents[:2] if folder.name in CLASS_NAMES), None)
