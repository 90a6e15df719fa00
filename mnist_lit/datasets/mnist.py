"""MNIST: addresses, retries and the digest that proves what arrived."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import requests
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.engine.data.files import Splits, content_digest, read_dataset
from mnist_lit.engine.errors import DatasetError, DownloadError
from mnist_lit.engine.storage import locked_directory

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
ATTEMPTS = 3
BACK_OFF = 0.5  # seconds before the second attempt, doubled before the third


def find_mnist(folder: Path) -> Path | None:
    """Find the tutorial's archive, or else the first IDX file, in a folder; None if neither is there."""
    return next((path for path in (folder / ARCHIVE, folder / IDX[0]) if path.exists()), None)


def read_mnist(archive: Path) -> Splits:
    """Read the tutorial's archive, or MNIST's IDX files.

    Raises:
        DatasetError: if the file is damaged or holds anything but MNIST.
    """
    splits = read_dataset(archive, read_pickle)
    digest = content_digest(splits)
    if digest != DIGEST:
        raise DatasetError(
            f"{archive}: a dataset, but not MNIST (content digest {digest}); delete it to "
            f"download MNIST, or use it as it is with --data.dataset={archive}"
        )
    return splits


def download_mnist(urls: Sequence[str], folder: Path, timeout: float) -> None:
    """Download MNIST unless it is there already. One of several processes does it.

    Args:
        urls: addresses of the tutorial's archive, or of folders of IDX files, which end with a slash. The first one
            that has MNIST is used.
        folder: where to put the files, once they are complete and known to hold MNIST.
        timeout: seconds to wait for the connection, and then for each chunk of the response.

    Raises:
        DownloadError: if none of the addresses has MNIST.
        DatasetError: if the folder cannot be written.
    """
    failures: list[str] = []
    unreachable: set[str] = set()  # hosts
    with locked_directory(folder):
        for url in urls:
            if find_mnist(folder):
                return
            if urlsplit(url).netloc in unreachable:
                continue
            try:
                _download_from(url, folder, timeout)
                return
            except DownloadError as error:
                failures.append(str(error))
                if isinstance(error.__cause__, requests.ConnectionError):
                    unreachable.add(urlsplit(url).netloc)
    raise DownloadError("; ".join(failures))


def _download_from(url: str, folder: Path, timeout: float) -> None:
    names = IDX if url.endswith("/") else [ARCHIVE]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as temporary:
        for name in names:
            _download(url + name if url.endswith("/") else url, Path(temporary) / name, timeout)
        try:
            read_mnist(Path(temporary) / names[0])
        except DatasetError as error:
            raise DownloadError(f"what came from {url} is not MNIST: {error.__cause__ or error}") from error
        for name in reversed(names):  # find_mnist looks for the first
            os.replace(Path(temporary) / name, folder / name)


def _download(url: str, path: Path, timeout: float) -> None:
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(BACK_OFF * 2 ** (attempt - 1))
        try:
            with requests.get(url, stream=True, timeout=timeout, headers=HEADERS) as response:
                response.raise_for_status()
                _write_body(response, path)
            return
        except requests.RequestException as error:
            failure = error
            status = error.response.status_code if error.response is not None else None
            final = status is not None and status < 500 and status not in (408, 429)
            if final or isinstance(error, ValueError):  # ValueError: the address itself is wrong
                break
    raise DownloadError(f"{url} could not be downloaded: {_reason(failure)}") from failure


def _write_body(response: requests.Response, path: Path) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    size = int(response.headers.get("Content-Length", 0))
    with Progress(*columns) as progress, path.open("wb") as file:
        task = progress.add_task("Downloading", total=size or None)
        for chunk in response.iter_content(1 << 16):
            progress.advance(task, file.write(chunk))


def _reason(error: requests.RequestException) -> str:
    """Summarize an error of requests in the few words that a person can use."""
    if isinstance(error, requests.HTTPError):
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut off half-way"
    if isinstance(error, requests.ConnectionError):
        if "Read timed out" in str(error):
            return "the server stopped sending half-way"
        return "no connection (is the network up? is the address right?)"
    return str(error)
