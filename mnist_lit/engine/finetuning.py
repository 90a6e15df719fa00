"""Transfer learning: a network for other images and classes, old weights for it, and a start with the head alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from operator import not_
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from mnist_lit.engine.errors import ConfigurationError

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
            weight = layer._parameters.get("weight")
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


class FineTuning(BaseFinetuning):
    """Train the head alone for some epochs, then everything, the rest with a lower learning rate than the head.

    It works with any optimizer and schedule. Frozen weights need no gradients, and the running statistics of batch
    norms stand still: those layers normalize as in validation. What the module has frozen itself stays frozen.

    The groups of parameters are split into head and rest before the first step, and the schedules follow both from
    there on. Lightning's own way, a group that is added when it is unfrozen, is one that ``OneCycleLR`` and others do
    not know.

    Args:
        unfreeze_at_epoch: epochs, counted from 0, before which the head is trained alone.
        lr_factor: learning rate of everything but the head, as a factor of the head's.
        head: name of the head; by default the last ``Linear`` or ``Conv2d`` that the module registers.

    Raises:
        ConfigurationError: if there is no head, or a strategy that cannot freeze weights.

    Example:
        >>> Trainer(callbacks=[FineTuning(unfreeze_at_epoch=1, lr_factor=0.1)])
    """

    def __init__(
        self, unfreeze_at_epoch: NonNegativeInt = 1, lr_factor: PositiveFloat = 0.1, head: str | None = None
    ) -> None:
        super().__init__()
        self.unfreeze_at_epoch, self.lr_factor, self.head = int(unfreeze_at_epoch), float(lr_factor), head
        self._frozen: list[nn.Parameter] = []
        self._norms: list[nn.Module] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find mistakes. Nothing is frozen yet: an optimizer might leave out what is frozen, and DDP would."""
        if stage != "fit":
            return
        self._find_head(pl_module)
        strategy = trainer.strategy
        if isinstance(strategy, ParallelStrategy) and not (
            isinstance(strategy, DDPStrategy) and strategy._ddp_kwargs.get("find_unused_parameters")
        ):
            raise ConfigurationError(
                f"FineTuning cannot freeze weights under {type(strategy).__name__}; of the strategies for several "
                "devices it takes --trainer.strategy=ddp_find_unused_parameters_true"
            )
        if trainer.max_epochs not in (None, -1) and self.unfreeze_at_epoch >= trainer.max_epochs:
            rank_zero_warn(
                f"FineTuning trains the head alone: unfreeze_at_epoch={self.unfreeze_at_epoch} is never reached with "
                f"--trainer.max_epochs={trainer.max_epochs}"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Split the optimizers' groups, before the state of a resumed run is restored into them."""
        name, head = self._find_head(pl_module)
        ours = set(map(id, head.parameters()))
        for optimizer in trainer.optimizers:
            factors = _split(optimizer, ours, self.lr_factor)
            for config in trainer.lr_scheduler_configs:
                if config.scheduler.optimizer is optimizer:
                    _extend(config.scheduler, factors)
        rank_zero_info(
            f"FineTuning: {name} alone until epoch {self.unfreeze_at_epoch}, "
            f"then everything, the rest with {self.lr_factor:g} of its learning rate"
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze; a run that is resumed within an epoch does not pass its start."""
        if trainer.current_epoch < self.unfreeze_at_epoch:
            self.freeze_before_training(pl_module)

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze everything but the head."""
        _, head = self._find_head(pl_module)
        ours = set(map(id, head.parameters()))
        self._frozen = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in ours]
        for weight in self._frozen:
            weight.requires_grad_(False)
        # Lightning's own way would have them normalize by the batch, and not as in validation.
        norms = (module for module in pl_module.modules() if isinstance(module, _NormBase) and module.training)
        self._norms = [module for module in norms if module not in set(head.modules())]
        for module in self._norms:
            module.eval()

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze, at the start of an epoch."""
        if epoch >= self.unfreeze_at_epoch:
            self._unfreeze()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._unfreeze()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the epoch tells what is frozen, and Lightning's own state would be groups to put in place."""
        return {}

    def _unfreeze(self) -> None:
        for weight in self._frozen:
            weight.requires_grad_(True)
        for module in self._norms:
            module.train()
        self._frozen, self._norms = [], []

    def _find_head(self, module: LightningModule) -> tuple[str, nn.Module]:
        if self.head is None:
            name, head = find_head(module)
            if head is None:
                raise ConfigurationError(
                    f"FineTuning finds no head in {type(module).__name__}, which has neither Linear nor Conv2d layers; "
                    "name a submodule with the callback's option head, or leave the callback out"
                )
            return name, head
        try:
            return self.head, module.get_submodule(self.head)
        except AttributeError as error:
            names = ", ".join(name for name, _ in _layers(module)) or "none"
            raise ConfigurationError(
                f"FineTuning finds no head={self.head} in {type(module).__name__}; its layers: {names}"
            ) from error


RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")  # in a group of an optimizer
# What schedulers keep in lists with one entry for each group.
RATES_OF_GROUPS = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
OTHERS_OF_GROUPS = ("lr_lambdas", "base_momentums", "max_momentums")

Factors = list[tuple[int, float]]  # for each new group: that which it was before, and the factor of its rates


def _split(optimizer: Optimizer, head: set[int], factor: float) -> Factors:
    """Split every group into the head's parameters and the rest.

    The head stays where it was, so that the learning rate of the first group, which is logged, is its.
    """
    factors: Factors = []
    added: list[tuple[int, dict[str, Any]]] = []
    for index, group in enumerate(optimizer.param_groups):
        mine = [id(weight) in head for weight in group["params"]]
        scaled = {key: group[key] * factor for key in RATES if key in group}
        if all(mine):
            factors.append((index, 1.0))
        elif not any(mine):
            group.update(scaled)
            factors.append((index, factor))
        else:
            ours, rest = dict(group), {**group, **scaled}
            for key in group.keys() & {"params", "param_names"}:
                ours[key] = list(compress(group[key], mine))
                rest[key] = list(compress(group[key], map(not_, mine)))
            group.update(ours)
            added.append((index, rest))
            factors.append((index, 1.0))
    for index, group in added:
        if names := group.pop("param_names", None):
            group["params"] = list(zip(names, group["params"], strict=True))
        optimizer.add_param_group(group)
        factors.append((index, factor))
    return factors


def _extend(scheduler: Any, factors: Factors) -> None:
    """Give a scheduler, and those in a sequence or a chain, the groups that its optimizer has been split into."""
    state = vars(scheduler)
    # New lists, because a sequence shares that of its last rates with a part of it.
    for name in RATES_OF_GROUPS:
        if name in state:
            state[name] = [state[name][index] * factor for index, factor in factors]
    for name in OTHERS_OF_GROUPS:
        if name in state:
            state[name] = [state[name][index] for index, _ in factors]
    for inner in state.get("_schedulers", ()):
        _extend(inner, factors)
