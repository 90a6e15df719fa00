"""What the engine understands of a batch and of a step's outputs.

Steps may return whatever Lightning allows. Metrics, dashboards, prediction tables and export look here for
what they need, and leave out what is not there.
"""

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor


class Outputs(TypedDict):
    """What a training, validation or test step returns to gain metrics, dashboards and tables.

    ``loss`` is a scalar (), the mean over the batch. ``preds`` and ``target`` are what the metrics take, such
    as logits (B, num_classes) and classes (B,), or values (B,) and (B,).
    """

    loss: Tensor
    preds: Tensor
    target: Tensor


def step_outputs(outputs: Any) -> list[Mapping[str, Any]]:
    """The outputs of each optimizer step in one step of Lightning's; several with ``StepsPerExecution``."""
    if isinstance(outputs, Tensor):
        outputs = {"loss": outputs}
    return outputs.get("steps", [outputs]) if isinstance(outputs, Mapping) else []


def as_outputs(outputs: Any) -> Outputs | None:
    """The outputs if they have the three keys of ``Outputs``, or else None."""
    if isinstance(outputs, Mapping) and all(isinstance(outputs.get(key), Tensor) for key in Outputs.__annotations__):
        return Outputs(loss=outputs["loss"], preds=outputs["preds"], target=outputs["target"])
    return None


def classification(outputs: Any) -> tuple[Tensor, Tensor] | None:
    """Logits or probabilities (B, num_classes) and classes (B,) out of ``Outputs``, or else None."""
    if (found := as_outputs(outputs)) is None:
        return None
    preds, target = found["preds"].detach(), found["target"]
    fits = preds.ndim == 2 and preds.is_floating_point() and target.shape == preds.shape[:1]
    return (preds, target) if fits and not target.is_floating_point() else None


def find_images(batch: Any) -> Tensor | None:
    """The first tensor of images (B, C, H, W), C 1 or 3, in a tensor, a tuple or a dict, or else None."""
    return next((each for each in _tensors(batch) if each.ndim == 4 and each.shape[1] in (1, 3) and len(each)), None)


def find_classes(batch: Any) -> Tensor | None:
    """The first tensor of integers (B,) in a batch, or else None."""
    return next((each for each in _tensors(batch) if each.ndim == 1 and not each.is_floating_point()), None)


def _tensors(batch: Any) -> list[Tensor]:
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else [batch]
    return [part for part in parts if isinstance(part, Tensor)]


def are_probabilities(values: Tensor) -> bool:
    """Whether the rows of (n, num_classes) are distributions; bfloat16 rounds their sums by up to 2 %."""
    if values.ndim != 2 or values.shape[1] < 2 or not values.is_floating_point():
        return False
    return bool((values >= 0).all() and ((values.float().sum(1) - 1).abs() < 0.02).all())


def class_names(
    source: Trainer | LightningDataModule | None,
    num_classes: int | None = None,
    checkpoint: Mapping[str, Any] | None = None,
) -> list[str]:
    """Names of classes, by default as many as there are: those in a checkpoint's content, else those of the data
    module or of the model, else 0, 1, ...
    """
    owners = (getattr(source, "datamodule", source), getattr(source, "lightning_module", None))
    for names in ((checkpoint or {}).get("class_names"), *(getattr(owner, "class_names", None) for owner in owners)):
        if names is not None and num_classes in (len(names), None):
            return [*map(str, names)]
    return [*map(str, range(num_classes or 0))]


def display(images: Tensor) -> Tensor:
    """Images (n, C, H, W) as uint8 to look at; values out of 0..1 are stretched to that range."""
    if images.dtype == torch.uint8:
        return images.cpu()
    images = images.detach().float().cpu()
    low, high = images.aminmax()
    if low < 0 or high > 1:
        images = (images - low) / (high - low).clamp(min=1e-12)
    return (images * 255).round().to(torch.uint8)
