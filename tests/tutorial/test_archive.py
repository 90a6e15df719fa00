"""MNIST's files: every way in which they can arrive, whole, damaged or hostile."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ENVIRONMENT
from hostile import hostile
from mirror import folder_server, server

from mnist_lit.datasets import mnist
from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.engine.data.arrays import Arrays, Splits
from mnist_lit.engine.data.files import cached, read_dataset
from mnist_lit.engine.data.sources import content_digest
from mnist_lit.engine.errors import UserError

Pairs = tuple[tuple[np.ndarray, np.ndarray], ...]


def pairs(sizes: tuple[int, ...] = (30, 20, 10), side: int = 28) -> Pairs:
    """Arrays of the tutorial's form: float32 rows k/256 and int64 labels."""
    random = np.random.default_rng(0)
    return tuple((random.integers(0, 256, (n, side * side)).astype(np.float32) / 256, np.arange(n) % 10) for n in sizes)


def published(sizes: tuple[int, int] = (120, 20)) -> Pairs:
    """Training and test images as they were published: uint8 (n, 28, 28) and labels."""
    random = np.random.default_rng(0)
    return tuple((random.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n) % 10) for n in sizes)


def write_keras(path: Path, data: Pairs) -> Path:
    (x, y), (x_test, y_test) = data
    np.savez(path, x_train=x, y_train=y.astype(np.uint8), x_test=x_test, y_test=y_test.astype(np.uint8))
    return path


def write_idx(folder: Path, data: Pairs, prefix: str = "", gz: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pair in zip(("train", "test" if prefix else "t10k"), data, strict=True):
        for kind, array in zip(("images-idx3", "labels-idx1"), pair, strict=True):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = head + array.astype(np.uint8).tobytes()
            name = f"{prefix}{split}-{kind}-ubyte"
            (folder / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(content, 1) if gz else content)
    return folder


def read(path: Path) -> Splits:
    return read_dataset(path, read_pickle).splits


def assert_holds(splits: Splits, expected: Pairs) -> None:
    for (images, labels), (x, y) in zip(splits, expected, strict=True):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images.flatten(1) / 256, torch.from_numpy(x))  # exact: nothing is lost in uint8
        assert torch.equal(labels, torch.from_numpy(y))


# ------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("form", ["tuples", "lists", "Fortran's order"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_decodes_exactly(tmp_path: Path, protocol: int, form: str, zipped: bool) -> None:
    data, content = pairs(side=6), pairs(side=6)
    if form == "lists":
        content = [list(pair) for pair in data]  # type: ignore[assignment]
    elif form == "Fortran's order":
        content = tuple((np.asfortranarray(x.astype(">f8")), y.astype(np.uint8)) for x, y in data)
    written = pickle.dumps(content, protocol)
    (tmp_path / "mnist").write_bytes(gzip.compress(written, 1) if zipped else written)
    assert_holds(read(tmp_path / "mnist"), data)


