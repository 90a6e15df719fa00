"""MNIST: addresses, download, and the digest that proves what arrived."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import requests
from filelock import FileLock
from rich.progress import track

from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.engine import UserError, read_dataset

# Tried in turn: the tutorial's file, and the same on the repository's other branch.
URLS = tuple(f"https://github.com/pytorch/tutorials/raw/{branch}/_static/mnist.pkl.gz" for branch in ("master", "main"))
ARCHIVE = "mnist.pkl.gz"
# SHA-256 over MNIST's 70,000 images as uint8 (train, valid, test), then its labels as uint8: the same for
# every way in which the tutorial's archive may be compressed.
DIGEST = "c2069063c1105f2bf96266aef1ff68c6e13bdda7a54e37bf19c16f1db24efc83"


def read_mnist(path: Path) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
    """Read the tutorial's archive.

    Raises:
        UserError: if the file is damaged or holds anything but MNIST.
    """
    pairs, digest = read_dataset(path, read_pickle), hashlib.sha256()
    for array in [*(x for x, _ in pairs.values()), *(y.astype(np.uint8) for _, y in pairs.values())]:
        digest.update(array.tobytes())
    if digest.hexdigest() != DIGEST:
        raise UserError(
            f"{path}: a dataset, but not MNIST; delete it to download MNIST, or use it as it is with "
            f"--data.dataset={path}"
        )
    return pairs


def download_mnist(urls: Sequence[str], archive: Path, timeout: float = 10.0) -> str:
    """Download MNIST unless it is there already. One of several processes does it.

    Args:
        urls: addresses of the tutorial's archive. The first one that has MNIST is used.
        archive: where to put the file, once it is complete and known to hold MNIST.
        timeout: seconds to wait for the connection, and then for each chunk of the response.

    Returns:
        why none of the addresses has MNIST, or "".

    Raises:
        UserError: if the folder cannot be written.
    """
    failures: list[str] = []
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(archive.parent / ".lock"):
            for url in urls:
                if not archive.exists():
                    failures.append(_try(url, archive, timeout))
    except OSError as error:
        raise UserError(
            f"cannot write in the data folder {archive.parent} ({error.strerror or error}); make room or make it "
            "writable, or choose another one with --data.data_dir"
        ) from error
    return "" if archive.exists() else "; ".join(failures)


def _try(url: str, archive: Path, timeout: float) -> str:
    """Download from one address; returns why that failed, or ""."""
    part = archive.with_name(f".part-{archive.name}")
    headers = {"Accept-Encoding": "identity"}  # or a server may send the file as a gzip of a gzip
    try:
        with requests.get(url, stream=True, timeout=timeout, headers=headers) as response, part.open("wb") as file:
            response.raise_for_status()
            chunks = int(response.headers.get("Content-Length", 0)) >> 16
            for chunk in track(response.iter_content(1 << 16), "Downloading", chunks or None):
                file.write(chunk)
        read_mnist(part)
        part.replace(archive)
        return ""
    except requests.HTTPError as error:
        return str(error)
    except requests.RequestException as error:
        return f"{url}: no connection, or it broke off ({type(error).__name__})"
    except UserError as error:
        return f"what came from {url} is not MNIST: {error}"
    finally:
        part.unlink(missing_ok=True)
