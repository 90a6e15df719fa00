"""A classifier full of chance, with a learning rate schedule to choose."""

from __future__ import annotations

from typing import Any

import torch
from interrupt import Chance
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import lr_scheduler as schedules

from mnist_lit import Classifier


class Scheduled(Classifier):
    """SGD with momentum, whose learning rate follows a schedule, per step or per epoch.

    Args:
        schedule: one_cycle, cosine, cyclic, plateau or warmup_cosine.
        options: as in ``Classifier``.
    """

    def __init__(self, schedule: str, **options: Any) -> None:
        super().__init__(Chance(), lr=0.02, **options)
        self.schedule = schedule

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        steps = int(self.trainer.estimated_stepping_batches)
        if self.schedule == "plateau":
            plateau = schedules.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"}}
        if self.schedule == "one_cycle":
            chosen: Any = schedules.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)  # cycles momentum, too
        elif self.schedule == "cosine":
            chosen = schedules.CosineAnnealingLR(optimizer, T_max=steps)
        elif self.schedule == "cyclic":
            chosen = schedules.CyclicLR(optimizer, base_lr=0.001, max_lr=0.05, step_size_up=7)
        else:
            warmup = schedules.LinearLR(optimizer, start_factor=0.01, total_iters=steps // 4)
            cosine = schedules.CosineAnnealingLR(optimizer, T_max=steps - steps // 4)
            chosen = schedules.SequentialLR(optimizer, [warmup, cosine], milestones=[steps // 4])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": chosen, "interval": "step"}}
