"""What somebody has in a folder of their own; nothing of it knows the command line."""

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


class Wide(nn.Module):
    """For images of three channels and 20 classes, as networks with trained weights are for other data."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(width * 16, 20)

    def forward(self, images):
        return self.fc(self.drop(self.pool(self.bn1(self.conv1(images)).relu()).flatten(1)))


def wide(width: int = 8) -> Wide:
    """As torchvision and timm make their networks: by a function."""
    return Wide(width)


def make(num_classes: int, width: int = 8) -> Classifier:
    return Classifier(Net(width, num_classes), num_classes=num_classes)


class Smooth(Classifier):
    def loss(self, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scores, labels, label_smoothing=0.5)


class Stripes(LightningDataModule):
    """Three classes of 12 x 16 pixels, each brighter than the one before."""

    num_classes, num_pixels = 3, 192

    def train_dataloader(self) -> DataLoader:
        labels = torch.arange(300) % 3
        images = torch.rand(300, 1, 12, 16) + labels[:, None, None, None]
        return DataLoader(TensorDataset(images, labels), batch_size=10)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class SlowSGD(torch.optim.SGD):
    pass


class Halving(torch.optim.lr_scheduler.StepLR):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, step_size=1, gamma=0.5)


class Hello(Callback):
    def on_train_start(self, trainer, pl_module) -> None:
        print("hello from a callback")
