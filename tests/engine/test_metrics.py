"""The means that are logged are those of what was trained on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import CONFIGS, RUN, Run, curves
from lightning.pytorch import Callback, Trainer
from plain import Model, fit, noise
from torch import Tensor
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MultilabelF1Score

from mnist_lit.engine import Metrics

Batch = tuple[int, float, int]  # its size, mean loss and number of correct predictions
FIT = ("fit", "--config", CONFIGS / "logistic.yaml", "--trainer.callbacks+=interrupt.Batches")


def read(folder: Path, rank: int = 0) -> tuple[list[list[Batch]], dict[str, float]]:
    """Per epoch the batches of a process, and what it has last logged."""
    written = json.loads((folder / f"batches.{rank}.json").read_text())
    return [[tuple(batch) for batch in epoch] for epoch in written["epochs"]], written["logged"]


def mean(batches: list[Batch]) -> tuple[float, float]:
    """Loss and accuracy over all samples."""
    samples = sum(size for size, _, _ in batches)
    loss = sum(size * loss for size, loss, _ in batches) / samples
    return loss, sum(correct for _, _, correct in batches) / samples


def since_last_log(steps: list[list[Batch]], every: int) -> dict[int, list[Batch]]:
    """The batches between two logs, by the step at which they are logged, counted from 0."""
    return {end - 1: sum(steps[end - every : end], []) for end in range(every, len(steps) + 1, every)}


def assert_logged(
    found: dict[str, list[tuple[int, float]]], expected: dict[int, list[Batch]], suffix: str = ""
) -> None:
    for index, name in enumerate(("train/loss", "train/acc")):
        steps, values = zip(*found[name + suffix], strict=True)
        assert list(steps) == list(expected)
        assert values == pytest.approx([mean(batches)[index] for batches in expected.values()], rel=1e-5)


@pytest.mark.parametrize(
    ("accumulate", "every", "processes"),
    [(3, 4, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 5, 1), (16, 1, 1), (3, 2, 2)))],
    ids=str,
)
def test_logged_means_are_over_all_batches_since_the_last_log(
    cli: Run, small: Path, tmp_path: Path, accumulate: int, every: int, processes: int
) -> None:
    """Two epochs of 16 batches, or of 8 in each process, the last one shorter; an interval may lie in two epochs."""
    settings = (f"--trainer.accumulate_grad_batches={accumulate}", f"--trainer.log_every_n_steps={every}")
    settings += ("--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2") * (processes == 2)
    cli(*FIT, "--data.dataset", small, "--trainer.max_epochs=2", *settings, fork=processes == 1)
    epochs, logged = zip(*(read(tmp_path, rank) for rank in range(processes)), strict=True)
    sizes = [64] * 15 + [40] if processes == 1 else [64] * 7 + [52]
    assert all([[size for size, _, _ in epoch] for epoch in of_one] == [sizes] * 2 for of_one in epochs)
    assert len({json.dumps(of_one) for of_one in epochs}) == processes
    steps = []  # per epoch the batches of all processes by step, of which the last takes what is left
    for each in zip(*epochs, strict=True):
        starts = range(0, len(sizes), accumulate)
        steps.append([sum((epoch[start : start + accumulate] for epoch in each), []) for start in starts])
    found = curves(tmp_path / RUN)
    assert_logged(found, since_last_log(sum(steps, []), every))
    ends = [len(steps[0]) * epoch - 1 for epoch in (1, 2)]
    assert_logged(found, dict(zip(ends, (sum(epoch, []) for epoch in steps), strict=True)), "_epoch")
    assert all(values == logged[0] for values in logged)
    assert logged[0]["train/loss"] == pytest.approx(found["train/loss"][-1][1])


# ---------------------------------------------------------------------------------------- in a plain Trainer


def classes(model: Model, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Loss, predictions and targets."""
    return F.cross_entropy(model(images), target), model(images), target


