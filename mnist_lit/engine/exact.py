"""What exact resume needs besides Lightning's checkpoint: random states, and the position in the epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torchmetrics import Metric

from mnist_lit.engine.compat import epoch_sums, wrap_training_loaders
from mnist_lit.engine.errors import UserError, explain_damage


def random_state() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's global generators, as plain values and tensors."""
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    cuda = torch.cuda.get_rng_state_all()
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def _randomness_of(state: dict[str, Any]) -> Iterator[None]:
    now = random_state()
    try:
        set_random_state(state)
        yield
    finally:
        set_random_state(now)


class Rest(Sampler):
    """The part of a sampler's or batch sampler's epoch that comes after the first ``skip`` items.

    Args:
        whole: the sampler.
    """

    def __init__(self, whole: Any) -> None:
        self.whole, self.skip = whole, 0
        self.sampler = getattr(whole, "sampler", whole)  # Lightning sets its epoch

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Any]:
        self._left: Iterator[Any] = islice(iter(self.whole), self.skip, None)
        return self

    def __next__(self) -> Any:
        return next(self._left)

    def draw(self) -> None:
        """Make the sampler draw its random numbers now, and keep the item for later."""
        self._left = chain(list(islice(self._left, 1)), self._left)


class ResumableLoader(DataLoader):
    """A ``DataLoader`` over a map-style dataset that can resume in the middle of an epoch.

    It records the states of all generators at the start of an epoch. A resumed epoch draws its order from them, and its
    sampler skips the batches before the checkpoint, so that they are not loaded. Random numbers that workers draw start
    over where the epoch is resumed.
    """

    trainer: Trainer
    _rest: Rest
    _epoch, _taken = -1, 0  # the epoch, and the number of batches taken from it
    _epochs = 0  # number of epochs started
    _start: dict[str, Any]  # the global generators at the start of the epoch
    _own: list[Tensor]  # the loader's and samplers' own generators then
    _resumed: dict[str, Any] | None = None

    @classmethod
    def of(cls, loader: Any, trainer: Trainer) -> Any:
        """Make a loader resumable, unless it keeps its position itself or cannot skip samples.

        Args:
            loader: any iterable of batches.
            trainer: the trainer that uses it.
        """
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            return loader
        if hasattr(loader, "state_dict") or type(loader).__iter__ is not DataLoader.__iter__:
            return loader
        same = copy(loader)
        same.__class__ = type(type(loader).__name__, (cls, type(loader)), {})
        kind = "sampler" if loader.batch_sampler is None else "batch_sampler"
        rest = Rest(getattr(loader, kind))
        vars(same).update({"trainer": trainer, "_rest": rest, kind: rest})  # DataLoader's attributes are read-only
        return same

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator function, so that it starts with the epoch's first batch, after all hooks.
        resumed, self._resumed = self._resumed, None
        self._epoch, self._taken = self.trainer.current_epoch, 0
        within = resumed is not None and resumed["epoch"] == self._epoch
        before = resumed["epochs"] - within if resumed else self._epochs
        if resumed and before and self.persistent_workers:
            with _randomness_of(random_state()):  # they drew their seed in an earlier epoch
                super().__iter__()
        if resumed and within:
            self._check(resumed["shares"])
            self._start, self._own, self._taken = resumed["start"], resumed["own"], resumed["taken"]
            self._set_own(self._own)
            self._rest.skip = self._taken
            with _randomness_of(self._start):
                batches = super().__iter__()
                self._rest.draw()
            self._rest.skip = 0
        else:
            if resumed:
                self._set_own(resumed["now"])
            self._start, self._own = random_state(), self._get_own()
            batches = super().__iter__()
        self._epochs = before + 1
        for batch in batches:
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The loader's position, and the random states that lead there."""
        if self._epoch < 0:
            return {}
        state = {"epoch": self._epoch, "epochs": self._epochs, "taken": self._taken, "start": self._start}
        return state | {"own": self._own, "now": self._get_own(), "shares": self._shares()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from this position when the next epoch starts.

        Raises:
            UserError: if it is damaged; or when the epoch starts, if it counts batches of another size.
        """
        self._resumed = state_dict or None
        if state_dict:
            with explain_damage(self.trainer.ckpt_path), _randomness_of(state_dict["start"]):
                for states in (state_dict["own"], state_dict["now"]):
                    self._set_own(states)
                state_dict |= {name: len(range(state_dict[name])) for name in ("epoch", "epochs", "taken")}
                state_dict["shares"] = {name: int(state_dict["shares"][name]) for name in self._shares()}

    def _shares(self) -> dict[str, int]:
        return {"batch size": self.batch_size or 0, "number of processes": self.trainer.world_size}

    def _check(self, shares: dict[str, int]) -> None:
        for name, ours in self._shares().items():
            if shares[name] != ours:
                raise UserError(
                    f"the checkpoint is of the middle of an epoch with a {name} of {shares[name]}, not {ours}, and "
                    f"batches are counted; resume with {shares[name]}, or start a new run from its weights with "
                    "--init_from"
                )

    def _generators(self) -> list[torch.Generator]:
        owners = (self, self._rest.whole, self._rest.sampler)
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())

    def _get_own(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_own(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)


class ExactResume(Callback):
    """Make a resumed run draw the same random numbers, see the same batches and log the same means.

    Checkpoints get the random states of every process, the position of every training loader that is a ``DataLoader``
    over a map-style dataset, and the sums of the module's own torchmetrics and of ``self.log(..., on_epoch=True)``.
    Loaders with a ``state_dict`` are restored from it. Any other loader starts over with its first batches, and a
    warning says so.

    Example:
        >>> Trainer(callbacks=[ExactResume(), LastCheckpoint()])
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}  # this process's part of the checkpoint
        self._positions: list[Any] = []  # of the first process's loaders
        self._sums: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            wrap_training_loaders(trainer, ResumableLoader.of)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._add_sums(trainer)
        state = {
            "random": random_state(),
            "loaders": [each.state_dict() for each in _loaders(trainer) if hasattr(each, "state_dict")],
            "sums": {**self._sums, **epoch_sums(trainer)},
            "metrics": {name: metric.metric_state for name, metric in _metrics(pl_module) if metric.update_called},
        }
        states = [state] * trainer.world_size
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(states, state)
        checkpoint["processes"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        states = checkpoint.get("processes", [])
        self._positions = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader") or []
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint has the random state of {len(states)} processes, this run has "
                f"{trainer.world_size}: it resumes, but not exactly as the uninterrupted run would have"
            )
            return
        with explain_damage(trainer.ckpt_path):
            self._state = states[trainer.global_rank]
            set_random_state(self._state["random"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, self._state = self._state, {}
        # Lightning restores every loader from the first process's state; and does not restore any if a schedule that
        # asks for trainer.estimated_stepping_batches sets up the loaders before the loops (Lightning issue 20550).
        loaders = _loaders(trainer)
        stateful = [loader for loader in loaders if hasattr(loader, "load_state_dict")]
        for loader, first, own in zip(stateful, self._positions, state.get("loaders", self._positions), strict=False):
            loader.load_state_dict(own or first)
        self._positions = []
        if trainer.fit_loop.restarted_mid_epoch:
            self._sums = state.get("sums", {})
            for name, metric in _metrics(pl_module):
                for key, value in state.get("metrics", {}).get(name, {}).items():
                    setattr(metric, key, _to(value, metric.device))
        if len(stateful) < len(loaders):
            rank_zero_warn(
                "the training loader has no state_dict and no map-style dataset: a run that is stopped within an epoch "
                "resumes with its weights, and with the loader's first batches"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._add_sums(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._add_sums(trainer)
        self._sums = {}

    def _add_sums(self, trainer: Trainer) -> None:
        """Add the sums from the checkpoint to the values, each as soon as it has been logged again."""
        if self._sums:
            with explain_damage(trainer.ckpt_path):
                self._sums = epoch_sums(trainer, self._sums)


def _loaders(trainer: Trainer) -> list[Any]:
    return CombinedLoader(trainer.train_dataloader).flattened


def _metrics(pl_module: LightningModule) -> list[tuple[str, Metric]]:
    return [(name, module) for name, module in pl_module.named_modules() if isinstance(module, Metric)]


def _to(value: Any, device: torch.device) -> Any:
    return [each.to(device) for each in value] if isinstance(value, list) else value.to(device)
