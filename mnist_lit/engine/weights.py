"""Starting a new run from old weights."""

from pathlib import Path

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mnist_lit.engine.checkpoint import load_file, misfits, no_such_checkpoint
from mnist_lit.engine.errors import UserError, no_pipe, require
from mnist_lit.engine.finetuning import first_convolution, rename, to_channels


def init_from(model: LightningModule, path: str, strict: bool = True, weights_only: bool = True) -> None:
    """Load weights into a model, and nothing else of their file.

    Args:
        model: whose weights are replaced.
        path: a checkpoint of Lightning, or a file of ``torch.save`` with a state dict, alone or under ``state_dict`` or
            ``model``, or a ``.safetensors``. Names are matched with and without a first part such as ``net.``.
        strict: all must fit. Else those of a first convolution are adapted to other channels, and what does not fit is
            listed and left as it is.
        weights_only: accept tensors and plain values only, so that no code runs out of the file.

    Raises:
        UserError: if they do not fit, or cannot be read.
    """
    if not no_pipe(path).exists():
        raise UserError(no_such_checkpoint("init_from", path))
    ours = model.state_dict()
    weights, done = rename(_read(path, weights_only), ours), [f"Started from the weights of {path}"]
    layer, conv = first_convolution(model)
    first = weights.get(f"{layer}.weight")
    if not strict and conv is not None and first is not None and first.ndim == 4 and conv.groups == 1:
        adapted = to_channels(first, conv.in_channels)
        if first.shape != adapted.shape == conv.weight.shape:
            weights[f"{layer}.weight"] = adapted
            done.append(f"{layer}.weight from {first.shape[1]} to {conv.in_channels} channels")
    misfitting = {name: f"{name} ({theirs} there, {here} here)" for name, theirs, here in misfits(weights, model)}
    listed = ", ".join([*misfitting.values()][:8]) + ", ..." * (len(misfitting) > 8)
    if misfitting and (strict or not weights.keys() & ours.keys() - misfitting.keys()):
        raise UserError(
            f"--init_from={path} does not fit {type(model).__name__}: {listed}; --init_strict=false starts from those "
            "weights that do, if there are any"
        )
    model.load_state_dict({name: w for name, w in weights.items() if name not in misfitting}, strict=False)
    rank_zero_info(", ".join([*done, *([f"without {listed}"] if misfitting else [])]))


def _read(path: str, weights_only: bool) -> dict[str, Tensor]:
    if Path(path).suffix == ".safetensors":
        require("vision", "safetensors")
        from safetensors.torch import load_file as load_safetensors

        return load_safetensors(path)
    weights = load_file(path, weights_only, old=True)
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights.get("model", weights))
    if not isinstance(weights, dict) or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise UserError(f"{path} cannot be used as a checkpoint (it has no state dict, which is names and tensors)")
    return weights
