"""What makes a run faster changes nothing in it: several optimizer steps in one step of Lightning's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import CONFIGS, OVERLAYS, Run, assert_same_weights, checkpoint, curves

import mnist_lit
from mnist_lit import Classifier

CHECKPOINTS = Path("checkpoints")
SCHEDULED = ("--optimizer=Adam", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5")
EIGHT = ("--config", OVERLAYS / "speed.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("--config", CONFIGS / "cnn.yaml"),
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                ("--config", CONFIGS / "logistic.yaml", "--trainer.max_epochs=-1", "--trainer.max_steps=21"),
                ("--config", CONFIGS / "logistic.yaml", "--data.batch_size=48", "--trainer.max_epochs=3"),
                ("--config", CONFIGS / "cnn.yaml", *SCHEDULED),
                ("--config", CONFIGS / "cnn.yaml", "--trainer.precision=bf16-mixed"),
                ("--config", CONFIGS / "fast.yaml", "--trainer.max_epochs=2"),
            )
        ),
    ],
    ids=["cnn", "max_steps", "logistic", "scheduler", "bf16", "one cycle"],
)
def test_eight_steps_in_one_are_eight_steps(cli: Run, small: Path, tmp_path: Path, settings) -> None:
    """16 or 21 batches an epoch, the last ones shorter: weights, optimizer and curves bit for bit."""
    common = ("fit", *settings, "--data.dataset", small, "--trainer.log_every_n_steps=3")
    cli(*common)
    cli(*common, *EIGHT)
    one, eight = (tmp_path / "lightning_logs" / f"version_{n}" for n in (0, 1))
    ours, theirs = (checkpoint(run / CHECKPOINTS / "last.ckpt") for run in (eight, one))
    assert ours["hyper_parameters"]["steps_per_execution"] == 8
    assert_same_weights(ours["state_dict"], theirs["state_dict"])
    assert ours["global_step"] == theirs["global_step"]
    for mine, other in zip(ours["optimizer_states"], theirs["optimizer_states"], strict=True):
        assert mine["param_groups"] == other["param_groups"]
        for key in other["state"]:
            assert_same_weights(
                {k: torch.as_tensor(v) for k, v in mine["state"][key].items() if v is not None},
                {k: torch.as_tensor(v) for k, v in other["state"][key].items() if v is not None},
            )
    assert ours["lr_schedulers"] == theirs["lr_schedulers"]
    assert curves(eight) == curves(one)
    assert "train/loss" in curves(one)


@pytest.mark.parametrize(
    "setting",
    [
        "--trainer.limit_train_batches=3",
        "--trainer.val_check_interval=0.5",
        pytest.param("--trainer.accumulate_grad_batches=2", marks=pytest.mark.slow),
        pytest.param("--trainer.gradient_clip_val=1.0", marks=pytest.mark.slow),
    ],
)
def test_what_eight_steps_in_one_cannot_honour_is_refused(cli: Run, small: Path, setting: str) -> None:
    done = cli("fit", "--config", CONFIGS / "cnn.yaml", *EIGHT, "--data.dataset", small, setting, ok=False)
    assert setting.split(".")[1].split("=")[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_averaging_after_every_step_is_refused(cli: Run, small: Path) -> None:
    ema = ("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.99")
    done = cli("fit", "--config", CONFIGS / "cnn.yaml", *EIGHT, "--data.dataset", small, *ema, ok=False)
    assert "cannot honour EMAWeightAveraging" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_plateau_scheduler_is_refused(cli: Run, small: Path) -> None:
    scheduler = ("--optimizer=SGD", "--optimizer.lr=0.1", "--lr_scheduler=ReduceLROnPlateau")
    monitor = "--lr_scheduler.monitor=val/loss"
    common = ("fit", "--config", CONFIGS / "cnn.yaml", *EIGHT, "--data.dataset", small)
    done = cli(*common, *scheduler, monitor, ok=False)
    assert "ReduceLROnPlateau" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_resumed_in_the_middle_of_an_epoch(cli: Run, small: Path, tmp_path: Path) -> None:
    common = ("fit", "--config", CONFIGS / "cnn.yaml", *EIGHT, "--data.dataset", small)
    common += ("--data.batch_size=20", "--trainer.log_every_n_steps=3")  # 50 steps an epoch
    cli(*common)
    interrupt = tmp_path / "interrupt.yaml"
    arguments = {"signum": "SIGINT", "hook": "on_train_batch_end", "step": 24}
    callback = {"class_path": "interrupt.SignalAt", "init_args": arguments}
    interrupt.write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    cli(*common, "--config", interrupt, ok=False)
    stopped = checkpoint(tmp_path / "lightning_logs" / "version_1" / CHECKPOINTS / "last.ckpt")
    assert stopped["global_step"] == 24
    cli(*common, "--ckpt_path", "last")
    whole, resumed = (tmp_path / "lightning_logs" / f"version_{n}" for n in (0, 1))
    ours, theirs = (checkpoint(run / CHECKPOINTS / "last.ckpt") for run in (resumed, whole))
    assert_same_weights(ours["state_dict"], theirs["state_dict"])
    assert curves(resumed) == curves(whole)


@pytest.mark.slow
def test_resuming_with_other_steps_per_execution_is_refused(cli: Run, small: Path, tmp_path: Path) -> None:
    common = ("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small)
    cli(*common, *EIGHT)
    done = cli(*common, "--ckpt_path", "last", "--trainer.max_epochs=3", ok=False)
    assert "steps_per_execution=8" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_step_of_divergence_is_named(cli: Run, small: Path) -> None:
    """The same step, whether one by one or eight in one."""
    common = ("fit", "--config", CONFIGS / "logistic.yaml", "--data.dataset", small, "--model.lr=1e38")
    messages = {cli(*common, *more, ok=False).stderr.splitlines()[-1] for more in ((), EIGHT)}
    assert len(messages) == 1
    assert "the loss is" in messages.pop()


def test_package_imports_nothing_before_it_is_asked_for() -> None:
    """Only so can the command line see to how its imports are done."""
    code = "import sys, mnist_lit; print('torch' in sys.modules, 'CNN' in vars(mnist_lit))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]
    assert mnist_lit.CNN.__name__ == "CNN"
    with pytest.raises(AttributeError, match="no attribute 'Transformer'"):
        mnist_lit.Transformer  # noqa: B018


def test_classifier_says_what_it_is_trained_with() -> None:
    assert Classifier(torch.nn.Flatten(), steps_per_execution=4).hparams["steps_per_execution"] == 4
