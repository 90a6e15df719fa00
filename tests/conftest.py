"""What the tests share: the command line as a process, a small dataset, the real archive if there is one."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from common import ARCHIVE, ENVIRONMENT, Run
from forks import start, wait

# Torch is imported where it is needed: the process that only hands out tests starts without it.


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        if item.name.startswith("test_rung_changes_nothing[mnist"):  # the ladder's last rung is climbed in any case
            item.add_marker(pytest.mark.matrix)
        if item.nodeid.startswith("tests/project/"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("mnist") and not ARCHIVE:
            item.add_marker(pytest.mark.skip(reason="MNIST_LIT_ARCHIVE names no archive"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def cli_in(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """``python -m mnist_lit ...`` in the folder that comes first; it must succeed, or fail if not ``ok``.

    It may do either if ``ok`` is None. It is a process of its own in any case. Unless it is a fork of one that has
    imported mnist_lit already, it starts its own interpreter, which takes seconds.
    """
    printed = tmp_path_factory.mktemp("printed")

    def run(
        folder: Path, *args: object, ok: bool | None = True, env: dict[str, str] | None = None, fork: bool = True
    ) -> subprocess.CompletedProcess[str]:
        arguments, environment = list(map(str, args)), ENVIRONMENT | (env or {})
        if fork:
            output, errors = printed / "output", printed / "errors"
            for path in (output, errors):
                path.write_text("")
            code = wait(start(folder, arguments, environment, output, errors))
            done = subprocess.CompletedProcess(arguments, code, output.read_text(), errors.read_text())
        else:
            command = [sys.executable, "-m", "mnist_lit", *arguments]
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert ok in (None, done.returncode == 0), f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def cli(cli_in: Run, tmp_path: Path) -> Run:
    """The same in an empty folder."""
    return partial(cli_in, tmp_path)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file of 1,000 / 300 / 300 digits: trains in a second and has shorter last batches."""
    from mnist_lit.datasets.digits import make_digits

    path = tmp_path_factory.mktemp("small") / "small.npz"
    arrays = {}
    for (name, (images, labels)), n in zip(make_digits().items(), (1000, 300, 300), strict=True):
        arrays[f"x_{name}"], arrays[f"y_{name}"] = images[:n], labels[:n]
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def digits(small: Path) -> np.ndarray:
    """Its images to train on, uint8 (1000, 28, 28)."""
    return np.load(small)["x_train"]


@pytest.fixture(scope="session")
def mnist_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the real archive in its place, decoded once for all tests, for those marked ``mnist``."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "mnist").mkdir()
    (folder / "mnist" / "mnist.pkl.gz").symlink_to(Path(ARCHIVE or "").resolve())
    return folder
