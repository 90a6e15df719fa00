"""What made a run, with how many threads, and how it ended."""

import json
import os
import subprocess
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
from common import CONFIGS, RUN, Run
from interrupt import signal_at
from plain import Model, fit
from test_resume import TWO_PROCESSES

from mnist_lit.engine import Provenance
from mnist_lit.engine.threads import available_cpus


@pytest.mark.slow
def test_run_tells_what_made_it_and_how_it_ended(cli: Run, small: Path, tmp_path: Path) -> None:
    """In a repository with changes; the test after the fit ends in the numbers of a test of its own."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "notes.txt").write_text("one\n")
    git("add", "notes.txt")
    git("commit", "--quiet", "-m", "One")
    (tmp_path / "notes.txt").write_text("two\n")
    fit = ("fit", "--config", CONFIGS / "fast.yaml", "--data.dataset", small)
    fit += ("--data.batch_size=64", "--trainer.max_epochs=2")
    cli(*fit, "--num_threads=2", *signal_at("SIGTERM", "on_train_batch_end", 20), ok=False)
    done = cli(*fit, "--ckpt_path=last", "--test_after_fit=true")

    first, second = json.loads((tmp_path / RUN / "provenance.json").read_text())
    assert (first["exit"], first["step"]) == ("SIGTERM", 20)
    assert (second["exit"], second["step"]) == ("finished", 32)
    assert (first["threads"], second["threads"]) == (2, 2)
    assert "--ckpt_path=last" in second["command"]
    assert first["versions"]["torch"] == version("torch")
    assert first["start"] < first["end"] < second["start"] < second["end"]
    assert first["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    assert "-one\n+two\n" in (tmp_path / RUN / "git.diff").read_text()

    other = cli(*fit, "--ckpt_path=last", "--num_threads=1").stderr
    assert "with --num_threads=2, this command has 1" in other

    metrics = json.loads((tmp_path / RUN / "metrics.json").read_text())
    assert metrics["best"]["checkpoint"] == "best.ckpt"
    cli("test", "--ckpt_path", RUN / "checkpoints" / "best.ckpt")
    table = json.loads((tmp_path / "lightning_logs" / "version_1" / "metrics.json").read_text())
    for name in ("test/loss", "test/acc"):
        assert name in done.stdout
        assert metrics[name] == table[name]


@pytest.mark.parametrize("damaged", [True, False])
def test_file_of_another_kind_does_not_end_the_run(tmp_path: Path, damaged: bool) -> None:
    """Nor does one that cannot be written. With a plain ``Trainer``."""
    file = tmp_path / "provenance.json"
    file.write_text("damaged") if damaged else file.mkdir()
    with nullcontext() if damaged else pytest.warns(UserWarning, match=r"provenance\.json is not written"):
        fit(Model(), tmp_path, Provenance())
    if damaged:
        (start,) = json.loads(file.read_text())
        assert (start["exit"], start["step"]) == ("finished", 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "environment", "expected"), [((), "3", 3), (TWO_PROCESSES, "", max(1, available_cpus() // 2))], ids=str
)
def test_number_of_threads_is_what_the_process_may_use(
    cli: Run, small: Path, tmp_path: Path, options: tuple[str, ...], environment: str, expected: int
) -> None:
    fit = ("fit", "--config", CONFIGS / "fast.yaml", "--data.dataset", small, *options)
    cli(*fit, env={"OMP_NUM_THREADS": environment}, fork=not options)
    assert json.loads((tmp_path / RUN / "provenance.json").read_text())[-1]["threads"] == expected
    assert f"num_threads: {expected}\n" in (tmp_path / RUN / "config.yaml").read_text()


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
