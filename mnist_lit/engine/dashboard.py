"""Pictures and numbers of a run in its loggers, without code in the model."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from mnist_lit.engine.compat import log_step
from mnist_lit.engine.outputs import class_names, classification, display, find_classes, find_images
from mnist_lit.engine.sheets import confusion_sheet, contact_sheet


class Dashboard(Callback):
    """Log more than losses and metrics.

    Scalars are the learning rate and the gradient norm every ``log_every_n_steps``, and the accuracy per class. Images,
    in every logger that takes them, are samples of the first training batch and, after every validation and test, the
    confusion matrix and the most confident mistakes as "target > prediction". TensorBoard also gets charts of training
    and validation together (CUSTOM SCALARS), and hyperparameters next to metrics (HPARAMS).

    Images need batches with images (B, C, H, W), C 1 or 3; the confusion matrix and mistakes need steps that return
    ``Outputs``. Parts that lack these are left out. So are parts that fail, with a warning: nothing here ends a run.

    Args:
        every_n_epochs: number of epochs between the images of validations; 0 switches the dashboard off.
        mistakes: number of mistakes to show.
        samples: number of images of the first training batch to show.
        confusion_matrix: whether to show the confusion matrix.
        gradient_norm: whether to log the gradient norm.

    Example:
        >>> Trainer(callbacks=[Dashboard(mistakes=60, samples=0)])
    """

    def __init__(
        self,
        every_n_epochs: NonNegativeInt = 1,
        mistakes: NonNegativeInt = 30,
        samples: NonNegativeInt = 30,
        confusion_matrix: bool = True,
        gradient_norm: bool = True,
    ) -> None:
        self.every_n_epochs, self.mistakes, self.samples = int(every_n_epochs), int(mistakes), int(samples)
        self.confusion_matrix, self.gradient_norm = confusion_matrix, gradient_norm
        self._listed = False  # whether TensorBoard has the charts and hyperparameters
        self._counts: Tensor | None = None  # confusion matrix, int64 (num_classes, num_classes)
        self._worst: list[Tensor] = []  # confidence, image, target and prediction of each mistake

    def _active(self, trainer: Trainer) -> bool:
        return bool(self.every_n_epochs and trainer.loggers and not trainer.sanity_checking)

    def _due(self, trainer: Trainer) -> bool:
        return self._active(trainer) and (
            trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        )

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Switch off a part that fails, instead of ending the run."""
        try:
            yield
        except Exception as error:  # whatever a model, its data and a server can raise
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise  # the run's disk is full or gone
            off = type(getattr(self, name))(0)
            setattr(self, name, off)
            reason = (str(error) or type(error).__name__).splitlines()[0]
            rank_zero_warn(f"no {name} in the dashboard: {reason}; --dashboard.{name}={str(off).lower()} leaves it out")

    # ------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        first = batch_idx == 0 and trainer.global_step == 0 and trainer.is_global_zero
        if not first or not self.samples or not self._active(trainer) or (images := find_images(batch)) is None:
            return
        with self._part("samples"):
            captions = [""] * len(images)
            if (labels := find_classes(batch)) is not None:
                names = class_names(trainer)
                captions = [names[label] if 0 <= label < len(names) else str(label) for label in labels.tolist()]
            sheet = contact_sheet(display(images[: self.samples]), captions[: self.samples])
            _log_image(trainer, "train/samples", sheet, 0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (trainer.global_step + 1) % every or not self._active(trainer):
            return
        scalars = {"train/lr": optimizer.param_groups[0]["lr"]}
        if self.gradient_norm:
            with self._part("gradient_norm"):
                # Another optimizer's gradients may be left from its last step.
                weights = [weight for group in optimizer.param_groups for weight in group["params"]]
                gradients = [weight.grad for weight in weights if weight.grad is not None]
                scalars["train/gradient_norm"] = float(torch.nn.utils.get_total_norm(gradients))
        _log_scalars(trainer, scalars, log_step(trainer))

    # ----------------------------------------------------------------------------------------- evaluation

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if not self._due(trainer) or (found := classification(outputs)) is None:
            return
        preds, target = found
        number, predicted = preds.shape[1], preds.argmax(1)
        with self._part("confusion_matrix"):
            if self._counts is None:
                self._counts = target.new_zeros((number, number), dtype=torch.int64)
            self._counts.index_put_((target.long(), predicted), self._counts.new_ones(()), accumulate=True)
        images = find_images(batch)
        if self.mistakes and images is not None and len(images) == len(preds):
            with self._part("mistakes"):
                confidence = preds.float().softmax(1).amax(1)
                confidence = torch.where(predicted != target, confidence, -1.0)
                samples = self._most_confident([confidence, images, target, predicted])  # so few images are copied
                worst = [torch.cat(pair) for pair in zip(self._worst, samples, strict=True)] if self._worst else samples
                self._worst = self._most_confident(worst)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def _most_confident(self, samples: list[Tensor]) -> list[Tensor]:
        index = samples[0].topk(min(self.mistakes, len(samples[0]))).indices
        return [values[index] for values in samples]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not self._listed and self._active(trainer) and trainer.is_global_zero:
            self._listed = True
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    _add_charts_and_hparams(logger, [n for n in trainer.callback_metrics if n.startswith("val")])
        self._show(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, "test")

    def _show(self, trainer: Trainer, stage: str) -> None:
        counts, worst, self._counts, self._worst = self._counts, self._worst, None, []
        if counts is None:
            return
        # The counts are summed over processes; the mistakes are those of the first.
        counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu()
        step, names = log_step(trainer), class_names(trainer, len(counts))
        shares = (counts.diag() / counts.sum(1)).tolist()
        tags = {f"{stage}_acc_of_class/{name}": share for name, share in zip(names, shares, strict=True)}
        _log_scalars(trainer, tags, step)
        if not trainer.is_global_zero:
            return
        if self.confusion_matrix:
            with self._part("confusion_matrix"):
                _log_image(trainer, f"{stage}/confusion_matrix", confusion_sheet(counts, names), step)
        if worst and (wrong := worst[0] >= 0).any():
            with self._part("mistakes"):
                confidence, images, target, predicted = (values[wrong] for values in worst)
                rows = zip(target.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
                captions = [f"{names[true]} > {names[guess]} {sure:.0%}" for true, guess, sure in rows]
                _log_image(trainer, f"{stage}/mistakes", contact_sheet(display(images), captions), step)


def _log_scalars(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step)


def _log_image(trainer: Trainer, name: str, sheet: Image.Image, step: int) -> None:
    """Log an image to every logger that takes images: TensorBoard, MLflow, and those with a ``log_image``."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            pixels = np.atleast_3d(np.asarray(sheet))  # (H, W, C)
            logger.experiment.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, sheet, key=name, step=step)
        elif callable(log := getattr(logger, "log_image", None)):
            log(key=name, images=[sheet], step=step)


def _add_charts_and_hparams(logger: TensorBoardLogger, metrics: list[str]) -> None:
    """Chart validation metrics with those of training, and list them with the hyperparameters.

    Lightning's ``log_hyperparams`` would log the metrics once more.
    """
    writer: SummaryWriter = logger.experiment
    charts = {name[4:]: ["Multiline", [f"train{name[3:]}_epoch", name]] for name in metrics}
    writer.add_custom_scalars({"training and validation": charts})
    values = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in logger.hparams.items()
        if not name.startswith("_")  # Lightning's notes to itself
    }
    assert writer.file_writer is not None
    for summary in hparams(values, dict.fromkeys([*metrics, "train/loss"], 0)):
        writer.file_writer.add_summary(summary)
