"""The progress bar, on one line."""

import time
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomBarColumn
from rich import get_console
from rich.progress import ProgressColumn, TextColumn, TimeRemainingColumn


class ProgressBar(RichProgressBar):
    """Lightning's bar on one line, with as many metrics as fit and epochs counted from 1.

    It is updated a few times per second and after the last batch, because an update takes as long as a step of a small
    network.

    Args:
        refresh_rate: number of updates per second.

    Example:
        >>> Trainer(callbacks=[ProgressBar()])
    """

    def __init__(self, refresh_rate: PositiveInt = 5) -> None:
        super().__init__(refresh_rate)
        self._updated = 0.0

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        """Epoch, bar, number of batches and time."""
        return [
            TextColumn("{task.description}"),
            CustomBarColumn(bar_width=10),
            BatchesProcessedColumn(style=""),
            TimeRemainingColumn(elapsed_when_finished=True),
        ]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's metrics that fit on the line, without the logger's version."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        room, fitting = get_console().width - 37, {}  # the other columns take 37
        for name, value in metrics.items():
            short = name.removeprefix("train/")
            room -= len(f"{short}: 0.000 ")
            if room >= 0:
                fitting[short] = value
        return fitting

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._describe(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if now - self._updated >= 1 / self.refresh_rate or batch_idx + 1 == self.total_train_batches:
            self._updated = now
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._describe(trainer)  # a run that is resumed within an epoch skips its start

    def _describe(self, trainer: Trainer) -> None:
        if self.progress is not None and self.train_progress_bar_id is not None:
            last = f"/{trainer.max_epochs}" if trainer.max_epochs not in (None, -1) else ""
            self.progress.update(self.train_progress_bar_id, description=f"Epoch {trainer.current_epoch + 1}{last}")
