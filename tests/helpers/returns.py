"""Modules and data modules as people write them: steps that return all kinds of things, batches of all kinds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

# ---------------------------------------------------------------------------------------------- data


class Pairs(LightningDataModule):
    """Three classes of 12 x 16 pixels, each brighter than the one before; batches are (images, targets)."""

    num_classes = 3

    def __init__(self, batch_size: int = 256, num_workers: int = 0) -> None:
        super().__init__()
        self.batch_size, self.num_workers = batch_size, num_workers
        targets = torch.arange(600) % 3
        images = torch.rand(600, 1, 12, 16, generator=torch.Generator().manual_seed(1))
        self.images, self.targets = images + targets[:, None, None, None], targets

    def dataset(self) -> Dataset:
        return TensorDataset(self.images, self.targets)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=self.batch_size, shuffle=True, num_workers=self.num_workers)

    def val_dataloader(self) -> Any:
        return DataLoader(self.dataset(), batch_size=self.batch_size, num_workers=self.num_workers)

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=self.batch_size, num_workers=self.num_workers)


class Triples(Pairs):
    """Batches (number of the sample, images, targets)."""

    def dataset(self) -> Dataset:
        return TensorDataset(torch.arange(600), self.images, self.targets)


class Dicts(Pairs):
    """Batches {"image": ..., "label": ...}."""

    def dataset(self) -> Dataset:
        return [{"image": image, "label": label} for image, label in zip(self.images, self.targets, strict=True)]  # type: ignore[return-value]


class NoValidation(Pairs):
    """Has training images only."""

    def val_dataloader(self) -> Any:
        return []


# -------------------------------------------------------------------------------------------- modules


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        return batch["image"], batch["label"]
    return batch[-2], batch[-1]


class Base(LightningModule):
    """Logs ``val/loss`` by itself, and knows nothing of the engine."""

    monitored = "val/loss"

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, target = unpack(batch)
        return F.cross_entropy(self(images), target)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        images, target = unpack(batch)
        loss = F.cross_entropy(self(images), target)
        self.log(self.monitored, loss, batch_size=len(target))
        return self.returned(loss, images)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        images, target = unpack(batch)
        return self.returned(F.cross_entropy(self(images), target), images)

    def returned(self, loss: Tensor, images: Tensor) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class Scalars(Base):
    """As many do: the loss."""

    def returned(self, loss: Tensor, images: Tensor) -> Tensor:
        return loss


class Values(Base):
    """One value per image (B,)."""

    def returned(self, loss: Tensor, images: Tensor) -> Tensor:
        return self.net(images)[:, 0]


class Columns(Base):
    """One value per image (B, 1)."""

    def returned(self, loss: Tensor, images: Tensor) -> Tensor:
        return self.net(images)[:, :1]


class Maps(Base):
    """Images (B, C, H, W)."""

    def returned(self, loss: Tensor, images: Tensor) -> Tensor:
        return images.repeat(1, 2, 1, 1)


class Nothing(Base):
    """No outputs at all."""

    def returned(self, loss: Tensor, images: Tensor) -> None:
        return None


class OtherName(Nothing):
    """No ``val/loss``."""

    monitored = "val_mse"


class UserMistake(Nothing):
    """Raises the error that Lightning raises for wrong options."""

    def on_train_start(self) -> None:
        raise MisconfigurationException("this module needs a GPU")


# -------------------------------------------------------------------------------------------- loggers


class Remote(Logger):
    """A logger without a folder, as those that write to a server; takes pictures as W&B's does."""

    def __init__(self, project: str = "mine") -> None:
        super().__init__()
        self.project = project

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return "a1b2c3"

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            print(f"logged {name} at {step}: {value}")

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        for image in images:
            print(f"picture {key} at {step}: {image.width} x {image.height}")