LAYOUTS = {
    "Keras": lambda folder, data: write_keras(folder / "mnist.npz", data),
    "IDX": lambda folder, data: write_idx(folder / "own", data),
    "IDX, gzipped": lambda folder, data: write_idx(folder / "own", data, gz=True),
    "one IDX file": lambda folder, data: write_idx(folder / "own", data, gz=True) / "train-images-idx3-ubyte.gz",
    "torchvision": lambda folder, data: write_idx(folder / "FashionMNIST" / "raw", data).parent,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_files_are_split_as_in_the_tutorial(tmp_path: Path, layout: str) -> None:
    (x, y), test = data = published()
    splits = read(LAYOUTS[layout](tmp_path, data))
    expected = ((x[:100], y[:100]), (x[100:], y[100:]), test)
    for (images, labels), (pixels, classes) in zip(splits, expected, strict=True):
        np.testing.assert_array_equal(images[:, 0].numpy(), pixels)
        np.testing.assert_array_equal(labels.numpy(), classes)


def test_emnist_is_upright_and_chosen(tmp_path: Path) -> None:
    data = published()
    raw = write_idx(tmp_path / "EMNIST" / "raw", data, "emnist-letters-")
    np.testing.assert_array_equal(read(raw.parent).train[0][:, 0].numpy(), data[0][0][:100].swapaxes(1, 2))
    write_idx(raw, data, "emnist-digits-")
    with pytest.raises(UserError, match=r"several datasets, choose one: .*emnist-digits-train.*emnist-letters"):
        read(raw.parent)
    assert len(read(raw / "emnist-digits-train-images-idx3-ubyte").train[0]) == 100


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.parametrize("layout", [*LAYOUTS, "the archive", "protocol 0"])
def test_mnist_is_the_same_in_every_layout(mnist_archive: Path, tmp_path: Path, layout: str) -> None:
    with gzip.open(mnist_archive) as file:
        (x, y), (xv, yv), test = real = pickle.load(file, encoding="latin-1")
    path = tmp_path / "mnist.pkl"
    if layout == "the archive":
        assert_holds(read(mnist_archive), real)
        path = mnist_archive
    elif layout == "protocol 0":
        path.write_bytes(pickle.dumps(real, 0))
    else:
        pixels = [(a * 256).astype(np.uint8).reshape(-1, 28, 28) for a in (np.concatenate([x, xv]), test[0])]
        path = LAYOUTS[layout](tmp_path, ((pixels[0], np.concatenate([y, yv])), (pixels[1], test[1])))
    assert content_digest(read(path)) == mnist.DIGEST


# -------------------------------------------------------------------------------- damaged and wrong


def pickled(content: object) -> bytes:
    return gzip.compress(pickle.dumps(content))


WRONG = {
    "two splits": (pickled(pairs()[:2]), "x_train, y_train"),
    "a number": (pickled(5), "damaged, or not a dataset"),
    "nothing": (b"", "damaged, or not a dataset"),
    "objects": (pickled([[np.zeros(3), np.array([{}] * 3)]] * 3), "more than numpy arrays"),
    "texts": (pickled([[np.zeros((3, 4)), np.array(["a"] * 3)]] * 3), "more than arrays of numbers"),
    "HTML": (b"\n<!DOCTYPE html><html>Not Found", "this is HTML: the server sent a page"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    "npy": (b"\x93NUMPY\x01\0", "a single array"),
    "PNG": (gzip.compress(b"\x89PNG\r\n"), "an image: use --data.dataset=FOLDER"),
    "text": (b"label,pixel0\n5,0\n", "neither a pickle nor an .npz nor an IDX file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_named(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("cut", [1, 50, None, "missing"])
def test_damaged_idx_files_are_named(tmp_path: Path, cut: int | str | None) -> None:
    folder = write_idx(tmp_path / "own", published())
    images = folder / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    if cut == "missing":
        (folder / "t10k-labels-idx1-ubyte").unlink()
    else:
        images.write_bytes(whole[:-cut] if cut else b"\0\0\x09\x03" + whole[4:])
    message = "there is no t10k-labels" if cut == "missing" else "train-images-idx3-ubyte is not an IDX file"
    with pytest.raises(UserError, match=message):
        read(folder)


@pytest.mark.parametrize("kind", ["pkl.gz", "npz"])
def test_every_truncation_and_flip_is_an_error_or_harmless(tmp_path: Path, kind: str) -> None:
    """A gzip and a zip carry checksums, so damage is either found or lies where nothing is read."""
    data = pairs((12, 4, 4), side=6)
    path = tmp_path / f"own.{kind}"
    if kind == "npz":
        named = zip(("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test"), sum(data, ()), strict=True)
        np.savez(path, **dict(named))
    else:
        path.write_bytes(pickled(data))
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    refused = 0
    for _ in range(250):
        damaged = bytearray(whole)
        if random.random() < 0.3:
            damaged = damaged[: random.integers(len(whole))]
        else:
            damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            assert_holds(read(path), data)
        except UserError:
            refused += 1
    assert refused > 170


def test_decompression_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pkl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(16):
            file.write(bytes(1 << 25))  # 512 MiB of zeros in a few MB
    program = (
        "import resource, sys; from pathlib import Path; from mnist_lit.engine.data import files\n"
        "files.MAX_DECODED_BYTES = 1 << 27\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: files.read_dataset(Path(sys.argv[1]))\n"
        "except files.UserError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    message, grown = done.stdout.splitlines()
    assert f"decodes to more than {1 << 27:,} bytes" in message
    assert int(grown) * 1024 < 2.5 * (1 << 27)


@pytest.mark.parametrize("case", hostile(Path("x")))
def test_hostile_pickle_is_refused_and_never_runs(tmp_path: Path, case: str) -> None:
    marker, path = tmp_path / "executed", tmp_path / "own.pkl.gz"
    path.write_bytes(gzip.compress(hostile(marker)[case]))
    started = time.process_time()  # not that of other processes
    with pytest.raises(UserError, match=r"own\.pkl\.gz: damaged, or not a dataset"):
        read(path)
    assert not marker.exists()
    assert time.process_time() - started < 10


def test_the_hostile_pickles_do_run_elsewhere(tmp_path: Path) -> None:
    """A test of the test: the standard unpickler believes what ``read_dataset`` refuses."""
    for case in ("os.system", "builtins.eval", "the old INST opcode", "subprocess"):
        marker = tmp_path / case.replace(" ", "-")
        pickle.load(io.BytesIO(hostile(marker)[case]))
        assert marker.exists(), case


# ---------------------------------------------------------------------------------------- fast copy


def test_fast_copy_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    copy, made = tmp_path / "new" / "copy.pt", []

    def make() -> tuple[torch.Tensor, int]:
        made.append(1)
        return torch.arange(99), len(made)

    for source, number in (("v1", 1), ("v1", 1), ("v2", 2)):  # the source has changed
        tensor, found = cached(copy, source, make)
        assert torch.equal(tensor, torch.arange(99))
        assert found == number
    for damaged in (copy.read_bytes()[:-100], b"", pickle.dumps(5)):
        copy.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged and will be made again"):
            cached(copy, "v2", make)
    assert len(made) == 5
    with pytest.raises(ZeroDivisionError):
        cached(copy, "v3", lambda: 1 / 0)
    assert {path.name for path in copy.parent.iterdir()} <= {"copy.pt", ".lock"}
    assert cached(copy, "v2", make)[1] == 5


# ----------------------------------------------------------------------------------------- download


BODY = pickled(pairs())

FAILURES = {
    "404": (BODY, "the server answered 404", 1),
    "cut off": (BODY, "is not MNIST|it broke off", 1),
    "silent": (BODY, "no connection, or it broke off", 3),
    "stalls": (BODY, "no connection, or it broke off", 1),
    "whole": (BODY, "is not MNIST", 1),
    "503": (BODY, "no connection, or it broke off", 3),
    "a login page": (b"<html>Welcome to our Wi-Fi</html>", "this is HTML: the server sent a page", 1),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failed_download_says_why_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    body, message, attempts = FAILURES[case]
    behaviour = case if case in ("404", "cut off", "silent", "stalls") else "whole"
    timeout = 1.0 if case in ("silent", "stalls") else 60  # of the others none may pass, however busy the machine is
    with (
        server(behaviour, body, failures=99 if case == "503" else 0) as (url, requests),
        pytest.raises(mnist.DownloadError, match=message),
    ):
        mnist.download_mnist([url], tmp_path / "mnist", timeout)
    assert len(requests) == attempts
    assert [entry.name for entry in (tmp_path / "mnist").iterdir() if entry.name != ".lock"] == []


def test_addresses_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be reached, one without the file, one with another dataset, and one with IDX files."""
    wanted = write_idx(tmp_path / "mnist", published(), gz=True)
    monkeypatch.setattr(mnist, "DIGEST", content_digest(read(wanted)))
    with (
        server("404") as (missing, _),
        server("whole", BODY) as (wrong, _),
        folder_server(wanted) as (folder, requests),
    ):
        urls = ["http://127.0.0.1:9/mnist.pkl.gz", missing, wrong, folder]
        mnist.download_mnist(urls, tmp_path / "data")
        assert sorted(path.lstrip("/") for path in requests) == sorted(mnist.IDX)
        mnist.download_mnist([missing], tmp_path / "data")  # it is there
        with pytest.raises(mnist.DownloadError, match=r":9/.*no connection.*; .*answered 404.*; .*but not MNIST"):
            mnist.download_mnist(urls[:3], tmp_path / "none")
    found = mnist.find_mnist(tmp_path / "data")
    assert found is not None
    assert isinstance(mnist.read_mnist(found), Arrays)


@pytest.mark.mnist
@pytest.mark.slow
def test_eight_processes_at_once_download_and_decode_once(mnist_archive: Path, tmp_path: Path) -> None:
    """The server is busy at first, and what arrives is whole."""
    program = (
        "import sys; from mnist_lit import MNISTDataModule\n"
        "data = MNISTDataModule('mnist', data_dir=sys.argv[1], url=sys.argv[2])\n"
        "data.prepare_data(); data.setup('fit'); print(data.digest)"
    )
    with server("whole", mnist_archive.read_bytes(), failures=2) as (url, requests):
        command = [sys.executable, "-c", program, str(tmp_path / "data"), url]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
        digests = [process.communicate(timeout=300)[0].split()[-1] for process in processes]
    assert len(requests) == 3
    assert digests == [mnist.DIGEST] * 8
    assert (tmp_path / "data" / "mnist" / "mnist.pkl.gz").read_bytes() == mnist_archive.read_bytes()
