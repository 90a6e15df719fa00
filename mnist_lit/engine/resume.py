"""Resuming: what a checkpoint restores, whatever this command asks for, has to be what it asks for."""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging

from mnist_lit.engine.errors import CheckpointError, ConfigurationError
from mnist_lit.engine.runs import as_list

# Options whose effect is in the checkpoint: weights, optimizers, schedulers, random numbers, the best so far.
RESTORED = ("seed_everything", "model", "optimizer", "lr_scheduler", "monitor", "mode", "best_checkpoint", "init_from")
# Attributes of schedulers that say when they end.
HORIZONS = ("total_steps", "T_max", "T_0", "total_iters", "milestones", "_milestones", "total_size")


def restored_options(config: Namespace) -> dict[str, Any]:
    """The options of a command that a resumed run takes from its checkpoint, as plain values."""
    options = {name: config.get(name) for name in RESTORED}
    for callback in as_list(config.trainer.callbacks):
        kind = pkgutil.resolve_name(callback.class_path)  # or a function that makes a callback
        if getattr(kind, "state_dict", Callback.state_dict) is not Callback.state_dict:
            monitor = (callback.get("init_args") or {}).get("monitor", "")
            options[f"trainer.callbacks.{kind.__name__}.{monitor}".rstrip(".")] = callback.get("init_args")
    return json.loads(json.dumps(options, default=_plain, skipkeys=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Namespace):
        return value.as_dict()
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    # Of anything else its name, because some objects print their address.
    return str(value) if isinstance(value, os.PathLike) else getattr(value, "__qualname__", type(value).__qualname__)


def different_options(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two results of ``restored_options`` disagree in, one line each. Options that only one has do not count:
    a callback may come or go, and a model may have got one more option.

    Example:
        >>> different_options({"model": {"lr": 0.1}}, {"model": {"lr": 0.01}})
        ['--model.lr=0.01 (0.1 in the checkpoint)']
    """
    return [
        f"--{name.replace('.init_args', '')}={ours} ({theirs} in the checkpoint)"
        for name, theirs, ours in _differences(there, here)
    ]


def _differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted(there.keys() & here.keys()):
            yield from _differences(there[key], here[key], f"{name}.{key}" if name else key)
    elif str(there) != str(here):  # nan is no other nan
        yield name, there, here


def longer_if_finished(checkpoint: Mapping[str, Any], trainer: Trainer) -> str:
    """How to train longer, if a trainer would have nothing left to do; else nothing."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if checkpoint["global_step"] >= trainer.max_steps >= 0:
        return "raise --trainer.max_steps"
    if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
        return "raise --trainer.max_epochs"
    stopped = [
        state["wait_count"] >= state["patience"]
        for key, state in checkpoint.get("callbacks", {}).items()
        if trainer.early_stopping_callbacks and key.startswith("EarlyStopping")
    ]
    return "it was stopped early, so leave out EarlyStopping" if any(stopped) else ""


class ResumeGuard(Callback):
    """Save the options in checkpoints, and refuse to resume schedules that the checkpoint would silently change.

    Args:
        options: see ``restored_options``.

    Raises:
        CheckpointError: naming a schedule of another length, or an optimizer with other groups of parameters.
        ConfigurationError: for weight averaging that Lightning does not restore exactly.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self._schedulers: list[dict[str, Any]] = []
        self._optimizers: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["options"] = self.options

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._schedulers = checkpoint.get("lr_schedulers", [])
            self._optimizers = checkpoint.get("optimizer_states", [])
        if trainer.lr_scheduler_configs:  # FSDP loads checkpoints after on_fit_start
            self._compare(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the schedules, which are there by now and not restored yet."""
        averages = any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if trainer.ckpt_path and averages:
            raise ConfigurationError(
                "StochasticWeightAveraging cannot be resumed exactly, its average and schedule are restored in part; "
                "train in one piece, or use TailAveraging or EMAWeightAveraging"
            )
        self._compare(trainer)

    def _compare(self, trainer: Trainer) -> None:
        for optimizer, state in zip(trainer.optimizers, self._optimizers, strict=False):
            there, here = len(state.get("param_groups", optimizer.param_groups)), len(optimizer.param_groups)
            if there != here:
                raise CheckpointError(
                    f"{trainer.ckpt_path} has a {type(optimizer).__name__} with {there} groups of parameters, and this "
                    f"run has {here}, such as with or without the callback FineTuning; resume with the callbacks that "
                    f"it was started with, or start a new run with --init_from={trainer.ckpt_path}"
                )
        for config, state in zip(trainer.lr_scheduler_configs, self._schedulers, strict=False):
            ours = dict(_horizons(config.scheduler.state_dict()))
            for name, theirs in _horizons(state):
                if ours.get(name, theirs) != theirs:
                    raise CheckpointError(
                        f"{trainer.ckpt_path} has a {type(config.scheduler).__name__} with {name}={theirs}, and this "
                        f"run asks for {ours[name]}, such as by another --trainer.max_epochs; resume with the length "
                        f"that it was started with, or start a new run with --init_from={trainer.ckpt_path}"
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
