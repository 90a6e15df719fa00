"""What a run needs beside Lightning's checkpoint to resume bit for bit: randomness, and the place in the epoch."""

from __future__ import annotations

import operator
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
    """Set what ``random_state`` has returned."""
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
    """What a sampler, or a batch sampler, still has to draw in an epoch.

    Args:
        whole: the sampler.
    """

    def __init__(self, whole: Any) -> None:
        self.whole, self.skip = whole, 0
        self.sampler = getattr(whole, "sampler", whole)  # whose epoch Lightning sets

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Any]:
        self._left: Iterator[Any] = islice(iter(self.whole), self.skip, None)
        return self

    def __next__(self) -> Any:
        return next(self._left)

    def draw(self) -> None:
        """Have the sampler draw its random numbers, and keep the next index for later."""
        self._left = chain(list(islice(self._left, 1)), self._left)


class ResumableLoader(DataLoader):
    """A ``DataLoader`` of a map-style dataset that can go on in the middle of an epoch.

    At the start of an epoch the states of all generators are recorded. A resumed epoch draws its order with them, and
    the batches before the checkpoint are left out by the sampler: they are not loaded. What workers draw at random
    restarts where the epoch is resumed.
    """

    trainer: Trainer
    _rest: Rest
    _epoch, _taken = -1, 0  # the epoch, and the number of its batches that were taken
    _epochs = 0  # begun by now
    _start: dict[str, Any]  # the global generators at the start of the epoch
    _own: list[Tensor]  # its own generators then
    _resumed: dict[str, Any] | None = None

    @classmethod
    def of(cls, loader: Any, trainer: Trainer) -> Any:
        """The same loader, resumable; as it is where it keeps its position by itself, or where nothing can be left out.

        Args:
            loader: any iterable of batches.
            trainer: that trains on it.
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
        # A generator, so that it starts with the first batch of the epoch, after all hooks at its start.
        resumed, self._resumed = self._resumed, None
        self._epoch, self._taken = self.trainer.current_epoch, 0
        within = resumed is not None and resumed["epoch"] == self._epoch
        before = resumed["epochs"] - within if resumed else self._epochs
        if resumed and before and self.persistent_workers:
            with _randomness_of(random_state()):  # they drew their seed when they were started, in an earlier epoch
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
        """Where the loader is, and what it takes to get there again."""
        if self._epoch < 0:
            return {}
        state = {"epoch": self._epoch, "epochs": self._epochs, "taken": self._taken, "start": self._start}
        return state | {"own": self._own, "now": self._get_own(), "shares": self._shares()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from such a place when the next epoch starts.

        Raises:
            UserError: if it is damaged; and when the epoch starts, if it counts other batches.
        """
        self._resumed = state_dict or None
        if state_dict:
            with explain_damage(self.trainer.ckpt_path), _randomness_of(state_dict["start"]):
                for states in (state_dict["own"], state_dict["now"]):
                    self._set_own(states)
                state_dict |= {name: operator.index(state_dict[name]) for name in ("epoch", "epochs", "taken")}

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
    """Have a resumed run draw the random numbers, see the batches and log the means of the uninterrupted one.

    Checkpoints get the state of the random generators of every process, the place in the epoch of every training
    loader that is a ``DataLoader`` of a map-style dataset, whoever made it, and what the module's own torchmetrics and
    ``self.log(..., on_epoch=True)`` have summed up. Loaders with a ``state_dict`` keep it. Any other loader starts
    again with its first batches, and a warning says so.

    Example:
        >>> Trainer(callbacks=[ExactResume(), LastCheckpoint()])
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}  # of this process, in the checkpoint
        self._positions: list[Any] = []  # of loaders in the first process
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
        # Lightning loads what the first process has saved; and nothing if a schedule that asks for
        # trainer.estimated_stepping_batches makes it set up the loaders before the loops (Lightning issue 20550).
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
        """Add the sums of before the checkpoint to those values that have been logged again, as one after the other."""
        if self._sums:
            with explain_damage(trainer.ckpt_path):
                self._sums = epoch_sums(trainer, self._sums)


def _loaders(trainer: Trainer) -> list[Any]:
    return CombinedLoader(trainer.train_dataloader).flattened


def _metrics(pl_module: LightningModule) -> list[tuple[str, Metric]]:
    return [(name, module) for name, module in pl_module.named_modules() if isinstance(module, Metric)]


def _to(value: Any, device: torch.device) -> Any:
    return [each.to(device) for each in value] if isinstance(value, list) else value.to(device)
