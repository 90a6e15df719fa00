"""Your models: networks, and ``LightningModule``s that train them."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

from mnist_lit.engine import Metrics, Outputs, StepsPerExecution, UserError, adapt

Batch = tuple[Tensor, Tensor]  # images float32 (B, C, H, W), targets (B,)


class Classifier(LightningModule):
    """Trains a network on images and targets; by default cross-entropy, accuracy and SGD.

    Args:
        net: maps images (B, C, H, W) to logits (B, num_classes), or to one value (B, 1) for regression. If it takes
            another number of channels or classes, it is adapted, see ``adapt``.
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        num_classes: number of classes; on the command line from the data.
        channels: C of the images; on the command line from the data. None leaves the network as it is.
        task: ``multiclass``, ``multilabel`` (several labels at once) or ``regression``; on the command line from the
            data. It decides the following defaults.
        loss: maps outputs and targets to their mean loss (); by default ``CrossEntropyLoss``, ``BCEWithLogitsLoss`` or
            ``MSELoss``.
        metrics: metrics of torchmetrics by name, which may lack ``num_classes`` or ``num_labels``; by default the
            accuracy as ``acc``, or ``mse``.
        activation: maps outputs to predictions; by default ``Softmax``, ``Sigmoid`` or ``Identity``.
        balanced: whether to weigh classes in the loss, the rarer in the training set the more.
        channels_last: whether to keep weights and activations in that memory format of PyTorch, in which most
            processors convolve faster; results differ by rounding.
        steps_per_execution: number of optimizer steps in one step of Lightning, see ``StepsPerExecution``.

    Example:
        >>> Trainer(max_epochs=2).fit(Classifier(cnn(num_classes=10)), datamodule=MNISTDataModule())
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        num_classes: int = 10,
        channels: int | None = None,
        task: Literal["multiclass", "multilabel", "regression"] = "multiclass",
        loss: nn.Module | None = None,
        metrics: dict[str, Metric | Callable[[int], Metric]] | None = None,
        activation: nn.Module | None = None,
        balanced: bool = False,
        channels_last: bool = False,
        steps_per_execution: int = 1,
    ) -> None:
        super().__init__()
        # Lightning refuses hyperparameters that differ from the data's, as a None would.
        self.save_hyperparameters(ignore=["net", "loss", "metrics", "activation", *["channels"] * (channels is None)])
        self.net = net
        if channels is not None and (adapted := adapt(net, channels, num_classes)):
            rank_zero_info(f"{type(net).__name__} was adapted to the data: {', '.join(adapted)}")
        if channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
        metric: Metric
        if task == "multiclass":
            loss, activation = loss or nn.CrossEntropyLoss(), activation or nn.Softmax(dim=1)
            metric = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        elif task == "multilabel":
            loss, activation = loss or nn.BCEWithLogitsLoss(), activation or nn.Sigmoid()
            metric = MultilabelAccuracy(num_classes, validate_args=False)
        else:
            loss, activation, metric = loss or nn.MSELoss(), activation or nn.Identity(), MeanSquaredError()
        if balanced:
            loss.register_buffer("weight", torch.ones(num_classes))  # as in CrossEntropyLoss, see setup
        number = {"num_labels" if task == "multilabel" else "num_classes": num_classes}
        self.metrics = {
            name: made if isinstance(made, Metric) else made(**number)  # type: ignore[call-arg]
            for name, made in (metrics or {"mse" if task == "regression" else "acc": metric}).items()
        }
        self.loss, self.activation, self.task, self.balanced = loss, activation, task, balanced
        self.lr, self.momentum, self.steps_per_execution = lr, momentum, steps_per_execution
        self.execution = StepsPerExecution(steps_per_execution)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes), or to values (B,) if the network has one output."""
        outputs = self.net(images)
        return outputs.squeeze(1) if outputs.shape[1:] == (1,) else outputs

    def setup(self, stage: str) -> None:
        """Set the class weights if ``balanced``; otherwise they come from the checkpoint."""
        if self.balanced and stage == "fit":
            weights = getattr(getattr(self.trainer, "datamodule", None), "class_weights", None)
            if weights is None:
                raise UserError("--model.balanced: needs a data module with class_weights (num_classes,)")
            self.loss.weight = weights.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return self.execution.run(self, batch, self._step)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Outputs:
        return self._step(batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Outputs:
        return self._step(batch)

    def _step(self, batch: Batch) -> Outputs:
        images, target = batch
        preds = self(images)  # (B, num_classes) or (B,)
        loss = self.loss(preds, target)
        if self.task == "multiclass" and target.is_floating_point():  # mixed images have (B, num_classes)
            target = target.argmax(1)
        return {"loss": loss, "preds": preds, "target": target}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Probabilities (B, num_classes), or values (B,) or (B, K)."""
        images, _ = batch
        return self.activation(self(images))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def configure_callbacks(self) -> list[Callback]:
        """Log the metrics of the outputs above; take several steps at once if ``steps_per_execution`` asks for it."""
        return [Metrics(self.metrics), *([self.execution] if self.steps_per_execution > 1 else [])]


# --------------------------------------------------------------------------------------------- the tutorial's


