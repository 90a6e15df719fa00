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
from common import CONFIGS, ENVIRONMENT, OVERLAYS, Run, assert_same_weights, checkpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.slow
CHECKPOINTS = Path("lightning_logs/version_0/checkpoints")
ON_CPU = ("--config", OVERLAYS / "ddp.yaml", "--trainer.accelerator=cpu")
FIT = (
    *("fit", "--config", CONFIGS / "fast.yaml", "--data.batch_size=32", "--trainer.max_epochs=3"),
    "--trainer.log_every_n_steps=5",
)
KILL = {"class_path": "interrupt.SignalAt"}
KILL["init_args"] = {"signum": "SIGKILL", "hook": "on_train_batch_start", "step": 20, "rank": 1}  # type: ignore


def start(folder: Path, arguments: tuple, *, processes: int, nodes: tuple[str, ...] = ("--standalone",)):
    folder.mkdir(exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--nproc_per_node={processes}"]
    settings = [*arguments, *ON_CPU, f"--trainer.devices={processes}"]
    return subprocess.Popen(
        [*torchrun, "-m", "mnist_lit", *map(str, settings)],
        cwd=folder,
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(folder: Path, *arguments: object, ok: bool = True) -> str:
    process = start(folder, arguments, processes=2)
    output, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) == ok, output
    return output


@pytest.fixture(scope="module")
def uneven(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 / 129 / 301 digits: with batches of 64, one of two processes would have one more to validate."""
    path = tmp_path_factory.mktemp("uneven") / "uneven.npz"
    with np.load(small) as arrays:
        x, y = arrays["x_valid"], arrays["y_valid"]
        test = np.concatenate([arrays["x_test"], x[:1]]), np.concatenate([arrays["y_test"], y[:1]])
        np.savez(
            path,
            x_train=arrays["x_train"],
            y_train=arrays["y_train"],
            x_valid=x[:129],
            y_valid=y[:129],
            x_test=test[0],
            y_test=test[1],
        )
    return path


@pytest.fixture(scope="module")
def fitted(uneven: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    torchrun(folder, *FIT, "--data.dataset", uneven)
    return folder


def metrics(output: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"((?:val|test)/\w+)\W+([\d.]+)", output)}


@pytest.mark.parametrize("command", ["validate", "test"])
def test_metrics_of_two_processes_are_those_of_one(
    cli: Run, fitted: Path, uneven: Path, tmp_path: Path, command: str
) -> None:
    """On 129 and 301 images, none of them counted twice."""
    last = fitted / CHECKPOINTS / "last.ckpt"
    arguments = (command, *FIT[1:], "--data.dataset", uneven, "--ckpt_path", last)
    one = metrics(cli(*arguments).stdout)
    two = metrics(torchrun(tmp_path / "two", *arguments))
    stage = {"validate": "val", "test": "test"}[command]
    assert one.keys() == two.keys() == {f"{stage}/loss", f"{stage}/acc"}
    assert two[f"{stage}/acc"] == one[f"{stage}/acc"]
    assert two[f"{stage}/loss"] == pytest.approx(one[f"{stage}/loss"], rel=1e-6)
    if command == "validate":
        events = EventAccumulator(str(fitted / CHECKPOINTS.parent)).Reload()
        for name, value in one.items():
            assert events.Scalars(name)[-1].value == pytest.approx(value, rel=1e-6)


def test_two_machines_are_two_processes(fitted: Path, uneven: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (*FIT, "--data.dataset", uneven, "--config", OVERLAYS / "nodes.yaml")
    common = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={port}")
    machines = [
        start(tmp_path / str(rank), arguments, processes=1, nodes=(*common, f"--node_rank={rank}")) for rank in range(2)
    ]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    ours, theirs = (checkpoint(folder / CHECKPOINTS / "last.ckpt") for folder in (tmp_path / "0", fitted))
    assert_same_weights(ours["state_dict"], theirs["state_dict"])
    for folder in ("0", "1"):  # each has prepared the data for itself
        assert list((tmp_path / folder / "data" / "copies").glob("*.pt"))


def test_killed_process_ends_all_and_they_resume(fitted: Path, uneven: Path, tmp_path: Path) -> None:
    arguments = (*FIT, "--data.dataset", uneven, "--last_checkpoint.every_n_train_steps=8")
    output = torchrun(tmp_path, *arguments, f"--trainer.callbacks+={json.dumps(KILL)}", ok=False)
    assert "Signal 9 (SIGKILL) received" in output
    assert checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["global_step"] == 16
    torchrun(tmp_path, *arguments, "--ckpt_path=last")
    ours, theirs = (checkpoint(folder / CHECKPOINTS / "last.ckpt") for folder in (tmp_path, fitted))
    assert_same_weights(ours["state_dict"], theirs["state_dict"])


@pytest.mark.mnist
@pytest.mark.matrix
def test_second_process_has_no_second_copy_of_the_data(mnist_dir: Path, uneven: Path, tmp_path: Path) -> None:
    """MNIST's 55 MB are mapped, and what it has to itself is about what it has with a tiny dataset. The first
    process, which has decoded the archive, maps the same pages.
    """
    found = {}
    for name, data in (
        ("mnist", ("--data.dataset=mnist", f"--data.data_dir={mnist_dir}")),
        ("tiny", (f"--data.dataset={uneven}",)),
    ):
        folder = tmp_path / name
        settings = ("--trainer.max_epochs=1", '--trainer.callbacks+={"class_path": "memory.Memory"}')
        torchrun(folder, *FIT, *data, *settings)
        found[name] = [json.loads((folder / f"memory.{rank}.json").read_text()) for rank in range(2)]
        print(name, [{key: f"{value / 1e6:.0f} MB" for key, value in rank.items()} for rank in found[name]])
    for process in found["mnist"]:
        assert process["data"] > 50e6
        assert process["data_dirty"] == 0
    assert found["mnist"][1]["anonymous"] - found["tiny"][1]["anonymous"] < 25e6
