"""Metrics in a callback: what steps return is gathered, and evaluated when it is logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, SumMetric

from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.engine.outputs import Outputs, as_outputs, class_names, step_outputs

FLUSH_EVERY = 64  # batches; bounds the memory of what is gathered

Stage = Literal["train", "val", "test"]


class Metrics(Callback):
    """Log the loss and metrics of every step that returns ``Outputs``.

    ``train/loss`` is the mean over all batches of all processes since the last log, every
    ``log_every_n_steps`` optimizer steps, and ``train/loss_epoch`` over the epoch; ``val/loss`` and
    ``test/loss`` are means over the split; metrics likewise. A metric with one value per class is logged as
    ``val/recall/NAME`` for each. What a step logs by itself under one of these names is left to it. To update
    a metric or to log takes as long as a step of a small network, so nothing of that is done per step. What
    is gathered is part of the checkpoint.

    Args:
        metrics: by the names under which they are logged.

    Raises:
        ConfigurationError: if a metric of torchmetrics does not take what the steps return.

    Example:
        >>> def configure_callbacks(self):
        ...     return [Metrics({"acc": MulticlassAccuracy(num_classes=10, average="micro")})]
    """

    def __init__(self, metrics: Mapping[str, Metric] | None = None) -> None:
        self.metrics = dict(metrics or {})
        self._train: list[Outputs] = []  # since the last log
        self._interval, self._epoch = self._new(), self._new()
        self._logged_step = 0
        # While evaluating, by dataloader: its outputs since the last flush, and its metrics.
        self._evaluated: dict[int, tuple[list[Outputs], _Collection]] = {}

    def _new(self) -> _Collection:
        return _Collection(self.metrics)

    # ------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a new run may start from the weights of another, not from its sums
            self._train, self._interval, self._epoch = [], self._new(), self._new()
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        steps = step_outputs(outputs)
        for step, output in enumerate(steps, trainer.global_step - len(steps) + 1):
            if (found := as_outputs(output)) is not None:
                # Lightning has divided the loss by the number of batches that it accumulates.
                scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
                self._train.append(_detached(found, scale))
            if len(self._train) == FLUSH_EVERY:
                self._flush_train()
            if every and step // every > self._logged_step // every:
                self._logged_step = step
                self._flush_train()
                if self._interval.updated:
                    values = self._interval.compute(trainer, "train")
                    # Lightning reads what the bar shows after every step; on a GPU that would wait for it.
                    values = {name: value.cpu() for name, value in values.items()}
                    self._interval.reset()
                    self._log(trainer, pl_module, values, step - 1, sync_dist=False)

    def _flush_train(self) -> None:
        outputs, self._train = self._train, []
        for collection in (self._interval, self._epoch):
            if outputs:
                collection.update(outputs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush_train()
        if self._epoch.updated:
            values = self._epoch.compute(trainer, "train", suffix="_epoch")
            self._epoch.reset()
            self._log(trainer, pl_module, values, trainer.global_step - 1)

    # ----------------------------------------------------------------------------------------- evaluation

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(outputs, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._evaluate(outputs, dataloader_idx)

    def _evaluate(self, outputs: Any, dataloader_idx: int) -> None:
        if (found := as_outputs(outputs)) is None:
            return
        gathered, collection = self._evaluated.setdefault(dataloader_idx, ([], self._new()))
        gathered.append(_detached(found))
        if len(gathered) == FLUSH_EVERY:
            collection.update(gathered)
            gathered.clear()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_evaluated(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_evaluated(trainer, pl_module, "test")

    def _log_evaluated(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        evaluated, self._evaluated = self._evaluated, {}
        loaders = trainer.num_val_batches if stage == "val" else trainer.num_test_batches
        for index, (gathered, collection) in evaluated.items():
            if gathered:
                collection.update(gathered)
            suffix = f"/dataloader_idx_{index}" if len(loaders) > 1 else ""  # as Lightning's own names
            values = collection.compute(trainer, stage, suffix)
            self._log(trainer, pl_module, values, max(trainer.global_step - 1, 0))

    # -------------------------------------------------------------------------------------------- logging

    @staticmethod
    def _log(
        trainer: Trainer,
        pl_module: LightningModule,
        values: dict[str, Tensor],
        step: int,
        sync_dist: bool = True,
    ) -> None:
        """Log values that are the same in every process.

        In ``fit`` the loggers are called directly: Lightning would place the values at the number of its own steps,
        each of which may be several optimizer steps. In ``validate`` and ``test`` Lightning logs, prints and returns
        the values.
        """
        fits = trainer.state.fn == "fit"
        results: Any = trainer._results or {}
        steps = ("training_step", "validation_step", "test_step")
        taken = {name for name in values for fx in steps if f"{fx}.{name.removesuffix('_epoch')}" in results}
        values = {name: value for name, value in values.items() if name not in taken}
        for name, value in values.items():
            shown = name.count("/") == 1
            pl_module.log(name, value, shown, not fits, sync_dist=sync_dist, add_dataloader_idx=False)
        if values and fits and not trainer.sanity_checking:
            scalars = {name: value.item() for name, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=step)

    # ---------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = {
            "train": [dict(outputs) for outputs in self._train],
            "interval": self._interval.state_dict(),
            "epoch": self._epoch.state_dict(),
        }
        states = [state] * trainer.world_size
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(states, state)
        checkpoint["metrics"] = states  # one for each process
        if names := getattr(getattr(trainer, "datamodule", None), "class_names", None):
            checkpoint["class_names"] = [str(name) for name in names]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "class_names" in checkpoint:
            pl_module.class_names = checkpoint["class_names"]
        states = checkpoint.get("metrics", [])
        if trainer.state.fn != "fit" or len(states) != trainer.world_size:
            return  # RandomState warns of another number of processes; the means start again
        state = states[trainer.global_rank]
        device = trainer.strategy.root_device
        self._train = [
            Outputs(**{key: value.to(device) for key, value in outputs.items()})  # type: ignore[typeddict-item]
            for outputs in state["train"]
        ]
        self._interval.load_state_dict(state["interval"])
        self._epoch.load_state_dict(state["epoch"])


def metric_names(trainer: Trainer) -> list[str]:
    """The names that ``Metrics`` logs in each stage, such as loss and acc; none if the run has no metrics."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Metrics) and callback.metrics:
            return ["loss", *callback.metrics]
    return []


