"""Learning rate schedules by configuration: per step, and one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from mnist_lit.engine.errors import UserError

# Arguments of PyTorch's schedulers that say how long they last.
LENGTHS = "total_steps", "T_max", "total_iters"


class Schedule(LRScheduler):
    """A scheduler, or several one after the other, for ``lr_scheduler`` in a config; by step or by epoch.

    A length of -1 in the arguments of a scheduler (``total_steps``, ``T_max``, ``total_iters``) stands for its part of
    the run. So does a ``total_steps`` that is left out.

    Args:
        optimizer: comes from the config.
        schedulers: of PyTorch or your own, each but for its optimizer.
        milestones: where the second begins, the third and so on: a number of steps (or epochs), or a share of the run
            between 0 and 1.
        interval: what they count.

    Raises:
        UserError: if the milestones do not fit, or a run without an end is asked for its length.

    Example, with a twentieth of the run for the warm-up and the rest for the cosine::

        lr_scheduler:
          class_path: mnist_lit.engine.Schedule
          init_args:
            schedulers:
              - {class_path: LinearLR, init_args: {start_factor: 0.01, total_iters: -1}}
              - {class_path: CosineAnnealingLR, init_args: {T_max: -1}}
            milestones: [0.05]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: list[Callable[[Optimizer], LRScheduler]],
        milestones: list[float] | None = None,
        interval: Literal["step", "epoch"] = "step",
    ) -> None:
        # A plan: only the trainer, which is there when training starts, knows how long the run is.
        self.optimizer, self.interval = optimizer, interval
        self.parts = schedulers
        self.milestones = milestones or []
        if len(self.milestones) != len(self.parts) - 1:
            raise UserError(
                f"lr_scheduler: {len(self.parts)} schedulers need {max(len(self.parts) - 1, 0)} milestones, where each "
                f"but the first begins, not {len(self.milestones)}"
            )

    def make(self, trainer: Trainer) -> dict[str, Any]:
        """What ``configure_optimizers`` returns as ``lr_scheduler``."""
        starts = [0, *(self._place(milestone, trainer) for milestone in self.milestones)]
        if sorted(set(starts)) != starts:
            raise UserError(f"lr_scheduler: the milestones {self.milestones} are not in order")
        made = [self._part(part, index, starts, trainer) for index, part in enumerate(self.parts)]
        scheduler = made[0] if len(made) == 1 else SequentialLR(self.optimizer, made, starts[1:])
        return {"scheduler": scheduler, "interval": self.interval}

    def _place(self, milestone: float, trainer: Trainer) -> int:
        return max(1, round(milestone * self._length(trainer))) if 0 < milestone < 1 else round(milestone)

    def _length(self, trainer: Trainer) -> int:
        length = trainer.estimated_stepping_batches if self.interval == "step" else trainer.max_epochs
        if length is None or length < 0 or math.isinf(length):
            raise UserError(
                "lr_scheduler: a schedule as long as the run needs a run with an end: give --trainer.max_epochs"
                + (" or --trainer.max_steps" if self.interval == "step" else "")
            )
        return int(length)

    def _part(self, part: Callable[..., LRScheduler], index: int, starts: list[int], trainer: Trainer) -> LRScheduler:
        given: dict[str, Any] = getattr(part, "keywords", {})  # a config's part is a functools.partial
        lengths = {}
        for name in LENGTHS:
            if given.get(name, 0) == -1 or (name == "total_steps" and given.get(name, 0) is None):
                if given.get("epochs") and given.get("steps_per_epoch"):
                    continue  # OneCycleLR's other way to say it
                end = starts[index + 1] if index + 1 < len(starts) else self._length(trainer)
                lengths[name] = max(1, end - starts[index])
        return part(self.optimizer, **lengths)
