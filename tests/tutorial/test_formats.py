"""Dataset files of other people: the same images and labels, whatever the file."""

from __future__ import annotations

import gzip
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from common import CONFIGS, Run
from mirror import folder_server, server
from test_archive import Arrays, arrays, assert_holds, read_dataset

from mnist_lit.datasets import mnist
from mnist_lit.engine.data import idx
from mnist_lit.engine.data.files import Splits, content_digest
from mnist_lit.engine.data.sources import FolderOptions, open_dataset
from mnist_lit.engine.errors import DatasetError, DownloadError


def as_lists(content: object) -> object:
    if isinstance(content, tuple):
        return [as_lists(part) for part in content]
    return content


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("form", ["tuples", "lists", "lists of numbers"])
def test_plain_pickle(tmp_path: Path, form: str, protocol: int) -> None:
    """Neither gzipped nor called .pkl.gz."""
    data = arrays((30, 20, 10), side=6)
    numbers = [[x.tolist(), y.tolist()] for x, y in data]
    content = {"tuples": data, "lists": as_lists(data), "lists of numbers": numbers}[form]
    path = tmp_path / "mnist"
    path.write_bytes(pickle.dumps(content, protocol))
    assert_holds(read_dataset(path), data)


def test_pickle_of_a_list_of_images(tmp_path: Path) -> None:
    data = arrays((30, 20, 10), side=6)
    path = tmp_path / "mnist.pkl"
    path.write_bytes(pickle.dumps([[list(x), list(map(int, y))] for x, y in data], 4))
    assert_holds(read_dataset(path), data)


