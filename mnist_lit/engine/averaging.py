"""Weights averaged over the last epochs."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class TailAveraging(WeightAveraging):
    """Average the weights over the last epochs, step by step, after stochastic weight averaging
    (P. Izmailov et al., https://arxiv.org/abs/1803.05407).

    Lightning's ``StochasticWeightAveraging`` keeps its average out of checkpoints and cannot resume exactly; this one
    validates it, saves it and resumes bit for bit. Running statistics are averaged, too.

    Args:
        start_epoch: the first epoch to average over, counted from 0. Before it the average is the current weights.

    Example:
        >>> Trainer(callbacks=[TailAveraging(start_epoch=1)])
    """

    def __init__(self, start_epoch: NonNegativeInt = 1) -> None:
        super().__init__(use_buffers=True, avg_fn=self._average)
        self.start_epoch = int(start_epoch)
        self._tail = False  # whether the average has begun
        self._number = 0  # of weights in the average

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tail = trainer.current_epoch >= self.start_epoch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Update after every optimizer step; asked once before each update."""
        if step_idx is None:
            return False
        self._number = self._number + 1 if self._tail else 0
        return True

    def _average(self, average: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        return current if self._number <= 1 else average + (current - average) / self._number

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "number": self._number}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore how many weights are in the average."""
        super().load_state_dict(state_dict)
        self._number = state_dict["number"]
