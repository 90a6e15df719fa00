"""Resuming: what a checkpoint restores, whatever this command asks for, has to be what it asks for."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lit.engine.errors import UserError
from mnist_lit.engine.provenance import engine_version

# Options whose effect is in the checkpoint: weights, optimizers, schedulers, random numbers, the best so far.
RESTORED = ("seed_everything", "model", "optimizer", "lr_scheduler", "monitor", "mode", "best_checkpoint", "init_from")
# Keys in a scheduler's state dict that say when it ends.
HORIZONS = ("total_steps", "T_max", "T_0", "total_iters", "milestones", "_milestones", "total_size")


def conflicting_options(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """What the config of a run and the options of a command that resumes it disagree in, one line each.

    Options that only one has do not count: a callback may come or go, and a model may have got one more option.

    Example:
        >>> conflicting_options({"model": {"lr": 0.1}}, {"model": {"lr": 0.01}})
        ['--model.lr=0.01 (0.1 in the checkpoint)']
    """
    theirs, ours = ({name: config.get(name) for name in RESTORED} | _callbacks(config) for config in (saved, given))
    return [
        f"--{name.replace('.init_args', '')}={new} ({old} in the checkpoint)"
        for name, old, new in _differences(theirs, ours)
    ]


def _callbacks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of those callbacks that have a state, by class and monitor."""
    callbacks = config.get("trainer", {}).get("callbacks") or []
    found = {}
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        kind = pkgutil.resolve_name(callback["class_path"])  # or a function that makes a callback
        if getattr(kind, "state_dict", Callback.state_dict) is not Callback.state_dict:
            options = callback.get("init_args") or {}
            found[f"trainer.callbacks.{kind.__name__}.{options.get('monitor', '')}".rstrip(".")] = options
    return found


def _differences(saved: Any, given: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        for key in sorted(saved.keys() & given.keys()):
            yield from _differences(saved[key], given[key], f"{name}.{key}" if name else key)
    elif str(saved) != str(given):  # nan is no other nan
        yield name, saved, given


class ResumeGuard(Callback):
    """Refuse to resume schedules and optimizers that the checkpoint would silently change, and warn of another engine.

    Raises:
        UserError: naming a schedule of another length, or an optimizer with other groups of parameters.
        UserError: for weight averaging that Lightning does not restore exactly.
    """

    def __init__(self) -> None:
        self._schedulers: list[dict[str, Any]] = []
        self._optimizers: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["engine"] = engine_version()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            theirs, ours = checkpoint.get("engine"), engine_version()
            if theirs != ours:
                rank_zero_warn(
                    f"the checkpoint was written by {theirs}, this is {ours}: it resumes, but the last bits of its "
                    "results may differ from those of the uninterrupted run"
                )
            self._schedulers = checkpoint.get("lr_schedulers", [])
            self._optimizers = checkpoint.get("optimizer_states", [])
        if trainer.lr_scheduler_configs:  # FSDP loads checkpoints after on_fit_start
            self._compare(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the schedules, which are there by now and not restored yet."""
        averages = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.ckpt_path and averages:
            raise UserError(
                "StochasticWeightAveraging cannot be resumed exactly, its average and schedule are restored in part; "
                "train in one piece, or use EMAWeightAveraging"
            )
        self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        for optimizer, state in zip(trainer.optimizers, self._optimizers, strict=False):
            theirs, ours = len(state.get("param_groups", optimizer.param_groups)), len(optimizer.param_groups)
            if theirs != ours:
                raise UserError(
                    f"{trainer.ckpt_path} has a {type(optimizer).__name__} with {theirs} groups of parameters, and "
                    f"this run has {ours}, such as with or without the callback FineTuning; resume with the callbacks "
                    f"that it was started with, or start a new run with --init_from={trainer.ckpt_path}"
                )
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=False):
            lengths = dict(_horizons(config.scheduler.state_dict()))
            for name, length in _horizons(state):
                if lengths.get(name, length) != length:
                    raise UserError(
                        f"{trainer.ckpt_path} has a {type(config.scheduler).__name__} with {name}={length}, and this "
                        f"run asks for {lengths[name]}, such as by another --trainer.max_epochs; resume with the "
                        f"length that it was started with, or start a new run with --init_from={trainer.ckpt_path}"
                    )
        self._schedulers, self._optimizers = [], []


def _horizons(state: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Where a scheduler's state says that it ends; those in a sequence or chain have states of their own."""
    if isinstance(state, Mapping):
        for name, value in state.items():
            if name in HORIZONS:
                yield f"{place}{name}", value
            elif name == "_schedulers":
                for index, inner in enumerate(value):
                    yield from _horizons(inner, f"{place}{index}.")
