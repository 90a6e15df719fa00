"""Several processes as torchrun starts them: on one machine, and on two "machines" that are this one."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_same_weights, checkpoint, curves
from interrupt import signal_at

pytestmark = pytest.mark.slow
LAST = RUN / "checkpoints" / "last.ckpt"
FIT = ("fit", "--config", CONFIGS / "fast.yaml", "--data.batch_size=32", "--trainer.max_epochs=3")
FIT += ("--trainer.log_every_n_steps=5",)


def start(folder: Path, *arguments: object, processes: int = 2, nodes: tuple[str, ...] = ("--standalone",)):
    folder.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc_per_node={processes}"]
    on_cpu = ("--config", OVERLAYS / "ddp.yaml", "--trainer.accelerator=cpu", f"--trainer.devices={processes}")
    return subprocess.Popen(
        [*torchrun, "-m", "mnist_lit", *map(str, (*arguments, *on_cpu))],
        cwd=folder,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(*started: subprocess.Popen, ok: bool = True) -> str:
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all((process.returncode == 0) == ok for process in started), outputs
    return outputs[0]


@pytest.fixture(scope="module")
def uneven(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 / 129 / 299 digits: with batches of 64, one of two processes would have one more to validate."""
    path = tmp_path_factory.mktemp("uneven") / "uneven.npz"
    with np.load(small) as arrays:
        sizes = {"train": 1000, "valid": 129, "test": 299}
        np.savez(path, **{name: array[: sizes[name[2:]]] for name, array in arrays.items()})
    return path


@pytest.fixture(scope="module")
def fitted(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    wait(start(folder, *FIT, "--data.dataset", uneven))
    return folder


def assert_same_end(ours: Path, theirs: Path) -> None:
    assert_same_weights(*(checkpoint(folder / LAST)["state_dict"] for folder in (ours, theirs)))


@pytest.mark.parametrize(("command", "stage"), [("validate", "val"), ("test", "test")])
def test_metrics_of_two_processes_are_those_of_one(
    cli: Run, fitted: Path, uneven: Path, tmp_path: Path, command: str, stage: str
) -> None:
    """On 129 and 299 images, none of them counted twice."""
    arguments = (command, *FIT[1:], "--data.dataset", uneven, "--ckpt_path", fitted / LAST)
    one, two = (
        {name: float(value) for name, value in re.findall(r"((?:val|test)/\w+)\W+([\d.]+)", output)}
        for output in (cli(*arguments).stdout, wait(start(tmp_path / "two", *arguments)))
    )
    assert one.keys() == two.keys() == {f"{stage}/loss", f"{stage}/acc"}
    assert two[f"{stage}/acc"] == one[f"{stage}/acc"]
    assert two == pytest.approx(one, rel=1e-6)
    if command == "validate":
        assert {name: curves(fitted / RUN)[name][-1][1] for name in one} == pytest.approx(one, rel=1e-6)


def test_two_machines_are_two_processes(fitted: Path, uneven: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (*FIT, "--data.dataset", uneven, "--config", OVERLAYS / "nodes.yaml")
    common = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    folders = [tmp_path / str(rank) for rank in range(2)]
    nodes = [(*common, f"--node_rank={rank}") for rank in range(2)]
    wait(*(start(folder, *arguments, processes=1, nodes=node) for folder, node in zip(folders, nodes, strict=True)))
    assert_same_end(folders[0], fitted)
    for folder in folders:  # each has prepared the data for itself
        assert list((folder / "data" / "copies").glob("*.pt"))


def test_killed_process_ends_all_and_they_resume(fitted: Path, uneven: Path, tmp_path: Path) -> None:
    arguments = (*FIT, "--data.dataset", uneven, "--last_checkpoint.every_n_train_steps=8")
    output = wait(start(tmp_path, *arguments, *signal_at("SIGKILL", "on_train_batch_start", 20, rank=1)), ok=False)
    assert "Signal 9 (SIGKILL) received" in output
    assert checkpoint(tmp_path / LAST)["global_step"] == 16
    wait(start(tmp_path, *arguments, "--ckpt_path=last"))
    assert_same_end(tmp_path, fitted)


@pytest.mark.mnist
@pytest.mark.matrix
def test_second_process_has_no_second_copy_of_the_data(mnist_dir: Path, uneven: Path, tmp_path: Path) -> None:
    """MNIST's 55 MB are mapped, and what it has to itself is about what it has with a tiny dataset. The first
    process, which has decoded the archive, maps the same pages.
    """
    found = {}
    mnist = ("--data.dataset=mnist", f"--data.data_dir={mnist_dir}")
    for name, data in (("mnist", mnist), ("tiny", (f"--data.dataset={uneven}",))):
        folder = tmp_path / name
        wait(start(folder, *FIT, *data, "--trainer.max_epochs=1", "--trainer.callbacks+=memory.Memory"))
        found[name] = [json.loads((folder / f"memory.{rank}.json").read_text()) for rank in range(2)]
        print(name, [{key: f"{value / 1e6:.0f} MB" for key, value in rank.items()} for rank in found[name]])
    for process in found["mnist"]:
        assert process["data"] > 50e6
        assert process["data_dirty"] == 0
    assert found["mnist"][1]["anonymous"] - found["tiny"][1]["anonymous"] < 25e6
