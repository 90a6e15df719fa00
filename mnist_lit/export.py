"""A checkpoint as one file that predicts without mnist_lit: ONNX, or the format of ``torch.export``."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from torch import Tensor, nn
from torch.export import Dim

import mnist_lit
from mnist_lit.archive import ArchiveError, replacing
from mnist_lit.checkpoints import read_checkpoint

TOLERANCE = 1e-5  # of a probability, between the file and the checkpoint
EXTRA = "onnx", "onnxscript", "onnxruntime"  # what ONNX needs

Predict = Callable[[Tensor], Tensor]


class Trainer(lightning.pytorch.Trainer):
    """Lightning's, which also exports."""

    def export(
        self,
        model: LightningModule,
        datamodule: LightningDataModule,
        ckpt_path: str | None = None,
        format: Literal["onnx", "pt2"] = "onnx",
        output: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write a checkpoint's model to one file that takes images as they come and gives probabilities.

        Everything that ``predict`` does with a batch is inside. The file is read back and compared with the
        checkpoint on the test split before it counts.

        Args:
            model: of the checkpoint.
            datamodule: whose preprocessing goes along, and on whose test split the file is checked.
            ckpt_path: the checkpoint.
            format: ``onnx``, or ``pt2`` for ``torch.export.load``.
            output: the file, by default beside the checkpoint.
            weights_only: false admits a checkpoint that holds more than tensors and plain values.

        Raises:
            MisconfigurationException: when the model cannot be exported, or the file does not agree with
                the checkpoint.
        """
        assert ckpt_path is not None  # the command line has seen to it
        if format == "onnx" and (missing := [name for name in EXTRA if find_spec(name) is None]):
            raise MisconfigurationException(
                f"ONNX needs {', '.join(missing)}: pip install 'mnist_lit[export]'"
            )
        checkpoint = read_checkpoint(ckpt_path, weights_only is not False)
        model.load_state_dict(checkpoint["state_dict"])
        images, labels, stage = _evaluation_set(datamodule)
        predictor = Predictor(model.cpu(), datamodule).eval()
        path = Path(output or Path(ckpt_path).with_suffix(f".{format}"))
        name = type(getattr(model, "net", model)).__name__
        with Console(stderr=True).status(f"Exporting {path}"), torch.no_grad(), replacing(path) as part:
            other_size = F.pad(images[:100], (4, 4, 6, 6))  # MNIST's 28 x 28 become 40 x 36
            any_size = _takes(predictor, other_size)
            program = _program(predictor, images, any_size, name)
            probabilities = _in_batches(predictor, images)
            metadata: dict[str, Any] = {
                "input": {"images": str(images.dtype)[6:], "axes": _axes(images, any_size)},
                "output": {"probabilities": "float32", "axes": ["batch", "classes"]},
                "classes": list(range(probabilities.shape[1])),
                "dataset": getattr(datamodule, "dataset_used", type(datamodule).__name__),
                "metrics": _metrics(probabilities, labels, stage),
                "epoch": checkpoint["epoch"],
                "global_step": checkpoint["global_step"],
                "versions": {
                    "mnist_lit": mnist_lit.__version__,
                    "torch": torch.__version__,
                    "lightning": lightning.__version__,
                },
            }
            written = {"onnx": _write_onnx, "pt2": _write_pt2}[format](program, metadata, part)
            pairs = [(written(images[:1]), probabilities[:1]), (_in_batches(written, images), probabilities)]
            if any_size:
                pairs.append((written(other_size), predictor(other_size)))
            difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
            if not difference <= TOLERANCE:
                raise MisconfigurationException(
                    f"{path} would differ from {ckpt_path} by {difference:.1e}, more than {TOLERANCE:g}; "
                    "nothing was written"
                )
        size = "of any size" if any_size else f"of {images.shape[-2]} x {images.shape[-1]}"
        Console().print(
            f"Wrote {path}: images {size}, in batches of any size; on {len(images):,} of the {stage} split "
            f"it differs from the checkpoint by {difference:.1e} at most",
            soft_wrap=True,
            highlight=False,
        )


class Predictor(nn.Module):
    """What ``predict`` does with a batch.

    Args:
        model: whose ``predict_step`` it is.
        datamodule: whose ``on_after_batch_transfer`` comes before.
    """

    def __init__(self, model: LightningModule, datamodule: LightningDataModule) -> None:
        super().__init__()
        self.model, self.datamodule = model, datamodule

    def forward(self, images: Tensor) -> Tensor:
        """Images as the loader has them, here uint8 (B, H, W), to probabilities (B, num_classes)."""
        return self.model.predict_step(self.datamodule.on_after_batch_transfer((images, None), 0), 0)


def _evaluation_set(datamodule: LightningDataModule) -> tuple[Tensor, Tensor, str]:
    """Images and labels of the test split, or of the validation split where there is none."""
    datamodule.prepare_data()
    try:
        datamodule.setup("test")
        stage, loader = "test", datamodule.test_dataloader()
    except (ArchiveError, MisconfigurationException):
        datamodule.setup("validate")
        stage, loader = "validation", datamodule.val_dataloader()
    images, labels = map(torch.cat, zip(*loader, strict=True))
    return images, labels, stage


def _takes(predict: Predict, images: Tensor) -> bool:
    try:
        predict(images)
    except RuntimeError:  # torch's, of shapes that do not fit
        return False
    return True


def _axes(images: Tensor, any_size: bool) -> list[str]:
    axes = ["batch", *map(str, images.shape[1:])]
    if any_size:
        axes[-2:] = "height", "width"
    return axes


def _program(predictor: Predictor, images: Tensor, any_size: bool, name: str) -> torch.export.ExportedProgram:
    # AUTO instead of names: what a network asks of height and width is for torch.export to find out.
    dynamic = {axis: Dim.AUTO for axis, label in enumerate(_axes(images, any_size)) if label.isalpha()}
    try:
        return torch.export.export(predictor, (images[:3],), dynamic_shapes={"images": dynamic})
    except Exception as error:  # whatever a network does that torch.export cannot follow
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise MisconfigurationException(f"torch.export cannot follow {name}: {reason}") from error


def _in_batches(predict: Predict, images: Tensor) -> Tensor:
    return torch.cat([predict(batch) for batch in images.split(1000)])


def _metrics(probabilities: Tensor, labels: Tensor, stage: str) -> dict[str, float]:
    loss = F.nll_loss(probabilities.log(), labels).item()
    accuracy = (probabilities.argmax(1) == labels).float().mean().item()
    return {f"{stage}/loss": round(loss, 6), f"{stage}/acc": round(accuracy, 6)}


# Each writes the file and hands out what it predicts.


def _write_onnx(program: torch.export.ExportedProgram, metadata: dict[str, Any], path: Path) -> Predict:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    exported = torch.onnx.export(
        program, dynamo=True, input_names=["images"], output_names=["probabilities"], verbose=False
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
