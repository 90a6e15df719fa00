"""The number of threads: from what the process may use, on record with the run, the same when resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from common import CONFIGS, RUN, Run

from mnist_lit.engine.threads import available_cpus

DDP = ("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu")


@pytest.mark.parametrize(
    ("option", "environment", "expected"),
    [
        (("--num_threads=2",), "3", 2),
        pytest.param((), "3", 3, marks=pytest.mark.slow),
        pytest.param((), "", available_cpus(), marks=pytest.mark.slow),
        pytest.param(DDP, "", max(1, available_cpus() // 2), marks=pytest.mark.slow),
    ],
)
def test_number_is_recorded_and_kept(
    cli: Run, small: Path, tmp_path: Path, option: tuple[str, ...], environment: str, expected: int
) -> None:
    fit = ("fit", "--config", CONFIGS / "fast.yaml", "--dashboard.every_n_epochs=0", "--data.dataset", small)
    cli(*fit, *option, env={"OMP_NUM_THREADS": environment}, fork=option != DDP)
    config = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())
    assert config["num_threads"] == expected
    assert json.loads((tmp_path / RUN / "provenance.json").read_text())[-1]["threads"] == expected
    if option and option != DDP:
        # It is finished: the number is compared before there is found to be nothing left to do.
        resumed = cli(*fit, "--ckpt_path=last", env={"OMP_NUM_THREADS": "1"})
        assert "num_threads" not in resumed.stderr
        other = cli(*fit, "--ckpt_path=last", "--num_threads=1")
        assert "--num_threads=2, this command has 1" in other.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_and_the_quota_of_a_container_count(tmp_path: Path) -> None:
    allowed, quota = os.sched_getaffinity(0), tmp_path / "cpu.max"
    for text, expected in (("max 100000", len(allowed)), ("50000 100000", 1)):
        quota.write_text(text)
        assert available_cpus(limit=quota) == expected
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
