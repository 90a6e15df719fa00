"""Pictures and numbers of a run beside its losses, in whatever loggers it has, without code in the model."""

from __future__ import annotations

import errno
import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import SummaryWriter

from mnist_lit.engine.best import best_checkpoint
from mnist_lit.engine.metrics import metric_names
from mnist_lit.engine.outputs import as_outputs, class_names, classification, display, find_classes, find_images
from mnist_lit.engine.sheets import confusion_sheet, contact_sheet


class Dashboard(Callback):
    """Log what a practitioner asks next.

    As scalars: learning rate and gradient norm every ``log_every_n_steps``, accuracy per class. As images, in
    every logger that takes them: samples of the first training batch, the filters of the first layer, and
    after every validation and test the confusion matrix and the most confident mistakes as "target >
    prediction". In TensorBoard also the graph, charts of training and validation together (CUSTOM SCALARS),
    and the hyperparameters of the run beside its metrics (HPARAMS).

    What the model or the data have no use for is left out, with one warning that names the switch. Nothing
    here ends a run.

    Args:
        every_n_epochs: how often the images of a validation are made; 0 switches the dashboard off.
        mistakes: number of mistakes to show.
        samples: number of images of the first training batch to show.
        confusion_matrix: whether to show it.
        filters: whether to show the filters of the first layer.
        graph: whether to show the graph of the model.
        gradient_norm: whether to log it.

    Example:
        >>> Trainer(callbacks=[Dashboard(mistakes=60, graph=False)])
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
        self._off: set[str] = set()  # parts that were left out once
        self._reset()

    def _reset(self) -> None:
        self._counts: Tensor | None = None  # confusion matrix, int64 (num_classes, num_classes)
        self._worst: list[Tensor] | None = None  # confidence, image, target and prediction of each mistake

    def _active(self, trainer: Trainer) -> bool:
        return bool(self.every_n_epochs and trainer.loggers and not trainer.sanity_checking)

    @contextmanager
    def _part(self, name: str, switch: str) -> Iterator[None]:
        """Keep an error in a part of the dashboard from ending the run, and warn of it once."""
        try:
            yield
        except Exception as error:  # whatever a model, its data and a server can be
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT):
                raise  # of the run's disk, which is not for the dashboard to hide
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self._leave_out(name, switch, reason)

    def _leave_out(self, name: str, switch: str, reason: str) -> None:
        if name not in self._off:
            rank_zero_warn(f"no {name} in the dashboard: {reason}; --dashboard.{switch} leaves it out")
        self._off.add(name)

    # ------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._active(trainer) or trainer.global_step or not trainer.is_global_zero:
            return  # a resumed run has all this in its folder
        with self._part("table of hyperparameters", "every_n_epochs=0"):
            for writer in _tensorboards(trainer):
                _add_charts(writer, trainer)
                _add_hparams(writer, trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step or batch_idx or not self._active(trainer) or not trainer.is_global_zero:
            return
        images = find_images(batch)
        if images is None:
            if self.samples:
                reason = "the batch has no images (B, C, H, W) with C 1 or 3"
                self._leave_out("samples", "samples=0", reason)
            return
        if self.samples:
            with self._part("samples", "samples=0"):
                labels = find_classes(batch)
                names = [""] * len(images) if labels is None else self._names(trainer, labels)
                sheet = contact_sheet(display(images[: self.samples]), names[: self.samples])
                log_image(trainer, "train/samples", sheet, 0)
        if self.graph:
            with self._part("graph", "graph=false"):
                for writer in _tensorboards(trainer):
                    _add_graph(writer, pl_module, images[:1])

    @staticmethod
    def _names(trainer: Trainer, labels: Tensor) -> list[str]:
        datamodule = getattr(trainer, "datamodule", None)
        known = getattr(datamodule, "class_names", None) or ()
        names = class_names(trainer, len(known))
        return [names[label] if 0 <= label < len(names) else str(label) for label in labels.tolist()]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (trainer.global_step + 1) % every or not self._active(trainer):
            return
        scalars = {"train/lr": optimizer.param_groups[0]["lr"]}
        if self.gradient_norm and "gradient norm" not in self._off:
            with self._part("gradient norm", "gradient_norm=false"):
                gradients = [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
                scalars["train/gradient_norm"] = float(torch.nn.utils.get_total_norm(gradients))
        _log_scalars(trainer, scalars, trainer.global_step)

    # ----------------------------------------------------------------------------------------- evaluation

    def _due(self, trainer: Trainer) -> bool:
        due = trainer.state.fn != "fit" or (trainer.current_epoch + 1) % max(self.every_n_epochs, 1) == 0
        return due and self._active(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._gather(trainer, outputs, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._gather(trainer, outputs, batch)

    def _gather(self, trainer: Trainer, outputs: Any, batch: Any) -> None:
        wanted = (self.confusion_matrix or self.mistakes) and self.OF_CLASSES not in self._off
        if not wanted or not self._due(trainer):
            return
        found = classification(outputs)
        if found is None and (understood := as_outputs(outputs)) and understood["target"].is_floating_point():
            return  # a regression, which has no classes
        if found is None:
            reason = "steps return no dict of loss, preds (B, num_classes) and target (B,)"
            return self._leave_out(self.OF_CLASSES, self.SWITCHES, reason)
        with self._part(self.OF_CLASSES, self.SWITCHES):
            preds, target = found
            number, predicted = preds.shape[1], preds.argmax(1)
            if self._counts is None:
                self._counts = target.new_zeros((number, number), dtype=torch.int64)
            one = self._counts.new_ones(())
            self._counts.index_put_((target.long(), predicted), one, accumulate=True)
            images = find_images(batch)
            if self.mistakes and images is not None and len(images) == len(preds):
                self._keep_worst(preds, predicted, target, images)

    OF_CLASSES = "confusion matrix, accuracy per class and mistakes"
    SWITCHES = "confusion_matrix=false --dashboard.mistakes=0"

    def _keep_worst(self, preds: Tensor, predicted: Tensor, target: Tensor, images: Tensor) -> None:
        confidence = preds.float().softmax(1).amax(1)
        worst = torch.where(predicted != target, confidence, -1.0).topk(min(self.mistakes, len(target)))
        index = worst.indices
        found = [worst.values, images[index], target[index], predicted[index]]
        if self._worst is not None:
            found = [torch.cat(pair) for pair in zip(self._worst, found, strict=True)]
            index = found[0].topk(min(self.mistakes, len(found[0]))).indices
            found = [values[index] for values in found]
        self._worst = found

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "test")

    def _show(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        counts, worst = self._counts, self._worst
        self._reset()
        if not self._due(trainer):
            return
        step = max(trainer.global_step - 1, 0)
        if counts is not None:
            # Of all processes together, so each of them has to ask; the mistakes are those of the first.
            counts = trainer.strategy.reduce(counts, reduce_op="sum").cpu()
            names = class_names(trainer, len(counts))
            shares = (counts.diag() / counts.sum(1)).tolist()
            tags = {f"{stage}_acc_of_class/{name}": share for name, share in zip(names, shares, strict=True)}
            _log_scalars(trainer, tags, step)
            if self.confusion_matrix and trainer.is_global_zero:
                with self._part("confusion matrix", "confusion_matrix=false"):
                    sheet = confusion_sheet(counts, names)
                    log_image(trainer, f"{stage}/confusion_matrix", sheet, step)
            if worst is not None and trainer.is_global_zero:
                with self._part("mistakes", "mistakes=0"):
                    self._show_mistakes(trainer, stage, names, worst, step)
        if self.filters and stage == "val" and "filters" not in self._off and trainer.is_global_zero:
            with self._part("filters", "filters=false"):
                if (shades := _filters(pl_module)) is not None:
                    sheet = contact_sheet(shades, [str(index) for index in range(len(shades))])
                    log_image(trainer, "val/filters", sheet, step)

    @staticmethod
    def _show_mistakes(trainer: Trainer, stage: str, names: list[str], worst: list[Tensor], step: int) -> None:
        confidence, images, target, predicted = worst
        wrong = confidence >= 0
        if wrong.any():
            rows = zip(*(t[wrong].tolist() for t in (target, predicted, confidence)), strict=True)
            captions = [f"{names[true]} > {names[guess]} {sure:.0%}" for true, guess, sure in rows]
            sheet = contact_sheet(display(images[wrong]), captions)
            log_image(trainer, f"{stage}/mistakes", sheet, step)


# ------------------------------------------------------------------------------------------------- loggers


def _log_scalars(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(scalars, step)


def log_image(trainer: Trainer, name: str, sheet: Image.Image, step: int) -> None:
    """Log a picture to every logger that takes pictures: TensorBoard, MLflow, and those with a ``log_image``."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            _add_image(logger.experiment, name, sheet, step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, sheet, key=name, step=step)
        elif callable(log := getattr(logger, "log_image", None)):
            log(key=name, images=[sheet], step=step)


