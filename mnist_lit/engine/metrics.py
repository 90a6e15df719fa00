"""Metrics in a callback: outputs of steps are gathered, and evaluated when they are logged."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics import Metric

from mnist_lit.engine.compat import log_step
from mnist_lit.engine.errors import explain_damage
from mnist_lit.engine.outputs import as_outputs, class_names, step_outputs

# Batches are gathered up to one of these limits and then evaluated together.
MAX_BATCHES = 64
MAX_BYTES = 4 * 2**20

Row = tuple[Any, ...]  # loss (), batch size; preds and target if there are metrics


class Metrics(Callback):
    """Log the loss and metrics of every step that returns ``Outputs``.

    ``train/loss`` is the mean over all batches of all processes since the last log, every ``log_every_n_steps``
    optimizer steps, and ``train/loss_epoch`` the mean over the epoch. ``val/loss`` and ``test/loss`` are means over the
    split. Metrics are logged likewise, those with one value per class as ``val/recall/NAME`` for each. Names that a
    step logs itself are left to it.

    Updating a metric and logging take as long as a step of a small network. So up to 64 batches or 4 MiB are gathered
    and evaluated together. Checkpoints contain the gathered batches.

    Args:
        metrics: metrics by the names to log them under, other than ``loss``.

    Example:
        >>> metrics = {"acc": MulticlassAccuracy(num_classes=10, average="micro")}
        >>> Trainer(callbacks=[Metrics(metrics)])
    """

    def __init__(self, metrics: Mapping[str, Metric] | None = None) -> None:
        self.metrics = {name: metric for name, metric in (metrics or {}).items() if name != "loss"}
        self._trained = _Means(self.metrics, "interval", "epoch")
        self._evaluated: dict[int, _Means] = {}  # by dataloader
        self._logged_step = 0
        self._logged: set[str] = set()  # names that this callback logs

    # ------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a new run does not continue the sums of another
            self._trained = _Means(self.metrics, "interval", "epoch")
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        steps = step_outputs(outputs)
        # Lightning has divided the loss by the number of batches that it accumulates.
        scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        for step, output in enumerate(steps, trainer.global_step - len(steps) + 1):
            self._trained.add(output, scale)
            if every and step // every > self._logged_step // every:
                self._logged_step = step
                values = self._trained.compute("interval", trainer, "train")
                # Lightning reads the bar's values after every step, which would wait for a GPU.
                values = {name: value.cpu() for name, value in values.items()}
                self._log(trainer, pl_module, values, log_step(trainer) + step - trainer.global_step, sync_dist=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = self._trained.compute("epoch", trainer, "train", suffix="_epoch")
        self._log(trainer, pl_module, values, log_step(trainer) - 1)  # as Lightning does

    # ----------------------------------------------------------------------------------------- evaluation

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx not in self._evaluated:
            self._evaluated[dataloader_idx] = _Means(self.metrics, "split")
        self._evaluated[dataloader_idx].add(outputs)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        evaluated, self._evaluated = self._evaluated, {}
        for index, means in evaluated.items():
            suffix = f"/dataloader_idx_{index}" if len(evaluated) > 1 else ""  # as in Lightning's own names
            values = means.compute("split", trainer, "test" if trainer.testing else "val", suffix)
            self._log(trainer, pl_module, values, log_step(trainer))

    on_test_epoch_end = on_validation_epoch_end

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
        state = {**self._trained.state_dict(), "logged": sorted(self._logged)}
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
                self._trained.load_state_dict(state, trainer.strategy.root_device)
                self._logged = set(state["logged"])


class _Means:
    """Batches, and the mean loss and copies of the metrics over those of each of some periods."""

    def __init__(self, metrics: Mapping[str, Metric], *periods: str) -> None:
        self.has_metrics, self.rows = bool(metrics), list[Row]()
        self.periods: Any = nn.ModuleDict()
        for period in periods:
            copies = {name: metric.clone() for name, metric in {"loss": _MeanLoss(), **metrics}.items()}
            for metric in copies.values():
                metric.persistent(True)
            self.periods[period] = nn.ModuleDict(copies)

    def add(self, outputs: Any, scale: int = 1) -> None:
        """Gather a batch, if a step returned ``Outputs`` for it."""
        if (found := as_outputs(outputs)) is None:
            return
        loss, target = found["loss"].detach() * scale, found["target"].detach()
        # A clone, because torch.compile(mode="reduce-overhead") reuses the memory of preds.
        pair = (found["preds"].detach().clone(), target) if self.has_metrics else ()
        self.rows.append((loss, len(target) if target.ndim else 1, *pair))
        if len(self.rows) == MAX_BATCHES or len(self.rows) * sum(values.nbytes for values in pair) >= MAX_BYTES:
            self._update()

    def _update(self) -> None:
        """Evaluate the gathered batches, at once if their shapes allow it."""
        if not self.rows:
            return
        rows, self.rows = self.rows, []
        losses = _widened(torch.stack([row[0] for row in rows]))  # (number of batches,)
        self.periods.to(losses.device)
        # The last batch may be smaller.
        sizes = torch.tensor([row[1] for row in rows]).to(losses.device, non_blocking=True)
        pairs = [pair for _, _, *pair in rows if pair]
        if len({(preds.shape[1:], target.shape[1:]) for preds, target in pairs}) == 1 and pairs[0][1].ndim:
            pairs = [[torch.cat(values) for values in zip(*pairs, strict=True)]]
        pairs = [[_widened(values) for values in pair] for pair in pairs]
        for period in self.periods.values():
            for name, metric in period.items():
                for values in [(losses, sizes)] if name == "loss" else pairs:
                    metric.update(*values)

    def compute(self, period: str, trainer: Trainer, stage: str, suffix: str = "") -> dict[str, Tensor]:
        """The values of a period over all processes by the names to log them under; then reset."""
        self._update()
        values: dict[str, Tensor] = {}
        for name, metric in self.periods[period].items() if self.periods[period]["loss"].samples else ():
            value = metric.compute()
            metric.reset()
            if isinstance(value, Tensor) and value.ndim == 1:
                value = dict(zip(class_names(trainer, len(value)), value, strict=True))
            # Several are such as those of torchmetrics' ClasswiseWrapper.
            parts = {f"/{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {"": value}
            values |= {f"{stage}/{name}{key}{suffix}": part.detach().float() for key, part in parts.items()}
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"rows": list(self.rows), "sums": dict(self.periods.state_dict())}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore the metrics of the same names; new ones start here."""
        self.periods.load_state_dict(state["sums"], strict=False)
        rows = ((loss.to(device), size, *(values.to(device) for values in pair)) for loss, size, *pair in state["rows"])
        self.rows = list(rows)


class _MeanLoss(Metric):
    """The mean over samples. torchmetrics' MeanMetric 1.9 drops weights unless it checks for NaN, waiting for a GPU."""

    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("samples", torch.tensor(0), "sum")

    def update(self, losses: Tensor, sizes: Tensor) -> None:
        self.total = self.total + (losses * sizes).sum()
        self.samples = self.samples + sizes.sum()

    def compute(self) -> Tensor:
        return self.total / self.samples


def _widened(values: Tensor) -> Tensor:
    """As float32 or wider, because bfloat16 is too coarse for sums. Integers stay as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) if values.is_floating_point() else values
