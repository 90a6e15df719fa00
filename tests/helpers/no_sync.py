"""A callback for the tests on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class NoSync(Callback):
    """Raises where the host waits for the GPU, in steps that log nothing and in the loading of their batches.

    Not in the first epoch, in which libraries choose and compile their kernels.
    """

    def __init__(self) -> None:
        self.checked = 0  # steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch and not self._logs(trainer):
            torch.cuda.set_sync_debug_mode("error")
            self.checked += 1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._logs(trainer) or trainer.is_last_batch:
            torch.cuda.set_sync_debug_mode("default")

    @staticmethod
    def _logs(trainer: Trainer) -> bool:
        """Whether the next step logs, of which there may be several in one of Lightning's."""
        steps = getattr(trainer.lightning_module, "steps_per_execution", 1)
        every = trainer.log_every_n_steps
        return (trainer.global_step + steps) // every > trainer.global_step // every

    def on_validation_start(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_train_end(self, *_: Any) -> None:
        print(f"{self.checked} steps without a wait for the GPU")
