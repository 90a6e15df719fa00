"""Everything that relies on behaviour that other libraries do not promise; a test for each use notices a change."""

import operator
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import PassThroughProfiler
from torchmetrics import Metric

# Hooks of every step.
STEP_HOOKS = """on_train_batch_start on_before_zero_grad on_before_backward on_after_backward on_before_optimizer_step
on_train_batch_end""".split()


class LessOverhead(Callback):
    """Have Lightning skip the hooks of every step that a callback does not override, and the default profiler's work.

    Results are the same. Lightning 2.6 calls every callable hook of every callback. With a dozen callbacks, the empty
    calls take 5 % of an epoch of ``logistic.yaml`` and of ``cnn.yaml``, the profiler 4 to 6 %, both together 17 and 8 %
    (8 and 4 interleaved repeats on an idle AMD EPYC). There is no upstream issue. If a later version calls hooks that
    are None, training fails at its first step.

    Example:
        >>> Trainer(callbacks=[LessOverhead()])
    """

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:
            for hook in STEP_HOOKS:
                if getattr(getattr(callback, hook), "__func__", None) is getattr(Callback, hook):
                    setattr(callback, hook, None)
        if type(trainer.profiler) is PassThroughProfiler:
            trainer.profiler = _NoProfiler()

    def teardown(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        for callback in trainer.callbacks:
            for hook in STEP_HOOKS:
                if vars(callback).get(hook, Callback) is None:
                    delattr(callback, hook)
        if isinstance(trainer.profiler, _NoProfiler):
            trainer.profiler = PassThroughProfiler()


class _NoProfiler(PassThroughProfiler):
    """Lightning's default profiler, without the generator that it makes for each of some hundred hooks per step."""

    NOTHING: AbstractContextManager[Any] = nullcontext()

    def profile(self, action_name: str) -> Any:
        return self.NOTHING


def wrap_training_loaders(trainer: Trainer, wrap: Callable[[Any, Trainer], Any]) -> None:
    """Apply a function to every training loader, after Lightning has set its sampler.

    Lightning 2.6 has no hook for that. ``Strategy.process_dataloader`` sees a loader last, so the trainer's strategy
    gets another one. There is no upstream issue. If a later version does not call it, resumed epochs see other batches.
    """
    process = trainer.strategy.process_dataloader
    if getattr(process, "wrapped", False):
        return

    def process_dataloader(loader: object) -> object:
        loader = process(loader)
        return wrap(loader, trainer) if trainer.training else loader

    process_dataloader.wrapped = True  # type: ignore[attr-defined]
    trainer.strategy.process_dataloader = process_dataloader  # type: ignore[assignment, method-assign]


def epoch_sums(trainer: Trainer, add: dict[str, Any] | None = None) -> dict[str, Any]:
    """The sums of ``self.log(..., on_epoch=True)`` in the training epoch.

    Lightning 2.6 keeps them in ``_results`` and does not save them, so that the mean of a resumed epoch would only
    cover its second part. If a later version moves them, saving a checkpoint fails.

    Args:
        trainer: the trainer.
        add: earlier sums to add to the present ones.

    Returns:
        tensors by name and kind; with ``add``, those of values that have not been logged again yet.
    """
    sums = {
        key: result
        for key, result in trainer.fit_loop.epoch_loop._results.items()
        if result.is_tensor and result.meta.on_epoch and not result.has_reset
    }
    if add is None:
        parts = ("value", "cumulated_batch_size")
        return {
            key: {name: getattr(result, name) for name in parts if hasattr(result, name)}
            for key, result in sums.items()
        }
    for key in sums.keys() & add.keys():
        result = sums[key]
        for name, value in add[key].items():
            ours, value = getattr(result, name), value.to(getattr(result, name).device)
            extreme = result.meta.is_max_reduction or result.meta.is_min_reduction
            setattr(result, name, result.meta.reduce_fx(ours, value) if extreme else ours + value)
    return {key: value for key, value in add.items() if key not in sums}


def log_step(trainer: Trainer) -> int:
    """The step at which Lightning logs, which differs from ``global_step`` if a batch has several optimizer steps.

    Lightning 2.6 counts batches in ``_batches_that_stepped``, those whose gradients are accumulated as one. If a later
    version renames it, training fails.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def saved_log_step(fit_loop: Mapping[str, Any]) -> int:
    """The step at which Lightning goes on to log, from the loop's state in a checkpoint; see ``log_step``."""
    epochs = fit_loop["epoch_progress"]["current"]
    within = epochs["ready"] - epochs["processed"]  # a batch is counted after the checkpoint
    return operator.index(fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] + within)


def count_log_step(trainer: Trainer) -> None:
    """Count a step that Lightning does not; see ``log_step``."""
    trainer.fit_loop.epoch_loop._batches_that_stepped += 1


def epoch_metrics(trainer: Trainer) -> list[Metric]:
    """The metrics that the training epoch has logged and resets at its end; see ``epoch_sums`` on ``_results``."""
    return [result.value for result in trainer.fit_loop.epoch_loop._results.values() if not result.is_tensor]


def set_update_count(metric: Metric, count: int) -> None:
    """Set the number of updates, by which torchmetrics weighs what it has and knows whether there is anything.

    torchmetrics 1.9 only has a getter for it. If a later version renames it, means of resumed epochs differ.
    """
    metric._update_count = count
