"""What TensorBoard shows of a run beside its losses, without a line of code in the model."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter
from torchmetrics.classification import MulticlassConfusionMatrix

from mnist_lit.pictures import confusion_sheet, contact_sheet

CHARTS = {
    "training and validation": {
        "loss": ["Multiline", ["train/loss_epoch", "val/loss"]],
        "accuracy": ["Multiline", ["train/acc_epoch", "val/acc"]],
    }
}


class Dashboard(Callback):
    """Writes to TensorBoard what a practitioner asks next; silent where the run has no TensorBoard.

    As scalars: learning rate and gradient norm every ``log_every_n_steps``, accuracy per class. As images:
    samples of the training batch as the model sees them, the filters of the first layer, the confusion
    matrix and the most confident mistakes as "label > prediction", after every validation and test. And
    the graph, the charts of training and validation together (CUSTOM SCALARS), and the settings of the run
    beside its metrics (HPARAMS).

    Args:
        every_n_epochs: how often the pictures of a validation are made; 0 switches the dashboard off.
        mistakes: how many mistakes are shown.
        samples: how many images of the first training batch are shown.
        confusion_matrix: whether there is one.
        filters: whether the filters of the first layer are shown.
        graph: whether the graph of the model is.
        gradient_norm: whether it is logged.
    """

    def __init__(
        self,
        every_n_epochs: NonNegativeInt = 1,
        mistakes: NonNegativeInt = 30,
        samples: NonNegativeInt = 30,
        confusion_matrix: bool = True,
        filters: bool = True,
        graph: bool = True,
        gradient_norm: bool = True,
    ) -> None:
        self.every_n_epochs, self.mistakes, self.samples = int(every_n_epochs), int(mistakes), int(samples)
        self.confusion_matrix, self.filters = confusion_matrix, filters
        self.graph, self.gradient_norm = graph, gradient_norm
        # Per batch: probabilities (B, num_classes) and labels (B,); of the worst mistakes confidence, image,
        # label and prediction.
        self._scores: list[tuple[Tensor, Tensor]] = []
        self._wrong: list[tuple[Tensor, ...]] = []

    def _logger(self, trainer: Trainer) -> TensorBoardLogger | None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        return loggers[0] if self.every_n_epochs and loggers and not trainer.sanity_checking else None

    def _writer(self, trainer: Trainer) -> SummaryWriter | None:
        """Of the first of several processes."""
        logger = self._logger(trainer)
        return logger.experiment if logger and trainer.is_global_zero else None

    # ---------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = self._writer(trainer)
        if writer is None or trainer.global_step:
            return  # a resumed run has all this in its folder
        writer.add_custom_scalars(CHARTS)
        both = {**pl_module.hparams, **getattr(trainer.datamodule, "hparams", {})}  # type: ignore[attr-defined]
        plain = (bool, int, float, str)
        settings = {
            name: value if isinstance(value, plain) else str(value)
            for name, value in both.items()
            if not name.startswith("_")  # Lightning's notes to itself
        }
        # The tab reads the metrics out of the run's curves; the numbers here only name them.
        assert writer.file_writer is not None
        for summary in hparams(settings, dict.fromkeys(("val/loss", "val/acc", "train/loss"), 0)):
            writer.file_writer.add_summary(summary)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step or batch_idx or (writer := self._writer(trainer)) is None:
            return
        images, labels = batch
        if self.samples:
            self._add_sheet(
                writer, "train/samples", images, [str(n) for n in labels.tolist()], self.samples, 0
            )
        if self.graph:
            self._add_graph(writer, pl_module, images[:1])

    @staticmethod
    def _add_graph(writer: SummaryWriter, pl_module: LightningModule, images: Tensor) -> None:
        modes = {module: module.training for module in pl_module.modules()}
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(), redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # the tracer's, about itself
                writer.add_graph(pl_module.eval(), images)
        except Exception as error:  # whatever a network does that cannot be traced: it trains all the same
            rank_zero_warn(f"no graph in TensorBoard: {str(error).splitlines()[0]}")
        finally:
            for module, training in modes.items():
                module.training = training

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        due = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if not due or (writer := self._writer(trainer)) is None:
            return
        writer.add_scalar("train/lr", optimizer.param_groups[0]["lr"], trainer.global_step)
        gradients = [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
        if self.gradient_norm:
            norm = torch.nn.utils.get_total_norm(gradients)
            writer.add_scalar("train/gradient_norm", norm, trainer.global_step)

    # -------------------------------------------------------------------------------- evaluation

    def _due(self, trainer: Trainer) -> bool:
        if self._logger(trainer) is None:
            return False
        return trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._keep(trainer, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._keep(trainer, outputs, batch)

    def _keep(self, trainer: Trainer, scores: Any, batch: Any) -> None:
        if not isinstance(scores, Tensor) or not self._due(trainer):
            return
        images, labels = batch
        probabilities = scores.float().softmax(1)
        self._scores.append((probabilities, labels))
        confidence, predicted = probabilities.max(1)
        worst = torch.where(predicted != labels, confidence, -1.0).topk(min(self.mistakes, len(labels)))
        index = worst.indices
        self._wrong.append((worst.values, images[index], labels[index], predicted[index]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        kept, wrong, self._scores, self._wrong = self._scores, self._wrong, [], []
        if not kept:
            return
        step = max(trainer.global_step - 1, 0)
        probabilities, labels = map(torch.cat, zip(*kept, strict=True))  # (n, num_classes), (n,)
        matrix = MulticlassConfusionMatrix(probabilities.shape[1]).to(labels.device)
        # Of all processes together, so each of them has to ask; the mistakes are those of the first.
        counts = matrix(probabilities, labels).cpu()  # (num_classes, num_classes)
        if (writer := self._writer(trainer)) is None:
            return
        for name, accuracy in enumerate((counts.diag() / counts.sum(1)).tolist()):
            writer.add_scalar(f"{stage}_acc_of_class/{name}", accuracy, step)
        if self.confusion_matrix:
            self._add_image(writer, f"{stage}/confusion_matrix", confusion_sheet(counts), step)
        if self.mistakes:
            confidence, images, true, predicted = map(torch.cat, zip(*wrong, strict=True))
            worst = confidence.argsort(descending=True)[: self.mistakes]
            worst = worst[confidence[worst] >= 0]
            captions = [
                f"{label} > {guess} {sure:.0%}"
                for label, guess, sure in zip(
                    *(t[worst].tolist() for t in (true, predicted, confidence)), strict=True
                )
            ]
            self._add_sheet(writer, f"{stage}/mistakes", images[worst], captions, self.mistakes, step)
        if self.filters and stage == "val":
            self._add_filters(writer, pl_module, step)

    @staticmethod
    def _add_sheet(
        writer: SummaryWriter, name: str, images: Tensor, captions: list[str], most: int, step: int
    ) -> None:
        """Images float32 (n, 1, H, W) in 0..1, up to ``most`` of them."""
        if len(images):
            pixels = (images[:most, 0].float() * 255).round().clamp(0, 255).to(torch.uint8).cpu()
            Dashboard._add_image(writer, name, contact_sheet(pixels, captions[:most]), step)

    @staticmethod
    def _add_image(writer: SummaryWriter, name: str, sheet: Image.Image, step: int) -> None:
        """What ``writer.add_image`` does by way of three channels of floats, in a quarter of the time."""
        png = io.BytesIO()
        sheet.save(png, "PNG")
        image = Summary.Image(
            height=sheet.height, width=sheet.width, colorspace=1, encoded_image_string=png.getvalue()
        )
        assert writer.file_writer is not None
        writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    def _add_filters(self, writer: SummaryWriter, pl_module: LightningModule, step: int) -> None:
        """The weights of the first layer, each filter from its lowest (white) to its highest (black)."""
        layer = next((m for m in pl_module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
        if layer is None:
            return
        weights = layer.weight.detach().float().cpu()
        if weights.ndim == 2:  # (out, H * W)
            side = round(weights.shape[1] ** 0.5)
            if side * side != weights.shape[1]:
                return
            weights = weights.reshape(-1, 1, side, side)
        weights = weights.mean(1, keepdim=True)[:64]  # (out, 1, kh, kw)
        low, high = weights.amin((2, 3), keepdim=True), weights.amax((2, 3), keepdim=True)
        shades = (weights - low) / (high - low).clamp(min=1e-12)
        self._add_sheet(writer, "val/filters", shades, [str(n) for n in range(len(shades))], 64, step)
