"""Stop a run whose loss or weights are no longer finite."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.parameter import is_lazy

from mnist_lit.engine.errors import UserError
from mnist_lit.engine.outputs import step_outputs

ADVICE = "the last checkpoint is from before that; train again with a lower learning rate"


class DivergenceError(UserError):
    """The loss or the weights are infinite or not a number."""


class StopOnNonFinite(Callback):
    """Stop a run that has diverged before a checkpoint is saved.

    The losses are checked every ``log_every_n_steps`` and before every checkpoint, because a check in every step would
    wait for the GPU.

    Raises:
        DivergenceError: with the step and the learning rate.

    Example:
        >>> Trainer(callbacks=[StopOnNonFinite()])
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []  # step, loss ()
        self._logs = 0  # number of logs at the last check

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        steps = step_outputs(outputs)
        for step, output in enumerate(steps, trainer.global_step - len(steps) + 1):
            if isinstance(loss := output.get("loss"), Tensor):
                self._losses.append((step, loss.detach()))
        # Steps that log wait for the GPU anyway.
        logs = trainer.global_step // max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        if logs != self._logs:
            self._logs = logs
            self._check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check(trainer)
        if not all(weight.isfinite().all() for weight in pl_module.parameters() if not is_lazy(weight)):
            raise DivergenceError(f"the weights are no longer finite after step {trainer.global_step}; {ADVICE}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        losses, self._losses = self._losses, []
        if not losses or torch.stack([loss for _, loss in losses]).isfinite().all():
            return
        step, loss = next((step, loss) for step, loss in losses if not loss.isfinite())
        rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else float("nan")
        raise DivergenceError(
            f"the loss is {loss.item()} at step {step} (epoch {trainer.current_epoch}), the learning rate {rate:g}; "
            f"{ADVICE}"
        )
