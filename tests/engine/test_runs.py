"""Runs of several processes at once: each in a folder of its own."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
from common import CONFIGS, ENVIRONMENT, RUN, Run, assert_one_message, checkpoint
from forks import Forks
from test_resume import interrupt

FIT = ("fit", "--config", CONFIGS / "logistic.yaml", "--dashboard.every_n_epochs=0")


def make(root: Path, gate: Any, names: Any) -> None:
    from mnist_lit.engine import runs

    gate.wait()
    names.put(runs.Run.create(root).name)


@pytest.mark.slow
@pytest.mark.matrix
def test_eight_starts_at_once_make_eight_folders(tmp_path: Path) -> None:
    """In each of 20 rounds. The gate opens for all of them in the moment before they look for a name."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mnist_lit.engine.run"])
    for number in range(20):
        gate, names = context.Barrier(8), context.Queue()
        root = tmp_path / str(number)
        processes = [context.Process(target=make, args=(root, gate, names)) for _ in range(8)]
        for process in processes:
            process.start()
        assert sorted(names.get(timeout=60) for _ in processes) == [f"version_{n}" for n in range(8)]
        for process in processes:
            process.join()
            assert process.exitcode == 0


@pytest.mark.slow
def test_run_that_is_being_trained_is_not_resumed(cli: Run, forks: Forks, small: Path, tmp_path: Path) -> None:
    """Another process waits for it a while, and then leaves it alone."""
    wait = ("--trainer.callbacks+=interrupt.WaitFor", f"--trainer.callbacks.path={tmp_path / 'go'}")
    cli(*FIT, "--data.dataset", small, *interrupt("SIGTERM", "on_train_batch_end", 20), ok=False)
    output = tmp_path / "output"
    resume = list(map(str, (*FIT, "--data.dataset", small, "--ckpt_path=last")))
    other = Forks()
    try:
        other.start(tmp_path, [*resume, *wait], ENVIRONMENT, output, output)
        deadline = time.monotonic() + 60
        while not (tmp_path / "go.waits").exists():
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.01)
        refused = cli(*resume, ok=False)
        assert_one_message(refused, "lightning_logs/version_0 is being trained by another process")
        (tmp_path / "go").touch()
        assert other.wait() == 0, output.read_text()
    finally:
        other.close()
    assert checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")["global_step"] == 32
