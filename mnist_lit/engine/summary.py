"""The table at the end of a run, and the commands that come next."""

import shlex
import time
from datetime import timedelta
from math import nan
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from mnist_lit.engine.best import best_checkpoint, best_or_last
from mnist_lit.engine.run import Run, relative


class Summary(Callback):
    """Print the final metrics, those of the best epoch, the run's folder, and the commands that come next.

    Example:
        >>> Trainer(callbacks=[Summary()])
    """

    def __init__(self) -> None:
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._started = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run, kept = Run.of(trainer), best_or_last(trainer)  # in every process, see Provenance
        if not trainer.is_global_zero:
            return
        console, epochs = Console(), trainer.current_epoch
        best: Any = best_checkpoint(trainer)
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        dataset = getattr(datamodule, "dataset_used", type(datamodule or pl_module).__name__)
        taken = timedelta(seconds=round(time.monotonic() - self._started))
        title = f"{type(pl_module).__name__} on {dataset} after {epochs} epoch{'s' * (epochs != 1)}, {taken}"
        best_metrics: dict[str, float] = getattr(best, "best_metrics", {})
        columns = ["last", *([f"best: epoch {best.best_epoch}, step {best.best_step}"] if best_metrics else [])]
        table = Table("metric", *(Column(name, justify="right") for name in columns), title=escape(title))
        table.min_width = len(title) + 2
        for name, value in sorted(trainer.callback_metrics.items()):
            if f"{name}_epoch" not in trainer.callback_metrics:  # the mean over the epoch is more useful
                values = [value.item(), *([best_metrics.get(name, nan)] if best_metrics else [])]
                numbers = (f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}" for value in values)
                table.add_row(escape(name.removesuffix("_epoch")), *numbers)
        console.print(table)
        if not kept:
            return
        commands = [shlex.join(viewer) for logger in trainer.loggers if (viewer := _viewer(logger))]
        if run.project and is_overridden("test_step", pl_module):
            options = ("--config", relative(run.config), "--ckpt_path", relative(kept))
            commands.append(run.project.command("test", *options))
        console.print(f"The run is in {relative(run.folder)}. What comes next:", highlight=False, markup=False)
        for line in commands:
            console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)


def _viewer(logger: Logger) -> list[str]:
    """The command that shows a logger's curves; empty if there is none."""
    if isinstance(logger, TensorBoardLogger):
        return ["tensorboard", "--logdir", relative(logger.root_dir)]
    if isinstance(logger, MLFlowLogger) and logger.save_dir:  # not of a server
        return ["mlflow", "ui", "--backend-store-uri", relative(logger.save_dir)]
    return []