class Logistic(Classifier):
    """The tutorial's logistic regression.

    Args:
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        num_pixels: C * H * W of the images; on the command line from the data.
        num_classes: number of classes; on the command line from the data.
        options: as in ``Classifier``.
    """

    def __init__(
        self,
        lr: float = 0.5,
        momentum: float = 0.0,
        num_pixels: int = 28 * 28,
        num_classes: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(
            logistic(num_pixels, num_classes), lr=lr, momentum=momentum, num_classes=num_classes, **options
        )


def logistic(num_pixels: int, num_classes: int) -> nn.Sequential:
    """One linear layer on the pixels."""
    return nn.Sequential(
        nn.Flatten(),  # (B, C, H, W) -> (B, num_pixels)
        nn.Linear(num_pixels, num_classes),  # (B, num_classes)
    )


class CNN(Classifier):
    """The tutorial's CNN.

    Args:
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        channels: of the images; on the command line from the data.
        num_classes: number of classes; on the command line from the data.
        options: as in ``Classifier``.
    """

    def __init__(
        self, lr: float = 0.1, momentum: float = 0.9, channels: int = 1, num_classes: int = 10, **options: Any
    ) -> None:
        super().__init__(cnn(num_classes, channels), lr=lr, momentum=momentum, num_classes=num_classes, **options)


def cnn(num_classes: int, channels: int = 1) -> nn.Sequential:
    """Three convolutions, each of which halves height and width, for images of any size.

    The last ReLU is the tutorial's. It cuts off logits below zero, and their gradients: now and then a class dies in
    the first steps and never comes back.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 16, kernel_size=3, stride=2, padding=1),  # (B, 16, H/2, W/2)
        nn.ReLU(),
        nn.Conv2d(16, 16, kernel_size=3, stride=2, padding=1),  # (B, 16, H/4, W/4)
        nn.ReLU(),
        nn.Conv2d(16, num_classes, kernel_size=3, stride=2, padding=1),  # (B, num_classes, H/8, W/8)
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),  # (B, num_classes, 1, 1)
        nn.Flatten(),  # (B, num_classes)
    )


# ---------------------------------------------------------------------------------------------- better ones


class FastCNN(Classifier):
    """A better CNN in one epoch: batch norm, Adam with little momentum, and a one-cycle learning rate
    (L. Smith, https://arxiv.org/abs/1803.09820).

    Args:
        lr: peak of the learning rate.
        momentum: Adam's first beta.
        width: channels of the first layer; the second has twice, the third four times as many.
        channels: of the images; on the command line from the data.
        num_classes: number of classes; on the command line from the data.
        options: as in ``Classifier``.
    """

    def __init__(
        self,
        lr: float = 2e-2,
        momentum: float = 0.7,
        width: int = 16,
        channels: int = 1,
        num_classes: int = 10,
        **options: Any,
    ) -> None:
        super().__init__(
            fast_cnn(num_classes, channels, width), lr=lr, momentum=momentum, num_classes=num_classes, **options
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Betas of a one-epoch recipe (https://github.com/tuomaso): averages so short that an epoch is long.
        optimizer = torch.optim.Adam(self.parameters(), self.lr, betas=(self.momentum, 0.9))
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fast_cnn(num_classes: int, channels: int = 1, width: int = 16) -> nn.Sequential:
    """Batch norm, global max pooling, and no ReLU on the logits; for images of 9 pixels and more."""
    return nn.Sequential(
        *_block(channels, width, 5, stride=2, padding=2),  # (B, width, H/2, W/2)
        *_block(width, 2 * width, 5, stride=2, padding=2),  # (B, 2 width, H/4, W/4)
        *_block(2 * width, 4 * width, 5, stride=1, padding=1),  # (B, 4 width, H/4 - 2, W/4 - 2)
        nn.AdaptiveMaxPool2d(1),  # (B, 4 width, 1, 1)
        nn.Flatten(),  # (B, 4 width)
        nn.Linear(4 * width, num_classes),  # (B, num_classes)
    )


def accurate_cnn(num_classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Deeper and with smaller kernels, for ``accurate.yaml``; for images of 13 pixels and more."""
    return nn.Sequential(
        *_block(channels, 24, 5, stride=2, padding=2),  # (B, 24, H/2, W/2)
        *_block(24, 32, 3, stride=1, padding=0),  # (B, 32, H/2 - 2, W/2 - 2)
        *_block(32, 48, 3, stride=2, padding=1),  # (B, 48, H/4 - 1, W/4 - 1)
        *_block(48, 64, 3, stride=1, padding=1),  # (B, 64, H/4 - 1, W/4 - 1)
        *_block(64, 96, 3, stride=1, padding=0),  # (B, 96, H/4 - 3, W/4 - 3)
        nn.AdaptiveMaxPool2d(1),  # (B, 96, 1, 1)
        nn.Flatten(),  # (B, 96)
        nn.Linear(96, num_classes),  # (B, num_classes)
    )


def _block(channels_in: int, channels_out: int, kernel_size: int, stride: int, padding: int) -> tuple[nn.Module, ...]:
    # The batch norm has a bias, so the convolution needs none.
    conv = nn.Conv2d(channels_in, channels_out, kernel_size, stride, padding, bias=False)
    return conv, nn.BatchNorm2d(channels_out), nn.ReLU()
