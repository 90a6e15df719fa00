"""Resuming with other options: they count, or they are refused before training; a run from old weights is a new run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from common import CONFIGS, RUN, Run, assert_one_message, checkpoint
from interrupt import signal_at

LAST = RUN / "checkpoints" / "last.ckpt"
CNN = ("fit", "--config", CONFIGS / "cnn.yaml", "--trainer.log_every_n_steps=4", "--dashboard.every_n_epochs=0")
FAST = ("fit", "--config", CONFIGS / "fast.yaml", "--data.batch_size=64", "--trainer.max_epochs=3", CNN[-1])
STOPPED = signal_at("SIGTERM", "on_train_batch_end", 20)  # in the second epoch of 16 steps
STOPPING = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss")
AVERAGING = ("--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.05")
slow = pytest.mark.slow


def contents(folder: Path) -> dict[str, bytes]:
    """Of a run, without the notes of its starts."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("provenance.json", ".lock"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("first", "then", "parts"),
    [
        (CNN, (*CNN, "--model.momentum=0.5"), ("--model.momentum=0.5 (0.9", f"--init_from={LAST}")),
        pytest.param(
            (*CNN, *STOPPING, "--trainer.callbacks.patience=3"),
            (*CNN, *STOPPING, "--trainer.callbacks.patience=9"),
            ("--trainer.callbacks.EarlyStopping.val/loss.patience=9 (3",),
            marks=slow,
        ),
        pytest.param(
            FAST,
            (*FAST, "--trainer.max_epochs=4"),
            ("OneCycleLR with total_steps=48", "asks for 64", "--init_from"),
            marks=slow,
        ),
        pytest.param(
            (*CNN, *AVERAGING),
            (*CNN, *AVERAGING),
            ("StochasticWeightAveraging", "EMAWeightAveraging"),
            marks=slow,
        ),
    ],
    ids=["momentum", "patience", "length of a schedule", "averaging"],
)
def test_option_that_the_checkpoint_would_override_is_refused(
    cli: Run, small: Path, tmp_path: Path, first: tuple, then: tuple, parts: tuple[str, ...]
) -> None:
    """``test_mistakes.py`` has more of them; here, the checkpoints stay as they were and resume."""
    data = ("--data.dataset", small)
    cli(*first, *data, *STOPPED, ok=False)
    before = contents(tmp_path / LAST.parent)
    assert_one_message(cli(*then, *data, "--ckpt_path=last", ok=False), *parts)
    assert contents(tmp_path / LAST.parent) == before
    if first != then:
        cli(*first, *data, "--ckpt_path=last")


@slow
def test_options_that_count_are_not_refused(cli: Run, small: Path, tmp_path: Path) -> None:
    """Another batch size counts from the next epoch on."""
    cli(*CNN, "--data.dataset", small, "--trainer.max_epochs=1")
    cli(*CNN, "--data.dataset", small, "--data.batch_size=32", "--data.num_workers=1", "--ckpt_path=last")
    assert checkpoint(tmp_path / LAST)["global_step"] == 16 + 32
    (resumed,) = (tmp_path / RUN).glob("config-from-step-*.yaml")
    assert yaml.safe_load(resumed.read_text())["data"]["init_args"]["batch_size"] == 32


def test_finished_run_has_nothing_left_to_do(cli: Run, small: Path, tmp_path: Path) -> None:
    """One that was stopped early is finished until early stopping is left out."""
    command = (*CNN, "--data.dataset", small, "--trainer.max_epochs=3", "--run_name=mine", "--ckpt_path=last")
    stopping = (*STOPPING, "--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=10")
    last = tmp_path / "lightning_logs" / "mine" / "checkpoints" / "last.ckpt"
    for options, steps, way_out in ((stopping, 32, "leave out EarlyStopping"), ((), 48, "raise --trainer.max_epochs")):
        cli(*command, *options)
        before = contents(tmp_path)
        again = cli(*command, *options)
        assert f"is of a finished run, with {steps} steps" in again.stderr
        assert f"{way_out} to train longer" in again.stderr
        assert contents(tmp_path) == before
        assert checkpoint(last)["global_step"] == steps


@slow
def test_last_of_a_named_run_is_never_that_of_another(cli: Run, small: Path, tmp_path: Path) -> None:
    """Not even if that was killed before its first checkpoint: it starts again in its own folder."""
    (tmp_path / "lightning_logs" / "mine").mkdir(parents=True)
    one = (*CNN, "--data.dataset", small, "--trainer.max_epochs=1")
    cli(*one)
    done = cli(*one, "--run_name=mine", "--ckpt_path=last")
    assert "there is no checkpoint yet" in done.stderr
    assert "The run is in lightning_logs/mine" in done.stdout
    assert_one_message(cli(*one, "--run_name=mine", ok=False), "there is such a run already")


@slow
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

    other = (*CNN, "--data.dataset", small, "--data.num_classes=12", f"--init_from={LAST}", "--trainer.max_epochs=1")
    listed = "net.4.weight ((10, 16, 3, 3) there, (12, 16, 3, 3) here)"
    assert_one_message(cli(*other, ok=False), listed, "--init_strict=false")
    assert listed in cli(*other, "--init_strict=false").stderr
