"""Learning rate schedules in configs: by step or epoch, and in sequence."""

import math
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, SequentialLR

from mnist_lit.engine.errors import UserError

# Arguments of PyTorch's schedulers for their length.
LENGTHS = "total_steps", "T_max", "total_iters"


class Schedule(LRScheduler):
    """A scheduler or a sequence of them, for ``lr_scheduler`` in a config; by step or by epoch.

    A length of -1 in a scheduler's arguments (``total_steps``, ``T_max``, ``total_iters``) stands for its part of the
    run.

    Args:
        optimizer: comes from the config.
        schedulers: PyTorch's or your own, without their optimizer.
        milestones: where the second scheduler starts, the third and so on: a number of steps (or epochs), or a fraction
            of the run between 0 and 1.
        interval: whether they count steps or epochs.

    Raises:
        UserError: if milestones are missing, or the run has no end.

    Example, with 5 % of the run for the warm-up and the rest for the cosine::

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
        schedulers: list[Callable[..., LRScheduler]],
        milestones: list[float] | None = None,
        interval: Literal["step", "epoch"] = "step",
    ) -> None:
        # The schedulers are made when training starts, because only the trainer knows the length of the run.
        self.optimizer, self.parts = optimizer, schedulers
        self.milestones, self.interval = milestones or [], interval
        if len(schedulers) != len(self.milestones) + 1:
            raise UserError("lr_scheduler: every scheduler but the first needs a milestone, where it begins")

    def make(self, trainer: Trainer) -> dict[str, Any]:
        """Make the dict that ``configure_optimizers`` returns as ``lr_scheduler``."""
        places = [m * self._length(trainer) if 0 < m < 1 else m for m in self.milestones]
        starts = [0, *(max(1, round(place)) for place in places)]
        made = []
        for part, start, end in zip(self.parts, starts, [*starts[1:], 0], strict=True):
            given = getattr(part, "keywords", {})  # a config's part is a functools.partial
            to_fill = [name for name in LENGTHS if given.get(name) == -1]
            length = max(1, (end or self._length(trainer)) - start) if to_fill else 0
            made.append(part(self.optimizer, **dict.fromkeys(to_fill, length)))
        scheduler = made[0] if len(made) == 1 else SequentialLR(self.optimizer, made, starts[1:])
        return {"scheduler": scheduler, "interval": self.interval}

    def _length(self, trainer: Trainer) -> int:
        length = trainer.estimated_stepping_batches if self.interval == "step" else trainer.max_epochs
        if length is None or length < 0 or math.isinf(length):
            raise UserError("lr_scheduler: a schedule as long as the run needs a run with an end: --trainer.max_epochs")
        return int(length)
