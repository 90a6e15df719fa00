"""A module of 1,000 classes on as many images as one likes, and the most memory that it took."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 1_000


class Data(LightningDataModule):
    """Images (B, 1, 2, 2) of noise.

    Args:
        number: of images.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(number, 1, 2, 2, generator=generator)
        self.dataset = TensorDataset(images, torch.randint(CLASSES, (number,), generator=generator))

    def val_dataloader(self):
        return DataLoader(self.dataset, batch_size=50)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, CLASSES))

    def validation_step(self, batch, batch_idx):
        images, target = batch
        preds = self.net(images)
        return {"loss": torch.nn.functional.cross_entropy(preds, target), "preds": preds, "target": target}


class Peak(Callback):
    """Writes the most memory that validation took, in bytes, into ``peak``."""

    def on_validation_start(self, trainer, pl_module) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def on_validation_end(self, trainer, pl_module) -> None:
        status = Path("/proc/self/status").read_text()
        (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        Path("peak").write_text(str(int(peak) * 1024))
