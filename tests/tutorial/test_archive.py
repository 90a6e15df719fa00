"""MNIST's files: every way in which they can arrive, whole, damaged or hostile."""

from __future__ import annotations

import gzip
import io
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hostile import hostile
from mirror import folder_server, server

from mnist_lit import MNISTDataModule
from mnist_lit.datasets import mnist
from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.engine import UserError, read_dataset

Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]
RANDOM = np.random.default_rng(0)


def images(n: int, side: int = 28) -> tuple[np.ndarray, np.ndarray]:
    return RANDOM.integers(0, 256, (n, side, side), dtype=np.uint8), np.arange(n) % 10


def read(path: Path) -> Pairs:
    return read_dataset(path, read_pickle)


def assert_same(found: Pairs, expected: Pairs) -> None:
    assert found.keys() == expected.keys()
    for split, (x, y) in expected.items():
        np.testing.assert_array_equal(found[split][0], x)
        np.testing.assert_array_equal(found[split][1], y)


def write_idx(folder: Path, data: Pairs, prefix: str = "", gz: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, pair in data.items():
        name = "t10k" if split == "test" and not prefix else split
        for kind, array in zip(("images-idx3", "labels-idx1"), pair, strict=True):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            content = head + array.astype(np.uint8).tobytes()
            path = folder / f"{prefix}{name}-{kind}-ubyte{'.gz' * gz}"
            path.write_bytes(gzip.compress(content, 1) if gz else content)
    return folder


def write_npz(path: Path, data: Pairs) -> Path:
    np.savez(path, **{f"{axis}_{split}": a for split, pair in data.items() for axis, a in zip("xy", pair, strict=True)})
    return path


# ------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize("form", ["tuples", "lists", "Fortran's order", "gzipped"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_decodes_exactly(tmp_path: Path, protocol: int, form: str) -> None:
    data = {split: (x.reshape(n, -1) / np.float32(256), y) for split, n in SIZES.items() for x, y in [images(n, 6)]}
    content = tuple(data.values())
    if form == "lists":
        content = [list(pair) for pair in content]
    elif form == "Fortran's order":
        content = tuple((np.asfortranarray(x.astype(">f8")), y.astype(np.uint8)) for x, y in content)
    written = pickle.dumps(content, protocol)
    (tmp_path / "mnist").write_bytes(gzip.compress(written, 1) if form == "gzipped" else written)
    assert_same(read(tmp_path / "mnist"), data)


SIZES = {"train": 30, "valid": 20, "test": 10}
LAYOUTS = {
    "Keras": lambda folder, data: write_npz(folder / "mnist.npz", data),
    "IDX": lambda folder, data: write_idx(folder / "own", data),
    "one IDX file": lambda folder, data: write_idx(folder / "own", data, gz=True) / "train-images-idx3-ubyte.gz",
    "torchvision": lambda folder, data: write_idx(folder / "FashionMNIST" / "raw", data).parent,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_files_are_split_as_in_the_tutorial(tmp_path: Path, layout: str) -> None:
    data = {"train": images(120), "test": images(20)}
    path = LAYOUTS[layout](tmp_path, data)
    assert_same(read(path), data)
    module = MNISTDataModule(str(path), data_dir=str(tmp_path / "data"))
    module.prepare_data()
    (x, y), splits = data["train"], module.source.splits
    expected = {"train": (x[:100], y[:100]), "valid": (x[100:], y[100:]), "test": data["test"]}
    assert_same({split: (a[:, 0].numpy(), b.numpy()) for split, (a, b) in splits.items()}, expected)


def test_emnist_is_upright_and_chosen(tmp_path: Path) -> None:
    data = {"train": images(12), "test": images(2)}
    raw = write_idx(tmp_path / "EMNIST" / "raw", data, "emnist-letters-")
    np.testing.assert_array_equal(read(raw.parent)["train"][0], data["train"][0].swapaxes(1, 2))
    write_idx(raw, data, "emnist-digits-")
    with pytest.raises(UserError, match=r"several datasets, choose one: .*emnist-digits-train.*emnist-letters"):
        read(raw.parent)
    assert len(read(raw / "emnist-digits-train-images-idx3-ubyte")["train"][0]) == 12


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.parametrize("layout", ["the archive", "protocol 0", "IDX"])
def test_mnist_is_known_by_its_digest_in_every_layout(mnist_archive: Path, tmp_path: Path, layout: str) -> None:
    path = mnist_archive
    with gzip.open(mnist_archive) as file:
        (x, y), (xv, yv), (xt, yt) = real = pickle.load(file, encoding="latin-1")
    if layout == "protocol 0":
        (path := tmp_path / "mnist.pkl").write_bytes(pickle.dumps(real, 0))
    elif layout == "IDX":
        train, test = ((a * 256).astype(np.uint8).reshape(-1, 28, 28) for a in (np.concatenate([x, xv]), xt))
        path = write_idx(tmp_path / "own", {"train": (train, np.concatenate([y, yv])), "test": (test, yt)})
    np.testing.assert_array_equal(mnist.read_mnist(path)["test"][1], yt)


# -------------------------------------------------------------------------------- damaged and wrong


def pickled(content: object) -> bytes:
    return gzip.compress(pickle.dumps(content))


def npz(shape: str) -> bytes:
    """A file whose arrays say that they have another shape."""
    file = io.BytesIO()
    np.savez(file, x_train=np.zeros((2, 3), np.uint8), y_train=np.zeros(2))
    return file.getvalue().replace(b"(2, 3), }       ", f"{shape}, }}".ljust(16).encode())


WRONG = {
    "two splits": pickled([images(3)] * 2),
    "nothing": b"",
    "objects": pickled([[np.zeros(3), np.array([{}] * 3)]] * 3),
    "texts": pickled([[np.zeros((3, 4)), np.array(["a"] * 3)]] * 3),
    "HTML": b"\n<!DOCTYPE html><html>Not Found",
    "npy": b"\x93NUMPY\x01\0",
    "a table": b"label,pixel0\n5,0\n",
    "a huge array": npz(f"({1 << 40},)"),
    "a cut npz": npz("(2, 3)")[:-30],
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_named(tmp_path: Path, case: str) -> None:
    path = tmp_path / "mnist.pkl.gz"
    path.write_bytes(WRONG[case])
    with pytest.raises(UserError, match=r"mnist\.pkl\.gz: damaged, or not a dataset \(.+\)"):
        read(path)


@pytest.mark.parametrize("cut", [1, 50, None, "missing"])
def test_damaged_idx_files_are_named(tmp_path: Path, cut: int | str | None) -> None:
    folder = write_idx(tmp_path / "own", {"train": images(120), "test": images(20)})
    path = folder / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    if cut == "missing":
        (folder / "t10k-labels-idx1-ubyte").unlink()
    else:
        path.write_bytes(whole[:-cut] if cut else b"\0\0\x09\x03" + whole[4:])
    with pytest.raises(UserError, match="t10k-labels" if cut == "missing" else "train-images-idx3-ubyte is not an IDX"):
        read(folder)


@pytest.mark.parametrize("kind", ["pkl.gz", "npz"])
def test_every_truncation_and_flip_is_an_error_or_harmless(tmp_path: Path, kind: str) -> None:
    """A gzip and a zip carry checksums, so damage is either found or lies where nothing is read."""
    data, path = {"train": images(12, 6), "valid": images(4, 6), "test": images(4, 6)}, tmp_path / f"own.{kind}"
    write_npz(path, data) if kind == "npz" else path.write_bytes(pickled(tuple(data.values())))
    whole, random, refused = path.read_bytes(), np.random.default_rng(1), 0
    for _ in range(250):
        damaged = bytearray(whole)
        if random.random() < 0.3:
            damaged = damaged[: random.integers(len(whole))]
        else:
            damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            assert_same(read(path), data)
        except UserError:
            refused += 1
    assert refused > 170


def test_decompression_bomb_is_refused_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_lit.engine.data.files.MAX_DECODED_BYTES", 1 << 27)
    with gzip.open(tmp_path / "bomb.pkl.gz", "wb", compresslevel=1) as file:
        for _ in range(16):
            file.write(bytes(1 << 25))  # 512 MiB of zeros in a few MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"decodes to more than {1 << 27:,} bytes"):
        read(tmp_path / "bomb.pkl.gz")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2.5 * (1 << 27)


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


def test_fast_copy_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    path, data = tmp_path / "own.npz", {"train": images(30), "valid": images(10)}

    def opened() -> tuple[int, str]:
        module = MNISTDataModule(str(path), data_dir=str(tmp_path / "new"))
        module.prepare_data()
        (copy,) = (tmp_path / "new" / "copies").glob("*.pt")
        assert {file.name for file in copy.parent.iterdir()} <= {copy.name, ".lock"}
        return copy.stat().st_mtime_ns, module.digest

    write_npz(path, data)
    made, digest = opened()
    assert opened() == (made, digest)
    (copy,) = (tmp_path / "new" / "copies").glob("*.pt")
    for damaged in (copy.read_bytes()[:-100], b"", pickle.dumps(5)):
        copy.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged and will be made again"):
            assert opened()[1] == digest
    write_npz(path, data | {"train": images(30)})
    assert opened()[1] != digest


# ----------------------------------------------------------------------------------------- download


BODY = pickled([images(3), images(2), images(2)])

FAILURES = {  # how the server behaves, what is said, and how often it is asked
    "404": ("404 Client Error", 1),
    "cut off": ("is not MNIST|it broke off", 1),
    "silent": ("no connection, or it broke off", 3),
    "stalls": ("no connection, or it broke off", 1),
    "whole": ("is not MNIST: .*but not MNIST", 1),
    "503": ("no connection, or it broke off", 3),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failed_download_says_why_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    message, attempts = FAILURES[case]
    behaviour, failures = ("whole", 99) if case == "503" else (case, 0)
    timeout = 1.0 if case in ("silent", "stalls") else 60  # of the others none may pass, however busy the machine is
    with (
        server(behaviour, BODY, failures=failures) as (url, requests),
        pytest.raises(mnist.DownloadError, match=message),
    ):
        mnist.download_mnist([url], tmp_path / "mnist", timeout)
    assert len(requests) == attempts
    assert [entry.name for entry in (tmp_path / "mnist").iterdir() if entry.name != ".lock"] == []


def test_addresses_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be reached, one without the file, one with another dataset, and one with IDX files."""
    data = {"train": images(120), "test": images(20)}
    wanted = write_idx(tmp_path / "mnist", data, gz=True)
    module = MNISTDataModule(str(wanted), data_dir=str(tmp_path / "copies"))
    module.prepare_data()
    monkeypatch.setattr(mnist, "DIGEST", module.digest)
    with (
        server("404") as (missing, _),
        server("whole", BODY) as (wrong, _),
        folder_server(wanted) as (folder, requests),
    ):
        urls = ["http://127.0.0.1:9/mnist.pkl.gz", missing, wrong, folder]
        mnist.download_mnist(urls, tmp_path / "data")
        assert sorted(path.lstrip("/") for path in requests) == sorted(mnist.IDX)
        mnist.download_mnist([missing], tmp_path / "data")  # it is there
        with pytest.raises(mnist.DownloadError, match=r":9/.*no connection.*; .*404 Client.*; .*but not MNIST"):
            mnist.download_mnist(urls[:3], tmp_path / "none")
    found = mnist.find_mnist(tmp_path / "data")
    assert found
    assert_same(mnist.read_mnist(found), data)


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
