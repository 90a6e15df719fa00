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
        conv = nn.Conv2d(1, width, 3, 2, 1)
        super().__init__(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))


class Smooth(Classifier):
    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=0.5)


class Stripes(LightningDataModule):
    """Three classes of 12 x 16 pixels, each brighter than the one before."""

    num_classes = 3

    def train_dataloader(self) -> DataLoader:
        labels = torch.arange(300) % 3
        images = torch.rand(300, 1, 12, 16) + labels[:, None, None, None]
        return DataLoader(TensorDataset(images, labels), batch_size=10)

    val_dataloader = test_dataloader = train_dataloader


class SlowSGD(torch.optim.SGD):
    pass


class Halving(torch.optim.lr_scheduler.StepLR):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, step_size=1, gamma=0.5)


class Hello(Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        print("hello from a callback")