@pytest.mark.parametrize("shape", [(9, 12, 1), (9, 12, 3), (1, 9, 12), (3, 9, 12), (9, 12)])
def test_npz_with_channels_first_or_last(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x, y = np.random.default_rng(0).integers(0, 256, (60, *shape), dtype=np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_valid=x[:6], y_valid=y[:6])
    images, _ = read_dataset(tmp_path / "own.npz").train
    expected = x if shape[0] in (1, 3) else x[:, None] if len(shape) == 2 else np.moveaxis(x, 3, 1)
    np.testing.assert_array_equal(images.numpy(), expected)


# -------------------------------------------------------------------------------- without a validation split


def published(sizes: tuple[int, int] = (120, 20)) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Training and test images as they were published: uint8 (n, 28, 28) and labels."""
    random = np.random.default_rng(0)
    return tuple((random.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n) % 10) for n in sizes)


def assert_split_as_in_the_tutorial(splits: Splits, data: tuple[tuple[np.ndarray, np.ndarray], ...]) -> None:
    (x, y), test = data
    sixth = len(x) // 6
    expected = ((x[:-sixth], y[:-sixth]), (x[-sixth:], y[-sixth:]), test)
    for (images, labels), (pixels, classes) in zip(splits, expected, strict=True):
        np.testing.assert_array_equal(images[:, 0].numpy(), pixels)
        np.testing.assert_array_equal(labels.numpy(), classes)


def write_keras(path: Path, data: tuple[tuple[np.ndarray, np.ndarray], ...]) -> Path:
    (x, y), (x_test, y_test) = data
    np.savez(path, x_train=x, y_train=y.astype(np.uint8), x_test=x_test, y_test=y_test.astype(np.uint8))
    return path


def write_idx(
    folder: Path, data: tuple[tuple[np.ndarray, np.ndarray], ...], prefix: str = "", gz: bool = False
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pair in zip(("train", "test" if prefix else "t10k"), data, strict=True):
        for kind, array in zip(("images-idx3", "labels-idx1"), pair, strict=True):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = head + array.astype(np.uint8).tobytes()
            name = f"{prefix}{split}-{kind}-ubyte"
            (folder / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(content, 1) if gz else content)
    return folder


LAYOUTS = {
    "Keras": lambda folder, data: write_keras(folder / "mnist.npz", data),
    "IDX": lambda folder, data: write_idx(folder / "own", data),
    "IDX, gzipped": lambda folder, data: write_idx(folder / "own", data, gz=True),
    "one IDX file": lambda folder, data: write_idx(folder / "own", data, gz=True) / "train-images-idx3-ubyte.gz",
    "torchvision": lambda folder, data: write_idx(folder / "FashionMNIST" / "raw", data).parent,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_files_are_split_as_in_the_tutorial(tmp_path: Path, layout: str) -> None:
    data = published()
    assert_split_as_in_the_tutorial(read_dataset(LAYOUTS[layout](tmp_path, data)), data)


def test_sorted_images_are_held_out_by_class(tmp_path: Path) -> None:
    """The last sixth of them would be of one class."""
    (x, _), test = published()
    labels = np.arange(120) // 12
    _, valid, _ = read_dataset(write_keras(tmp_path / "sorted.npz", ((x, labels), test)))
    assert torch.bincount(valid[1]).tolist() == [2] * 10


def test_fashion_has_names_and_emnist_is_upright_and_chosen(tmp_path: Path) -> None:
    data = published()
    fashion = write_idx(tmp_path / "FashionMNIST" / "raw", data)
    source = open_dataset(str(fashion.parent), tmp_path / "data", FolderOptions())
    assert source.class_names is not None
    assert (source.class_names[0], source.class_names[9]) == ("T-shirt/top", "Ankle boot")

    raw = write_idx(tmp_path / "EMNIST" / "raw", data, "emnist-letters-")
    (raw / "emnist-letters-mapping.txt").write_text("1 65 97\n2 66 98\n")
    assert idx.class_names(raw / "emnist-letters-train-images-idx3-ubyte") == ["0", "A/a", "B/b"]
    images = read_dataset(raw.parent).train[0]
    np.testing.assert_array_equal(images[:, 0].numpy(), data[0][0][:100].swapaxes(1, 2))
    write_idx(raw, data, "emnist-digits-")
    with pytest.raises(
        DatasetError, match=r"several datasets, choose one: .*emnist-digits-train.*emnist-letters-train"
    ):
        read_dataset(raw.parent)
    assert len(read_dataset(raw / "emnist-digits-train-images-idx3-ubyte").train[0]) == 100


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    folder = write_idx(tmp_path / "own", published())
    images = folder / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for damage, message in (
        (whole[:-1], "94,079 bytes of data, 120 x 28 x 28 expected"),
        (whole[:10], "ends in its header"),
        (b"\0\0\x09\x03" + whole[4:], "no IDX file of 3 dimensions"),
        (whole[:4] + b"\xff" * 12 + whole[16:], "expected"),
    ):
        images.write_bytes(damage)
        with pytest.raises(DatasetError, match=message):
            read_dataset(folder)
    images.unlink()
    with pytest.raises(DatasetError, match="neither MNIST's IDX files nor a folder of images for each class"):
        read_dataset(folder)
    images.write_bytes(whole)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DatasetError, match=r"no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte\.gz beside"):
        read_dataset(folder)


FOREIGN = {
    "HTML": (b"\n<!DOCTYPE html><html>Not Found", "HTML, not a gzip: the server sent a page"),
    "IDX": (b"\0\0\x08\x03" + bytes(12), "an IDX file: name it as it was published"),
    "XZ": (b"\xfd7zXZ\0 and so on", "an XZ archive"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "npy": (b"\x93NUMPY\x01\0", "a single array"),
    "PNG": (b"\x89PNG\r\n", "an image: use --data.dataset=FOLDER"),
    "tar": (b"data/".ljust(257, b"\0") + b"ustar", "a tar archive: unpack it"),
    "text": (b"label,pixel0\n5,0\n", "neither a pickle nor an .npz nor an IDX file"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_are_named(tmp_path: Path, kind: str, zipped: bool) -> None:
    content, message = FOREIGN[kind]
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(DatasetError, match=message):
        read_dataset(path)


def test_zip_archive_is_named(cli: Run, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("cats/1.jpg", b"")
    done = cli("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset=images.zip", ok=False)
    assert "images.zip: damaged, or not a dataset (this is a ZIP archive: unpack it" in done.stderr


# -------------------------------------------------------------------------------------------- addresses


def test_addresses_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no file, one that answers with a page, one with another dataset, and one with IDX files."""
    monkeypatch.setattr(mnist, "BACK_OFF", 0.01)
    wanted, other = write_idx(tmp_path / "mnist", published(), gz=True), arrays()
    digest = content_digest(read_dataset(wanted))
    monkeypatch.setattr(mnist, "DIGEST", digest)
    page, pickled = b"<!DOCTYPE html>", gzip.compress(pickle.dumps(other))
    with (
        server("404") as (missing, _),
        server("whole", page) as (html, _),
        server("whole", pickled) as (wrong, _),
        folder_server(wanted) as (folder, requests),
    ):
        mnist.download_mnist([missing, html, wrong, folder], tmp_path / "data", timeout=60)
        assert sorted(path.lstrip("/") for path in requests) == sorted(mnist.IDX)
        mnist.download_mnist([missing], tmp_path / "data", timeout=60)  # it is there
        with pytest.raises(DownloadError, match=r"answered 404.*; .*this is HTML.*; .*but not MNIST"):
            mnist.download_mnist([missing, html, wrong], tmp_path / "none", timeout=60)
    found = mnist.find_mnist(tmp_path / "data")
    assert found is not None
    assert content_digest(mnist.read_mnist(found)) == digest
    assert [path.name for path in (tmp_path / "none").iterdir()] == [".lock"]


def test_address_of_an_unreachable_host_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tutorial's two addresses are of one host: without a network only one of them waits."""
    monkeypatch.setattr(mnist, "BACK_OFF", 0.01)
    with pytest.raises(DownloadError) as caught:
        mnist.download_mnist(["http://127.0.0.1:9/a", "http://127.0.0.1:9/b"], tmp_path, timeout=60)
    assert "127.0.0.1:9/a could not be downloaded: no connection" in str(caught.value)
    assert "127.0.0.1:9/b" not in str(caught.value)


# ------------------------------------------------------------------------------------------- real MNIST


@pytest.fixture(scope="module")
def real(mnist_archive: Path) -> Arrays:
    with gzip.open(mnist_archive) as file:
        return pickle.load(file, encoding="latin-1")


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.parametrize("layout", [*LAYOUTS, "protocol 0", "protocol 4, lists"])
def test_mnist_is_the_same_in_every_layout(real: Arrays, tmp_path: Path, layout: str) -> None:
    if layout.startswith("protocol"):
        path = tmp_path / "mnist.pkl"
        path.write_bytes(pickle.dumps(as_lists(real) if "lists" in layout else real, int(layout[9])))
    else:
        (x, y), (xv, yv), test = real
        pixels = [(a * 256).astype(np.uint8).reshape(-1, 28, 28) for a in (np.concatenate([x, xv]), test[0])]
        path = LAYOUTS[layout](tmp_path, ((pixels[0], np.concatenate([y, yv])), (pixels[1], test[1])))
    assert content_digest(read_dataset(path)) == mnist.DIGEST
