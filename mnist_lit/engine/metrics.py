"""Metrics in a callback: outputs of steps are gathered, and evaluated when they are logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection, SumMetric

from mnist_lit.engine.errors import explain_damage
from mnist_lit.engine.outputs import Outputs, as_outputs, class_names, step_outputs

# Batches are gathered up to one of these limits and then evaluated together.
MAX_BATCHES = 64
MAX_BYTES = 4 * 2**20

Row = tuple[Tensor, int, Tensor | None, Tensor | None]  # loss (), batch size; preds and target if there are metrics


class Metrics(Callback):
    """Log the loss and metrics of every step that returns ``Outputs``.

    ``train/loss`` is the mean over all batches of all processes since the last log, every ``log_every_n_steps``
    optimizer steps, and ``train/loss_epoch`` the mean over the epoch. ``val/loss`` and ``test/loss`` are means over the
    split. Metrics are logged likewise, those with one value per class as ``val/recall/NAME`` for each. Names that a
    step logs itself are left to it.

    Updating a metric and logging take as long as a step of a small network. So up to 64 batches or 4 MiB are gathered
    and evaluated together. Checkpoints contain the gathered batches.

    Args:
        metrics: metrics by the names to log them under.

    Example:
        >>> metrics = {"acc": MulticlassAccuracy(num_classes=10, average="micro")}
        >>> Trainer(callbacks=[Metrics(metrics)])
    """

    def __init__(self, metrics: Mapping[str, Metric] | None = None) -> None:
        self.metrics = dict(metrics or {})
        self._interval, self._epoch = _Means(self.metrics), _Means(self.metrics)
        self._logged_step = 0
        self._evaluated: dict[int, _Means] = {}  # by dataloader
        self._logged: set[str] = set()  # names that this callback logs

    # ------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a new run does not continue the sums of another
            self._interval, self._epoch = _Means(self.metrics), _Means(self.metrics)
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        steps = step_outputs(outputs)
        # Lightning has divided the loss by the number of batches that it accumulates.
        scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        for step, output in enumerate(steps, trainer.global_step - len(steps) + 1):
            if (found := as_outputs(output)) is not None:
                row = self._row(found, scale)
                self._interval.add(row)
                self._epoch.add(row)
            if every and step // every > self._logged_step // every:
                self._logged_step = step
                values = self._interval.compute(trainer, "train")
                # Lightning reads the bar's values after every step, which would wait for a GPU.
                values = {name: value.cpu() for name, value in values.items()}
                self._log(trainer, pl_module, values, step - 1, sync_dist=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self._epoch.compute(trainer, "train", suffix="_epoch")
        self._log(trainer, pl_module, values, trainer.global_step - 1)

    def _row(self, outputs: Outputs, scale: int = 1) -> Row:
        loss, target = outputs["loss"].detach() * scale, outputs["target"].detach()
        size = len(target) if target.ndim else 1
        if not self.metrics:
            return loss, size, None, None
        # A clone, because torch.compile(mode="reduce-overhead") reuses the memory of preds.
        return loss, size, outputs["preds"].detach().clone(), target

    # ----------------------------------------------------------------------------------------- evaluation

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if (found := as_outputs(outputs)) is not None:
            if dataloader_idx not in self._evaluated:
                self._evaluated[dataloader_idx] = _Means(self.metrics)
            self._evaluated[dataloader_idx].add(self._row(found))

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_evaluated(trainer, pl_module, "val", len(trainer.num_val_batches))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_evaluated(trainer, pl_module, "test", len(trainer.num_test_batches))

    def _log_evaluated(self, trainer: Trainer, pl_module: LightningModule, stage: str, loaders: int) -> None:
        evaluated, self._evaluated = self._evaluated, {}
        for index, means in evaluated.items():
            suffix = f"/dataloader_idx_{index}" if loaders > 1 else ""  # as in Lightning's own names
            values = means.compute(trainer, stage, suffix)
            self._log(trainer, pl_module, values, max(trainer.global_step - 1, 0))

    # -------------------------------------------------------------------------------------------- logging

    def _log(
        self, trainer: Trainer, pl_module: LightningModule, values: dict[str, Tensor], step: int, sync_dist: bool = True
    ) -> None:
        """Log values that are the same in every process.

        In ``fit``, the loggers are called directly: Lightning would count its own steps, each of which may be several
        optimizer steps. In ``validate`` and ``test``, Lightning logs, prints and returns the values.
        """
        fits = trainer.state.fn == "fit"
        own = trainer.callback_metrics.keys() - self._logged  # logged by the module
        values = {name: value for name, value in values.items() if not {name, name.removesuffix("_epoch")} & own}
        self._logged.update(values)
        for name, value in values.items():
            shown = name == "train/loss" or (name.count("/") == 1 and not name.startswith("train/"))  # on the bar
            pl_module.log(name, value, shown, not fits, sync_dist=sync_dist, add_dataloader_idx=False)
        if values and fits and not trainer.sanity_checking:
            scalars = {name: value.item() for name, value in values.items()}
            for logger in trainer.loggers:
                logger.log_metrics({**scalars, "epoch": trainer.current_epoch}, step=step)

    # ---------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state: dict[str, Any] = {"interval": self._interval.state_dict(), "epoch": self._epoch.state_dict()}
        state["logged"] = sorted(self._logged)
        states = [state] * trainer.world_size
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(states, state)
        checkpoint["metrics"] = states  # one per process
        if names := class_names(trainer):
            checkpoint["class_names"] = names

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if "class_names" in checkpoint:
            pl_module.class_names = checkpoint["class_names"]
        states = checkpoint.get("metrics", [])
        if trainer.state.fn == "fit" and len(states) == trainer.world_size:  # else the means start again
            with explain_damage(trainer.ckpt_path):
                state = states[trainer.global_rank]
                self._interval.load_state_dict(state["interval"], trainer.strategy.root_device)
                self._epoch.load_state_dict(state["epoch"], trainer.strategy.root_device)
                self._logged = set(state["logged"])


class _Means:
    """The mean loss and copies of the metrics over the same batches."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        # Not a MeanMetric: in torchmetrics 1.9 it drops the weights unless it checks for NaN, which waits for a GPU.
        self.loss, self.samples = SumMetric(nan_strategy="disable"), SumMetric(nan_strategy="disable")
        self.metrics = {name: metric.clone() for name, metric in metrics.items()}
        parts: dict[str, Any] = {" loss": self.loss, " samples": self.samples, **self.metrics}
        self.parts = MetricCollection(parts, compute_groups=False)
        self.parts.persistent(True)
        self.reset()

    def reset(self) -> None:
        self.rows, self.bytes, self.updated = list[Row](), 0, False
        self.parts.reset()

    def add(self, row: Row) -> None:
        """Gather a batch."""
        self.rows.append(row)
        self.bytes += sum(values.nbytes for values in row[2:] if isinstance(values, Tensor))
        if len(self.rows) == MAX_BATCHES or self.bytes >= MAX_BYTES:
            self._update()

    def _update(self) -> None:
        """Evaluate the gathered batches, at once if their shapes allow it."""
        rows, self.rows, self.bytes, self.updated = self.rows, [], 0, True
        losses = _widened(torch.stack([row[0] for row in rows]))  # (number of batches,)
        self.parts.to(losses.device)
        # The last batch may be smaller.
        weights = torch.tensor([row[1] for row in rows]).to(losses.device, non_blocking=True)
        self.loss.update((losses * weights).sum())
        self.samples.update(weights.sum())
        pairs = [(preds, target) for _, _, preds, target in rows if preds is not None and target is not None]
        if len({(preds.shape[1:], target.shape[1:]) for preds, target in pairs}) == 1 and pairs[0][1].ndim:
            every_preds, every_target = zip(*pairs, strict=True)
            pairs = [(torch.cat(every_preds), torch.cat(every_target))]
        for preds, target in pairs:
            for metric in self.metrics.values():
                metric.update(_widened(preds), _widened(target))

    def compute(self, trainer: Trainer, stage: str, suffix: str = "") -> dict[str, Tensor]:
        """The values over all processes by the names to log them under; then reset."""
        if self.rows:
            self._update()
        if not self.updated:
            return {}
        values = {f"{stage}/loss{suffix}": self.loss.compute() / self.samples.compute()}
        for name, metric in self.metrics.items():
            value = metric.compute()
            if isinstance(value, Tensor) and value.ndim == 1:
                value = dict(zip(class_names(trainer, len(value)), value, strict=True))
            if isinstance(value, Mapping):  # such as those of torchmetrics' ClasswiseWrapper
                values |= {f"{stage}/{name}/{key}{suffix}": part for key, part in value.items()}
            elif isinstance(value, Tensor) and value.ndim == 0:
                values[f"{stage}/{name}{suffix}"] = value
            else:
                rank_zero_warn(f"{stage}/{name} is neither a number nor one number per class: not logged")
        self.reset()
        return {name: value.detach().float() for name, value in values.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "updated": self.updated, "parts": dict(self.parts.state_dict())}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the metrics of the same names; new ones start here."""
        self.reset()
        self.updated = state["updated"]
        self.parts.load_state_dict(state["parts"], strict=False)
        for loss, size, *pair in state["rows"]:
            preds, target = (values if values is None else values.to(device) for values in pair)
            self.add((loss.to(device), size, preds, target))


def _widened(values: Tensor) -> Tensor:
    """As float32 or wider, because bfloat16 is too coarse for sums. Integers stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) if values.is_floating_point() else values
