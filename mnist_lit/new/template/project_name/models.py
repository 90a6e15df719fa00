"""Your models: networks, and how they are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from mnist_lit.engine import Metrics, Outputs
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

Batch = tuple[Tensor, Tensor]  # images float32 (B, C, H, W), classes int64 (B,)


class CNN(LightningModule):
    """A small convolutional network for images of any size.

    Args:
        width: channels of the first layer; the second has twice, the third four times as many.
        lr: learning rate of Adam.
        num_classes: number of classes; comes from the data.
        channels: channels of the images; comes from the data.
    """

    def __init__(self, width: int = 16, lr: float = 3e-3, num_classes: int = 3, channels: int = 1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.num_classes = lr, num_classes
        self.net = nn.Sequential(
            nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1),  # (B, width, H/2, W/2)
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),  # (B, 2 width, H/4, W/4)
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, kernel_size=3, stride=2, padding=1),  # (B, 4 width, H/8, W/8)
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),  # (B, 4 width, 1, 1)
            nn.Flatten(),  # (B, 4 width)
            nn.Linear(4 * width, num_classes),  # (B, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to logits (B, num_classes)."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Outputs:
        images, target = batch
        preds = self(images)
        # The engine makes metrics, dashboards and tables of these three.
        return {"loss": F.cross_entropy(preds, target), "preds": preds, "target": target}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return self.training_step(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return self.training_step(batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities (B, num_classes), for tables and exported files."""
        images, _ = batch
        return self(images).softmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)

    def configure_callbacks(self) -> list[Callback]:
        """Log these metrics as ``train/acc``, ``val/acc`` and so on."""
        return [Metrics({"acc": MulticlassAccuracy(self.num_classes, average="micro")})]
