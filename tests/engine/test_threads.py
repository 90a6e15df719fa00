"""The number of threads: from what the process may use, on record with the run, the same when resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from common import CONFIGS, RUN, Run

from mnist_lit.engine.threads import available_cpus

LAST = RUN / "checkpoints" / "last.ckpt"
FIT = ("fit", "--config", CONFIGS / "fast.yaml", "--trainer.max_epochs=1", "--dashboard.every_n_epochs=0")


def recorded(folder: Path) -> list[int]:
    """In the run's config and in its provenance."""
    config = yaml.safe_load((folder / RUN / "config.yaml").read_text())
    return [config["num_threads"], json.loads((folder / RUN / "provenance.json").read_text())[-1]["threads"]]


@pytest.mark.parametrize(
    ("option", "environment", "expected"), [((), "3", 3), (("--num_threads=2",), "3", 2), ((), "", available_cpus())]
)
def test_number_is_chosen_and_recorded(
    cli: Run, small: Path, tmp_path: Path, option: tuple[str, ...], environment: str, expected: int
) -> None:
    cli(*FIT, "--data.dataset", small, *option, env={"OMP_NUM_THREADS": environment})
    assert recorded(tmp_path) == [expected] * 2


def test_resumed_run_keeps_its_number_or_warns(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*FIT, "--data.dataset", small, "--num_threads=2")
    # One that is finished: the number is compared before there is found to be nothing left to do.
    resumed = cli(*FIT, "--data.dataset", small, "--ckpt_path", LAST, env={"OMP_NUM_THREADS": "1"})
    assert "num_threads" not in resumed.stderr
    other = cli(*FIT, "--data.dataset", small, "--ckpt_path", LAST, "--num_threads=1")
    assert "--num_threads=2, this command has 1" in other.stderr


@pytest.mark.slow
def test_processes_share_the_processors(cli: Run, small: Path, tmp_path: Path) -> None:
    ddp = ("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu")
    cli(*FIT, "--data.dataset", small, *ddp, env={"OMP_NUM_THREADS": ""}, fork=False)
    assert recorded(tmp_path) == [max(1, available_cpus() // 2)] * 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_counts() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, available_cpus()),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, available_cpus()),
        ({}, available_cpus()),
    ],
)
def test_quota_of_a_container_counts(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_cpus(groups=tmp_path) == expected
