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

    def __init__(self) -> None:
        super().__init__()
        targets = torch.arange(600) % 3
        images = torch.rand(600, 1, 12, 16, generator=torch.Generator().manual_seed(1))
        self.images, self.targets = images + targets[:, None, None, None], targets

    def dataset(self) -> Dataset:
        return TensorDataset(self.images, self.targets)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset(), batch_size=256)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    predict_dataloader = train_dataloader


class Triples(Pairs):
    """Batches (number of the sample, images, targets)."""

    def dataset(self) -> Dataset:
        return TensorDataset(torch.arange(600), self.images, self.targets)


class Dicts(Pairs):
    """Batches {"image": ..., "label": ...}."""

    def dataset(self) -> Dataset:
        return [{"image": image, "label": label} for image, label in zip(self.images, self.targets, strict=True)]  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------- modules


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, dict):
        return batch["image"], batch["label"]
    return batch[-2], batch[-1]


class Module(LightningModule):
    """Logs a loss by itself, and knows nothing of the engine.

    Args:
        returned: what its steps return but for training, which returns the loss.
        monitored: the name by which it logs the loss.
    """

    def __init__(self, returned: str = "nothing", monitored: str = "val/loss") -> None:
        super().__init__()
        self.returned, self.monitored = returned, monitored
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, target = unpack(batch)
        return F.cross_entropy(self(images), target)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log(self.monitored, self.training_step(batch, batch_idx), batch_size=len(unpack(batch)[1]))
        return self.predict_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        images, _ = unpack(batch)
        outputs = {
            "scalar": self.training_step(batch, batch_idx),
            "values": self(images)[:, 0],  # (B,)
            "maps": images.repeat(1, 2, 1, 1),  # (B, C, H, W)
        }
        return outputs.get(self.returned)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


class UserMistake(Module):
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
