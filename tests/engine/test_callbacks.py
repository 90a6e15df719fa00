"""Each callback in a plain ``Trainer``, from Python, without the command line."""

import csv
import math
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from common import assert_same
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import PassThroughProfiler
from plain import Model, Weights, fit, noise
from torchmetrics.classification import MulticlassAccuracy

from mnist_lit.engine import (
    BestCheckpoint,
    Checkpoint,
    Dashboard,
    LastCheckpoint,
    Metrics,
    PredictionsFile,
    Project,
    Run,
    StopOnNonFinite,
    Summary,
)
from mnist_lit.engine.compat import LessOverhead
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.progress import ProgressBar
from mnist_lit.engine.resume import ResumeGuard

# ------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("callbacks", [[StopOnNonFinite], [StopOnNonFinite, LessOverhead]], ids=len)
def test_run_that_diverges_is_stopped(tmp_path: Path, callbacks: list[type[Callback]]) -> None:
    message = r"the loss is (nan|inf) at step [23] \(epoch 0\), the learning rate 1e\+38; .* lower"
    with pytest.raises(UserError, match=message):
        fit(Model(lr=1e38), tmp_path, *(callback() for callback in callbacks))


def test_no_checkpoint_is_made_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 8:  # after the last loss
                pl_module.net[-1].bias.data.fill_(math.nan)  # type: ignore[index, union-attr]

    with pytest.raises(UserError, match="the weights are no longer finite after step 8"):
        fit(Model(), tmp_path, StopOnNonFinite(), Break(), ModelCheckpoint(tmp_path), enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 1  # the first epoch's


def test_validation_that_is_not_finite_warns(tmp_path: Path) -> None:
    class Broken(Model):
        def validation_step(self, batch: list[Any], batch_idx: int) -> None:
            self.log("val_loss", math.nan)

    with pytest.warns(UserWarning, match="val_loss is nan") as warned:
        fit(Broken(), tmp_path, BestCheckpoint(dirpath=tmp_path), enable_checkpointing=True)
    texts = [str(each.message) for each in warned if "nan" in str(each.message)]
    assert texts == [f"val_loss is nan after step {step}: it cannot be the best" for step in (4, 8)]


# --------------------------------------------------------------------------------------------------- resuming


class Freezes(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])  # type: ignore[index]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        """Unfreezes nothing."""


@pytest.mark.parametrize(
    "callback",
    [
        StochasticWeightAveraging(0.1),
        ModelPruning("l1_unstructured"),
        Freezes(),
        GradientAccumulationScheduler({1: 2}),
        LearningRateFinder(num_training_steps=2),
        BatchSizeFinder(max_trials=1),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_run_with_a_callback_that_is_not_restored_is_not_resumed(tmp_path: Path, callback: Callback) -> None:
    class Loads(Model):
        batch_size = 10  # for the finder, which takes no loaders from elsewhere

        def train_dataloader(self) -> Any:
            return noise(40, self.batch_size)

        val_dataloader = train_dataloader

    def trainer(epochs: int) -> Trainer:
        callbacks = [copy(callback), ResumeGuard()]
        return Trainer(
            max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False, default_root_dir=tmp_path
        )

    started = trainer(1)
    started.fit(Loads())
    started.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=f"{type(callback).__name__} cannot be resumed exactly"):
        trainer(3).fit(Loads(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("improves", "patience", "min_epochs", "early"),
    [(False, 0, None, True), (True, 0, None, False), (False, 1, None, True), (False, 1, 4, False)],
)
def test_run_that_was_stopped_early_is_finished(
    tmp_path: Path, improves: bool, patience: int, min_epochs: int | None, early: bool
) -> None:
    """One whose metric still improves is not, nor is one that has epochs left to train in any case."""

    class Scored(Model):
        def validation_step(self, batch: list[Any], batch_idx: int) -> None:
            self.log("score", -float(self.current_epoch) if improves else 1.0)

    stop = EarlyStopping("score", patience=patience)
    fit(Scored(), tmp_path, stop, num_sanity_val_steps=0).save_checkpoint(tmp_path / "last.ckpt")
    longer = Trainer(max_epochs=5, min_epochs=min_epochs, accelerator="cpu", callbacks=[stop], logger=False)
    assert bool(Checkpoint.read(tmp_path / "last.ckpt").finished(longer)) == early


# --------------------------------------------------------------------------------------------------- the rest


def test_bar_is_one_line_and_counts_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    metrics = {name: MulticlassAccuracy(3) for name in ("acc", "a_metric_of_a_long_name", "another_one")}
    trainer = fit(Model(), tmp_path, Metrics(metrics), ProgressBar(), enable_progress_bar=True)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.strip())
    assert line.startswith("Epoch 2/2 ")
    assert " 4/4 " in line
    assert len(line.rstrip()) <= 80
    for short, name in {"loss": "train/loss", "val/loss": "val/loss", "val/acc": "val/acc"}.items():
        assert f" {short}: {trainer.callback_metrics[name]:.3f}" in line


def test_less_overhead_changes_nothing(tmp_path: Path) -> None:
    class Counts(Callback):
        def __init__(self) -> None:
            self.calls = 0

        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.calls += 1

    counts, weights, model, other = Counts(), Weights(), Model(), Model()
    trainer = fit(model, tmp_path, LessOverhead(), counts, weights)
    fit(other, tmp_path)
    assert_same(dict(model.state_dict()), dict(other.state_dict()))
    assert (counts.calls, len(weights.steps)) == (8, 8)
    assert callable(counts.on_train_batch_start)  # as before
    assert type(trainer.profiler) is PassThroughProfiler  # type: ignore[attr-defined]


def test_gradient_norm_is_of_the_optimizer_that_steps(tmp_path: Path) -> None:
    """Gradients that another one left there do not count; they are not in a checkpoint either."""
    norms: list[float] = []

    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: list[Any], batch_idx: int) -> None:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.zero_grad()
                self.manual_backward(self.outputs(batch)["loss"])
                gradients = [weight.grad.flatten() for weight in optimizer.param_groups[0]["params"]]
                norms.append(torch.cat(gradients).norm().item())
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[-1])]

    logger = CSVLogger(tmp_path)
    fit(Two(), tmp_path, Dashboard(), logger=logger, log_every_n_steps=1)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        logged = [float(row["train/gradient_norm"]) for row in csv.DictReader(file) if row["train/gradient_norm"]]
    assert logged == pytest.approx(norms, rel=1e-5)
    assert len(norms) == 16


@pytest.mark.parametrize("tests", [True, False])
def test_command_that_comes_next_is_one_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tests: bool
) -> None:
    class Untested(Model):
        test_step = LightningModule.test_step  # type: ignore[assignment]

    run = Run(tmp_path / "lightning_logs" / "version_0", Project("leaf_id"))
    fit(Model() if tests else Untested(), tmp_path, run, LastCheckpoint(), Summary(), enable_checkpointing=True)
    shown = capsys.readouterr().out
    assert "The run is in" in shown
    assert ("python -m leaf_id test" in shown) == tests


@pytest.mark.parametrize("logger", [True, False])
def test_predictions_are_written_beside_the_log(tmp_path: Path, logger: bool) -> None:
    """What is in them, ``test_cli.py`` looks at."""
    quiet = {"logger": logger, "enable_progress_bar": False}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[PredictionsFile()], **quiet)
    trainer.predict(Model(), noise(12))
    (path,) = tmp_path.rglob("predictions.csv")
    assert path.parent == Path(trainer.log_dir or tmp_path)
    assert len(path.read_text().splitlines()) == 13
