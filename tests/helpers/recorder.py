"""What a Lightning run did, in the oracle's terms."""

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tutorial import Outcome

from mnist_lit import MNISTDataModule


class Reads(MNISTDataModule):
    """Takes its time to read a dataset, and notes in ``data_dir`` which process did."""

    def read(self, path: Path | str) -> Any:
        time.sleep(1)
        (self.data_dir / f"read-by-{os.getpid()}").touch()
        return super().read(path)


class Recorder(Callback):
    """Records initial weights, order of the training images, losses and final weights of a fit.

    Args:
        path: where each process saves all of it, for a test in another one.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.seen: list[list[Tensor]] = []  # per epoch and step: images uint8 (B, H, W)
        self.losses: list[Tensor] = []
        self.valid_losses: list[float] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = {name: p.detach().cpu().clone() for name, p in pl_module.named_parameters()}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append([])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        images = (batch[0][:, 0] * 256).to(torch.uint8).cpu()
        self.seen[-1].extend(images.split(trainer.datamodule.batch_size))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.extend(torch.stack([o["loss"].detach() for o in outputs.get("steps", [outputs])]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.valid_losses.append(float(trainer.callback_metrics["val/loss"]))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        everything = [image.numpy().tobytes() for image in trainer.datamodule.source.datasets["train"].tensors[0]]
        index = {image: i for i, image in enumerate(everything)}
        epochs = [[image.numpy().tobytes() for image in torch.cat(seen)] for seen in self.seen]
        self.order = [[index[image] for image in seen] for seen in epochs]
        self.saw_every_image_once_an_epoch = all(Counter(seen) == Counter(everything) for seen in epochs)
        weights = [p.detach().cpu() for p in pl_module.parameters()]
        self.outcome = Outcome(weights, torch.stack(self.losses).tolist(), self.valid_losses)
        if self.path:
            saved = self.start, self.order, self.saw_every_image_once_an_epoch, tuple(self.outcome)
            torch.save(saved, self.path + (f".{trainer.global_rank}" if trainer.global_rank else ""))

    @classmethod
    def load(cls, path: Path) -> "Recorder":
        """What a run in another process saved."""
        recorder = cls()
        saved = torch.load(path, weights_only=True)
        recorder.start, recorder.order, recorder.saw_every_image_once_an_epoch, outcome = saved
        recorder.outcome = Outcome(*outcome)
        return recorder
