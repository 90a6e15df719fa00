"""Several labels per image, in batches of both kinds; knows nothing of the engine."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


def pictures() -> Tensor:
    """Images uint8 (60, 1, 12, 16)."""
    return torch.randint(256, (60, 1, 12, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


class Tags(LightningDataModule):
    """Batches (images, labels), or {"image": images, "label": labels}."""

    def __init__(self, dicts: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters({"channels": 1, "image_size": [12, 16]})
        self.dicts = dicts

    def train_dataloader(self) -> DataLoader:
        labels = (pictures().flatten(1)[:, :3] > 127).float()  # (60, 3)
        dataset: Dataset = TensorDataset(pictures(), labels)
        if self.dicts:
            dataset = [{"image": image, "label": label} for image, label in zip(pictures(), labels, strict=True)]  # type: ignore[assignment]
        return DataLoader(dataset, batch_size=20)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.dicts:
            return {**batch, "image": batch["image"].float() / 255}
        return batch[0].float() / 255, *batch[1:]


class Tagger(LightningModule):
    """Probabilities (B, 3) of which several may be high."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(12 * 16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch.values() if isinstance(batch, dict) else batch
        return F.binary_cross_entropy_with_logits(self.net(images), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["image"] if isinstance(batch, dict) else batch[0]).sigmoid()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)
