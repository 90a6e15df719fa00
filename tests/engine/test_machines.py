"""Several processes as torchrun or Lightning starts them: on one machine, and on two "machines" that are this one."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from common import CONFIGS, ENVIRONMENT, LAST, OVERLAYS, RUN, Run, assert_same_last, curves
from interrupt import signal_at

pytestmark = pytest.mark.slow
FIT = ("fit", "--config", CONFIGS / "fast.yaml", "--data.batch_size=32", "--trainer.max_epochs=3")
FIT += ("--trainer.log_every_n_steps=5",)


def start(folder: Path, *arguments: object, processes: int = 2, nodes: tuple[str, ...] = ("--standalone",)):
    """By torchrun, or without any ``nodes`` by Lightning."""
    folder.mkdir(exist_ok=True)
    torchrun = ["-m", "torch.distributed.run", *nodes, f"--nproc_per_node={processes}"] if nodes else []
    on_cpu = ("--config", OVERLAYS / "ddp.yaml", "--trainer.accelerator=cpu", f"--trainer.devices={processes}")
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "mnist_lit", *map(str, (*arguments, *on_cpu))],
        cwd=folder,
        # Without the second, restarted processes may read addresses of dead ones (pytorch issue 135712).
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait(*started: subprocess.Popen) -> str:
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert not any(process.returncode for process in started), outputs
    return outputs[0]


@pytest.fixture(scope="module")
def fitted(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 1,000 / 129 / 299 digits: with batches of 64, one of two processes would validate one more."""
    folder = tmp_path_factory.mktemp("fitted")
    with np.load(small) as arrays:
        sizes = {"train": 1000, "valid": 129, "test": 299}
        np.savez(folder / "uneven.npz", **{name: array[: sizes[name[2:]]] for name, array in arrays.items()})
    wait(start(folder, *FIT, "--data.dataset=uneven.npz"))
    return folder


def test_metrics_of_two_processes_are_those_of_one(cli_in: Run, fitted: Path) -> None:
    """On 299 images, none of them counted twice; those of validation are in the curves of the run."""
    arguments = (*FIT[1:], "--data.dataset=uneven.npz", "--ckpt_path", LAST)
    one = cli_in(fitted, "test", *arguments).stdout + cli_in(fitted, "validate", *arguments).stdout
    two = wait(start(fitted, "test", *arguments))
    metric = re.compile(r"((?:val|test)/\w+)\W+([\d.]+)")
    found = [{name: float(value) for name, value in metric.findall(output)} for output in (one, two)]
    found[1] |= {name: curves(fitted / RUN)[name][-1][1] for name in ("val/loss", "val/acc")}
    assert found[0].keys() == found[1].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.matrix
def test_two_machines_are_two_processes(fitted: Path, tmp_path: Path) -> None:
    """Which start at once, and share the folder with the data."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (*FIT, "--data.dataset", fitted / "uneven.npz", "--config", OVERLAYS / "nodes.yaml")
    shared = tmp_path / "data"
    arguments += ("--data=recorder.Reads", "--data.data_dir", shared)
    common = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    folders = [tmp_path / str(rank) for rank in range(2)]
    nodes = [(*common, f"--node_rank={rank}") for rank in range(2)]
    wait(*(start(folder, *arguments, processes=1, nodes=node) for folder, node in zip(folders, nodes, strict=True)))
    assert_same_last(folders[0] / RUN, fitted / RUN, "state_dict")
    assert len(list(shared.glob("read-by-*"))) == 1
    assert [path.suffix for path in sorted((shared / "copies").iterdir())] == ["", ".pt"]  # the lock and the copy


@pytest.mark.parametrize("nodes", [("--standalone", "--max-restarts=3"), ()], ids=["torchrun", "by hand"])
def test_killed_process_restarts_the_group(fitted: Path, tmp_path: Path, nodes: tuple[str, ...]) -> None:
    """From the last checkpoint, to the bytes of the uninterrupted run; Lightning ends, and the same command resumes."""
    arguments = (*FIT, "--data.dataset", fitted / "uneven.npz", "--last_checkpoint.every_n_train_steps=8")
    arguments += ("--ckpt_path=last",)
    kill = signal_at("SIGKILL", "on_train_batch_start", 20, rank=1)
    killed = start(tmp_path, *arguments, *kill, nodes=nodes)
    if nodes:
        wait(killed)
    else:
        killed.communicate(timeout=300)
        assert killed.returncode
        wait(start(tmp_path, *arguments, nodes=nodes))
    assert (tmp_path / RUN / "config-from-step-16.yaml").exists()
    assert_same_last(tmp_path / RUN, fitted / RUN, "state_dict")
