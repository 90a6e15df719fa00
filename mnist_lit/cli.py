"""The command line: ``fit``, ``validate``, ``test``, ``predict`` and ``export`` on ``LightningCLI``."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as AnyBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Column, Table

from mnist_lit.archive import ArchiveError
from mnist_lit.callbacks import DivergenceError, NoProfiler, PredictionsFile, ProgressBar, StopOnNonFinite
from mnist_lit.checkpoints import (
    CheckpointError,
    CheckpointFiles,
    LastCheckpoint,
    RandomState,
    newest_checkpoint,
    read_checkpoint,
)
from mnist_lit.dashboards import Dashboard
from mnist_lit.export import Trainer
from mnist_lit.schema import Print, print_completion, print_schema

# Warnings that a user can do nothing about: they tell one library's authors about another's.
NOISE = (
    r"'set_vital' is deprecated",  # torchdata 0.11 on torch 2.13
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 on torch 2.13
    r".*does not have many workers",  # the data is in memory, workers would only slow it down
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
    r".*configure_optimizers` will be overridden by",  # which is what --optimizer asks for
)

ERRORS = ArchiveError, CheckpointError, DivergenceError, MisconfigurationException
SCRIPT = "mnist-lit"
USAGE = "%(prog)s --config FILE [--config FILE ...] [--KEY=VALUE ...]"


class CLI(LightningCLI):
    """``LightningCLI`` with the best and the last checkpoint kept, early errors and a closing table."""

    run_name: str | None = None
    ckpt_path: str | None = None
    checkpoint: dict[str, Any] | None = None  # what is in it

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and ``Trainer.export``."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for printed, what in (
            (print_schema, "a JSON schema of configs"),
            (print_completion, "bash completion"),
        ):
            parser.add_argument(f"--{printed.__name__}", action=Print, const=printed, help=f"Print {what}.")
        parser.add_argument(
            "--run_name", type=str | None, help="Name the run's folder, instead of version_N."
        )
        parser.add_lightning_class_args(ModelCheckpoint, "best_checkpoint")
        settings = {"filename": "best", "monitor": "val/loss", "enable_version_counter": False}
        parser.set_defaults({f"best_checkpoint.{key}": value for key, value in settings.items()})
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        parser.set_defaults({"data": {"class_path": "mnist_lit.MNISTDataModule"}})
        for name in ("num_classes", "num_pixels"):  # ignored where a model or a data module has none
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        # LightningCLI would now read the checkpoint and let its hyperparameters win over the config, class
        # names out of a file that may be a stranger's. The config says what is built, so the path goes back
        # into it when that is past.
        config = self.config[self.config.subcommand]
        self.ckpt_path, config.ckpt_path = config.get("ckpt_path"), None

    def before_instantiate_classes(self) -> None:
        config, parser = self.config[self.subcommand], self._parser(self.subcommand)
        if config.get("lr_scheduler") and not config.get("optimizer"):
            parser.error("--lr_scheduler changes nothing without --optimizer: give both")
        logs = Path(config.trainer.default_root_dir or ".") / "lightning_logs"
        # Not in the run's config.yaml, with which others like it are started.
        self.run_name, config.run_name = config.run_name, None
        if self.run_name and (logs / self.run_name).exists():
            parser.error(f"--run_name={self.run_name}: there is such a run already in {logs}")
        try:
            logs.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=logs).close()
        except OSError as error:
            parser.error(
                f"cannot write in {logs} ({error.strerror}); "
                "choose another place for runs with --trainer.default_root_dir"
            )
        if self.subcommand == "fit" and self.ckpt_path == "last":
            self.ckpt_path = self._last_checkpoint()
        if self.ckpt_path is None:
            if self.subcommand == "export":
                parser.error("--ckpt_path: export needs the path of a checkpoint")
            if self.subcommand != "fit":
                rank_zero_warn(f"{self.subcommand} without --ckpt_path: the model's weights are random ones")
        elif self.ckpt_path in ("best", "last"):
            parser.error(f"--ckpt_path={self.ckpt_path}: {self.subcommand} needs the path of a checkpoint")
        elif "://" not in self.ckpt_path and self.ckpt_path != "hpc":
            if not Path(self.ckpt_path).exists():
                parser.error(
                    f"--ckpt_path={self.ckpt_path}: no such checkpoint; "
                    "runs keep them in lightning_logs/*/checkpoints"
                )
            self.checkpoint = read_checkpoint(self.ckpt_path, config.get("weights_only") is not False)
            self._classes_of_checkpoint(config)
        config.ckpt_path = self.ckpt_path
        # A run's config.yaml is what it was started with; what it was resumed with is kept beside it.
        resumed = self.subcommand == "fit" and self.checkpoint
        step = f"-from-step-{resumed['global_step']}" if resumed else ""
        self.save_config_kwargs = {"config_filename": f"config{step}.yaml", "overwrite": True}

    def _classes_of_checkpoint(self, config: Namespace) -> None:
        """Images to predict have no labels to count, and a model that is there needs no others counted."""
        classes = (self.checkpoint or {}).get("hyper_parameters", {}).get("num_classes")
        settings = config.data.get("init_args") or {}
        if classes is not None and "num_classes" in settings and settings["num_classes"] is None:
            settings["num_classes"] = classes

    def _last_checkpoint(self) -> str | None:
        root_dir = Path(self.config[self.subcommand].trainer.default_root_dir or ".")
        path = newest_checkpoint(root_dir)
        if path is None:
            rank_zero_info("--ckpt_path=last: no run has left a checkpoint yet, this one starts from scratch")
            return None
        rank_zero_info(f"--ckpt_path=last: going on from {path}")
        return str(path)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.pytorch.Trainer:
        config = self.config[self.subcommand].trainer
        if config.logger in (None, True) and not config.fast_dev_run:
            # Lightning's default logger; a resumed run goes on in its own folder, and what it had logged
            # after the checkpoint makes room for what it logs again.
            version, purge_step = self.run_name, None
            if self.subcommand == "fit" and self.ckpt_path and self.checkpoint:
                folder = Path(self.ckpt_path).absolute().parents[1]
                if folder.parent.name == "lightning_logs":
                    version, purge_step = folder.name, self.checkpoint["global_step"]
                    kwargs["default_root_dir"] = folder.parents[1]
            # Absolute, because the best checkpoint is forgotten by a resumed run that names its folder
            # differently.
            kwargs["logger"] = TensorBoardLogger(
                os.path.abspath(kwargs.get("default_root_dir") or config.default_root_dir or "."),
                version=version,
                purge_step=purge_step,
                default_hp_metric=False,
            )
        plugins, callbacks = (
            chosen if isinstance(chosen, list) else [chosen] if chosen else []
            for chosen in (self.config_init[self.subcommand].trainer[key] for key in ("plugins", "callbacks"))
        )
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        if config.enable_progress_bar is not False and not any(isinstance(c, AnyBar) for c in callbacks):
            callbacks = [*callbacks, ProgressBar()]
        if config.profiler is None:
            kwargs["profiler"] = NoProfiler()
        if self.subcommand == "predict":
            callbacks = [*callbacks, PredictionsFile()]
        return super().instantiate_trainer(**kwargs, callbacks=callbacks)

    def after_instantiate_classes(self) -> None:
        if self.checkpoint is None or not self.model.strict_loading:
            return
        if self.subcommand == "fit":
            name = "steps_per_execution"
            steps = self.checkpoint.get("hyper_parameters", {}).get(name, 1)
            if steps != getattr(self.model, name, 1):
                raise CheckpointError(
                    f"{self.ckpt_path} is of a run with {name}={steps}, which counts batches differently; "
                    f"resume with --model.{name}={steps}"
                )
        ours, theirs = (
            {name: tuple(weight.shape) for name, weight in state_dict.items()}
            for state_dict in (self.model.state_dict(), self.checkpoint["state_dict"])
        )
        self.checkpoint = None
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                raise CheckpointError(
                    f"{self.ckpt_path} is not of this model: {name} has the shape {theirs.get(name)} there "
                    f"and {ours.get(name)} in {type(self.model).__name__}; the config.yaml in the folder of "
                    "its run is the one that fits"
                )

    def after_predict(self) -> None:
        """Names the files that could not be read.

        Raises:
            SystemExit: with code 1, if there are any.
        """
        broken = getattr(self.datamodule, "broken", {})
        if not broken:
            return
        console = Console(stderr=True)
        for path, reason in broken.items():
            console.print(f"{path}: {reason}", soft_wrap=True, highlight=False, markup=False)
        total = len(broken) + len(self.datamodule.files)
        sys.exit(f"mnist_lit: error: {len(broken)} of {total} files could not be predicted")

    def after_fit(self) -> None:
        """Prints the final metrics and the commands that come next."""
        trainer, console = self.trainer, Console()
        log_dir = trainer.log_dir  # the processes agree on it, so each of them has to ask
        if not trainer.is_global_zero:
            return
        dataset = getattr(self.datamodule, "dataset_used", type(self.datamodule).__name__)
        title = f"{type(self.model).__name__} on {dataset} after {trainer.current_epoch} epochs"
        table = Table("metric", Column("value", justify="right"), title=title, min_width=len(title) + 2)
        for name, value in sorted(trainer.callback_metrics.items()):
            if "/" in name:
                table.add_row(name, f"{value:.4f}")
        console.print(table)
        checkpoint = trainer.checkpoint_callback
        if log_dir and isinstance(checkpoint, ModelCheckpoint) and checkpoint.best_model_path:
            run, best = os.path.relpath(log_dir), os.path.relpath(checkpoint.best_model_path)
            module = ["python", "-m", "mnist_lit"]
            console.print("What comes next:")
            for command in (
                ["tensorboard", "--logdir", os.path.dirname(run)],
                [*module, "test", "--config", f"{run}/config.yaml", "--ckpt_path", best],
            ):
                console.print(f"  {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Silent about TensorBoard's writer: what happens to it is raised again where training waits for it."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def with_config_of_run(args: list[str]) -> list[str]:
    """The command, and where it names a checkpoint and no config, the config.yaml of the checkpoint's run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config")
    parser.add_argument("--ckpt_path", type=Path)
    named, _ = parser.parse_known_args(args)
    if named.config or named.ckpt_path is None or not named.ckpt_path.exists():
        return args
    config = named.ckpt_path.absolute().parents[1] / "config.yaml"
    if not config.is_file():
        return args
    rank_zero_info(f"The config is the run's: {os.path.relpath(config)}")
    command, *settings = args
    return [command, "--config", str(config), *settings]


