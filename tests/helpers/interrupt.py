"""What tests put into a run: a network full of chance, a signal at a chosen place, callbacks that look on."""

import json
import multiprocessing
import os
import random
import resource
import signal
import time
from functools import partial
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
        conv, norm = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(conv, norm, nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(1568, 10))

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

    Processes that torchrun has started again get none.
    """

    def __init__(self, signum: str, hook: str, step: int, rank: int | None = None, run: str | None = None) -> None:
        self.signum, self.step, self.rank, self.run = signum, step, rank, run
        setattr(self, hook, self.send)

    def send(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if restarted or trainer.sanity_checking or trainer.global_step != self.step:
            return
        if self.rank in (None, trainer.global_rank) and self.run in (None, Run.of(trainer).name):
            self.step = -1
            if self.signum == "should_stop":
                trainer.should_stop = True
            else:
                os.kill(os.getpid(), getattr(signal, self.signum))


def signal_at(signum: str, hook: str, step: int, rank: int | None = None, **run: str) -> tuple[str, ...]:
    """The options that put ``SignalAt`` into a run."""
    settings = {"signum": signum, "hook": hook, "step": step, "rank": rank, **run}
    given = (f"--trainer.callbacks.{key}={value}" for key, value in settings.items() if value is not None)
    return ("--trainer.callbacks+=interrupt.SignalAt", *given)


class Phase(Callback):
    """Keeps the name of what the run is doing in a file, for whoever kills it to look; may wait for that."""

    def __init__(self, waits: str = "") -> None:
        self.waits = waits
        self.on_train_batch_start = self.on_train_batch_end = partial(self.write, "training")
        self.on_validation_start = partial(self.write, "validation")
        self.on_save_checkpoint = partial(self.write, "checkpoint")
        self.write("data")

    def write(self, phase: str, *_: Any) -> None:
        with open("phase.part", "w") as file:
            file.write(phase)
        os.replace("phase.part", "phase")
        if phase == self.waits:
            signal.pause()


class StartMethod(Callback):
    """Chooses how the processes of loaders start: fork, spawn or forkserver."""

    def __init__(self, method: str) -> None:
        multiprocessing.set_start_method(method, force=True)


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


class Batches(Callback):
    """Writes ``batches.RANK.json``: per epoch and batch its size, mean loss and number of correct predictions, and the
    values that the run has last logged.

    It looks at the loss function itself, and not at what Lightning and the engine make of its results.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs: list[list[list[float]]] = []
        self.module = pl_module
        self.hook = pl_module.loss.register_forward_hook(self.record)  # type: ignore[operator, union-attr]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append([])

    def record(self, loss: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        if self.module.training:
            preds, target = inputs
            correct = (preds.argmax(1) == target).sum().item()
            self.epochs[-1].append([len(target), output.item(), correct])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.hook.remove()
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        written = {"epochs": self.epochs, "logged": logged}
        Path(f"batches.{trainer.global_rank}.json").write_text(json.dumps(written))


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

    def on_train_end(self, *_: Any) -> None:
        print(f"{self.checked} steps without a wait for the GPU")
