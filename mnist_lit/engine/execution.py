"""Several optimizer steps in one step of Lightning, for small networks, where its overhead counts."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mnist_lit.engine.compat import count_log_step
from mnist_lit.engine.errors import UserError

# Options that would count executions instead of steps, with the value that has no effect.
NEUTRAL = {
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
}


class StepsPerExecution(Callback):
    """Take ``steps`` optimizer steps in one step of Lightning, like Keras's ``steps_per_execution``.

    The steps are bit for bit the same, but Lightning's overhead comes only once. The loader returns the batches of all
    steps as one, see ``train_dataloader``, and the module's ``training_step`` calls ``run``. Signals, checkpoints and
    the check of the loss wait for the end of an execution.

    Args:
        steps: number of optimizer steps per execution; 1 has no effect.

    Raises:
        UserError: before training, if an option is not supported.

    Example:
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.steps_per_execution = 8
        ...         self.execution = StepsPerExecution(8)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         return self.execution.run(self, batch, self.step)
        ...
        ...     def configure_callbacks(self):
        ...         return [self.execution]
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.steps > 1:
            pl_module.automatic_optimization = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps == 1:
            return
        options = {} if trainer.fast_dev_run else NEUTRAL  # type: ignore[attr-defined]
        chosen = {name: getattr(trainer, name) for name in options}
        refused = [f"--trainer.{name}={value}" for name, value in chosen.items() if value != NEUTRAL[name]]
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            refused.append("ReduceLROnPlateau")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        refused += [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
        if getattr(trainer.train_dataloader, "steps_per_execution", 1) != self.steps:
            refused.append("a loader that train_dataloader has not made")
        if refused:
            raise UserError(
                f"steps_per_execution={self.steps} does not support {' and '.join(refused)}; "
                "leave that out, or set --model.steps_per_execution=1"
            )

    def run(self, pl_module: LightningModule, batch: Any, step: Callable[[Any], Any]) -> Any:
        """Train on a batch of the loader.

        Args:
            pl_module: the module to train.
            batch: tensors with the samples of all steps.
            step: computes the outputs of one step from its part of the batch: a loss () or a dict with one as ``loss``.

        Returns:
            the outputs of a single step; for several steps, the last ``loss`` () and the outputs of all as ``steps``.
        """
        if self.steps == 1:
            return step(batch)
        trainer, optimizer, outputs = pl_module.trainer, pl_module.optimizers(), list[Any]()
        assert isinstance(optimizer, LightningOptimizer)
        batch_size = trainer.train_dataloader.batch_size // self.steps  # type: ignore[union-attr]
        for part in zip(*(tensor.split(batch_size) for tensor in batch), strict=True):
            if outputs:
                count_log_step(trainer)
            output = step(part)
            output = {"loss": output} if isinstance(output, Tensor) else output
            optimizer.zero_grad()
            pl_module.manual_backward(output["loss"])
            optimizer.step()
            self._step_schedulers(pl_module, "step", trainer.global_step)
            outputs.append({key: v.detach() if isinstance(v, Tensor) else v for key, v in output.items()})
            if trainer.global_step == trainer.max_steps:
                break
        if trainer.is_last_batch:
            self._step_schedulers(pl_module, "epoch", trainer.current_epoch + 1)
        return {"loss": outputs[-1]["loss"], "steps": outputs}

    @staticmethod
    def _step_schedulers(pl_module: LightningModule, interval: str, count: int) -> None:
        for config in pl_module.trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                pl_module.lr_scheduler_step(config.scheduler, None)


def estimated_steps(trainer: Trainer, executions: int | float) -> int | float:
    """Number of optimizer steps in a run, from Lightning's number of executions."""
    steps = getattr(trainer.lightning_module, "steps_per_execution", 1)
    if steps == 1 or trainer.max_epochs in (None, -1):
        return executions
    loader: Any = trainer.train_dataloader
    per_epoch = -(-len(loader.sampler) // (loader.batch_size // steps))
    total = per_epoch * trainer.max_epochs
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)