def labels(model: Model, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """Any number of three labels (B, 3)."""
    several = F.one_hot(target, 3) | F.one_hot((target + 1) % 3, 3)
    return F.binary_cross_entropy_with_logits(model(images), several.to(images)), model(images), several


def masks(model: Model, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """A class for each pixel (B, 8, 8)."""
    preds, pixels = model.net[:3](images)[:, :3], (images[:, 0] * 3).long()  # (B, 3, 8, 8), (B, 8, 8)
    return F.cross_entropy(preds, pixels), preds, pixels


def values(model: Model, images: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    """A number for each sample (B,)."""
    preds, brightness = model(images)[:, 0], images.mean((1, 2, 3))
    return F.mse_loss(preds, brightness), preds, brightness


@pytest.mark.parametrize(
    ("kind", "metric", "names", "precision"),
    [
        (classes, MulticlassAccuracy(3), [""], "32-true"),
        (classes, MulticlassAccuracy(3, average=None), ["/0", "/1", "/2"], "32-true"),
        (labels, MultilabelF1Score(3, average=None), ["/0", "/1", "/2"], "32-true"),
        (masks, MulticlassJaccardIndex(3), [""], "32-true"),
        (values, MeanSquaredError(), [""], "32-true"),
        (values, MeanSquaredError(), [""], "bf16-true"),  # metrics are not as coarse as the model
    ],
)
def test_any_kind_of_target(tmp_path: Path, kind: Callable, metric: Any, names: list[str], precision: str) -> None:
    class Of(Model):
        def outputs(self, batch: list[Tensor]) -> dict[str, Tensor]:
            return dict(zip(("loss", "preds", "target"), kind(self, *batch), strict=True))

    module = Of(lr=0.01)
    logged = fit(module, tmp_path, Metrics({"score": metric}), precision=precision).callback_metrics
    with torch.no_grad():
        to = next(module.parameters()).dtype
        outputs = [module.eval().outputs([images.to(to), target]) for images, target in noise()]
    expected = metric(*(torch.cat([output[key] for output in outputs]).float() for key in ("preds", "target")))
    found = torch.stack([logged[f"val/score{name}"] for name in names])
    torch.testing.assert_close(found, expected.reshape(-1), rtol=1e-5, atol=0)
    assert logged["val/loss"] == pytest.approx(sum(output["loss"].item() for output in outputs) / 4, rel=1e-5)
    assert {f"train/score{name}{suffix}" for name in names for suffix in ("", "_epoch")} <= logged.keys()


def test_names_that_a_step_logs_itself_are_left_to_it(tmp_path: Path) -> None:
    class Own(Model):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            self.log("train/loss", 1.0)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            self.log("val/loss", 2.0)
            self.log("val_loss", 3.0)
            return super().validation_step(batch, batch_idx)

    logged = fit(Own(), tmp_path, Metrics({"acc": MulticlassAccuracy(3)})).callback_metrics
    assert [logged[name] for name in ("train/loss", "val/loss", "val_loss")] == [1, 2, 3]
    assert logged.keys() == {"train/loss", "val/loss", "val_loss", "train/acc", "train/acc_epoch", "val/acc"}


@pytest.mark.parametrize("with_metrics", [True, False])
def test_little_is_kept(tmp_path: Path, with_metrics: bool) -> None:
    """Masks of 2 MB for each batch: without metrics none is kept, with them those of two batches at most."""

    class Large(Model):
        def outputs(self, batch: list[Tensor]) -> dict[str, Tensor]:
            preds = self(batch[0])[:, :, None, None].expand(-1, -1, 96, 96).contiguous()  # (10, 3, 96, 96)
            target = batch[1][:, None, None].expand(-1, 96, 96)
            return {"loss": F.cross_entropy(preds, target), "preds": preds, "target": target}

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    fit(Large(), tmp_path, Metrics({"acc": MulticlassAccuracy(3)} if with_metrics else {}), Save())
    sizes = [path.stat().st_size for path in tmp_path.glob("*.ckpt")]
    assert len(sizes) == 8
    assert max(sizes) < (5e6 if with_metrics else 100e3)
    assert not with_metrics or max(sizes) > 1e6