class _Collection:
    """The mean of the loss, and the metrics, over the same batches; fresh copies of them.

    torchmetrics' ``MetricCollection`` has one signature for all of its metrics; the loss has another one.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        # Not a MeanMetric: that of torchmetrics 1.9 drops the weights unless it looks for NaN, which waits for a GPU.
        self.loss, self.samples = SumMetric(nan_strategy="disable"), SumMetric(nan_strategy="disable")
        self.metrics = {name: metric.clone() for name, metric in metrics.items()}
        self.updated = False
        for metric in (self.loss, self.samples, *self.metrics.values()):
            metric.reset()
            metric.persistent(True)

    def update(self, outputs: list[Outputs]) -> None:
        """Take in batches, at once where their shapes allow it."""
        self.updated = True
        losses = _widened(torch.stack([output["loss"] for output in outputs]))
        sizes = [len(output["target"]) if output["target"].ndim else 1 for output in outputs]
        # Of a mean over samples: the last batch may be shorter.
        weights = torch.tensor(sizes).to(losses.device, non_blocking=True)
        self.loss.to(losses.device).update((losses * weights).sum())
        self.samples.to(losses.device).update(weights.sum())
        for preds, target in _joined(outputs):
            for name, metric in self.metrics.items():
                try:
                    metric.to(preds.device).update(_widened(preds), _widened(target))
                except (TypeError, ValueError, RuntimeError) as error:
                    if not type(metric).__module__.startswith("torchmetrics."):
                        raise  # a user's own metric: its traceback helps
                    raise ConfigurationError(
                        f"the metric {name} ({type(metric).__name__}) does not take preds {preds.dtype} "
                        f"{tuple(preds.shape)} and target {target.dtype} {tuple(target.shape)}: {error}"
                    ) from error

    def compute(self, trainer: Trainer, stage: Stage, suffix: str = "") -> dict[str, Tensor]:
        """The values by the names under which they are logged, over all processes."""
        values = {f"{stage}/loss{suffix}": self.loss.compute() / self.samples.compute()}
        for name, metric in self.metrics.items():
            value = metric.compute()
            if isinstance(value, Mapping):  # such as those of torchmetrics' ClasswiseWrapper
                values |= {f"{stage}/{name}/{key}{suffix}": part for key, part in value.items()}
            elif isinstance(value, Tensor) and value.ndim == 1:
                labels = class_names(trainer, len(value))
                values |= {f"{stage}/{name}/{label}{suffix}": part for label, part in zip(labels, value, strict=True)}
            elif isinstance(value, Tensor) and value.ndim == 0:
                values[f"{stage}/{name}{suffix}"] = value
            else:
                rank_zero_warn(f"{stage}/{name} is neither a number nor one number per class: not logged")
        return {name: value.detach().float() for name, value in values.items()}

    def reset(self) -> None:
        self.updated = False
        for metric in (self.loss, self.samples, *self.metrics.values()):
            metric.reset()

    def state_dict(self) -> dict[str, Any]:
        metrics = {name: metric.state_dict() for name, metric in self.metrics.items()}
        loss, samples = self.loss.state_dict(), self.samples.state_dict()
        return {"updated": self.updated, "loss": loss, "samples": samples, "metrics": metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the metrics of the same names; one that is new since then starts from here."""
        self.updated = state["updated"]
        self.loss.load_state_dict(state["loss"])
        self.samples.load_state_dict(state["samples"])
        for name, metric in self.metrics.items():
            if name in state["metrics"]:
                nn.Module.load_state_dict(metric, state["metrics"][name], strict=False)


def _detached(outputs: Outputs, scale: int = 1) -> Outputs:
    loss = outputs["loss"].detach()
    return Outputs(
        loss=loss * scale if scale > 1 else loss,
        preds=outputs["preds"].detach().clone(),  # torch.compile(mode="reduce-overhead") writes the next ones there
        target=outputs["target"].detach(),
    )


def _widened(values: Tensor) -> Tensor:
    """At least float32: for sums, bfloat16 is too coarse. Whole numbers stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) if values.is_floating_point() else values


def _joined(outputs: list[Outputs]) -> list[tuple[Tensor, Tensor]]:
    """Predictions and targets of all batches in one, unless their shapes differ."""
    pairs = [(output["preds"], output["target"]) for output in outputs]
    if len({(preds.shape[1:], target.shape[1:]) for preds, target in pairs}) > 1 or not pairs[0][1].ndim:
        return pairs
    preds, target = zip(*pairs, strict=True)
    return [(torch.cat(preds), torch.cat(target))]
