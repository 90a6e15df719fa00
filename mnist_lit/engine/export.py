"""Export a checkpoint to one file that predicts without this project: ONNX, or the format of ``torch.export``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.export import Dim

from mnist_lit.engine.checkpoint import Checkpoint
from mnist_lit.engine.errors import ENGINE as PROJECT
from mnist_lit.engine.errors import ConfigurationError, DatasetError, UserError
from mnist_lit.engine.execution import estimated_steps
from mnist_lit.engine.messages import leave_out_noise
from mnist_lit.engine.outputs import are_probabilities, class_names, find_classes
from mnist_lit.engine.storage import atomic_write

TOLERANCE = 1e-5  # of a prediction, between the file and the checkpoint; relative for values above 1
EXTRA = "onnx", "onnxscript", "onnxruntime"  # what ONNX needs

Predict = Callable[[Tensor], Tensor]


class Trainer(lightning.pytorch.Trainer):
    """Lightning's, with ``export``, and with schedules that know of several steps per execution."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        leave_out_noise()  # here as well, in a process of ddp_spawn

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Number of optimizer steps of the run, for schedules; Lightning counts executions."""
        estimated = super().estimated_stepping_batches
        return estimated_steps(self, estimated) if estimated != float("inf") else estimated

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        format: Literal["onnx", "pt2"] = "onnx",
        output: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write a checkpoint's model to one file, from images as the loader has them to predictions.

        Everything that ``predict`` does with a batch is inside. The file is read back and compared with the
        checkpoint on the test split before it replaces an older one.

        Args:
            model: of the checkpoint.
            datamodule: whose preprocessing is included, and on whose test split the file is checked.
            ckpt_path: the checkpoint.
            format: ``onnx``, or ``pt2`` for ``torch.export.load``.
            output: the file, by default beside the checkpoint.
            weights_only: false accepts a checkpoint that holds more than tensors and plain values.

        Raises:
            ConfigurationError: if the model cannot be exported, or the file does not agree with the checkpoint.
        """
        assert ckpt_path is not None  # the command line checks it
        if format == "onnx" and (missing := [name for name in EXTRA if find_spec(name) is None]):
            raise ConfigurationError(f"ONNX needs {', '.join(missing)}: pip install '{PROJECT}[export]'")
        checkpoint = Checkpoint.read(ckpt_path, weights_only is not False).content
        model.load_state_dict(checkpoint["state_dict"])
        batches, stage = _evaluation_set(datamodule)
        predictor = Predictor(model.cpu(), datamodule, batches[0]).eval()
        images = torch.cat([predictor.images(batch) for batch in batches])
        path = Path(output or Path(ckpt_path).with_suffix(f".{format}"))
        name = type(getattr(model, "net", model)).__name__
        with Console(stderr=True).status(f"Exporting {escape(str(path))}"), torch.no_grad(), atomic_write(path) as part:
            other_size = F.pad(images[:100], (4, 4, 6, 6))  # 28 x 28 become 40 x 36
            any_size = _takes(predictor, other_size)
            program = _program(predictor, images, any_size, name)
            if any_size and not _takes(program.module(), other_size):  # torch.export has found a bound, as in ResNets
                any_size = False
                program = _program(predictor, images, any_size, name)
            predictions = _in_batches(predictor, images)
            metadata = {
                "input": {"images": str(images.dtype)[6:], "axes": _axes(images, any_size)},
                **_describe(predictions, batches, checkpoint, datamodule, stage),
                "model": type(model).__name__,
                "data": {
                    key: value
                    for key, value in checkpoint.get("datamodule_hyper_parameters", {}).items()
                    if key in getattr(datamodule, "from_checkpoint", ("channels", "image_size"))
                },
                "dataset": getattr(datamodule, "dataset_used", type(datamodule).__name__),
                "epoch": checkpoint["epoch"],
                "global_step": checkpoint["global_step"],
                "versions": _versions(),
            }
            written = {"onnx": _write_onnx, "pt2": _write_pt2}[format](program, metadata, part)
            pairs = [(written(images[:1]), predictions[:1]), (_in_batches(written, images), predictions)]
            if any_size:
                pairs.append((written(other_size), predictor(other_size)))
            difference = max(_difference(ours, theirs) for ours, theirs in pairs)
            if not difference <= TOLERANCE:
                raise ConfigurationError(
                    f"{path} would differ from {ckpt_path} by {difference:.1e}, more than {TOLERANCE:g}; "
                    "nothing was written"
                )
        size = "of any size" if any_size else f"of {images.shape[-2]} x {images.shape[-1]}"
        Console().print(
            f"Wrote {path}: images {size}, in batches of any size; on {len(images):,} of the {stage} split "
            f"it differs from the checkpoint by {difference:.1e} at most",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )


