"""Transfer learning: a network for other images and classes, old weights for it, and a start with the head alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from mnist_lit.engine.errors import UserError

# ------------------------------------------------------------------------------------------------ networks


def adapt(net: nn.Module, channels: int, num_classes: int) -> list[str]:
    """Make a network take images of ``channels`` and tell ``num_classes`` apart, in place.

    The first ``Conv2d`` keeps its weights, see ``to_channels``. The head, which is the last ``Linear`` or ``Conv2d``,
    gets fresh ones. First and last in the order in which modules are registered, among those that have weights; layers
    that are still lazy adapt by themselves. What fits already is not touched.

    Args:
        net: images (B, C, H, W) to logits (B, num_classes).
        channels: C of the images.
        num_classes: outputs of the network.

    Returns:
        what was adapted, in words.

    Example:
        >>> adapt(torchvision.models.resnet18(), channels=1, num_classes=10)
        ['conv1: 3 -> 1 channels', 'fc: 1000 -> 10 classes']
    """
    done = []
    name, conv = first_convolution(net)
    if conv is not None and conv.in_channels != channels:
        done.append(f"{name or 'net'}: {conv.in_channels} -> {channels} channels")
        conv.weight = _like(conv.weight, to_channels(conv.weight.detach(), channels))
        conv.in_channels, conv.groups = channels, 1
    name, head = find_head(net)
    if head is None:
        return done
    size = "out_features" if isinstance(head, nn.Linear) else "out_channels"
    if getattr(head, size) != num_classes:
        done.append(f"{name or 'net'}: {getattr(head, size)} -> {num_classes} classes")
        for weight in ("weight", "bias"):
            if (old := getattr(head, weight)) is not None:
                setattr(head, weight, _like(old, old.new_empty(num_classes, *old.shape[1:])))
        setattr(head, size, num_classes)
        head.reset_parameters()
    return done


def to_channels(weight: Tensor, channels: int) -> Tensor:
    """The weights of a first convolution for another number of input channels.

    Every new channel gets the sum over the old ones, divided by the number of new ones. So an image that is alike in
    all channels, as a grey one is, gets the response that it got before; what else stands in a new channel is not
    known. To one channel this is the sum, from one channel it is that channel's weights divided by ``channels``.

    Args:
        weight: (out, in / groups, height, width), of one or several groups.
        channels: the new number.

    Returns:
        (out, channels, height, width), of one group.

    Example:
        >>> to_channels(torch.ones(16, 3, 7, 7), 1).unique()
        tensor([3.])
    """
    return (weight.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1)


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    if not old.is_contiguous():
        new = new.contiguous(memory_format=torch.channels_last)
    return nn.Parameter(new, old.requires_grad)


def first_convolution(module: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """The first ``Conv2d`` in the order of registration, with its name; None if there is none."""
    found = ((name, layer) for name, layer in _layers(module) if isinstance(layer, nn.Conv2d))
    return next(found, ("", None))


def find_head(module: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d | None]:
    """The last ``Linear`` or ``Conv2d`` in the order of registration, with its name; None if there is none."""
    return ([("", None), *_layers(module)])[-1]


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            weight = dict(layer.named_parameters(recurse=False)).get("weight")
            if weight is not None and not is_lazy(weight):
                yield name, layer


# ------------------------------------------------------------------------------------------------- weights


def rename(theirs: Mapping[str, Tensor], ours: Iterable[str]) -> dict[str, Tensor]:
    """Bring the names of weights into the form of a model's, with or without a first part such as ``net.`` in them.

    Args:
        theirs: weights by their names in a file.
        ours: names in the model.

    Returns:
        the same weights; those whose names are not the model's keep them.

    Example:
        >>> list(rename({"conv1.weight": weight}, ["net.conv1.weight"]))
        ['net.conv1.weight']
    """
    known = set(ours)

    def prefixes(names: Iterable[str]) -> list[str]:
        return ["", *dict.fromkeys(name.partition(".")[0] + "." for name in names)]

    def renamed(name: str, old: str, new: str) -> str:
        other = new + name.removeprefix(old)
        return other if name.startswith(old) and other in known else name

    # Of equally good ways the first counts, which is to change nothing.
    ways = [(old, new) for old in prefixes(theirs) for new in prefixes(sorted(known))]
    old, new = max(ways, key=lambda way: sum(renamed(name, *way) in known for name in theirs))
    return {renamed(name, old, new): weight for name, weight in theirs.items()}


# ------------------------------------------------------------------------------------------------ training


class FineTuning(Callback):
    """Train the head alone for some epochs, then everything, the rest with a lower learning rate than the head.

    It works with any optimizer and schedule. Frozen weights need no gradients, and layers with running statistics
    normalize as in validation. Weights that the module has frozen itself stay frozen.

    The lower learning rate is a part of each step: after the optimizer's step the weights go back most of the way. That
    is the same as a lower learning rate for every optimizer whose step is proportional to it, and leaves groups of
    parameters and schedules alone. It needs memory for one more copy of the weights.

    Args:
        unfreeze_at_epoch: number of epochs in which the head is trained alone.
        lr_factor: learning rate of everything but the head, as a factor of the head's.
        head: name of the head; by default the last ``Linear`` or ``Conv2d`` that the module registers.

    Raises:
        UserError: if there is no head, or a strategy that cannot freeze weights.

    Example:
        >>> Trainer(callbacks=[FineTuning(unfreeze_at_epoch=1, lr_factor=0.1)])
    """

    def __init__(
        self, unfreeze_at_epoch: NonNegativeInt = 1, lr_factor: PositiveFloat = 0.1, head: str | None = None
    ) -> None:
        self.unfreeze_at_epoch, self.lr_factor, self.head = int(unfreeze_at_epoch), float(lr_factor), head
        self._rest: list[nn.Parameter] = []  # everything but the head that is trained
        self._before: list[Tensor] = []  # its values before the step
        self._norms: list[nn.Module] = []
        self._hooks: list[RemovableHandle] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._find_head(pl_module)  # before anything takes time

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name, head = self._find_head(pl_module)
        strategy = trainer.strategy
        if isinstance(strategy, ParallelStrategy) and not getattr(strategy.model, "find_unused_parameters", False):
            raise UserError(
                f"FineTuning cannot freeze weights under {type(strategy).__name__}; of the strategies for several "
                "devices it takes --trainer.strategy=ddp_find_unused_parameters_true"
            )
        ours = set(head.parameters())
        self._rest = [weight for weight in pl_module.parameters() if weight.requires_grad and weight not in ours]
        for optimizer in trainer.optimizers:
            self._hooks += [
                optimizer.register_step_pre_hook(self._remember),
                optimizer.register_step_post_hook(self._go_back),
            ]
        rank_zero_info(
            f"FineTuning: {name} alone until epoch {self.unfreeze_at_epoch}, "
            f"then everything, the rest with {self.lr_factor:g} of its learning rate"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze, in a run that is resumed within an epoch as well."""
        if trainer.current_epoch < self.unfreeze_at_epoch:
            _, head = self._find_head(pl_module)
            for weight in self._rest:
                weight.requires_grad_(False)
            rest = (module for module in pl_module.modules() if module not in set(head.modules()))
            self._norms = [m for m in rest if m.training and getattr(m, "track_running_stats", False)]
            for module in self._norms:
                module.eval()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch >= self.unfreeze_at_epoch:
            self._unfreeze()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave module and optimizers as they were."""
        self._unfreeze()
        while self._hooks:
            self._hooks.pop().remove()

    def state_dict(self) -> dict[str, Any]:
        """Have Lightning warn when a run is resumed without this callback."""
        return {"unfreeze_at_epoch": self.unfreeze_at_epoch}

    def _unfreeze(self) -> None:
        for weight in self._rest:
            weight.requires_grad_(True)
        for module in self._norms:
            module.train()
        self._norms = []

    def _remember(self, *_: Any) -> None:
        self._before = [weight.detach().clone() for weight in self._rest if weight.requires_grad]

    def _go_back(self, *_: Any) -> None:
        with torch.no_grad():
            for weight, before in zip(self._rest, self._before, strict=False):
                weight.lerp_(before, 1 - self.lr_factor)
        self._before = []

    def _find_head(self, module: LightningModule) -> tuple[str, nn.Module]:
        name, head = find_head(module) if self.head is None else (self.head, module.get_submodule(self.head))
        if head is None:
            raise UserError(
                f"FineTuning finds no head in {type(module).__name__}, which has neither Linear nor Conv2d layers; "
                "name a submodule with the callback's option head, or leave the callback out"
            )
        return name, head
