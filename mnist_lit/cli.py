"""The command line: ``fit``, ``validate``, ``test`` and ``predict`` on ``LightningCLI``."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import warnings
from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from rich.table import Column, Table

from mnist_lit.archive import ArchiveError
from mnist_lit.callbacks import PredictionsFile
from mnist_lit.data import MNISTDataModule
from mnist_lit.models import Classifier

# Warnings that a user can do nothing about: they tell one library's authors about another's.
NOISE = (
    r"'set_vital' is deprecated",  # torchdata 0.11 on torch 2.13
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 on torch 2.13
    r".*does not have many workers",  # the data is in memory, workers would only slow it down
    r".*dirpath has changed from",  # a new run has a new folder
    r".*configure_optimizers` will be overridden by",  # which is what --optimizer asks for
)


USAGE = "%(prog)s --config FILE [--config FILE ...] [--KEY=VALUE ...]"


class CLI(LightningCLI):
    """``LightningCLI`` with the best and the last checkpoint kept, early errors and a closing table."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Two callbacks, because the last.ckpt of one with a monitor is only as new as its best.ckpt.
        for name, monitor in (("best", "val/loss"), ("last", None)):
            parser.add_lightning_class_args(ModelCheckpoint, f"{name}_checkpoint")
            settings = {"filename": name, "monitor": monitor, "enable_version_counter": False}
            parser.set_defaults({f"{name}_checkpoint.{key}": value for key, value in settings.items()})

    def before_instantiate_classes(self) -> None:
        config, parser = self.config[self.subcommand], self._parser(self.subcommand)
        if config.get("lr_scheduler") and not config.get("optimizer"):
            parser.error("--lr_scheduler changes nothing without --optimizer: give both")
        ckpt_path = config.get("ckpt_path")
        if ckpt_path is None:
            if self.subcommand != "fit":
                rank_zero_warn(f"{self.subcommand} without --ckpt_path: the model's weights are random ones")
        elif ckpt_path in ("best", "last", "hpc"):
            if self.subcommand != "fit":
                parser.error(f"--ckpt_path={ckpt_path}: {self.subcommand} needs the path of a checkpoint")
        elif "://" not in ckpt_path and not Path(ckpt_path).exists():
            parser.error(
                f"--ckpt_path={ckpt_path}: no such checkpoint; runs keep them in lightning_logs/*/checkpoints"
            )

    @rank_zero_only
    def after_fit(self) -> None:
        """Prints the final metrics and the commands that come next."""
        trainer, console = self.trainer, Console()
        name, dataset = type(self.model).__name__, self.datamodule.dataset_used
        title = f"{name} on {dataset} after {trainer.current_epoch} epochs"
        table = Table("metric", Column("value", justify="right"), title=title, min_width=len(title) + 2)
        for name, value in sorted(trainer.callback_metrics.items()):
            table.add_row(name, f"{value:.4f}")
        console.print(table)
        checkpoint = trainer.checkpoint_callback
        if trainer.log_dir and isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            run, best = os.path.relpath(trainer.log_dir), os.path.relpath(checkpoint.best_model_path)
            module = ["python", "-m", "mnist_lit"]
            console.print("What comes next:")
            for command in (
                ["tensorboard", "--logdir", os.path.dirname(run)],
                [*module, "test", "--config", f"{run}/config.yaml", "--ckpt_path", best],
            ):
                console.print(f"  {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Runs the command in ``sys.argv``; what the user got wrong ends in one message and exit code 1 or 2."""
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip: " not in record.getMessage())
    try:
        CLI(
            Classifier,
            MNISTDataModule,
            subclass_mode_model=True,
            # An error is one message and not a screenful of options; a typo is no abbreviation.
            parser_kwargs={
                "prog": "python -m mnist_lit",
                "allow_abbrev": False,
                **{command: {"usage": USAGE} for command in CLI.subcommands()},
            },
            seed_everything_default=1,
            trainer_defaults={"callbacks": [PredictionsFile()]},
        )
    except ArchiveError as error:
        sys.exit(f"mnist_lit: error: {error}")
