"""What somebody has in a folder of their own; nothing of it knows the command line."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_lit import Classifier


class Net(nn.Sequential):
    def __init__(self, width: int = 8, num_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, num_classes),
        )


class Smooth(Classifier):
    """Another loss."""

    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=0.5)


class Stripes(LightningDataModule):
    """Three classes of 12 x 16 pixels, each brighter than the one before."""

    num_classes = 3

    def __init__(self, n: int = 300) -> None:
        super().__init__()
        labels = torch.arange(n) % 3
        images = torch.rand(n, 1, 12, 16) + labels[:, None, None, None]
        self.data = TensorDataset(images, labels)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=10, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.data, batch_size=10)

    test_dataloader = predict_dataloader = val_dataloader


class SlowSGD(torch.optim.SGD):
    """Another optimizer."""


class Halving(torch.optim.lr_scheduler.StepLR):
    """Another schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, step_size=1, gamma=0.5)


class Hello(Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        print("hello from a callback")
