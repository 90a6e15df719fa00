"""The ``LightningModule``s: ``Classifier`` and, on it, the tutorial's two models and a better one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from mnist_lit.data import Batch

Outputs = list[tuple[Tensor, Tensor, Tensor]]  # per batch: mean loss (), predicted classes (B,), labels (B,)


def sums(outputs: Outputs) -> Tensor:
    """Losses, right answers and images, (3,): weighted by batch, as the tutorial's ``fit`` does."""
    losses, predicted, labels = zip(*outputs, strict=True)
    sizes = torch.tensor([len(batch) for batch in labels], device=losses[0].device)
    right = torch.cat(predicted) == torch.cat(labels)
    return torch.stack(((torch.stack(losses) * sizes).sum(), right.sum(), sizes.sum()))


class Classifier(LightningModule):
    """Trains any network that turns images into one score per class: cross-entropy, accuracy, SGD.

    Logs the means of loss and accuracy over the steps since the last log, ``train/loss`` and ``train/acc``
    every ``log_every_n_steps``, and over the epoch, ``train/loss_epoch`` and ``train/acc_epoch``.

    Args:
        net: images float32 (B, 1, H, W) to scores (B, num_classes).
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        num_classes: how many classes there are.
        channels_last: keep weights and activations in PyTorch's memory format of that name, in which most
            processors convolve faster; the results differ by rounding.
        steps_per_execution: optimizer steps in one step of Lightning's, see ``_execute``.
    """

    def __init__(
        self,
        net: nn.Module,
        lr: float = 0.1,
        momentum: float = 0.9,
        num_classes: int = 10,
        channels_last: bool = False,
        steps_per_execution: PositiveInt = 1,
    ) -> None:
        super().__init__()
        steps_per_execution = int(steps_per_execution)  # a type of jsonargparse's needs trust to load
        self.save_hyperparameters(ignore="net")
        self.net, self.lr, self.momentum = net, lr, momentum
        if channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.steps_per_execution = steps_per_execution
        self.automatic_optimization = steps_per_execution == 1
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.val_acc, self.test_acc = (MulticlassAccuracy(num_classes, average="micro") for _ in range(2))
        # Kept from step to step, and made into metrics when they are logged: to update a metric or to log
        # takes as long as a step of a small network.
        self._trained: Outputs = []
        self._evaluated: Outputs = []
        self._epoch_sums = torch.zeros(3)

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 (B, 1, H, W) to scores (B, num_classes)."""
        return self.net(images)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy; what a subclass says instead is trained on, and logged everywhere.

        Args:
            scores: float32 (B, num_classes).
            labels: int64 (B,).

        Returns:
            the mean over the batch, ().
        """
        return F.cross_entropy(scores, labels)

    # -------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        if self.global_step == 0:  # weights out of a checkpoint may begin a new run, its sums may not
            self._trained, self._epoch_sums = [], torch.zeros(3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | dict[str, Tensor]:
        return self._step(*batch) if self.automatic_optimization else self._execute(*batch)

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        scores = self(images)  # (B, num_classes)
        loss = self.loss(scores, labels)
        self._trained.append((loss.detach(), scores.detach().argmax(1), labels))
        # Lightning writes to the logger every log_every_n_steps; what is logged in between would be
        # thrown away, at the price of a large part of the step.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log_training()
        return loss

    def _log_training(self) -> None:
        loss, right, images = self.trainer.strategy.reduce(self._take(), reduce_op="sum")  # of all processes
        metrics = {"train/loss": loss / images, "train/acc": right / images}
        self.log_dict(metrics, prog_bar=True, logger=self.automatic_optimization)
        if not self.automatic_optimization:  # Lightning would log at the end of some executions only
            scalars = {name: value.item() for name, value in metrics.items()} | {"epoch": self.current_epoch}
            for logger in self.loggers:
                logger.log_metrics(scalars, step=self.global_step)

    def _take(self) -> Tensor:
        """The sums over the steps since the last log, which are added to the epoch's."""
        since = sums(self._trained)
        self._trained, self._epoch_sums = [], self._epoch_sums.to(since.device) + since
        return since

    def on_train_epoch_end(self) -> None:
        if self._trained:
            self._take()
        loss, right, images = self._epoch_sums
        if not images:
            return  # a step of a subclass that logs by itself
        self._epoch_sums = torch.zeros(3)
        metrics = {"train/loss_epoch": loss / images, "train/acc_epoch": right / images}
        self.log_dict(metrics, sync_dist=True)
        self.log_dict(self._place())

    def _place(self) -> dict[str, float]:
        """Where on the x-axis Lightning is to put what is logged with this, if it would itself count
        executions.
        """
        if self.automatic_optimization or self.trainer.state.fn != "fit":
            return {}
        return {"step": float(self.global_step - 1), "epoch": float(self.current_epoch)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {"trained": self._trained, "epoch_sums": self._epoch_sums}
        each = [kept]
        if torch.distributed.is_initialized():
            each *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(each, kept)
        checkpoint["kept"] = each  # by each process

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        several = torch.distributed.is_initialized()
        rank, world_size = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
        )
        each = checkpoint.get("kept", [])
        if len(each) != world_size:
            return  # as many processes as there were; others begin their means anew
        self._trained = [tuple(tensor.to(self.device) for tensor in step) for step in each[rank]["trained"]]
        self._epoch_sums = each[rank]["epoch_sums"]

    # ------------------------------------------------------------------------- many steps in one

    def on_fit_start(self) -> None:
        """Refuses what several steps per execution cannot honour.

        Raises:
            MisconfigurationException: naming the setting.
        """
        trainer = self.trainer
        if self.automatic_optimization or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        whole = {"limit_train_batches": 1.0, "overfit_batches": 0.0, "val_check_interval": 1.0}
        found = {name: getattr(trainer, name) for name in whole}
        refused = [f"--trainer.{name}={found[name]}" for name in whole if found[name] != whole[name]]
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            refused.append("the scheduler ReduceLROnPlateau")
        if refused:
            raise MisconfigurationException(
                f"steps_per_execution={self.steps_per_execution} cannot honour {' and '.join(refused)}; "
                "leave that out, or set --model.steps_per_execution=1"
            )

    def _execute(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``steps_per_execution`` optimizer steps, after Keras's setting of that name: the same steps on
        the same batches as one by one, bit for bit, while Lightning's work around a step is done once.

        Callbacks see one large batch. A signal, a checkpoint and a check of the losses wait for its end.

        Args:
            images: of all batches, float32 (steps * B, 1, H, W); the last batch may be shorter.
            labels: int64 (steps * B,).

        Returns:
            ``loss`` of the last step () and ``losses`` of all (steps,).
        """
        trainer, optimizer, losses = self.trainer, self.optimizers(), []
        assert isinstance(optimizer, LightningOptimizer)
        batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        for batch in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            loss = self._step(*batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self._step_schedulers("step", self.global_step)
            losses.append(loss.detach())
            if self.global_step == trainer.max_steps:
                break
        if trainer.is_last_batch:
            self._step_schedulers("epoch", self.current_epoch + 1)
        return {"loss": losses[-1], "losses": torch.stack(losses)}

    def _step_schedulers(self, interval: str, count: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                self.lr_scheduler_step(config.scheduler, None)

    # ------------------------------------------------------------------------------------ evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(*batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self._evaluate(*batch)

    def _evaluate(self, images: Tensor, labels: Tensor) -> Tensor:
        scores = self(images)  # (B, num_classes)
        self._evaluated.append((self.loss(scores, labels), scores.argmax(1), labels))
        return scores

    def on_validation_epoch_end(self) -> None:
        self._log_evaluated("val", self.val_loss, self.val_acc)

    def on_test_epoch_end(self) -> None:
        self._log_evaluated("test", self.test_loss, self.test_acc)

    def _log_evaluated(self, stage: str, mean_loss: MeanMetric, accuracy: MulticlassAccuracy) -> None:
        if not self._evaluated:
            return  # a step of a subclass that logs by itself
        losses, predicted, labels = zip(*self._evaluated, strict=True)
        self._evaluated = []
        # The sizes weigh the shorter last batch as the tutorial's fit() does.
        sizes = torch.tensor([len(batch) for batch in labels], device=self.device)
        mean_loss.update(torch.stack(losses), sizes)
        accuracy.update(torch.cat(predicted), torch.cat(labels))
        self.log_dict({f"{stage}/loss": mean_loss, f"{stage}/acc": accuracy}, prog_bar=True)
        self.log_dict(self._place())

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
        steps_per_execution: as in ``Classifier``.
    """

    def __init__(
        self,
        lr: float = 0.5,
        momentum: float = 0.0,
        num_pixels: int = 28 * 28,
        num_classes: int = 10,
        steps_per_execution: PositiveInt = 1,
    ) -> None:
        net = nn.Sequential(
            nn.Flatten(),  # (B, 1, H, W) -> (B, H * W)
            nn.Linear(num_pixels, num_classes),
        )
        super().__init__(net, lr, momentum, num_classes, steps_per_execution=steps_per_execution)


class CNN(Classifier):
    """The tutorial's CNN: three convolutions, each halving height and width, for images of any size.

    The ReLU after the last convolution is the tutorial's too. It cuts off the scores of a class below
    zero, and with them their gradients: now and then a class dies early and never comes back.

    Args:
        lr: learning rate of SGD.
        momentum: momentum of SGD.
        num_classes: how many classes there are.
        channels_last: as in ``Classifier``.
        steps_per_execution: as in ``Classifier``.
    """

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.9,
        num_classes: int = 10,
        channels_last: bool = False,
        steps_per_execution: PositiveInt = 1,
    ) -> None:
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
        super().__init__(net, lr, momentum, num_classes, channels_last, steps_per_execution)


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