def _tensorboards(trainer: Trainer) -> list[SummaryWriter]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _add_image(writer: SummaryWriter, name: str, sheet: Image.Image, step: int) -> None:
    """What ``writer.add_image`` does by way of three channels of floats, in a quarter of the time."""
    png = io.BytesIO()
    sheet.save(png, "PNG")
    image = Summary.Image(
        height=sheet.height,
        width=sheet.width,
        colorspace=len(sheet.getbands()),
        encoded_image_string=png.getvalue(),
    )
    assert writer.file_writer is not None
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)


def _add_charts(writer: SummaryWriter, trainer: Trainer) -> None:
    names = metric_names(trainer)
    charts = {name: ["Multiline", [f"train/{name}_epoch", f"val/{name}"]] for name in names}
    if charts:
        writer.add_custom_scalars({"training and validation": charts})


def _add_hparams(writer: SummaryWriter, trainer: Trainer, pl_module: LightningModule) -> None:
    datamodule = getattr(trainer, "datamodule", None)
    both = {**pl_module.hparams, **getattr(datamodule, "hparams", {})}
    plain = (bool, int, float, str)
    values = {
        name: value if isinstance(value, plain) else str(value)
        for name, value in both.items()
        if not name.startswith("_")  # Lightning's notes to itself
    }
    # The tab reads the metrics out of the run's curves; the numbers here only name them.
    assert writer.file_writer is not None
    names = [f"val/{name}" for name in metric_names(trainer)] + ["train/loss"]
    monitor = getattr(best_checkpoint(trainer), "monitor", None)
    for summary in hparams(values, dict.fromkeys([monitor, *names] if monitor else names, 0)):
        writer.file_writer.add_summary(summary)


