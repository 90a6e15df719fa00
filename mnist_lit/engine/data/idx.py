"""IDX, the format in which MNIST and its relatives were published, and the folders that torchvision keeps it in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

Pair = tuple[np.ndarray, np.ndarray]

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
        names = sorted(file.name for file in folder.glob("*train-images-idx3-ubyte*"))
        found = {name.removesuffix(".gz"): name for name in reversed(names) if NAME.fullmatch(name)}
        if len(found) > 1:
            raise ValueError(
                f"several datasets, choose one: {', '.join(sorted(str(folder / name) for name in found.values()))}"
            )
        for name in found.values():
            return folder / name
    return None


def read_idx(train: Path, read: Callable[[Path], bytes]) -> tuple[Pair, Pair]:
    """Read the training and the test images of a dataset.

    EMNIST's images are transposed in its files; here they are upright, like MNIST's.

    Args:
        train: the file of the training images, as from ``find_idx``; the other three lie beside it.
        read: reads a file, gzipped or not.

    Returns:
        training and test images uint8 (n, H, W) with their labels uint8 (n,).

    Raises:
        ValueError: if a file is missing or damaged.
    """
    parts = NAME.fullmatch(train.name)
    assert parts is not None
    test = "test" if parts["set"] else "t10k"
    pairs = []
    for split in ("train", test):
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            plain = train.with_name(f"{parts['set']}{split}-{kind}-ubyte")
            names = [plain, plain.with_name(f"{plain.name}.gz")]
            file = next((name for name in names if name.is_file()), None)
            if file is None:
                raise ValueError(f"there is no {plain.name} or {plain.name}.gz beside {train.name}")
            arrays.append(_decode(file.name, read(file), 3 if kind == "images-idx3" else 1))
        images, labels = arrays
        pairs.append((images.swapaxes(1, 2) if parts["set"].startswith("emnist") else images, labels))
    return pairs[0], pairs[1]


def _decode(name: str, content: bytes, dimensions: int) -> np.ndarray:
    if content[:4] != MAGIC + bytes([dimensions]):
        raise ValueError(f"{name} is no IDX file of {dimensions} dimensions of bytes")
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{name} ends in its header")
    shape = tuple(int(length) for length in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != np.prod(shape, dtype=object):
        raise ValueError(f"{name} has {len(content) - start:,} bytes of data, {' x '.join(map(str, shape))} expected")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def class_names(train: Path) -> list[str] | None:
    """The names of the classes where they are known: FashionMNIST's, KMNIST's, EMNIST's by its mapping file."""
    parts = NAME.fullmatch(train.name)
    assert parts is not None
    if parts["set"]:
        mapping = train.with_name(f"{parts['set'].removesuffix('-')}-mapping.txt")
        if not mapping.is_file():
            return None
        codes = {int(line.split()[0]): line.split()[1:] for line in mapping.read_text("utf-8").splitlines() if line}
        return ["/".join(map(chr, map(int, codes.get(index, [])))) or str(index) for index in range(max(codes) + 1)]
    for folder in train.parents[:2]:
        if folder.name in CLASS_NAMES:
            return CLASS_NAMES[folder.name]
    return None
