"""Callbacks: divergence, compilation, weight averaging, the table of the model, progress bar."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichModelSummary, RichProgressBar, WeightAveraging
from lightning.pytorch.profilers import PassThroughProfiler
from rich import get_console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor
from torch.nn.parameter import is_lazy

from mnist_lit.engine.errors import DivergenceError
from mnist_lit.engine.outputs import step_outputs


class StopOnNonFinite(Callback):
    """Monitor the loss, and stop before a checkpoint is made of a run that has diverged.

    The losses are checked every ``log_every_n_steps`` and before every checkpoint, because on a GPU to look
    at each of them would make every step wait.

    Raises:
        DivergenceError: naming step, batch and learning rate.

    Example:
        >>> Trainer(callbacks=[StopOnNonFinite()])
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, int, float, Tensor]] = []  # step, batch, lr, loss ()
        self._logs = 0  # number of logs when they were checked

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps = step_outputs(outputs)
        batch_idx *= getattr(pl_module, "steps_per_execution", 1)
        first = trainer.global_step - len(steps) + 1
        lr = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else math.nan
        for index, output in enumerate(steps):
            if isinstance(loss := output.get("loss"), Tensor):
                self._losses.append((first + index, batch_idx + index, lr, loss.detach()))
        # In the steps that log, and so wait for the GPU anyway.
        logs = trainer.global_step // max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if logs != self._logs:
            self._logs = logs
            self._check(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)
        weights = (weight for weight in pl_module.parameters() if not is_lazy(weight))
        if not all(weight.isfinite().all() for weight in weights):
            raise DivergenceError(f"the weights are no longer finite after step {trainer.global_step}; {self.ADVICE}")

    ADVICE = "the last checkpoint is from before that; train again with a lower learning rate"

    def _check(self, trainer: Trainer) -> None:
        losses, self._losses = self._losses, []
        if not losses or torch.stack([row[-1] for row in losses]).isfinite().all():
            return
        step, batch_idx, lr, loss = next(row for row in losses if not row[-1].isfinite())
        raise DivergenceError(
            f"the loss is {loss.item()} at step {step} (epoch {trainer.current_epoch}, batch {batch_idx}), "
            f"the learning rate {lr:g}; {self.ADVICE}"
        )


class Compile(Callback):
    """Compile the model's ``forward`` with ``torch.compile``. Its weights keep their names.

    Args:
        mode: of ``torch.compile``, such as ``reduce-overhead``.
        dynamic: of ``torch.compile``: whether sizes may change without compiling again.

    Example:
        >>> Trainer(callbacks=[Compile(mode="reduce-overhead")])
    """

    def __init__(self, mode: str | None = None, dynamic: bool | None = None) -> None:
        self.mode, self.dynamic = mode, dynamic

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.compile(mode=self.mode, dynamic=self.dynamic)


class TailAveraging(WeightAveraging):
    """Average the weights over the last epochs, step by step, after stochastic weight averaging
    (P. Izmailov et al., https://arxiv.org/abs/1803.05407).

    Lightning's ``StochasticWeightAveraging`` has its average in no checkpoint and cannot resume exactly; this one
    validates it, keeps it in checkpoints and resumes bit for bit. Running statistics are averaged, too.

    Args:
        start_epoch: from which on, counted from 0. Before it the average is the current weights.

    Example:
        >>> Trainer(callbacks=[TailAveraging(start_epoch=1)])
    """

    def __init__(self, start_epoch: NonNegativeInt = 1) -> None:
        super().__init__(use_buffers=True)
        self.start_epoch = int(start_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.current_epoch < self.start_epoch and self._average_model is not None:
            self._average_model.n_averaged.zero_()  # PyTorch copies what is the first to average


class NoProfiler(PassThroughProfiler):
    """Lightning's default profiler, without the generator that it makes for every hook, and without calls of
    hooks that are empty.
    """

    # Those of every step.
    HOOKS = """on_train_batch_start on_before_zero_grad on_before_backward on_after_backward
    on_before_optimizer_step on_train_batch_end""".split()

    NOTHING: nullcontext[None] = nullcontext()

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Have Lightning pass over empty hooks, as it does over attributes that cannot be called."""
        module = getattr(self, "_lightning_module", None)  # which Lightning sets before
        if module is None:
            return
        for owner in (module, *module.trainer.callbacks):
            base = LightningModule if owner is module else Callback
            for hook in self.HOOKS:
                if getattr(getattr(owner, hook), "__func__", None) is getattr(base, hook):
                    setattr(owner, hook, None)

    def profile(self, action_name: str) -> Any:
        """Measure nothing."""
        return self.NOTHING


class ModelTable(RichModelSummary):
    """Lightning's summary of the model, without rows and columns that say nothing.

    Example:
        >>> Trainer(callbacks=[ModelTable(max_depth=2)])
    """

    @staticmethod
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        """Print a row for each part of the model."""
        left_out = {" ", "Mode", *(() if total_flops else ("FLOPs",))}
        columns = {name: cells for name, cells in summary_data if name not in left_out}
        numbers = {"Params", "Params per Device", "FLOPs"}
        table = Table(*(Column(name, justify="right" if name in numbers else "left") for name in columns))
        for row in zip(*columns.values(), strict=True):
            table.add_row(*map(escape, row))
        frozen = total_parameters - trainable_parameters
        table.caption = f"{total_parameters:,} parameters, {model_size:.3g} MB"
        table.caption += f"; {frozen:,} of them are not trained" if frozen else ""
        get_console().print(table)


class ProgressBar(RichProgressBar):
    """Lightning's bar, drawn ``refresh_rate`` times a second and after the last batch, not after every one; it counts
    epochs from 1.

    Args:
        refresh_rate: times per second.
    """

    def __init__(self, refresh_rate: PositiveInt = 5) -> None:
        super().__init__(refresh_rate)
        self._drawn = 0.0

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's, without the version of the logger."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        description = f"Epoch {current_epoch + 1}" + (f"/{last}" if last not in (None, -1) else "")
        return description.ljust(len(self.validation_description))  # so that the bar does not jump

    def _due(self, batch_idx: int, batches: int | float) -> bool:
        now = time.monotonic()
        due = now - self._drawn >= 1 / self.refresh_rate or batch_idx + 1 == batches
        self._drawn = now if due else self._drawn
        return due

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.is_enabled and self._due(batch_idx, self.total_train_batches):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning draws the last epoch's end before the metrics of that epoch are there.
        self._update_metrics(trainer, pl_module)
        self.refresh()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        if self.is_enabled and self._due(batch_idx, self.total_val_batches_current_dataloader):
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        if self.is_enabled and self._due(batch_idx, self.total_test_batches_current_dataloader):
            super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        *args: Any,
    ) -> None:
        if self.is_enabled and self._due(batch_idx, self.total_predict_batches_current_dataloader):
            super().on_predict_batch_end(trainer, pl_module, outputs, batch, batch_idx, *args)
