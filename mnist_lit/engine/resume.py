"""Resuming: refuses options that the checkpoint would silently override."""

import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lit.engine.checkpoint import Checkpoint, same_kinds
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.provenance import engine_version
from mnist_lit.engine.run import as_list

# Options whose effect is restored from the checkpoint.
RESTORED = ("seed_everything", "model", "optimizer", "lr_scheduler", "monitor", "mode", "best_checkpoint", "init_from")
# Keys in a scheduler's state dict for its end.
HORIZONS = ("total_steps", "T_max", "T_0", "total_iters", "milestones", "_milestones", "total_size")
# Callbacks that Lightning does not restore exactly, with what it does.
INEXACT = {
    StochasticWeightAveraging: "its average and schedule are restored in part; use EMAWeightAveraging",
    ModelPruning: "its masks are not restored; train in one piece",
    LearningRateFinder: "the run would start over; leave it out, the checkpoint has the learning rate",
    BaseFinetuning: "what it has unfrozen would be frozen again; use FineTuning",
    GradientAccumulationScheduler: "it would begin with the next epoch; give --trainer.accumulate_grad_batches instead",
    BatchSizeFinder: "the run would start over; leave it out, and give the batch size that it found",
}
ANOTHER_WAY = "it resumes, but the last bits of its results may differ from those of the uninterrupted run"


def keep_randomness(checkpoint: Checkpoint, config: Namespace) -> None:
    """Resume with the seed and the number of threads of the run's start."""
    saved = checkpoint.run.options if checkpoint.run else {}
    if config.seed_everything is True:
        config.seed_everything = saved.get("seed_everything", True)
    threads = saved.get("num_threads")
    if threads and config.num_threads not in (None, threads):
        started = f"the run was started with --num_threads={threads}, this command has {config.num_threads}"
        rank_zero_warn(f"{started}: {ANOTHER_WAY}")
    config.num_threads = config.num_threads or threads


def refuse_conflicts(checkpoint: Checkpoint, given: Mapping[str, Any]) -> None:
    """Compare the options of a command with those of the run that it resumes.

    Options that only one of them has are ignored: callbacks may come and go, and a model may have a new option.

    Raises:
        UserError: with the options that the checkpoint would override.
    """
    saved = checkpoint.run.options if checkpoint.run else {}
    theirs, ours = ({name: config.get(name) for name in RESTORED} | _callbacks(config) for config in (saved, given))
    for callback in as_list(given["trainer"].get("callbacks")):
        kind = pkgutil.resolve_name(callback["class_path"])  # a class, or a function that makes a callback
        if getattr(kind, "state_dict", Callback.state_dict) is Callback.state_dict:  # nothing is restored
            ours.pop(_name(callback), None)
    conflicts = [
        f"--{name.replace('.init_args', '')}={new} ({old} in the checkpoint)"
        for name, old, new in _differences(theirs, ours)
    ]
    if saved and conflicts:
        raise UserError(
            f"{checkpoint.path} resumes with the options of its run, and not with {', '.join(conflicts)}; leave them "
            f"out, or start a new run from its weights with --init_from={checkpoint.path}"
        )


def _callbacks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of callbacks, by class and monitor."""
    callbacks = as_list(config.get("trainer", {}).get("callbacks"))
    return {_name(callback): callback.get("init_args") or {} for callback in callbacks}


def _name(callback: Mapping[str, Any]) -> str:
    monitor = (callback.get("init_args") or {}).get("monitor", "")
    return f"trainer.callbacks.{callback['class_path'].rpartition('.')[2]}.{monitor}".rstrip(".")


def _differences(saved: Any, given: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        for key in sorted(saved.keys() & given.keys()):
            yield from _differences(saved[key], given[key], f"{name}.{key}" if name else key)
    elif str(saved) != str(given):  # as text, because nan != nan
        yield name, saved, given


class ResumeGuard(Callback):
    """Refuse to resume with a schedule of another length, and warn about another engine.

    Raises:
        UserError: for such a schedule, or for a callback that Lightning does not restore exactly.
    """

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}  # of optimizers and schedulers
        self._starts = True  # a finder saves a checkpoint before it restores it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._starts = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._starts = False
        checkpoint["engine"] = engine_version()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        for callback in trainer.callbacks if self._starts else ():  # type: ignore[attr-defined]
            if advice := next((INEXACT[kind] for kind in INEXACT if isinstance(callback, kind)), None):
                raise UserError(f"{type(callback).__name__} cannot be resumed exactly: {advice}")
        theirs, ours = checkpoint.get("engine"), engine_version()
        if theirs != ours:
            rank_zero_warn(f"the checkpoint was written by {theirs}, this is {ours}: {ANOTHER_WAY}")
        self._states = {key: checkpoint.get(key, []) for key in ("optimizer_states", "lr_schedulers")}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the schedules, which exist by now and are not restored yet."""
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        ours = [[each.state_dict() for each in made] for made in (trainer.optimizers, schedulers)]
        for (name, states), fresh in zip(self._states.items(), ours, strict=False):
            if not same_kinds(states, fresh):
                raise UserError(f"{trainer.ckpt_path} cannot be used as a checkpoint (its {name} do not fit)")
        for scheduler, state in zip(schedulers, self._states.get("lr_schedulers", []), strict=False):
            lengths = _horizons(scheduler.state_dict())
            for name, length in _horizons(state).items():
                if lengths.get(name, length) != length:
                    raise UserError(
                        f"{trainer.ckpt_path} has a {type(scheduler).__name__} with {name}={length}, and this "
                        f"run asks for {lengths[name]}, such as by another --trainer.max_epochs; resume with the "
                        f"length that it was started with, or start a new run with --init_from={trainer.ckpt_path}"
                    )
        self._states = {}


def _horizons(state: Mapping[str, Any]) -> dict[str, Any]:
    """The ends in a scheduler's state, with those of the schedulers inside a sequence or chain."""
    ends = {name: state[name] for name in HORIZONS if name in state}
    for index, inner in enumerate(state.get("_schedulers", [])):
        ends |= {f"{index}.{name}": end for name, end in _horizons(inner).items()}
    return ends
