"""Bytes on disk: every way in which a dataset can arrive, whole, damaged or hostile."""

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
from mirror import server

from mnist_lit.datasets import mnist
from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.engine.data import files
from mnist_lit.engine.data.files import Splits, cached, content_digest
from mnist_lit.engine.errors import DatasetError, DownloadError

Arrays = tuple[tuple[np.ndarray, np.ndarray], ...]


def read_dataset(path: Path) -> Splits:
    return files.read_dataset(path, read_pickle)


def arrays(sizes: tuple[int, ...] = (30, 20, 10), side: int = 28) -> Arrays:
    """Arrays of the tutorial's form: float32 rows k/256 and int64 labels."""
    random = np.random.default_rng(0)
    return tuple(
        (random.integers(0, 256, (n, side * side)).astype(np.float32) / 256, random.integers(0, 10, n)) for n in sizes
    )


def write_pickle(path: Path, content: object, protocol: int = 2) -> Path:
    path.write_bytes(gzip.compress(pickle.dumps(content, protocol), 1))
    return path


def assert_holds(splits: Splits, expected: Arrays) -> None:
    for (images, labels), (x, y) in zip(splits, expected, strict=True):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert torch.equal(images.flatten(1) / 256, torch.from_numpy(x))  # exact: nothing is lost in uint8
        assert torch.equal(labels, torch.from_numpy(y))


# ------------------------------------------------------------------------------------------- read_dataset


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_of_any_protocol_decodes_exactly(tmp_path: Path, protocol: int) -> None:
    data = arrays()
    assert_holds(read_dataset(write_pickle(tmp_path / "own.pkl.gz", data, protocol)), data)


def test_pickle_of_other_dtypes_and_orders_decodes_exactly(tmp_path: Path) -> None:
    data = arrays()
    other = tuple((np.asfortranarray(x.astype(">f8")), y.astype(np.uint8)) for x, y in data)
    assert_holds(read_dataset(write_pickle(tmp_path / "own.pkl.gz", other)), data)


@pytest.mark.parametrize("form", ["float rows", "uint8 images", "255ths with a channel"])
def test_npz_decodes_exactly(tmp_path: Path, form: str) -> None:
    data, named = arrays(), {}
    for name, (x, y) in zip(("train", "valid", "test"), data, strict=True):
        k = (x * 256).astype(np.uint8).reshape(-1, 28, 28)
        forms = {"float rows": x, "uint8 images": k, "255ths with a channel": k[:, None] / np.float32(255)}
        named |= {f"x_{name}": forms[form], f"y_{name}": y}
    np.savez(tmp_path / "own.npz", **named)
    assert_holds(read_dataset(tmp_path / "own.npz"), data)


def test_npz_may_lack_the_test_split(tmp_path: Path) -> None:
    (x, y), (xv, yv), _ = arrays(side=20)
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_valid=xv, y_valid=yv)
    splits = read_dataset(tmp_path / "own.npz")
    assert [tuple(images.shape) for images, _ in splits] == [(n, 1, 20, 20) for n in (30, 20, 0)]


@pytest.mark.mnist
def test_real_archive_has_the_published_content(mnist_archive: Path) -> None:
    splits = read_dataset(mnist_archive)
    assert content_digest(splits) == mnist.DIGEST
    with gzip.open(mnist_archive) as file:
        assert_holds(splits, pickle.load(file, encoding="latin-1"))


# -------------------------------------------------------------------------------- damaged and wrong


def change(**changed: object) -> Arrays:
    """The arrays with the training images or labels replaced."""
    (x, y), *rest = arrays()
    return ((changed.get("x", x), changed.get("y", y)), *rest)  # type: ignore[return-value]


def nearly_endless() -> list:
    """A pickle of a hundred opcodes that stands for 10 ** 20 numbers."""
    content: list = [0]
    for _ in range(8):
        content = [content] * 350
    return content


