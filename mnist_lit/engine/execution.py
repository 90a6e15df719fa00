"""Several optimizer steps in one step of Lightning's, for networks so small that its work around a step
counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mnist_lit.engine.errors import ConfigurationError

# What would count executions instead of steps, and the only value that makes no difference.
NEUTRAL = {
    "limit_train_batches": 1.0,
    "overfit_batches": 0.0,
    "val_check_interval": 1.0,
    "accumulate_grad_batches": 1,
    "gradient_clip_val": None,
}


def estimated_steps(trainer: Trainer, executions: int | float) -> int | float:
    """Number of optimizer steps of a run that Lightning has counted in executions.

    Args:
        trainer: of the run.
        executions: of the whole run, each of ``model.steps_per_execution`` steps but for the last of an epoch.
    """
    steps = getattr(trainer.lightning_module, "steps_per_execution", 1)
    loader: Any = trainer.train_dataloader
    if steps == 1 or trainer.max_epochs in (None, -1):
        return executions
    per_epoch = -(-len(loader.sampler) // (loader.batch_size // steps))
    total = per_epoch * trainer.max_epochs
    return total if trainer.max_steps == -1 else min(total, trainer.max_steps)


class StepsPerExecution(Callback):
    """Take ``steps`` optimizer steps in one step of Lightning's, after Keras's ``steps_per_execution``.

    The steps are the same, on the same batches and bit for bit, while Lightning's work around a step is done
    once. The loader hands out the batches of all steps as one, see ``train_dataloader``, and the module's own
    ``training_step`` is called on one slice after the other. Signals, checkpoints and the check of the loss
    wait for the end of an execution.

    Args:
        steps: optimizer steps per execution; 1 changes nothing.

    Raises:
        ConfigurationError: before training, naming an option that cannot be honoured.

    Example:
        >>> def configure_callbacks(self):
        ...     return [StepsPerExecution(8)]
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.steps == 1 or "training_step" in vars(pl_module):
            return
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            found = {name: getattr(trainer, name) for name in NEUTRAL}
            refused = [f"--trainer.{name}={found[name]}" for name in NEUTRAL if found[name] != NEUTRAL[name]]
            self._refuse(refused)
        self._training_step = pl_module.training_step
        pl_module.automatic_optimization = False

        def training_step(batch: Any, batch_idx: int) -> dict[str, Any]:
            return self._execute(trainer, pl_module, batch, batch_idx)

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.steps == 1:
            return
        if any(isinstance(config.scheduler, ReduceLROnPlateau) for config in trainer.lr_scheduler_configs):
            self._refuse(["the scheduler ReduceLROnPlateau"])
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        averaging = [callback for callback in callbacks if isinstance(callback, WeightAveraging)]
        self._refuse([f"{type(callback).__name__}, which averages after every step" for callback in averaging])
        if getattr(trainer.train_dataloader, "steps_per_execution", 1) != self.steps:
            self._refuse([f"the loader of {type(trainer.datamodule).__name__}"])  # type: ignore[attr-defined]

    def _refuse(self, found: list[str]) -> None:
        if found:
            raise ConfigurationError(
                f"steps_per_execution={self.steps} cannot honour {' and '.join(found)}; "
                "leave that out, or set --model.steps_per_execution=1"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.steps > 1:
            vars(pl_module).pop("training_step", None)
            pl_module.automatic_optimization = True

    def _execute(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Train on the slices of a batch; returns the last ``loss`` () and the outputs of all ``steps``."""
        optimizer, outputs = pl_module.optimizers(), []
        assert isinstance(optimizer, LightningOptimizer)
        batch_size = trainer.train_dataloader.batch_size // self.steps  # type: ignore[union-attr]
        for index, part in enumerate(zip(*(tensor.split(batch_size) for tensor in batch), strict=True)):
            output = self._training_step(part, batch_idx * self.steps + index)
            if isinstance(output, Tensor):
                output = {"loss": output}
            assert isinstance(output, Mapping)
            optimizer.zero_grad()
            pl_module.manual_backward(output["loss"])
            optimizer.step()
            self._step_schedulers(trainer, pl_module, "step", trainer.global_step)
            detached = {key: v.detach() if isinstance(v, Tensor) else v for key, v in output.items()}
            outputs.append(detached)
            if trainer.global_step == trainer.max_steps:
                break
        if trainer.is_last_batch:
            self._step_schedulers(trainer, pl_module, "epoch", trainer.current_epoch + 1)
        return {"loss": outputs[-1]["loss"], "steps": outputs}

    @staticmethod
    def _step_schedulers(trainer: Trainer, pl_module: LightningModule, interval: str, count: int) -> None:
        for config in trainer.lr_scheduler_configs:
            if config.interval == interval and count % config.frequency == 0:
                pl_module.lr_scheduler_step(config.scheduler, None)
