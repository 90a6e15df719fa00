"""A callback that writes down every batch that a run trains on, whatever the run logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


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
