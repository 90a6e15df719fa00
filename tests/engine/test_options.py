"""Resuming with other options: they count, or they are refused before training; a run from old weights is a new run."""

from pathlib import Path

import pytest
import torch
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


@slow
@pytest.mark.parametrize(
    ("options", "then", "parts"),
    [
        (
            *((*CNN, *STOPPING, "--trainer.callbacks.patience=3"), "--trainer.callbacks.patience=9"),
            ("--trainer.callbacks.EarlyStopping.val/loss.patience=9 (3",),
        ),
        (FAST, "--trainer.max_epochs=4", ("OneCycleLR with total_steps=48", "asks for 64", "--init_from")),
        ((*CNN, *AVERAGING), "", ("StochasticWeightAveraging", "EMAWeightAveraging")),
    ],
    ids=["patience", "length of a schedule", "averaging"],
)
def test_option_that_the_checkpoint_would_override_is_refused(
    cli: Run, small: Path, options: tuple, then: str, parts: tuple[str, ...]
) -> None:
    """``test_mistakes.py`` has more of them; here, the run resumes afterwards."""
    command = (*options, "--data.dataset", small)
    cli(*command, *STOPPED, ok=False)
    assert_one_message(cli(*command, *then.split(), "--ckpt_path=last", ok=False), *parts)
    if then:
        cli(*command, "--ckpt_path=last")


@slow
def test_options_that_count_are_not_refused(cli: Run, small: Path, tmp_path: Path) -> None:
    """Another batch size counts from the next epoch on."""
    cli(*CNN, "--data.dataset", small, "--trainer.max_epochs=1")
    cli(*CNN, "--data.dataset", small, "--data.batch_size=32", "--data.num_workers=1", "--ckpt_path=last")
    assert checkpoint(tmp_path / LAST)["global_step"] == 16 + 32
    (resumed,) = (tmp_path / RUN).glob("config-from-step-*.yaml")
    assert "batch_size: 32" in resumed.read_text()


@slow
@pytest.mark.parametrize("early", [True, False])
def test_finished_run_has_nothing_left_to_do(cli: Run, small: Path, tmp_path: Path, early: bool) -> None:
    """One that was stopped early is finished until early stopping is left out."""
    command = (*CNN, "--data.dataset", small, "--trainer.max_epochs=3", "--run_name=fold [1]", "--ckpt_path=last")
    if early:
        command += (*STOPPING, "--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=10")
    cli(*command)
    before = contents(tmp_path)
    again = cli(*command).stderr
    assert f"is of a finished run, with {32 if early else 48} steps" in again
    assert f"{'leave out EarlyStopping' if early else 'raise --trainer.max_epochs'} to train longer" in again
    assert contents(tmp_path) == before


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
