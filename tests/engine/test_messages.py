"""Options that cannot work: one message before training starts, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import CONFIGS, RUN, Run, assert_one_message, assert_same, checkpoint

FIT = ("fit", "--config", CONFIGS / "cnn.yaml", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false")
LINEAR = ("--model=Classifier", "--model.net=torch.nn.Linear", "--model.net.in_features=784")
PLATEAU = ("--optimizer=SGD", "--optimizer.lr=0.1", "--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau")


def added(callback: str, **options: object) -> tuple[str, ...]:
    return (f"--trainer.callbacks+={callback}", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items()))


MESSAGES: dict[str, tuple[tuple[str, ...], str]] = {
    "early stopping": (
        added("EarlyStopping", monitor="val/los"),
        "EarlyStopping with monitor=val/los: there is no such metric; the model logs val/acc, val/loss",
    ),
    "net": (
        (*LINEAR, "--model.net.out_features=10"),
        "--model.net: Linear does not take images of the shape (128, 1, 28, 28) (mat1 and mat2",
    ),
    "plateau": ((*PLATEAU, "--lr_scheduler.monitor=val/los"), "ReduceLROnPlateau with monitor=val/los: there is no"),
    "monitor": (("--monitor=val/los", "--mode=min"), "--monitor=val/los: there is no such metric"),
    "barebones": (("--trainer.barebones=true",), "--trainer.barebones leaves out logger, checkpoints, bar"),
    "same best": (added("ModelCheckpoint", filename="best"), "a ModelCheckpoint of trainer.callbacks writes best.ckpt"),
    "same last": (added("ModelCheckpoint", save_last="true"), "ModelCheckpoint of trainer.callbacks writes last.ckpt"),
    "timer": (added("Timer", duration=10), "`Timer(duration='10')` is not a valid duration. Expected a string"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i < 2 else pytest.mark.slow) for i, name in enumerate(MESSAGES)]
)
def test_option_that_cannot_work_is_one_message(cli: Run, small: Path, tmp_path: Path, name: str) -> None:
    options, message = MESSAGES[name]
    assert_one_message(cli(*FIT, *options, "--data.dataset", small, ok=False), message)
    assert not list(tmp_path.glob("**/*.ckpt"))


@pytest.mark.slow
def test_ntasks_without_srun_is_one_message(cli: Run, small: Path) -> None:
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "x"}
    assert_one_message(cli(*FIT, "--data.dataset", small, ok=False, env=slurm), "Use `--ntasks-per-node=2` instead")


@pytest.mark.slow
def test_own_network_of_the_wrong_shape_keeps_its_traceback(cli: Run, small: Path, tmp_path: Path) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.layer = nn.Linear(784, 10)\n\n    def forward(self, images):\n        return self.layer(images)\n"
    )
    failed = cli(*FIT, "--model=Classifier", "--model.net=my_net.Net", "--data.dataset", small, ok=False)
    assert 'my_net.py", line 10, in forward' in failed.stderr
    assert "mat1 and mat2 shapes cannot be multiplied" in failed.stderr
    if hasattr(BaseException, "add_note"):  # since Python 3.11
        assert failed.stderr.splitlines()[-1] == "Net does not take images of the shape (128, 1, 28, 28)"


def test_foreign_class_in_a_checkpoint_is_named(cli: Run, small: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": CONFIGS}, tmp_path / "foreign.ckpt")
    refused = cli(*FIT, "--ckpt_path=foreign.ckpt", "--data.dataset", small, ok=False)
    assert_one_message(refused, "foreign.ckpt holds pathlib", "Path", "add --weights_only=false")
    assert "\x1b" not in refused.stderr


@pytest.mark.slow
def test_without_checkpoints(cli: Run, small: Path, tmp_path: Path) -> None:
    done = cli(*FIT, "--trainer.enable_checkpointing=false", "--data.dataset", small)
    assert "val/loss" in done.stdout
    assert not list(tmp_path.glob("**/*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_other_ways_to_start_processes_end_in_the_same_weights(
    cli_in: Run, small: Path, tmp_path: Path, strategy: str
) -> None:
    weights = []
    for name in ("ddp", strategy):
        (tmp_path / name).mkdir()
        two = ("--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={name}")
        done = cli_in(tmp_path / name, *FIT, *two, "--data.dataset", small, fork=False)
        assert "What comes next" in done.stdout
        weights.append(checkpoint(tmp_path / name / RUN / "checkpoints" / "best.ckpt")["state_dict"])
    assert_same(*weights)
