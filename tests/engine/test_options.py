"""Resuming with other options: they count, or they are refused before training; a run from old weights is a new run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from common import CONFIGS, OVERLAYS, ROOT, RUN, Run, assert_one_message, assert_same, checkpoint
from test_resume import interrupt

LAST = RUN / "checkpoints" / "last.ckpt"
BEST = RUN / "checkpoints" / "best.ckpt"
CNN = ("fit", "--config", CONFIGS / "cnn.yaml", "--trainer.log_every_n_steps=4", "--dashboard.every_n_epochs=0")
STOPPED = interrupt("SIGTERM", "on_train_batch_end", 20)  # in the second epoch of 16 steps
COSINE = ("--config", OVERLAYS / "cosine.yaml")
MATRIX = (pytest.mark.slow, pytest.mark.matrix)
STOPPING = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss")


def contents(folder: Path) -> dict[str, bytes]:
    """Of a run, without the notes of its starts."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("provenance.json", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        ((), ("--model.momentum=0.5",), "--model.momentum=0.5 (0.9"),
        pytest.param(COSINE, (*COSINE, "--lr_scheduler.T_max=77"), "--lr_scheduler.T_max=77 (10", marks=MATRIX),
        pytest.param(COSINE, (*COSINE, "--optimizer.lr=0.5"), "--optimizer.lr=0.5", marks=MATRIX),
        pytest.param(
            (*STOPPING, "--trainer.callbacks.patience=3"),
            (*STOPPING, "--trainer.callbacks.patience=9"),
            "--trainer.callbacks.EarlyStopping.val/loss.patience=9 (3",
            marks=MATRIX,
        ),
    ],
    ids=["momentum", "T_max", "lr", "patience"],
)
def test_option_that_the_checkpoint_would_override_is_refused(
    cli: Run, small: Path, tmp_path: Path, first: tuple, then: tuple, named: str
) -> None:
    """``test_mistakes.py`` has more of them; here, the run stays as it was and resumes."""
    cli(*CNN, "--data.dataset", small, *first, *STOPPED, ok=False)
    before = contents(tmp_path / RUN)
    refused = cli(*CNN, "--data.dataset", small, *then, "--ckpt_path=last", ok=False)
    assert_one_message(refused, named, f"--init_from={LAST}")
    assert contents(tmp_path / RUN).keys() == before.keys()
    cli(*CNN, "--data.dataset", small, *first, "--ckpt_path=last")


@pytest.mark.slow
def test_options_that_count_are_not_refused(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*CNN, "--data.dataset", small, *STOPPED, ok=False)
    options = ("--trainer.max_epochs=3", "--trainer.log_every_n_steps=2", "--data.num_workers=1")
    cli(*CNN, "--data.dataset", small, *options, "--ckpt_path=last")
    assert checkpoint(tmp_path / LAST)["global_step"] == 3 * 16
    (resumed,) = (tmp_path / RUN).glob("config-from-step-*.yaml")
    assert yaml.safe_load(resumed.read_text())["trainer"]["max_epochs"] == 3


@pytest.mark.slow
def test_another_batch_size_counts_from_the_next_epoch(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*CNN, "--data.dataset", small, "--trainer.max_epochs=1")
    cli(*CNN, "--data.dataset", small, "--data.batch_size=32", "--ckpt_path=last")
    assert checkpoint(tmp_path / LAST)["global_step"] == 16 + 32


FAST = (
    *("fit", "--config", CONFIGS / "fast.yaml", "--data.batch_size=64", "--trainer.max_epochs=3"),
    "--dashboard.every_n_epochs=0",
)


@pytest.mark.slow
def test_schedule_of_another_length_is_refused(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*FAST, "--data.dataset", small, *STOPPED, ok=False)
    refused = cli(*FAST, "--data.dataset", small, "--trainer.max_epochs=4", "--ckpt_path=last", ok=False)
    assert_one_message(refused, "OneCycleLR with total_steps=48", "asks for 64", "--init_from")
    cli(*FAST, "--data.dataset", small, "--ckpt_path=last")
    assert checkpoint(tmp_path / LAST)["global_step"] == 3 * 16


@pytest.mark.slow
def test_schedule_without_an_end_is_refused(cli: Run, small: Path) -> None:
    endless = ("--trainer.max_epochs=-1", "--trainer.max_time=00:00:00:05")
    assert_one_message(cli(*FAST, "--data.dataset", small, *endless, ok=False), "one-cycle", "--trainer.max_epochs")


def test_finished_run_has_nothing_left_to_do(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*CNN, "--data.dataset", small)
    before = contents(tmp_path)
    again = cli(*CNN, "--data.dataset", small, "--ckpt_path=last")
    assert "finished run, with 32 steps" in again.stderr
    assert "raise --trainer.max_epochs" in again.stderr
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_run_that_was_stopped_early_is_finished_until_early_stopping_is_left_out(
    cli: Run, small: Path, tmp_path: Path
) -> None:
    command = (*CNN, "--data.dataset", small, "--trainer.max_epochs=4")
    stopping = (*STOPPING, "--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=10")
    cli(*command, *stopping)
    assert checkpoint(tmp_path / LAST)["global_step"] == 2 * 16
    before = contents(tmp_path)
    again = cli(*command, *stopping, "--ckpt_path=last")
    assert "finished run, with 32 steps" in again.stderr
    assert "leave out EarlyStopping to train longer" in again.stderr
    assert contents(tmp_path) == before
    cli(*command, "--ckpt_path=last")
    assert checkpoint(tmp_path / LAST)["global_step"] == 4 * 16


