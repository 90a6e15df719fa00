"""MNIST: addresses, download, and the digest that proves what arrived."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import requests
from filelock import FileLock
from requests.adapters import HTTPAdapter
from rich.progress import track
from urllib3.util import Retry

from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.engine import UserError, read_dataset

# Tried in turn: the tutorial's, the same on its other branch, and torchvision's mirror of the IDX files. An address
# that ends with a slash is of a folder of these.
URLS = (
    "https://github.com/pytorch/tutorials/raw/master/_static/mnist.pkl.gz",
    "https://github.com/pytorch/tutorials/raw/main/_static/mnist.pkl.gz",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
ARCHIVE = "mnist.pkl.gz"
IDX = [f"{name}-ubyte.gz" for split in ("train", "t10k") for name in (f"{split}-images-idx3", f"{split}-labels-idx1")]
# SHA-256 over MNIST's 70,000 images as uint8 (train, valid, test), then its labels as uint8: the same for
# every way in which the tutorial's archive may be compressed.
DIGEST = "c2069063c1105f2bf96266aef1ff68c6e13bdda7a54e37bf19c16f1db24efc83"

HEADERS = {"Accept-Encoding": "identity"}  # or a server may send the file as a gzip of a gzip
RETRY = Retry(total=2, backoff_factor=0.5, status_forcelist=(408, 429, 500, 502, 503, 504))


class DownloadError(UserError):
    """None of the addresses has MNIST."""


def find_mnist(folder: Path) -> Path | None:
    """Find the tutorial's archive, or else the first IDX file, in a folder; None if neither is there."""
    return next((path for path in (folder / ARCHIVE, folder / IDX[0]) if path.exists()), None)


def read_mnist(path: Path) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Read the tutorial's archive, or MNIST's IDX files.

    Raises:
        UserError: if the file is damaged or holds anything but MNIST.
    """
    pairs, digest = read_dataset(path, read_pickle), hashlib.sha256()
    for x, _ in pairs.values():
        digest.update(np.uint8(x * 256 if x.dtype.kind == "f" else x).tobytes())
    for _, y in pairs.values():
        digest.update(y.astype(np.uint8).tobytes())
    if digest.hexdigest() != DIGEST:
        raise UserError(
            f"{path}: a dataset, but not MNIST; delete it to download MNIST, or use it as it is with "
            f"--data.dataset={path}"
        )
    return pairs


def download_mnist(urls: Sequence[str], folder: Path, timeout: float = 10.0) -> None:
    """Download MNIST unless it is there already. One of several processes does it.

    Args:
        urls: addresses of the tutorial's archive, or of folders of IDX files, which end with a slash. The first one
            that has MNIST is used.
        folder: where to put the files, once they are complete and known to hold MNIST.
        timeout: seconds to wait for the connection, and then for each chunk of the response.

    Raises:
        DownloadError: if none of the addresses has MNIST.
        UserError: if the folder cannot be written.
    """
    failures: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for url in urls:
                if not find_mnist(folder):
                    failures += _try(url, folder, timeout)
    except OSError as error:
        raise UserError(
            f"cannot write in the data folder {folder} ({error.strerror or error}); make room or make it writable, or "
            "choose another one with --data.data_dir"
        ) from error
    if not find_mnist(folder):
        raise DownloadError("; ".join(failures))


def _try(url: str, folder: Path, timeout: float) -> list[str]:
    """Download from one address; returns why that failed."""
    names = {name: url + name for name in IDX} if url.endswith("/") else {ARCHIVE: url}
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as temporary:
        try:
            for name, address in names.items():
                _download(address, Path(temporary) / name, timeout)
            read_mnist(Path(temporary) / next(iter(names)))
        except requests.HTTPError as error:
            return [str(error)]
        except requests.RequestException as error:
            return [f"{url}: no connection, or it broke off ({type(error).__name__})"]
        except UserError as error:
            return [f"what came from {url} is not MNIST: {error}"]
        for name in reversed(names):  # find_mnist looks for the first
            os.replace(Path(temporary) / name, folder / name)
    return []


def _download(url: str, path: Path, timeout: float) -> None:
    with requests.Session() as session, path.open("wb") as file:
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=RETRY))
        with session.get(url, stream=True, timeout=timeout, headers=HEADERS) as response:
            response.raise_for_status()
            chunks = int(response.headers.get("Content-Length", 0)) >> 16
            for chunk in track(response.iter_content(1 << 16), "Downloading", chunks or None):
                file.write(chunk)
