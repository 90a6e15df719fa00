"""The last checkpoint of a run, from which it resumes, and its stop by a signal."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from mnist_lit.engine.checkpoint import EXCEPTION, explain_write_errors
from mnist_lit.engine.errors import UserError, explain_damage
from mnist_lit.engine.run import Run, relative

PENDING = "last.pending"
AGREE_EVERY = 16  # batches


class LastCheckpoint(Checkpoint):
    """Save ``last.ckpt`` after every epoch, every ``every_n_train_steps``, and when the run is asked to stop.

    Ctrl-C or SIGTERM ends the run after the current step, and after a validation that follows it, with a checkpoint and
    exit code 130 or 143. A second one ends it at once. Several processes only check every 16 batches whether one of
    them was asked, because they wait for each other to do so.

    The uninterrupted run passes through every state that is saved here. Its logs up to that state are on disk before
    the checkpoint replaces the previous one, so that a resumed run leaves the same curves.

    Args:
        every_n_train_steps: number of optimizer steps that may be lost.

    Example:
        >>> Trainer(callbacks=[LastCheckpoint(every_n_train_steps=100)])
    """

    def __init__(self, every_n_train_steps: PositiveInt = 500) -> None:
        self.every_n_train_steps = every_n_train_steps
        self._run = Run()
        self._pending, self._saved_step = False, 0
        self._asked = 0  # the signal that this process got
        self._signal = 0  # the signal that all processes stop for
        self._handlers: dict[int, Any] = {}
        self._started = self._stops = False  # whether training has started; whether it was asked to stop early
        self._metrics: dict[str, Tensor] = {}  # what callbacks see
        self._epoch_ends = False  # with the checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._run = Run.of(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started, self._stops, self._saved_step = True, False, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # Python handles signals only there
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._handlers[signum] = signal.signal(signum, self._stop)
        trainer.callback_metrics.update(self._metrics)
        if self._epoch_ends:
            self._step_plateaus(trainer, pl_module, trainer.current_epoch)
        self._metrics, self._epoch_ends = {}, False

    @staticmethod
    def _step_plateaus(trainer: Trainer, pl_module: LightningModule, epochs: int) -> None:
        """Step the schedulers that depend on a metric; Lightning does not when it resumes at an epoch's end."""
        for config in trainer.lr_scheduler_configs:
            due = config.reduce_on_plateau and config.interval == "epoch" and epochs % config.frequency == 0
            if due and config.monitor in trainer.callback_metrics:
                pl_module.lr_scheduler_step(config.scheduler, trainer.callback_metrics[config.monitor])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._started = False
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._asked = signum
        for handled in self._handlers:
            signal.signal(handled, signal.SIG_DFL)
        rank_zero_info(f"{signal.Signals(signum).name}: stopping after this step; once more stops at once")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            self._signal = self._asked
        elif (batch_idx + 1) % AGREE_EVERY == 0 or trainer.is_last_batch:  # all save together
            asked = torch.tensor(self._asked, device=pl_module.device)
            self._signal = int(trainer.strategy.reduce(asked, reduce_op="max"))
        due = trainer.global_step // self.every_n_train_steps > self._saved_step // self.every_n_train_steps
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0 and not trainer.is_last_batch
        # A stop, such as by max_time, waits for the optimizer step, because gradients are not saved.
        self._stops = self._stops or trainer.should_stop
        trainer.should_stop = self._stops and not accumulating
        # After this hook Lightning takes the epoch for complete.
        stops = (trainer.should_stop or trainer.global_step == trainer.max_steps) and trainer.fit_loop.epoch_loop.done
        if (due or stops or self._signal) and not accumulating and not self._evaluation_follows(trainer, batch_idx):
            self._save(trainer)

    @staticmethod
    def _evaluation_follows(trainer: Trainer, batch_idx: int) -> bool:
        """Whether validation or the end of the epoch comes before the next batch.

        Lightning would resume after them from a checkpoint that is saved here, and their metrics would be missing.
        """
        if trainer.check_val_every_n_epoch is None:
            batch_idx = trainer.fit_loop.total_batch_idx
        every = trainer.val_check_batch
        validates = trainer.enable_validation and every is not None and (batch_idx + 1) % every == 0
        return trainer.is_last_batch or validates

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With max_steps, Lightning would count the epoch twice when it resumes from here.
        if trainer.max_steps == -1 and self._saved_step != trainer.global_step:
            # Lightning steps the schedulers that depend on a metric after this hook; a resumed run makes up for that.
            self._epoch_ends = True
            self._save(trainer)
            self._epoch_ends = False
        if trainer.fit_loop.restarting:  # in the epoch that it was resumed in Lightning leaves that step out
            self._step_plateaus(trainer, pl_module, trainer.current_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._metrics, "epoch_ends": self._epoch_ends}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with explain_damage():
            self._metrics, self._epoch_ends = dict(state_dict["metrics"]), state_dict["epoch_ends"]

    def _save(self, trainer: Trainer) -> None:
        self._metrics = {name: value.cpu() for name, value in trainer.callback_metrics.items()}
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._run.checkpoints / PENDING, weights_only=False)
            self._pending, self._saved_step = True, trainer.global_step

    # The first hooks after Lightning has logged the step or the epoch.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._commit(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._commit(trainer)

    def _commit(self, trainer: Trainer) -> None:
        if not self._pending:
            return
        self._pending = False
        last = self._run.checkpoints / "last.ckpt"
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero:
            with explain_write_errors(last):
                os.replace(last.with_name(PENDING), last)
        if self._signal:
            path, project = relative(last), self._run.project
            resume = f"trainer.fit(..., ckpt_path={path!r})"
            if project:
                resume = project.command("fit", "--config", relative(self._run.config), "--ckpt_path", path)
            stopped = f"Stopped at step {trainer.global_step} by {signal.Signals(self._signal).name}"
            rank_zero_info(f"{stopped}. To go on: {resume}")
            sys.exit(128 + self._signal)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the current weights in ``exception.ckpt``.

        A run cannot resume exactly from the middle of a step, so ``--ckpt_path=last`` uses ``last.ckpt``.
        """
        ours = not isinstance(exception, Exception) or isinstance(exception, (UserError, OSError))
        if self._started and not ours and trainer.world_size == 1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._run.checkpoints / EXCEPTION)