class Predictor(nn.Module):
    """What ``predict`` does with a batch, as a function of its images.

    Args:
        model: whose ``predict_step`` is called.
        datamodule: whose ``on_after_batch_transfer`` is called before.
        example: a batch of the loader: images, or a tuple or a dict that starts with images.
        precision: to predict in; by default that of the weights.

    Raises:
        ConfigurationError: if the batch or the predictions are of another kind.
    """

    def __init__(
        self, model: LightningModule, datamodule: LightningDataModule, example: Any, precision: Precision | None = None
    ) -> None:
        super().__init__()
        self.model, self.datamodule, self.precision = model, datamodule, precision or Precision()
        self.keys = list(example) if isinstance(example, Mapping) else []
        self.length = len(example) if isinstance(example, (list, tuple)) else 0

    def images(self, batch: Any) -> Tensor:
        """The images of a batch, as the loader has them."""
        first = batch[self.keys[0]] if self.keys else batch[0] if self.length else batch
        if not isinstance(first, Tensor) or first.ndim < 3:
            raise ConfigurationError(
                "export needs batches that start with a tensor of images (B, ..., H, W); those of "
                f"{type(self.datamodule).__name__} start with a {type(first).__name__}"
            )
        return first

    def forward(self, images: Tensor) -> Tensor:
        """Images such as uint8 (B, H, W) to predictions (B, ...)."""
        batch: Any = images
        if self.keys:
            batch = {key: images if key == self.keys[0] else None for key in self.keys}
        elif self.length:
            batch = (images, *[None] * (self.length - 1))
        batch = self.precision.convert_input(self.datamodule.on_after_batch_transfer(batch, 0))
        with self.precision.predict_step_context():
            outputs = self.model.predict_step(batch, 0)
        predictions = outputs.get("preds") if isinstance(outputs, Mapping) else outputs
        if not isinstance(predictions, Tensor):
            raise ConfigurationError(
                "export needs a predict_step that returns a tensor, or a dict with preds; that of "
                f"{type(self.model).__name__} returns a {type(outputs).__name__}"
            )
        return predictions


def _evaluation_set(datamodule: LightningDataModule) -> tuple[list[Any], str]:
    """The batches of the test split, or of the validation split if there is no test split."""
    datamodule.prepare_data()
    try:
        datamodule.setup("test")
        stage, loader = "test", datamodule.test_dataloader()
    except (DatasetError, MisconfigurationException):
        datamodule.setup("validate")
        stage, loader = "validation", datamodule.val_dataloader()
    return list(loader), stage


def _describe(
    predictions: Tensor, batches: list[Any], checkpoint: dict[str, Any], datamodule: LightningDataModule, stage: str
) -> dict[str, Any]:
    """What the predictions are, and how good they are if that is known."""
    if not are_probabilities(predictions):
        axes = ["batch", *map(str, predictions.shape[1:])]
        return {"output": {"predictions": str(predictions.dtype)[6:], "axes": axes}}
    number = predictions.shape[1]
    names = class_names(datamodule, number, checkpoint)
    classes = list(range(number)) if names == [str(index) for index in range(number)] else names
    described: dict[str, Any] = {
        "output": {"probabilities": "float32", "axes": ["batch", "classes"]},
        "classes": classes,
    }
    labels = [label for batch in batches if (label := find_classes(batch)) is not None]
    if len(labels) == len(batches):
        described["metrics"] = _metrics(predictions, torch.cat(labels), stage)
    return described


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "lightning": lightning.__version__}
    try:
        return {PROJECT: version(PROJECT), **found}
    except PackageNotFoundError:  # a checkout that is not installed
        return found


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


def _takes(predict: Predict, images: Tensor) -> bool:
    try:
        predict(images)
    except Exception:  # whatever a network raises at a size that does not fit
        return False
    return True


def _axes(images: Tensor, any_size: bool) -> list[str]:
    axes = ["batch", *map(str, images.shape[1:])]
    if any_size:
        axes[-2:] = "height", "width"
    return axes


def _program(predictor: Predictor, images: Tensor, any_size: bool, name: str) -> torch.export.ExportedProgram:
    # AUTO instead of names: torch.export finds out what a network requires of height and width.
    dynamic = {axis: Dim.AUTO for axis, label in enumerate(_axes(images, any_size)) if label.isalpha()}
    try:
        return torch.export.export(predictor, (images[:3],), dynamic_shapes={"images": dynamic})
    except UserError:
        raise
    except Exception as error:  # whatever a network does that torch.export cannot follow
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigurationError(f"torch.export cannot follow {name}: {reason}") from error


def _in_batches(predict: Predict, images: Tensor) -> Tensor:
    return torch.cat([predict(batch) for batch in images.split(1000)])


def _metrics(probabilities: Tensor, labels: Tensor, stage: str) -> dict[str, float]:
    loss = F.nll_loss(probabilities.log(), labels).item()
    accuracy = (probabilities.argmax(1) == labels).float().mean().item()
    return {f"{stage}/loss": round(loss, 6), f"{stage}/acc": round(accuracy, 6)}


# Each writes the file and returns a function that predicts with it.


def _write_onnx(program: torch.export.ExportedProgram, metadata: dict[str, Any], path: Path) -> Predict:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=[next(iter(metadata["output"]))], verbose=False
    )
    assert exported is not None
    for side, value in (
        ("input", exported.model.graph.inputs[0]),
        ("output", exported.model.graph.outputs[0]),
    ):
        assert value.shape is not None
        for axis, label in enumerate(metadata[side]["axes"]):
            if not isinstance(value.shape[axis], int):
                value.shape[axis] = label  # viewers show it
    for key, value in metadata.items():
        exported.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_pt2(program: torch.export.ExportedProgram, metadata: dict[str, Any], path: Path) -> Predict:
    torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata, indent=1)})
    return torch.export.load(path).module()
