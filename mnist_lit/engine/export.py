"""Export a checkpoint to one file that predicts without this project: ONNX, or the format of ``torch.export``."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mnist_lit.engine.checkpoint import Checkpoint
from mnist_lit.engine.errors import UserError, require
from mnist_lit.engine.execution import estimated_steps
from mnist_lit.engine.outputs import are_probabilities, class_names
from mnist_lit.engine.provenance import engine_version
from mnist_lit.engine.storage import atomic_write

TOLERANCE = 1e-5  # of a prediction, between the file and the checkpoint; relative for values above 1


class Trainer(lightning.pytorch.Trainer):
    """Lightning's, with ``export``, and with schedules that know of several steps per execution."""

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Number of optimizer steps of the run, for schedules; Lightning counts executions."""
        estimated = super().estimated_stepping_batches
        return estimated_steps(self, estimated) if estimated != float("inf") else estimated

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str = "",
        format: Literal["onnx", "pt2"] = "onnx",
        output: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write a checkpoint's model to one file, with everything that ``predict`` does with a batch.

        The file is read back and compared with the checkpoint on the test split before it replaces an older one.

        Args:
            model: of the checkpoint.
            datamodule: whose preprocessing is included, and on whose test split the file is checked; by default the
                model's own.
            ckpt_path: the checkpoint.
            format: ``onnx``, or ``pt2`` for ``torch.export.load``.
            output: the file, by default beside the checkpoint.
            weights_only: false accepts a checkpoint that holds more than tensors and plain values.

        Raises:
            UserError: if the model cannot be exported, or the file does not agree with the checkpoint.
        """
        if format == "onnx":
            require("export", "onnx", "onnxscript", "onnxruntime")
        checkpoint = Checkpoint.read(ckpt_path, weights_only is not False)
        source: Any = datamodule or model
        # Hooks may ask their trainer whether it trains. This one neither shards the data nor changes their precision.
        model.trainer = source.trainer = lightning.pytorch.Trainer(accelerator="cpu", devices=1, logger=False)
        batches, stage = _evaluation_set(source)
        if datamodule:
            model.setup("test")
        model.configure_model()  # where, as in setup, layers may be made
        model.load_state_dict(checkpoint.weights, strict=model.strict_loading)
        predictor = Predictor(model.cpu(), source, batches[0]).eval()
        path = Path(output or Path(ckpt_path).with_suffix(f".{format}"))
        with Console(stderr=True).status(f"Exporting to {format}"), torch.no_grad(), atomic_write(path) as part:
            program = _trace(predictor, batches[0])
            predictions = torch.cat([predictor.predict(batch) for batch in batches])
            metadata = {"model": type(model).__name__, **_describe(source, checkpoint, predictions)}
            written = _write(program, predictor.names, metadata, part, format)
            inputs = [predictor.inputs(batch) for batch in batches]
            one = [tensor[:1] for tensor in inputs[0]]  # a batch of another size, too
            ours = torch.cat([written(*tensors) for tensors in [*inputs, one]])
            difference = _difference(ours, torch.cat([predictions, predictor(*one)]))
            if not difference <= TOLERANCE:
                raise UserError(
                    f"{path} would differ from {ckpt_path} by {difference:.1e}, more than {TOLERANCE:g}; "
                    "nothing was written"
                )
        taken = [f"{name} {tuple(tensor.shape[1:])}" for name, tensor in zip(predictor.names, inputs[0], strict=True)]
        print(
            f"Wrote {path}, which takes batches of {' and '.join(taken)}; on {len(predictions):,} of the {stage} split "
            f"it differs from the checkpoint by {difference:.1e} at most"
        )