WRONG = {
    "labels too large": (
        change(y=np.full(30, 1000)),
        r"labels 0\.\.999 expected, found 1000\.\.1000",
    ),
    "labels below 0": (change(y=np.full(30, -1)), r"labels 0\.\.999 expected, found -1\.\.-1"),
    "labels as floats": (change(y=np.zeros(30)), "30 whole-number labels expected, found float64"),
    "too few labels": (change(y=np.zeros(29, np.int64)), r"30 whole-number labels expected.*\(29,\)"),
    "rows of no square": (change(x=np.zeros((30, 785), np.float32)), "rows of 785 pixels"),
    "images of one dimension": (change(x=np.zeros(30, np.float32)), r"images \(n, H, W\)"),
    "images of five dimensions": (change(x=np.zeros((30, 1, 1, 2, 2), np.float32)), r"images \(n, H, W\)"),
    "images of no pixels": (change(x=np.zeros((30, 0, 5), np.float32)), r"images \(n, H, W\)"),
    "images of another size": (change(x=np.zeros((30, 400), np.float32)), "one size in every split"),
    "pixels that are no 256ths": (change(x=np.full((30, 784), 0.1234, np.float32)), "k/256 or k/255"),
    "pixels that are not numbers": (change(x=np.full((30, 784), np.nan, np.float32)), "k/256 or k/255"),
    "pixels below zero": (change(x=np.full((30, 784), -1, np.float32)), "k/256 or k/255"),
    "two splits": (arrays()[:2], "x_train, y_train"),
    "a number": (5, "damaged, or not a dataset"),
    "nothing": (None, "damaged, or not a dataset"),
    "numbers": ([[1, 2], [3, 4], [5, 6]], r"images \(n, H, W\)"),
    "lists of texts": ([[["a"], [0]]] * 3, "a str in the place of a number"),
    "a deep list": ([[[[[[[[[[[[[]]]]]]]]]]], [0]]] * 3, "nested too deeply"),
    "a list of nearly endless lists": ([[nearly_endless(), [0]]] * 3, "lists of more than"),
    "an array of objects": (change(y=np.array([{}] * 30)), "more than numpy arrays"),
    "an array of texts": (change(y=np.array(["7"] * 30)), "array of type 'U1'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_named(tmp_path: Path, case: str) -> None:
    content, message = WRONG[case]
    path = write_pickle(tmp_path / "own.pkl.gz", content)
    with pytest.raises(DatasetError, match=message) as caught:
        read_dataset(path)
    assert str(path) in str(caught.value)


def test_npz_without_an_array_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x_train=np.zeros((2, 4)), y_train=np.zeros(2, int), x_valid=np.zeros((2, 4)))
    with pytest.raises(DatasetError, match=r"'y_valid'\] expected, found \['x_train'"):
        read_dataset(tmp_path / "own.npz")


def test_other_kinds_of_file_are_named(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("1,2")
    with pytest.raises(DatasetError, match="neither a pickle nor an"):
        read_dataset(tmp_path / "own.csv")


@pytest.mark.parametrize("kind", ["pkl.gz", "npz"])
def test_every_truncation_and_flip_is_an_error_or_harmless(tmp_path: Path, kind: str) -> None:
    """A gzip and a zip carry checksums, so damage is either found or lies where nothing is read."""
    data = arrays((12, 4, 4), side=6)
    path = tmp_path / f"own.{kind}"
    if kind == "npz":
        named = zip(("x_train", "y_train", "x_valid", "y_valid", "x_test", "y_test"), sum(data, ()), strict=True)
        np.savez(path, **dict(named))
    else:
        write_pickle(path, data)
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
            assert_holds(read_dataset(path), data)
        except DatasetError:
            refused += 1
    assert refused > 170


@pytest.mark.slow
def test_decompression_bomb_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pkl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(1 << 25))  # 2 GiB of zeros in a few MB
    program = (
        "import resource, sys; from pathlib import Path; from test_archive import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: read_dataset(Path(sys.argv[1]))\n"
        "except DatasetError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    message, grown = done.stdout.splitlines()
    assert f"decodes to more than {files.MAX_DECODED_BYTES:,} bytes" in message
    assert int(grown) * 1024 < 1.5 * files.MAX_DECODED_BYTES


# ------------------------------------------------------------------------------------------ hostile


@pytest.mark.parametrize("case", hostile(Path("x")))
def test_hostile_pickle_is_refused_and_never_runs(tmp_path: Path, case: str) -> None:
    marker = tmp_path / "executed"
    path = tmp_path / "own.pkl.gz"
    path.write_bytes(gzip.compress(hostile(marker)[case]))
    started = time.process_time()  # not that of other processes
    with pytest.raises(DatasetError, match=r"own\.pkl\.gz: damaged, or not a dataset"):
        read_dataset(path)
    assert not marker.exists()
    assert time.process_time() - started < 10


def test_the_hostile_pickles_do_run_elsewhere(tmp_path: Path) -> None:
    """A test of the test: the standard unpickler believes what ``read_dataset`` refuses."""
    for case in ("os.system", "builtins.eval", "the old INST opcode", "subprocess"):
        marker = tmp_path / case.replace(" ", "-")
        pickle.load(io.BytesIO(hostile(marker)[case]))
        assert marker.exists(), case


# ---------------------------------------------------------------------------------------- fast copy


def splits_of(data: Arrays) -> Splits:
    return Splits(
        *((torch.from_numpy((x * 256).astype(np.uint8)).view(-1, 1, 28, 28), torch.from_numpy(y)) for x, y in data)
    )


def test_fast_copy_is_exact_and_made_once(tmp_path: Path) -> None:
    made = []

    def make() -> Splits:
        made.append(1)
        return splits_of(arrays())

    for _ in range(3):
        splits, digest = cached(tmp_path / "new" / "copy.pt", "v1", make)
        assert_holds(splits, arrays())
        assert digest == content_digest(splits)
    assert len(made) == 1
    cached(tmp_path / "new" / "copy.pt", "v2", make)
    assert len(made) == 2  # the source changed
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {"copy.pt", ".lock"}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "replaced"])
def test_damaged_fast_copy_is_made_again(tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "copy.pt"
    cached(copy, "v1", lambda: splits_of(arrays()))
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 16  # in the pixels
    pieces = {"truncated": content[:-100], "flipped": content, "emptied": b"", "replaced": pickle.dumps(5)}
    copy.write_bytes(pieces[damage])
    with pytest.warns(UserWarning, match="damaged and will be made again"):
        splits, _ = cached(copy, "v1", lambda: splits_of(arrays()))
    assert_holds(splits, arrays())


def test_failed_make_leaves_nothing(tmp_path: Path) -> None:
    def make() -> Splits:
        raise DatasetError("no")

    with pytest.raises(DatasetError, match="no"):
        cached(tmp_path / "copy.pt", "v1", make)
    assert not (tmp_path / "copy.pt").exists()


@pytest.mark.mnist
def test_second_start_reads_mnist_in_under_a_tenth_of_a_second(mnist_archive: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mnist.pt"
    times = []
    for _ in range(6):
        started = time.process_time()  # not that of other processes
        cached(copy, "mnist", lambda: read_dataset(mnist_archive))
        times.append(time.process_time() - started)
    print(f"first {times[0]:.2f} s, then {[f'{t:.3f}' for t in times[1:]]} s")
    assert min(times[1:]) < 0.1


# ----------------------------------------------------------------------------------------- download


BODY = gzip.compress(pickle.dumps(arrays()))

FAILURES = {
    "404": (BODY, "the server answered 404", 1),
    "cut off": (BODY, "the connection was cut off half-way", 3),
    "silent": (BODY, "the server did not answer in time", 3),
    "stalls": (BODY, "the server stopped sending half-way", 3),
    "whole": (BODY, "is not MNIST", 1),
    "503": (BODY, "the server answered 503", 3),
    "a login page": (b"<html>Welcome to our Wi-Fi</html>", "this is HTML, not a gzip: the server sent a page", 1),
}


TIMEOUTS = {"silent": 0.5, "stalls": 1.0}  # of the others none may pass, however busy the machine is


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] if c == "stalls" else []) for c in FAILURES])
def test_failed_download_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(mnist, "BACK_OFF", 0.01)
    body, message, attempts = FAILURES[case]
    behaviour = case if case in ("404", "cut off", "silent", "stalls") else "whole"
    path = tmp_path / "mnist" / "mnist.pkl.gz"
    with (
        server(behaviour, body, failures=99 if case == "503" else 0) as (url, requests),
        pytest.raises(DownloadError, match=message),
    ):
        mnist.download_mnist([url], path.parent, timeout=TIMEOUTS.get(case, 60))
    assert len(requests) == attempts
    assert [entry.name for entry in path.parent.iterdir() if entry.name != ".lock"] == []


