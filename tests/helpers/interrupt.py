"""What the tests of interruption put into a run: a network full of chance, and a signal at a chosen place."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from mnist_lit.engine.run import Run


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
        signum: SIGKILL, SIGINT, ... by name; or should_stop, which is how Lightning's own callbacks stop a run.
        hook: where.
        step: how many optimizer steps have been made by then.
        rank: of several processes the one, or all.
        run: of several runs in one process the one, by name, or all.
    """

    def __init__(self, signum: str, hook: str, step: int, rank: int | None = None, run: str | None = None) -> None:
        self.signum, self.step, self.rank, self.run = signum, step, rank, run
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.sanity_checking or trainer.global_step != self.step:
            return
        if self.rank in (None, trainer.global_rank) and self.run in (None, Run.of(trainer).name):
            self.step = -1
            if self.signum == "should_stop":
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), getattr(signal, self.signum))


def signal_at(signum: str, hook: str, step: int, rank: int | None = None) -> tuple[str, ...]:
    """The options that put ``SignalAt`` into a run."""
    settings = {"signum": signum, "hook": hook, "step": step, "rank": rank}
    given = (f"--trainer.callbacks.{key}={value}" for key, value in settings.items() if value is not None)
    return ("--trainer.callbacks+=interrupt.SignalAt", *given)


class Phase(Callback):
    """Keeps the name of what the run is doing in a file, for whoever kills it to look."""

    def __init__(self) -> None:
        self.write("data")

    @staticmethod
    def write(phase: str) -> None:
        with open("phase.part", "w") as file:
            file.write(phase)
        os.replace("phase.part", "phase")

    def on_train_batch_start(self, *_: Any) -> None:
        self.write("training")

    def on_validation_start(self, *_: Any) -> None:
        self.write("validation")

    def on_save_checkpoint(self, *_: Any) -> None:
        self.write("checkpoint")

    def on_train_batch_end(self, *_: Any) -> None:
        self.write("training")


class WaitFor(Callback):
    """Waits before training until a file is there, and makes another one that says so."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.path.with_suffix(".waits").touch()
        while not self.path.exists():
            time.sleep(0.01)


class FileSizeLimit(Callback):
    """Lets no file become longer than 32 KiB."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))


class Fail(Callback):
    """A mistake in a callback, in the second epoch of 16 steps."""

    def __init__(self, hook: str = "on_train_batch_end") -> None:
        setattr(self, hook, self.fail)

    def fail(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step in (20, 32):
            raise ZeroDivisionError("a mistake of mine")