@pytest.mark.slow
def test_averaging_that_is_not_restored_is_refused(cli: Run, small: Path) -> None:
    averaging = ("--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.05")
    cli(*CNN, "--data.dataset", small, *averaging, *STOPPED, ok=False)
    refused = cli(*CNN, "--data.dataset", small, *averaging, "--ckpt_path=last", ok=False)
    assert_one_message(refused, "StochasticWeightAveraging", "EMAWeightAveraging")


# ------------------------------------------------------------------------------------- errors in one's code

BROKEN = """
from lightning.pytorch import Callback
class Broken(Callback):
    def __init__(self, hook: str):
        setattr(self, hook, self.fail)
    def fail(self, trainer, *_):
        if not trainer.sanity_checking:
            raise ValueError("a mistake of mine")
"""


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end"])
def test_weights_of_an_error_are_none_to_resume_from(cli: Run, small: Path, tmp_path: Path, hook: str) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    broken = ("--trainer.callbacks+=broken.Broken", f"--trainer.callbacks.hook={hook}")
    short = (*CNN, "--data.dataset", small, "--trainer.max_epochs=1")
    failed = cli(*short, *broken, ok=False, env=env)
    assert "Traceback" in failed.stderr
    exception = RUN / "checkpoints" / "exception.ckpt"
    assert (tmp_path / exception).exists()
    assert_one_message(cli(*short, f"--ckpt_path={exception}", ok=False), "a step failed", f"--init_from={exception}")
    started = cli(*short, "--ckpt_path=last")
    assert "there is no checkpoint yet" in started.stderr or hook == "on_validation_end"
    assert "val/loss" in started.stdout
    assert cli(*short, f"--init_from={exception}").returncode == 0


# ----------------------------------------------------------------------------------------- from old weights


@pytest.mark.slow
def test_new_run_from_old_weights(cli: Run, small: Path, tmp_path: Path) -> None:
    """Of them alone: the first step's momentum, epoch and schedule are those of a new run."""
    cli(*CNN, "--data.dataset", small, *STOPPED, ok=False)
    old = checkpoint(tmp_path / LAST)
    done = cli(*CNN, "--data.dataset", small, f"--init_from={LAST}", "--model.lr=1e-30", "--model.momentum=0")
    assert f"Started from the weights of {LAST}" in done.stderr
    new = checkpoint(tmp_path / "lightning_logs" / "version_1" / "checkpoints" / "last.ckpt")
    assert (new["epoch"], new["global_step"]) == (1, 32)
    for name, weight in new["state_dict"].items():
        torch.testing.assert_close(weight, old["state_dict"][name], rtol=0, atol=1e-20)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_weights_that_do_not_fit_are_listed(cli: Run, small: Path, tmp_path: Path, strict: bool) -> None:
    cli(*CNN, "--data.dataset", small, "--trainer.max_epochs=1")
    other = (*CNN, "--data.dataset", small, "--data.num_classes=12", f"--init_from={LAST}", "--trainer.max_epochs=1")
    done = cli(*other, f"--init_strict={str(strict).lower()}", ok=not strict)
    listed = "net.4.weight ((10, 16, 3, 3) there, (12, 16, 3, 3) here)"
    if strict:
        assert_one_message(done, listed, "--init_strict=false")
    else:
        assert listed in done.stderr


# ------------------------------------------------------------------------------------------ what a run tells


@pytest.mark.slow
def test_run_tells_what_made_it_and_how_it_ended(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*CNN, "--data.dataset", small, *STOPPED, ok=False)
    done = cli(*CNN, "--data.dataset", small, "--ckpt_path=last", "--test_after_fit=true")
    starts = json.loads((tmp_path / RUN / "provenance.json").read_text())
    assert [start["exit"] for start in starts] == ["SIGTERM", "finished"]
    assert [start["step"] for start in starts] == [20, 32]
    assert "--ckpt_path=last" in starts[1]["command"]
    assert starts[0]["versions"]["torch"] == torch.__version__
    assert starts[0]["start"] < starts[0]["end"] < starts[1]["start"] < starts[1]["end"]
    metrics = json.loads((tmp_path / RUN / "metrics.json").read_text())
    assert metrics["best"]["checkpoint"] == "best.ckpt"
    tested = cli("test", "--ckpt_path", BEST)
    for name in ("test/loss", "test/acc"):
        assert name in done.stdout
        assert str(metrics[name])[:6] in tested.stdout
    table = json.loads((tmp_path / "lightning_logs" / "version_1" / "metrics.json").read_text())
    assert_same({name: metrics[name] for name in table if name != "best"}, {k: table[k] for k in table if k != "best"})


@pytest.mark.slow
def test_commit_and_changes_are_on_record(cli: Run, small: Path, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "notes.txt").write_text("one\n")
    git("add", "notes.txt")
    git("commit", "--quiet", "-m", "One")
    (tmp_path / "notes.txt").write_text("two\n")
    cli(*CNN, "--data.dataset", small, "--trainer.max_steps=1", "--trainer.limit_val_batches=1")
    (start,) = json.loads((tmp_path / RUN / "provenance.json").read_text())
    assert start["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    assert "-one\n+two\n" in (tmp_path / RUN / "git.diff").read_text()
