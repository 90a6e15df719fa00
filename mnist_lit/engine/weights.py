"""Starting a new run from old weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mnist_lit.engine.checkpoint import load_file, misfits, no_such_checkpoint, unusable
from mnist_lit.engine.errors import UserError, require
from mnist_lit.engine.finetuning import first_convolution, rename, to_channels


def init_from(model: LightningModule, path: str, strict: bool = True, weights_only: bool = True) -> None:
    """Load weights into a model, and nothing else of their file.

    Args:
        model: whose weights are replaced.
        path: see ``read_weights``. Names are matched with and without a first part such as ``net.``.
        strict: all must fit. Else those of a first convolution are adapted to other channels, and what does not fit is
            listed and left as it is.
        weights_only: as for ``read_weights``.

    Raises:
        UserError: if they do not fit, or cannot be read.
    """
    if not Path(path).exists():
        raise UserError(no_such_checkpoint("init_from", path))
    weights = rename(read_weights(path, weights_only), model.state_dict())
    done = [f"Started from the weights of {path}"]
    layer, conv = first_convolution(model)
    first = weights.get(f"{layer}.weight")
    if not strict and conv is not None and first is not None and first.ndim == 4 and conv.groups == 1:
        adapted = to_channels(first, conv.in_channels)
        if first.shape != adapted.shape == conv.weight.shape:
            weights[f"{layer}.weight"] = adapted
            done.append(f"{layer}.weight from {first.shape[1]} to {conv.in_channels} channels")
    misfitting = {name: f"{name} ({theirs} there, {ours} here)" for name, theirs, ours in misfits(weights, model)}
    listed = _briefly(misfitting.values())
    if not weights.keys() & model.state_dict().keys() - misfitting.keys():
        theirs, ours = _briefly(weights, 3), _briefly(model.state_dict(), 3)
        raise UserError(
            f"--init_from={path}: none of its weights fits {type(model).__name__}; there are {theirs} there and {ours} "
            "here"
        )
    if misfitting and strict:
        raise UserError(
            f"--init_from={path} does not fit {type(model).__name__}: {listed}; --init_strict=false starts from those "
            "weights that do"
        )
    model.load_state_dict({name: w for name, w in weights.items() if name not in misfitting}, strict=False)
    rank_zero_info(", ".join([*done, *([f"without {listed}"] if misfitting else [])]))


def _briefly(names: Collection[str], most: int = 8) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join([*names][:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_weights(path: str | Path, weights_only: bool = True) -> dict[str, Tensor]:
    """Read weights onto the CPU: of a checkpoint of Lightning, or a plain file of them.

    Args:
        path: a file of ``torch.save`` with a state dict, alone or under ``state_dict`` or ``model``; or, where the
            package safetensors is installed, a ``.safetensors``.
        weights_only: accept tensors and plain values only, so that no code runs out of the file.

    Raises:
        UserError: if the file cannot be read, is damaged, holds anything else or asks for code.
        UserError: if safetensors is needed and not installed.
    """
    if Path(path).suffix == ".safetensors":
        require("vision", "safetensors")
        from safetensors.torch import load_file as load_safetensors

        try:
            return load_safetensors(path)
        except Exception as error:  # whatever a damaged file makes it raise
            raise unusable(path, error) from error
    content = load_file(path, weights_only, old=True)
    weights: Any = content
    if isinstance(content, dict):
        weights = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError(f"{path} cannot be used as a checkpoint (it has no state dict, which is names and tensors)")
    return weights
