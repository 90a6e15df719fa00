"""What the tests of interruption put into a run: a network full of chance, and a signal at a chosen place."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn


class Chance(nn.Module):
    """Augments and drops out at random, from every generator that there is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(1568, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            images = images.roll((random.randint(-2, 2), int(np.random.randint(-2, 3))), (2, 3))
            images = images + 0.1 * torch.randn_like(images)
        return self.layers(images)


class SignalAt(Callback):
    """Sends this very process a signal at the start of a hook.

    Args:
        signum: SIGKILL, SIGINT, ... by name; or "raise" for an exception.
        hook: where.
        step: how many optimizer steps have been made by then.
    """

    def __init__(self, signum: str, hook: str, step: int) -> None:
        self.signum, self.step = signum, step
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            self.step = -1
            if self.signum == "raise":
                raise RuntimeError("a mistake in somebody's callback")
            os.kill(os.getpid(), getattr(signal, self.signum))
