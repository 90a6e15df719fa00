"""What makes a run faster changes nothing in it: several optimizer steps in one step of Lightning's."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from common import CONFIGS, OVERLAYS, Run, assert_same_last, curves
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging
from plain import Model, fit

from mnist_lit.engine import StepsPerExecution
from mnist_lit.engine.errors import UserError

CNN, LOGISTIC = (("--config", CONFIGS / f"{name}.yaml") for name in ("cnn", "logistic"))
EIGHT = ("--config", OVERLAYS / "speed.yaml")
SETTINGS = {
    "max_steps": (*LOGISTIC, "--trainer.max_epochs=-1", "--trainer.max_steps=21"),
    "logistic": (*LOGISTIC, "--data.batch_size=48", "--trainer.max_epochs=3"),
    "scheduler": (*CNN, "--optimizer=Adam", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5"),
    "bf16": (*CNN, "--trainer.precision=bf16-mixed"),
    "one cycle": ("--config", CONFIGS / "fast.yaml", "--trainer.max_epochs=2"),
}
ALSO = "scheduler", "bf16"


def assert_same_training(run: Path, other: Path) -> None:
    assert_same_last(run, other, "state_dict", "global_step", "optimizer_states", "lr_schedulers")
    assert curves(run) == curves(other)
    assert "train/loss" in curves(run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(s, marks=[pytest.mark.matrix] * (s in ALSO)) for s in SETTINGS])
def test_eight_steps_in_one_are_eight_steps(cli: Run, small: Path, tmp_path: Path, name: str) -> None:
    """16 or 21 batches an epoch, the last ones shorter: weights, optimizer and curves bit for bit."""
    common = ("fit", *SETTINGS[name], "--data.dataset", small, "--trainer.log_every_n_steps=3")
    cli(*common)
    cli(*common, *EIGHT)
    assert_same_training(tmp_path / "lightning_logs/version_1", tmp_path / "lightning_logs/version_0")


@pytest.mark.slow
def test_step_of_divergence_is_named(cli: Run, small: Path) -> None:
    """The same step, whether one by one or eight in one."""
    common = ("fit", *LOGISTIC, "--data.dataset", small, "--model.lr=1e38")
    (message,) = {cli(*common, *more, ok=False).stderr.splitlines()[-1] for more in ((), EIGHT)}
    assert "the loss is" in message


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


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Eight, {"limit_train_batches": 3}, "--trainer.limit_train_batches=3"),
        (Eight, {"gradient_clip_val": 1.0}, "--trainer.gradient_clip_val=1.0"),
        (Eight, {"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging"),
        (Plateau, {}, "ReduceLROnPlateau"),
        (Eight, {}, "a loader that train_dataloader has not made"),
    ],
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_what_eight_steps_in_one_do_not_support_is_refused(
    tmp_path: Path, model: type[Eight], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(f"steps_per_execution=8 does not support {message}")):
        fit(model(), tmp_path, log_every_n_steps=1, **options)
