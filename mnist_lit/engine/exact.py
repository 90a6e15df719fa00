"""What exact resume needs besides Lightning's checkpoint: random states, and the position in the epoch."""

import operator
import random
from collections.abc import Iterator
from copy import copy
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, IterableDataset, Sampler
from torchmetrics import Metric

from mnist_lit.engine.compat import epoch_metrics, epoch_sums, set_update_count, wrap_training_loaders
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


class Rest(Sampler):
    """What is left of an epoch of a sampler or batch sampler, in an order that follows from a seed.

    Args:
        whole: the sampler.
        generators: from which it draws, besides the global ones.
    """

    def __init__(self, whole: Any, generators: list[torch.Generator]) -> None:
        self.whole, self.generators = whole, generators
        self.sampler = getattr(whole, "sampler", whole)  # Lightning sets its epoch
        self.seed, self.skip = 0, 0  # items to leave out

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[Any]:
        torch.manual_seed(self.seed)
        random.seed(self.seed)
        np.random.seed(self.seed)
        for generator in self.generators:
            generator.manual_seed(self.seed)
        left = islice(iter(self.whole), self.skip, None)
        return chain(list(islice(left, 1)), left)  # with the first item a sampler draws its random numbers


class ResumableLoader(DataLoader):
    """A map-style loader that resumes within an epoch.

    A pass over the data draws its order from a seed, which is 1 more than the last pass's; the first one is drawn at
    random. A resumed pass leaves out the batches before the checkpoint, so that they are not loaded. Random numbers
    that workers draw start over where it is resumed.
    """

    trainer: Trainer
    _rest: Rest
    _seed, _epoch, _taken = -1, -1, 0  # of the present pass: its seed, its epoch, the number of batches taken from it
    _size = _counted = 0  # number of samples in a batch of all processes, now and where the pass started
    _resumes = False

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
        whole = getattr(loader, kind)
        own = [getattr(each, "generator", None) for each in (loader, whole, getattr(whole, "sampler", None))]
        rest = Rest(whole, [each for each in own if isinstance(each, torch.Generator)])
        size = (loader.batch_size or 0) * trainer.world_size
        vars(same).update({"trainer": trainer, "_rest": rest, "_size": size, kind: rest})  # DataLoader's are read-only
        return same

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator function, so that it starts with the epoch's first batch, after all hooks.
        resumes, self._resumes = self._resumes and self._epoch == self.trainer.current_epoch, False
        if resumes and self._counted != self._size:
            raise UserError(
                f"the checkpoint is of the middle of an epoch with a batch size of {self._counted}, not {self._size}, "
                f"over all processes, and batches are counted; resume with {self._counted}, or start a new run from "
                "its weights with --init_from"
            )
        if not resumes:
            self._epoch, self._taken = self.trainer.current_epoch, 0
            self._seed = self._seed + 1 if self._seed >= 0 else self._draw_seed()
        self._rest.seed, self._rest.skip = self._seed, self._taken
        with isolate_rng():
            batches = super().__iter__()
        for batch in batches:
            self._taken += 1
            yield batch

    def _draw_seed(self) -> int:
        generator = next(iter(self._rest.generators), torch.default_generator)
        return int(torch.randint(2**31, (), generator=generator, device=generator.device))

    def state_dict(self) -> dict[str, int]:
        """The loader's position, and the seed that leads there."""
        state = {"seed": self._seed, "epoch": self._epoch, "taken": self._taken, "size": self._size}
        return state if self._seed >= 0 else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume from this position when the next epoch starts.

        Raises:
            UserError: if it is damaged; or when the epoch starts, if it counts batches of another size.
        """
        if not state_dict:
            return
        with explain_damage(self.trainer.ckpt_path):
            position = [operator.index(state_dict[name]) for name in ("seed", "epoch", "taken", "size")]
            if min(position) < 0 or max(position) >= 2**32:
                raise ValueError(f"{position} is not a position in an epoch")
        self._seed, self._epoch, self._taken, self._counted = position
        self._resumes = True


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
        self._sums: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            wrap_training_loaders(trainer, ResumableLoader.of)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._add_sums(trainer)
        metrics = [(name, metric) for name, metric in _metrics(pl_module) if metric.update_called]
        reset = [*map(id, epoch_metrics(trainer))]
        state = {
            "random": random_state(),
            "loaders": [each.state_dict() for each in _loaders(trainer) if hasattr(each, "state_dict")],
            "sums": {**self._sums, **epoch_sums(trainer)},
            "metrics": {name: metric.metric_state for name, metric in metrics},
            "updates": {name: metric.update_count for name, metric in metrics},
            "reset": [name for name, metric in metrics if id(metric) in reset],
        }
        states = [state] * trainer.world_size
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(states, state)
        checkpoint["processes"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        states = checkpoint.get("processes", [])
        if len(states) == trainer.world_size:
            self._state = states[trainer.global_rank]
        else:
            self._state = {"loaders": checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])}
            rank_zero_warn(
                f"the checkpoint has the random state of {len(states)} processes, this run has "
                f"{trainer.world_size}: it resumes, but not exactly as the uninterrupted run would have"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        state, self._state = self._state, {}
        # Lightning restores every loader from the first process's state; and does not restore any if a schedule that
        # asks for trainer.estimated_stepping_batches sets up the loaders before the loops (Lightning issue 20550).
        loaders = _loaders(trainer)
        stateful = [loader for loader in loaders if hasattr(loader, "load_state_dict")]
        for loader, position in zip(stateful, state.get("loaders", []), strict=False):
            loader.load_state_dict(position)
        ends = not trainer.fit_loop.restarted_mid_epoch
        self._sums = {} if ends else state.get("sums", {})
        with explain_damage(trainer.ckpt_path):
            if "random" in state:  # not before, because data that a loader draws has to be that of the first start
                set_random_state(state["random"])
            metrics = state.get("metrics", {})
            updates, reset = state.get("updates", {}), state.get("reset", metrics)  # not in older checkpoints
            kept = {name: values for name, values in metrics.items() if not (ends and name in reset)}
            self._metrics = {name: (values, updates.get(name, 1)) for name, values in kept.items()}
        if len(stateful) < len(loaders):
            rank_zero_warn(
                "the training loader has no state_dict and no map-style dataset: a run that is stopped within an epoch "
                "resumes with its weights, and with the loader's first batches"
            )

    # The first hooks after the module's own on_train_start, which may reset its metrics.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._restore_metrics(trainer, pl_module)
        self._add_sums(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_metrics(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_metrics(trainer, pl_module)
        self._add_sums(trainer)
        self._sums = {}

    def _restore_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._metrics:
            return
        with explain_damage(trainer.ckpt_path):
            for name, metric in _metrics(pl_module):
                if name in self._metrics:
                    values, updates = self._metrics[name]
                    for key, value in values.items():
                        setattr(metric, key, _to(value, metric.device))
                    set_update_count(metric, updates)
        self._metrics = {}

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