class Predictor(nn.Module):
    """What ``predict`` does with a batch, as a function of its tensors.

    Args:
        model: whose ``predict_step`` is called, or ``forward`` where it has none.
        source: the data module, or a model with loaders of its own.
        example: a batch of the loader: a tensor, or a tuple or a dict of tensors.
        precision: to predict in; by default that of the weights.
    """

    def __init__(self, model: LightningModule, source: Any, example: Any, precision: Precision | None = None) -> None:
        super().__init__()
        self.model, self.precision = model, precision or Precision()
        # Lightning takes the hooks of the data module where it has any, else those of the model.
        self.hooks = [
            getattr(source if is_overridden(name, source) else model, name)
            for name in ("on_before_batch_transfer", "on_after_batch_transfer")
        ]
        self.kind = Mapping if isinstance(example, Mapping) else tuple if isinstance(example, (tuple, list)) else None
        self.keys: list[Any] = list(example if self.kind is Mapping else range(len(example)) if self.kind else [0])
        self.used = self.keys[:1]

    @property
    def names(self) -> list[str]:
        """Of the inputs."""
        return ["images"] if len(self.used) == 1 else [f"input_{key}" for key in self.used]

    def inputs(self, batch: Any) -> list[Tensor]:
        """The tensors of a batch that are used."""
        return [batch[key] for key in self.used] if self.kind else [batch]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Tensors such as images uint8 (B, H, W) to predictions (B, ...)."""
        batch: Any = {**dict.fromkeys(self.keys), **dict(zip(self.used, inputs, strict=True))}
        if self.kind is not Mapping:
            batch = tuple(batch.values()) if self.kind else inputs[0]
        return self.predict(batch)

    def predict(self, batch: Any) -> Tensor:
        """A batch of the loader to predictions (B, ...)."""
        for hook in self.hooks:
            batch = hook(batch, 0)
        batch = self.precision.convert_input(batch)
        with self.precision.predict_step_context():
            if is_overridden("predict_step", self.model):
                outputs = self.model.predict_step(batch, 0)
            else:
                outputs = self.model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        predictions = outputs.get("preds") if isinstance(outputs, Mapping) else outputs
        if not isinstance(predictions, Tensor):
            raise UserError(f"predict_step of {type(self.model).__name__} returns no tensor, and no dict with preds")
        return predictions


def _evaluation_set(source: LightningDataModule | LightningModule) -> tuple[list[Any], str]:
    """The batches of the test split, or of the validation split if there is no test split."""
    source.prepare_data()
    try:
        source.setup("test")
        return list(source.test_dataloader()), "test"
    except (UserError, MisconfigurationException):
        source.setup("validate")
        return list(source.val_dataloader()), "validation"


def _trace(predictor: Predictor, batch: Any) -> ExportedProgram:
    """Find out which tensors of a batch count, and trace the predictor with these."""
    expected = predictor.predict(batch)
    predictor.used = [key for key in predictor.keys if not predictor.kind or isinstance(batch[key], Tensor)]
    for key in reversed(predictor.used):  # leave out those without which the predictions are the same, such as labels
        every, predictor.used = predictor.used, [other for other in predictor.used if other != key]
        try:
            agrees = _difference(predictor(*predictor.inputs(batch)), expected) <= TOLERANCE
        except Exception:  # whatever a network raises at what it does not take
            agrees = False
        predictor.used = predictor.used if agrees else every
    few = tuple(tensor[:3] for tensor in predictor.inputs(batch))
    try:
        return torch.export.export(predictor, few, dynamic_shapes={"inputs": tuple({0: Dim.AUTO} for _ in few)})
    except Exception as error:  # whatever a network does that torch.export cannot follow
        name = type(getattr(predictor.model, "net", predictor.model)).__name__
        raise UserError(f"torch.export cannot follow {name}: {str(error).strip().partition(chr(10))[0]}") from error


def _describe(source: Any, checkpoint: Checkpoint, predictions: Tensor) -> dict[str, Any]:
    """What belongs to the model and is not in its weights."""
    options, own = checkpoint.content.get("datamodule_hyper_parameters", {}), ("channels", "image_size")
    described = {
        "data": {key: options[key] for key in getattr(source, "from_checkpoint", own) if key in options},
        "dataset": getattr(source, "dataset_used", type(source).__name__),
        "global_step": checkpoint.step,
        "versions": {"engine": engine_version(), "torch": torch.__version__},
    }
    if are_probabilities(predictions):
        number = predictions.shape[1]
        names = class_names(source, number, checkpoint.content)
        described["classes"] = list(range(number)) if names == [*map(str, range(number))] else names
    return described


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


def _write(
    program: ExportedProgram, names: list[str], metadata: dict[str, Any], path: Path, format: str
) -> Callable[..., Tensor]:
    """Write the file, and return a function from inputs, each (B, ...), to the file's predictions (B, ...)."""
    if format == "pt2":
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata, indent=1)})
        return torch.export.load(path).module()
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    exported = torch.onnx.export(program, dynamo=True, input_names=names, output_names=["predictions"], verbose=False)
    assert exported is not None
    for key, value in metadata.items():
        exported.model.metadata_props[key] = value if isinstance(value, str) else json.dumps(value)
    exported.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda *inputs: torch.from_numpy(
        session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})[0]
    )