def _add_graph(writer: SummaryWriter, pl_module: LightningModule, images: Tensor) -> None:
    modes = {module: module.training for module in pl_module.modules()}
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the tracer's, about itself
            writer.add_graph(pl_module.eval(), images)
    finally:
        for module, training in modes.items():
            module.training = training


def _filters(pl_module: LightningModule) -> Tensor | None:
    """Filters of the first layer as uint8 (n, C, kh, kw), each stretched from its lowest to its highest; those of
    three channels in colour, of other numbers of channels their mean.
    """
    layer = next((m for m in pl_module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    if layer is None:
        return None
    weights = layer.weight.detach().float().cpu()
    if weights.ndim == 2:  # (out, C * H * W)
        pixels = weights.shape[1]
        sides = {channels: math.isqrt(pixels // channels) for channels in (1, 3)}
        channels = next((c for c, side in sides.items() if c * side * side == pixels), None)
        if channels is None:
            return None
        weights = weights.reshape(-1, channels, sides[channels], sides[channels])
    if weights.shape[1] != 3:
        weights = weights.mean(1, keepdim=True)
    weights = weights[:64]  # (out, C, kh, kw)
    low, high = weights.amin((1, 2, 3), keepdim=True), weights.amax((1, 2, 3), keepdim=True)
    return display((weights - low) / (high - low).clamp(min=1e-12))
