"""Modules as people write them who do not know this project: with loaders, layers and names of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Own(LightningModule):
    """Loads its own data, logs ``val_loss`` and has no ``predict_step``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.make()

    def make(self) -> None:
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, self.hparams["num_classes"]))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(64, 3, 8, 8, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(64) % 3), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataloader().dataset, batch_size=8)

    test_dataloader = val_dataloader


class InConfigureModel(Own):
    def make(self) -> None:
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            Own.make(self)


class InSetup(Own):
    def make(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            super().make()


class Scaled(InConfigureModel):
    """Changes the batch where the data module usually does, and has a buffer of infinities."""

    def make(self) -> None:
        super().make()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * 2 - 1, batch[1]
