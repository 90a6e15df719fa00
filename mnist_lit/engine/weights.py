"""Starting a new run from old weights."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
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
    adapted = [] if strict else _adapt_channels(weights, model)
    misfitting = misfits(weights, model)
    left_out = {name for name, _, _ in misfitting}
    if not weights.keys() & model.state_dict().keys() - left_out:
        raise UserError(
            f"--init_from={path}: none of its weights fits {type(model).__name__}; there are "
            f"{_briefly(weights, 3)} there and {_briefly(model.state_dict(), 3)} here"
        )
    listed = _briefly([f"{name} ({theirs} there, {ours} here)" for name, theirs, ours in misfitting])
    if misfitting and strict:
        raise UserError(
            f"--init_from={path} does not fit {type(model).__name__}: {listed}; --init_strict=false starts from those "
            "weights that do"
        )
    model.load_state_dict({name: w for name, w in weights.items() if name not in left_out}, strict=False)
    done = [f"Started from the weights of {path}", *adapted, *([f"without {listed}"] if misfitting else [])]
    rank_zero_info(", ".join(done))


def _adapt_channels(weights: dict[str, Tensor], model: LightningModule) -> list[str]:
    """Adapt weights of the first convolution that are for images of other channels; says which in words."""
    layer, conv = first_convolution(model)
    theirs = weights.get(name := f"{layer}.weight")
    if conv is None or theirs is None or theirs.shape == conv.weight.shape or conv.groups > 1 or theirs.ndim != 4:
        return []
    adapted = to_channels(theirs, conv.in_channels)
    if adapted.shape != conv.weight.shape:
        return []
    weights[name] = adapted
    return [f"{name} from {theirs.shape[1]} to {conv.in_channels} channels"]


def _briefly(names: Collection[str], most: int = 8) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(islice(names, most)) or "none") + more


def read_weights(path: str | Path, weights_only: bool = True) -> dict[str, Tensor]:
    """Read weights onto the CPU: of a checkpoint of Lightning, or a plain file of them.

    Args:
        path: a file of ``torch.save`` with a state dict, alone or under ``state_dict`` or ``model``; or, where the
            package safetensors is installed, a ``.safetensors``.
        weights_only: accept tensors and plain values only, so that no code runs out of the file.

    Raises:
        UserError: if the file cannot be read, is damaged, holds anything else or asks for code.
        UserError: if safetensors is needed and not installed.

    Example:
        >>> list(read_weights("resnet18-f37072fd.pth"))[:2]
        ['conv1.weight', 'bn1.running_mean']
    """
    if Path(path).suffix == ".safetensors":
        require("vision", "safetensors")
        from safetensors.torch import load_file as load_safetensors

        try:
            return load_safetensors(path)
        except Exception as error:  # as below
            raise UserError(unusable(path, (str(error) or type(error).__name__).splitlines()[0])) from error
    # torch.save wrote files that are no zip archives until torch 1.6; old weights are still around in them.
    content = load_file(path, weights_only, old=True)
    weights: Any = None
    if isinstance(content, dict):
        weights = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError(unusable(path, "it has no state dict, which is names and tensors"))
    return weights
