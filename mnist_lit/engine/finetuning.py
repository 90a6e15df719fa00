"""Transfer learning: a network for other images and classes, old weights for it, and the head first."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from mnist_lit.engine.errors import UserError

Layer = nn.Linear | nn.Conv2d


def adapt(net: nn.Module, channels: int, num_classes: int) -> list[str]:
    """Make a network take ``channels`` and return ``num_classes`` outputs, in place.

    The first ``Conv2d`` keeps its weights, see ``to_channels``. The head, which is the last ``Linear`` or ``Conv2d``,
    gets fresh ones. Lazy layers adapt by themselves. Layers that fit are not touched.

    Args:
        net: maps images (B, C, H, W) to logits (B, num_classes).
        channels: C of the images.
        num_classes: number of outputs.

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
        conv.weight = nn.Parameter(to_channels(conv.weight.detach(), channels), conv.weight.requires_grad)
        conv.in_channels, conv.groups = channels, 1
    name, head = find_head(net)
    size = "out_features" if isinstance(head, nn.Linear) else "out_channels"
    if head is not None and getattr(head, size) != num_classes:
        done.append(f"{name or 'net'}: {getattr(head, size)} -> {num_classes} classes")
        for weight in ("weight", "bias"):
            if (old := getattr(head, weight)) is not None:
                setattr(head, weight, nn.Parameter(old.new_empty(num_classes, *old.shape[1:]), old.requires_grad))
        setattr(head, size, num_classes)
        head.reset_parameters()
    return done


def to_channels(weight: Tensor, channels: int) -> Tensor:
    """The weights of a first convolution for another number of input channels.

    Every new channel gets the sum over the old ones, divided by the number of new ones. So an image whose channels are
    equal, such as a grey one, gets the same response as before.

    Args:
        weight: (out, in / groups, height, width).
        channels: the new number.

    Returns:
        (out, channels, height, width), of one group.
    """
    return (weight.sum(1, keepdim=True) / channels).repeat(1, channels, 1, 1)


def first_convolution(module: nn.Module) -> tuple[str, nn.Conv2d | None]:
    """The first ``Conv2d`` in the order of registration, with its name; None if there is none."""
    return next(((name, layer) for name, layer in _layers(module) if isinstance(layer, nn.Conv2d)), ("", None))


def find_head(module: nn.Module) -> tuple[str, Layer | None]:
    """The last ``Linear`` or ``Conv2d`` in the order of registration, with its name; None if there is none."""
    return [("", None), *_layers(module)][-1]


def _layers(module: nn.Module) -> list[tuple[str, Layer]]:
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not isinstance(layer, LazyModuleMixin)
    ]


def rename(theirs: Mapping[str, Tensor], ours: Iterable[str]) -> dict[str, Tensor]:
    """Match the names of weights with a model's, with or without a first part such as ``net.``.

    Example:
        >>> list(rename({"conv1.weight": weight}, ["net.conv1.weight"]))
        ['net.conv1.weight']
    """
    known = set(ours)
    firsts = dict.fromkeys(["", *(name.partition(".")[0] + "." for name in sorted(known))])
    bare = {name.partition(".")[2] or name: weight for name, weight in theirs.items()}
    ways = [{first + name: weight for name, weight in each.items()} for each in (theirs, bare) for first in firsts]
    return max(ways, key=lambda way: len(way.keys() & known))  # the first of equally good ones, which changes least


class FineTuning(Callback):
    """Train the head alone for some epochs, then everything.

    It works with any optimizer and schedule. Frozen weights need no gradients, and layers with running statistics
    normalize as in validation. Weights that the module has frozen itself stay frozen. DDP needs
    ``find_unused_parameters``.

    Args:
        unfreeze_at_epoch: number of epochs in which only the head is trained.
        head: name of the head; by default the last ``Linear`` or ``Conv2d`` that the module registers.

    Raises:
        UserError: if there is no head.

    Example:
        >>> Trainer(callbacks=[FineTuning(unfreeze_at_epoch=1)])
    """

    def __init__(self, unfreeze_at_epoch: int = 1, head: str | None = None) -> None:
        self.unfreeze_at_epoch, self.head = unfreeze_at_epoch, head
        self._rest: list[nn.Parameter] = []  # trained parameters outside of the head
        self._norms: list[nn.Module] = []  # layers with running statistics outside of the head

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not (name := self.head or find_head(pl_module)[0]):
            raise UserError(f"FineTuning finds no head in {type(pl_module).__name__}; name one with its option head")
        head = pl_module.get_submodule(name)
        ours, inside = set(head.parameters()), set(head.modules())
        self._rest = [weight for weight in pl_module.parameters() if weight.requires_grad and weight not in ours]
        outside = [module for module in pl_module.modules() if module not in inside]
        self._norms = [module for module in outside if module.training and hasattr(module, "track_running_stats")]
        rank_zero_info(f"FineTuning: {name} alone until epoch {self.unfreeze_at_epoch}, then everything")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze, also in a run that is resumed within an epoch."""
        self._train_rest(trainer.current_epoch >= self.unfreeze_at_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train_rest(trainer.current_epoch >= self.unfreeze_at_epoch)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        if stage == "fit":
            self._train_rest(True)

    def state_dict(self) -> dict[str, Any]:
        """Have Lightning warn when a run is resumed without this callback."""
        return {"unfreeze_at_epoch": self.unfreeze_at_epoch}

    def _train_rest(self, train: bool) -> None:
        for weight in self._rest:
            weight.requires_grad_(train)
        for module in self._norms:
            module.train(train)
