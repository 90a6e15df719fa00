"""What watches over a run and what it leaves behind, beside Lightning's own logs and checkpoints."""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, RichProgressBar
from lightning.pytorch.profilers import PassThroughProfiler
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from mnist_lit.data import Images
from mnist_lit.pictures import contact_sheet


class DivergenceError(Exception):
    """Training has left the finite numbers; the message says at which step."""


class StopOnNonFinite(Callback):
    """Ends a run whose loss is infinite or not a number, before a checkpoint is made of it.

    Looks at the losses every ``log_every_n_steps`` and before every checkpoint, and not at each of them
    by itself: on a GPU that would make every step wait.

    Raises:
        DivergenceError: naming step, batch and learning rate.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, int, int, float, Tensor]] = []  # the last: of one step or of several

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(outputs, dict) and isinstance(outputs.get("loss"), Tensor):
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            losses = outputs["losses"] if "losses" in outputs else outputs["loss"]
            batch_idx *= getattr(pl_module, "steps_per_execution", 1)
            place = trainer.global_step, trainer.current_epoch, batch_idx, lr
            self._losses.append((*place, losses.detach().reshape(-1)))
        if len(self._losses) >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check()
        if not all(weight.isfinite().all() for weight in pl_module.parameters()):
            raise DivergenceError(
                f"the weights are no longer finite after step {trainer.global_step}; {self.ADVICE}"
            )

    ADVICE = "the last checkpoint is from before that; train again with a lower learning rate"

    def _check(self) -> None:
        losses, self._losses = self._losses, []
        if not losses or torch.cat([row[-1] for row in losses]).isfinite().all():
            return
        step, epoch, batch_idx, lr, each = next(row for row in losses if not row[-1].isfinite().all())
        first = int(each.isfinite().int().argmin())
        step, batch_idx = step - len(each) + 1 + first, batch_idx + first
        raise DivergenceError(
            f"the loss is {each[first].item()} at step {step} (epoch {epoch}, batch {batch_idx}), "
            f"the learning rate {lr:g}; {self.ADVICE}"
        )


class Compile(Callback):
    """Compiles the model's ``forward`` with ``torch.compile``; its weights keep their names.

    Args:
        mode: of ``torch.compile``, such as ``reduce-overhead``.
        dynamic: of ``torch.compile``: whether sizes may change without compiling again.
    """

    def __init__(self, mode: str | None = None, dynamic: bool | None = None) -> None:
        self.mode, self.dynamic = mode, dynamic

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.compile(mode=self.mode, dynamic=self.dynamic)


class NoProfiler(PassThroughProfiler):
    """Lightning's own, which measures nothing, without the generator that it makes for every hook of every
    callback: those took a tenth of an epoch of the logistic model.
    """

    NOTHING: nullcontext[None] = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Around each action."""
        return self.NOTHING


class ProgressBar(RichProgressBar):
    """Lightning's bar, drawn ``refresh_rate`` times a second, and after the last batch, instead of after
    every one.
    """

    def __init__(self, refresh_rate: PositiveInt = 5) -> None:
        super().__init__(refresh_rate)
        self._drawn = 0.0

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


class PredictionsFile(BasePredictionWriter):
    """What ``predict`` leaves in the run's folder: ``predictions.csv``, a row per image with its file (or
    its index in the test split), the predicted digit, the confidence and the probability of every class;
    and ``predictions.png``, the images and their digits, those with the least confidence first. Prints the
    first rows. Each process of several writes its own share, to ``predictions-rank1.csv`` and so on.
    """

    ROWS = 20  # that are printed
    PICTURES = 200

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        probabilities: Tensor = torch.cat(list(predictions)).float().cpu()  # (n, num_classes)
        indices = [index for batch in batch_indices[0] for index in batch]
        files = getattr(trainer.datamodule, "files", [])  # type: ignore[attr-defined]
        names = [str(files[index]) for index in indices] if files else [str(index) for index in indices]
        confidence, digits = probabilities.max(1)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-rank{trainer.global_rank}" if trainer.global_rank else ""
        path = folder / f"predictions{rank}.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            classes = (f"p{c}" for c in range(probabilities.shape[1]))
            rows.writerow(["file" if files else "index", "digit", "confidence", *classes])
            columns = names, digits.tolist(), confidence.tolist(), probabilities.tolist()
            for name, digit, sure, each in zip(*columns, strict=True):
                rows.writerow([name, digit, f"{sure:.6f}", *(f"{p:.6f}" for p in each)])
        dataset = getattr(trainer.predict_dataloaders, "dataset", None)
        sheet = folder / f"predictions{rank}.png"
        if isinstance(dataset, Images):
            order = confidence.argsort()[: self.PICTURES].tolist()
            captions = [f"{digits[place]}  {confidence[place]:.0%}" for place in order]
            contact_sheet(dataset.images[[indices[place] for place in order]], captions).save(sheet)
        if trainer.is_global_zero:
            table = Table("file" if files else "index", "digit", Column("confidence", justify="right"))
            for place in range(min(self.ROWS, len(names))):
                table.add_row(names[place], str(digits[place].item()), f"{confidence[place]:.1%}")
            console = Console()
            console.print(table)
            if len(names) > self.ROWS:
                console.print(f"... and {len(names) - self.ROWS:,} more")
            wrote = f"{path} and {sheet}" if sheet.exists() else str(path)
            console.print(f"Wrote {wrote}", soft_wrap=True, highlight=False)