def test_refused_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mnist, "BACK_OFF", 0.01)
    with pytest.raises(DownloadError, match="no connection"):
        mnist.download_mnist(["http://127.0.0.1:9/mnist.pkl.gz"], tmp_path, timeout=60)
    with pytest.raises(DownloadError, match="Invalid URL"):
        mnist.download_mnist(["mnist.pkl.gz"], tmp_path, timeout=1)


@pytest.mark.slow
@pytest.mark.mnist
def test_download_survives_a_busy_server_and_arrives_whole(mnist_archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "data" / "mnist.pkl.gz"
    with server("whole", mnist_archive.read_bytes(), failures=2) as (url, requests):
        mnist.download_mnist([url], path.parent, timeout=5)
        mnist.download_mnist([url], path.parent, timeout=5)  # it is there: no fourth request
    assert len(requests) == 3
    assert path.read_bytes() == mnist_archive.read_bytes()


@pytest.mark.mnist
@pytest.mark.slow
def test_eight_processes_at_once_download_and_decode_once(mnist_archive: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from mnist_lit import MNISTDataModule\n"
        "data = MNISTDataModule('mnist', data_dir=sys.argv[1], url=sys.argv[2])\n"
        "data.prepare_data(); data.setup('fit'); print(data.digest)"
    )
    with server("whole", mnist_archive.read_bytes()) as (url, requests):
        command = [sys.executable, "-c", program, str(tmp_path / "data"), url]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
        digests = [process.communicate(timeout=300)[0].split()[-1] for process in processes]
    assert len(requests) == 1
    assert digests == [mnist.DIGEST] * 8
