"""MNIST's file: every way in which it can arrive, whole, damaged or hostile."""

import gzip
import io
import os
import pickle
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from forks import CONTEXT, wait
from hostile import hostile

from mnist_lit import MNISTDataModule
from mnist_lit.datasets import mnist
from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.engine import UserError, read_dataset

Pairs = Mapping[str, tuple[np.ndarray, np.ndarray]]
RANDOM = np.random.default_rng(0)
DATA = {
    split: (RANDOM.integers(0, 256, (n, 36), dtype=np.uint8), np.arange(n) % 10)
    for split, n in (("train", 30), ("valid", 20), ("test", 10))
}


def pickled(data: Pairs = DATA) -> bytes:
    """As the tutorial's archive: pixels are k/256."""
    return gzip.compress(pickle.dumps(tuple((x / np.float32(256), y) for x, y in data.values())), 1)


def npz(data: Pairs = DATA) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{f"{axis}_{split}": a for split, pair in data.items() for axis, a in zip("xy", pair, strict=True)})
    return file.getvalue()


def read(path: Path) -> Pairs:
    return read_dataset(path, read_pickle)


def assert_same(found: Pairs, expected: Pairs = DATA) -> None:
    assert found.keys() == expected.keys()
    for split, (x, y) in expected.items():
        np.testing.assert_array_equal(found[split][0], x)
        np.testing.assert_array_equal(found[split][1], y)


@pytest.mark.parametrize("form", ["tuples", "lists in Fortran's order"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_decodes_exactly(tmp_path: Path, protocol: int, form: str) -> None:
    content = pickle.loads(gzip.decompress(pickled()))
    if form == "lists in Fortran's order":
        content = [[np.asfortranarray(x.astype(">f8")), y.astype(np.uint8)] for x, y in content]
    (tmp_path / "mnist").write_bytes(pickle.dumps(content, protocol))
    assert_same(read(tmp_path / "mnist"))


def refused(marker: Path = Path("x")) -> dict[str, tuple[bytes, str]]:
    """What is in the file, and what is said of it."""
    claimed = (3 * 2**30).to_bytes(4, "little")  # by each member, in the central directory
    huge = re.sub(rb"(?s)(PK\x01\x02.{20}).{4}", lambda found: found[1] + claimed, npz())
    return {
        "two splits": (gzip.compress(pickle.dumps([DATA["train"]] * 2)), "x_valid, y_valid"),
        "nothing": (b"", "."),
        "HTML": (b"\n<!DOCTYPE html><html>Not Found", "."),
        "a cut npz": (npz()[:-30], "."),
        "other arrays": (npz({"train": DATA["train"], "val": DATA["valid"]}), r"found \['x_train', 'x_val'"),
        "a huge npz": (huge, "it decodes to more than 4 GiB"),
        **{name: (gzip.compress(content), ".") for name, content in hostile(marker).items()},
    }


@pytest.mark.parametrize("case", refused())
def test_wrong_content_is_named_and_never_runs(tmp_path: Path, case: str) -> None:
    content, reason = refused(tmp_path / "executed")[case]
    (tmp_path / "own.pkl.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"own\.pkl\.gz: damaged, or not a dataset \(.*{reason}"):
        read(tmp_path / "own.pkl.gz")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("whole", [pickled(), npz()], ids=["pkl.gz", "npz"])
def test_every_truncation_and_flip_is_an_error_or_harmless(tmp_path: Path, whole: bytes) -> None:
    """A gzip and a zip carry checksums, so damage is either found or lies where nothing is read."""
    path, random, refused = tmp_path / "own", np.random.default_rng(1), 0
    for _ in range(250):
        damaged = bytearray(whole)
        if random.random() < 0.3:
            damaged = damaged[: random.integers(len(whole))]
        else:
            damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            found = read(path)
            assert_same(found, {split: DATA[split] for split in found})  # a zip may lose its last members
        except UserError:
            refused += 1
    assert refused > 170


def test_fast_copy_is_made_once_and_again_when_damaged(tmp_path: Path) -> None:
    def opened(content: bytes) -> tuple[Path, int, str]:
        (tmp_path / "own.npz").write_bytes(content)
        os.utime(tmp_path / "own.npz", ns=(1, 1))
        module = MNISTDataModule(str(tmp_path / "own.npz"), data_dir=str(tmp_path))
        module.prepare_data()
        (copy,) = (tmp_path / "copies").glob("*.pt")
        return copy, copy.stat().st_mtime_ns, module.digest

    copy, made, digest = opened(npz())
    assert opened(npz()) == (copy, made, digest)
    for damaged in (copy.read_bytes()[:-100], b"", pickle.dumps(5)):
        copy.write_bytes(damaged)
        assert opened(npz())[2] == digest
    assert opened(npz(DATA | {"train": DATA["valid"]}))[2] != digest


# ----------------------------------------------------------------------------------------- download


@contextmanager
def server(body: bytes | None, cut: int | None = None) -> Iterator[tuple[str, list[str]]]:
    """A real HTTP server of one file on this machine; yields its address and the list of requests it had."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/mnist.pkl.gz", requests
        httpd.shutdown()


def test_addresses_are_tried_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unreachable, without the file, broken off, with another dataset, and one that has it; failures leave nothing."""
    other = {split: (255 - x, y) for split, (x, y) in DATA.items()}
    (tmp_path / "own.pkl.gz").write_bytes(pickled())
    module = MNISTDataModule(str(tmp_path / "own.pkl.gz"), data_dir=str(tmp_path / "copies"))
    module.prepare_data()
    monkeypatch.setattr(mnist, "DIGEST", module.digest)
    archive, none = tmp_path / "data" / "mnist.pkl.gz", tmp_path / "none" / "mnist.pkl.gz"
    with (
        server(None) as (missing, _),
        server(pickled(), cut=500) as (cut, _),
        server(pickled(other)) as (wrong, _),
        server(pickled()) as (right, requests),
    ):
        urls = ["http://127.0.0.1:9/mnist.pkl.gz", missing, cut, wrong, right]
        said = mnist.download_mnist(urls[:4], none, timeout=60)
        assert not mnist.download_mnist(urls, archive, timeout=60)
        assert not mnist.download_mnist(urls, archive)  # it is there
        assert len(requests) == 1
    assert re.search(r":9/.*no connection.*; .*404 Client.*; .*it broke off.*; .*but not MNIST", said)
    assert [entry.name for entry in none.parent.iterdir() if entry.name != ".lock"] == []
    assert_same(mnist.read_mnist(archive))


def open_mnist(folder: Path, url: str) -> None:
    data = MNISTDataModule("mnist", data_dir=str(folder), url=url)
    data.prepare_data()
    data.setup("fit")
    assert data.digest == mnist.DIGEST


@pytest.mark.mnist
@pytest.mark.slow
def test_eight_processes_at_once_download_and_decode_once(mnist_dir: Path, tmp_path: Path) -> None:
    archive = (mnist_dir / "mnist" / "mnist.pkl.gz").read_bytes()
    with server(archive) as (url, requests):
        processes = [CONTEXT.Process(target=open_mnist, args=(tmp_path, url)) for _ in range(8)]
        for process in processes:
            process.start()
        assert [wait(process) for process in processes] == [0] * 8
    assert len(requests) == 1
    assert (tmp_path / "mnist" / "mnist.pkl.gz").read_bytes() == archive
