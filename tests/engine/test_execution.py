"""What makes a run faster changes nothing in it: several optimizer steps in one step of Lightning's."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from common import CONFIGS, OVERLAYS, Run, assert_same_weights, checkpoint, curves
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from plain import Model, data

import mnist_lit
from mnist_lit import Classifier
from mnist_lit.engine import StepsPerExecution
from mnist_lit.engine.errors import UserError

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


class Eight(Model):
    """Eight steps in one of Lightning's."""

    def __init__(self) -> None:
        super().__init__()
        self.execution = StepsPerExecution(8)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        return self.execution.run(self, batch, self.outputs)

    def configure_callbacks(self) -> list[Callback]:
        return [self.execution]


class Plateau(Eight):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}


class OwnStep(Eight):
    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> Any:
        return self.outputs(batch)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Eight, {"limit_train_batches": 3}, "--trainer.limit_train_batches=3"),
        (Eight, {"val_check_interval": 0.5}, "--trainer.val_check_interval=0.5"),
        (Eight, {"accumulate_grad_batches": 2}, "--trainer.accumulate_grad_batches=2"),
        (Eight, {"gradient_clip_val": 1.0}, "--trainer.gradient_clip_val=1.0"),
        (Eight, {"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging, which averages after every step"),
        (Plateau, {}, "the scheduler ReduceLROnPlateau"),
        (Eight, {}, "a DataLoader that train_dataloader has not made"),
        (OwnStep, {}, "the training_step of OwnStep, which does not call StepsPerExecution.run"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_eight_steps_in_one_do_not_support_is_refused(
    tmp_path: Path, model: type[Eight], options: dict[str, Any], message: str
) -> None:
    loader = data()
    if model is OwnStep:
        loader.steps_per_execution = 8  # type: ignore[attr-defined]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, log_every_n_steps=1, **quiet, **options)
    with pytest.raises(UserError, match=re.escape(f"steps_per_execution=8 does not support {message}")):
        trainer.fit(model(), loader, data())


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
    assert "--model.steps_per_execution=1 (8 in the checkpoint)" in done.stderr
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
