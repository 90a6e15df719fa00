"""The ``LightningModule``s: ``Classifier`` and, on it, the tutorial's two models and a better one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from mnist_lit.data import Batch


class Classifier(LightningModule):
    """Trains any network that turns images into one score per class: cross-entropy, accuracy, SGD.

    Args:
        net: images float32 (B, 1, H, W) to scores (B, num_classes).
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        num_classes: how many classes there are.
    """

    def __init__(self, net: nn.Module, lr: float = 0.1, momentum: float = 0.9, num_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net, self.lr, self.momentum = net, lr, momentum
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 (B, 1, H, W) to scores (B, num_classes)."""
        return self.net(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        scores = self(images)  # (B, num_classes)
        loss = F.cross_entropy(scores, labels)
        # Lightning writes to the logger every log_every_n_steps; what is logged in between would be
        # thrown away, at the price of a large part of the step.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            accuracy = (scores.detach().argmax(1) == labels).float().mean()
            self.log_dict({"train/loss": loss.detach(), "train/acc": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", self.val_acc, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("test", self.test_acc, batch)

    def _evaluate(self, stage: str, accuracy: MulticlassAccuracy, batch: Batch) -> None:
        images, labels = batch
        scores = self(images)
        accuracy.update(scores, labels)
        # batch_size weighs the shorter last batch as the tutorial's fit() does.
        loss = F.cross_entropy(scores, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/acc", accuracy, prog_bar=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The probability of each class, (B, num_classes)."""
        images, _ = batch
        return self(images).softmax(1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


class Logistic(Classifier):
    """The tutorial's logistic regression: one linear layer on the pixels.

    Args:
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        num_pixels: H * W of the images.
        num_classes: how many classes there are.
    """

    def __init__(
        self, lr: float = 0.5, momentum: float = 0.0, num_pixels: int = 28 * 28, num_classes: int = 10
    ) -> None:
        net = nn.Sequential(
            nn.Flatten(),  # (B, 1, H, W) -> (B, H * W)
            nn.Linear(num_pixels, num_classes),
        )
        super().__init__(net, lr, momentum, num_classes)


class CNN(Classifier):
    """The tutorial's CNN: three convolutions, each halving height and width, for images of any size.

    The ReLU after the last convolution is the tutorial's too. It cuts off the scores of a class below
    zero, and with them their gradients: now and then a class dies early and never comes back.

    Args:
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        num_classes: how many classes there are.
    """

    def __init__(self, lr: float = 0.1, momentum: float = 0.9, num_classes: int = 10) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, stride=2, padding=1),  # (B, 16, H/2, W/2)
            nn.ReLU(),
            nn.Conv2d(16, 16, kernel_size=3, stride=2, padding=1),  # (B, 16, H/4, W/4)
            nn.ReLU(),
            nn.Conv2d(16, num_classes, kernel_size=3, stride=2, padding=1),  # (B, num_classes, H/8, W/8)
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),  # (B, num_classes, 1, 1)
            nn.Flatten(),  # (B, num_classes)
        )
        super().__init__(net, lr, momentum, num_classes)


class FastCNN(Classifier):
    """A better CNN for few epochs: batch norm, the strongest response anywhere as the feature that counts,
    no ReLU on the scores, and a one-cycle learning rate (L. Smith, https://arxiv.org/abs/1803.09820).

    Args:
        lr: the peak of the learning rate.
        momentum: Nesterov momentum of SGD.
        weight_decay: L2 penalty of SGD.
        num_classes: how many classes there are.
    """

    def __init__(
        self, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 1e-3, num_classes: int = 10
    ) -> None:
        net = nn.Sequential(
            *self.block(1, 16, kernel_size=5, stride=2),  # (B, 16, H/2, W/2)
            *self.block(16, 32, kernel_size=5, stride=2),  # (B, 32, H/4, W/4)
            *self.block(32, 64, kernel_size=3, stride=1),  # (B, 64, H/4, W/4)
            nn.AdaptiveMaxPool2d(1),  # (B, 64, 1, 1)
            nn.Flatten(),  # (B, 64)
            nn.Linear(64, num_classes),  # (B, num_classes)
        )
        super().__init__(net, lr, momentum, num_classes)
        self.weight_decay = weight_decay

    @staticmethod
    def block(channels_in: int, channels_out: int, kernel_size: int, stride: int) -> tuple[nn.Module, ...]:
        # The batch norm has a bias of its own, the convolution needs none.
        padding = kernel_size // 2
        conv = nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding, bias=False)
        return conv, nn.BatchNorm2d(channels_out), nn.ReLU()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.SGD(
            self.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.lr, total_steps=steps, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