def run(args: list[str], callbacks: Sequence[Callback] = ()) -> CLI:
    """One command of ``LightningCLI``.

    Args:
        args: as on the command line, the command first.
        callbacks: that watch over the run beside those of its config.
    """
    sys.argv[1:] = args  # which Lightning starts further processes with
    return CLI(
        LightningModule,
        LightningDataModule,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # An error is one message and not a screenful of options; a typo is no abbreviation.
        parser_kwargs={
            "prog": SCRIPT if Path(sys.argv[0]).name == SCRIPT else "python -m mnist_lit",
            "epilog": "With a --help of their own: sweep (search settings), new (a project of your own)",
            "allow_abbrev": False,
            **{command: {"usage": USAGE} for command in CLI.subcommands()},
        },
        seed_everything_default=1,
        trainer_defaults={"callbacks": [StopOnNonFinite(), RandomState(), *callbacks]},
    )


def main() -> None:
    """Runs the command in ``sys.argv``; what the user got wrong ends in one message and exit code 1 or 2."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # until training starts: there is nothing to save
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    threading.excepthook = _thread_failed
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    tips = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tips.addFilter(lambda record: "Tip: " not in record.getMessage())
    # Once glibc has seen a block of this size freed, it keeps up to twice as much memory for what comes next;
    # before, it may give back to the system after every batch what the next batch then waits for.
    torch.empty(8 * 2**20, dtype=torch.uint8)
    command, *args = sys.argv[1:] or [""]
    try:
        if command == "new":
            from mnist_lit import new

            new.main(args)
        elif command == "sweep":
            if find_spec("optuna") is None:
                raise MisconfigurationException("sweep needs optuna: pip install 'mnist_lit[sweep]'")
            from mnist_lit import sweep

            sweep.main(args)
        else:
            run(with_config_of_run(sys.argv[1:]))
    except ERRORS as error:
        sys.exit(f"mnist_lit: error: {error}")
