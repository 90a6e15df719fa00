"""The command line: ``fit``, ``validate``, ``test``, ``predict`` and ``export`` on ``LightningCLI``."""

from __future__ import annotations

import errno
import inspect
import io
import os
import pkgutil
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch
import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt, register_type
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, ProgressBar, WeightAveraging
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer

from mnist_lit.engine.best import DEFAULT_MONITOR, BestCheckpoint, best_or_last, infer_mode
from mnist_lit.engine.checkpoint import (
    EXCEPTION,
    Checkpoint,
    CheckpointFiles,
    newest_checkpoint,
    no_such_checkpoint,
)
from mnist_lit.engine.dashboard import Dashboard
from mnist_lit.engine.defaults import default_callbacks
from mnist_lit.engine.errors import ENGINE, UserError, require
from mnist_lit.engine.export import Trainer
from mnist_lit.engine.last import LastCheckpoint
from mnist_lit.engine.messages import leave_out_noise
from mnist_lit.engine.options import USAGE, closest, did_you_mean, expand_home, join_values, with_config
from mnist_lit.engine.project import Project
from mnist_lit.engine.resume import conflicting_options
from mnist_lit.engine.run import LOGS, Run, RunConfig, as_list, loggers_of
from mnist_lit.engine.schedules import Schedule
from mnist_lit.engine.storage import printable
from mnist_lit.engine.threads import set_threads
from mnist_lit.engine.weights import init_from

FROM_DATA = ("num_classes", "num_pixels", "channels", "task")  # what a model may take from the data module
# Lightning's commands, and Trainer.export; with the arguments of each that are no options.
COMMANDS = {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}
# Weights of classes as numbers: --model.loss.weight=[1,2,1]
register_type(Tensor, serializer=Tensor.tolist, deserializer=lambda numbers: torch.tensor(numbers).float())


class CLI(LightningCLI):
    """``LightningCLI`` that keeps the best and the last checkpoint, finds mistakes early and ends with a table.

    Args:
        project: that runs.
        command: of this process; only its options are collected, because those of each take 0.1 s. "" for all.
        callbacks: in addition to those of the config.
        options: as in ``LightningCLI``.
    """

    linked: tuple[str, ...] = FROM_DATA

    def __init__(self, project: Project, command: str = "", callbacks: Sequence[Callback] = (), **options: Any) -> None:
        self.project, self.command, self.callbacks = project, command, callbacks
        self.run = Run()  # that the command makes or resumes
        self.checkpoint: Checkpoint | None = None  # that it starts from
        super().__init__(LightningModule, LightningDataModule, **options)

    # ------------------------------------------------------------------------------------------- options

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command of this process, if it is known, else all."""
        return {name: skipped for name, skipped in COMMANDS.items() if self.command in (name, "")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.options = parser  # of the command
        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            help="Threads to compute with in each process. By default OMP_NUM_THREADS, or else all processors that "
            "there are for it. Small networks are as fast with 1, and much faster beside other work. A resumed run "
            "keeps its number, on which the last bits of its results depend.",
        )
        parser.add_argument("--run_name", type=str | None, help="Name the run's folder, instead of version_N.")
        parser.add_argument(
            "--init_from",
            type=str | None,
            help="Start a new run from the weights of this checkpoint, or of a file of weights, and nothing else.",
        )
        parser.add_argument(
            "--init_strict",
            type=bool,
            default=True,
            help="Whether all weights must fit; those that do not are listed and left as they are.",
        )
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="After fit, test the best checkpoint, or else the last."
        )
        parser.add_argument(
            "--monitor",
            type=str,
            default=DEFAULT_MONITOR,
            help="The metric that decides: which checkpoint is best, when to stop early, what a sweep searches.",
        )
        parser.add_argument(
            "--mode",
            type=Literal["auto", "min", "max"],
            default="auto",
            help="Whether a lower or a higher value of it is better; auto goes by its name.",
        )
        for name, kind in (
            ("best_checkpoint", BestCheckpoint),
            ("last_checkpoint", LastCheckpoint),
            ("dashboard", Dashboard),
        ):
            parser.add_class_arguments(kind, name)
        parser.link_arguments("monitor", "best_checkpoint.monitor")
        parser.link_arguments("mode", "best_checkpoint.mode")
        for name in self.linked:  # ignored if the model or the data module has none
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and read the checkpoint that is named.

        Raises:
            UserError: if the arguments are wrong.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(f"{error}{did_you_mean(sys.argv[2:], self.options)}") from error
        if (command := self.config.subcommand) is None:
            parser.print_help()
            sys.exit(2)
        config = expand_home(self.config[command])
        if not isinstance(config.trainer, Namespace):
            raise UserError("trainer: is empty in the config; leave the line out, or give it options")
        if config.trainer.barebones:
            raise UserError(
                "--trainer.barebones leaves out logger, checkpoints, bar and every callback, which is all that this "
                "command adds to a loop; leave it out, or use Trainer(barebones=True) in a script of your own"
            )
        if config.get("lr_scheduler") and not config.get("optimizer"):
            raise UserError("--lr_scheduler changes nothing without --optimizer: give both")
        # LightningCLI would let hyperparameters of the checkpoint override the config, class names from an untrusted
        # file included. The config decides what is built, so the path comes back after that.
        path, config.ckpt_path = config.get("ckpt_path"), None
        self.checkpoint = self._find_checkpoint(command, path, config)
        if self.checkpoint and command == "fit":
            _keep_randomness(self.checkpoint, config)

    def _find_checkpoint(self, command: str, path: str | None, config: Namespace) -> Checkpoint | None:
        weights_only = config.get("weights_only") is not False
        if command == "fit" and path and config.trainer.fast_dev_run:
            raise UserError(
                "--trainer.fast_dev_run makes its few steps from the start and resumes nothing; leave out --ckpt_path"
            )
        if command == "fit" and path == "last":
            root = Path(config.trainer.default_root_dir or ".")
            return newest_checkpoint(root, config.model.class_path, config.run_name, weights_only)
        if not path and command == "export":
            raise UserError("--ckpt_path: export needs the path of a checkpoint")
        if path is None and command != "fit":
            rank_zero_warn(f"{command} without --ckpt_path: the model's weights are random")
        if path in ("best", "last"):
            raise UserError(f"--ckpt_path={path}: {command} needs the path of a checkpoint")
        if path is None or "://" in path or path == "hpc":
            return None if path is None else Checkpoint(path, {})
        if not Path(path).exists():
            raise UserError(no_such_checkpoint("ckpt_path", path))
        if command == "fit" and Path(path).name == EXCEPTION:
            raise UserError(
                f"{path} was saved when a step failed, so training cannot resume from it; resume with "
                f"--ckpt_path=last, or start a new run from its weights with --init_from={path}"
            )
        return Checkpoint.read(path, weights_only)

    # --------------------------------------------------------------------------- model, data and trainer

    def before_instantiate_classes(self) -> None:
        """Keep a copy of the options, complete them, and find the folder of the run."""
        config, checkpoint = self.config[self.subcommand], self.checkpoint
        name, config.run_name = config.run_name, None  # not in a config from which other runs are started
        self.pristine = yaml.safe_load(self.options.dump(config, skip_none=False))
        if checkpoint and self.subcommand == "fit" and checkpoint.run:
            _refuse_conflicts(checkpoint, self.pristine)
        if checkpoint:
            _take_from_checkpoint(checkpoint, config)
        for chosen in (*as_list(config.trainer.callbacks), config.get("lr_scheduler")):
            options = chosen.get("init_args") if isinstance(chosen, Namespace) else None
            if options and options.get("monitor") == "auto":
                options["monitor"], options["mode"] = config.monitor, infer_mode(config.monitor, config.mode)
        config.ckpt_path = checkpoint and checkpoint.path
        if self.subcommand != "export" and not config.trainer.fast_dev_run:
            self._make_run(config, name)

    def _make_run(self, config: Namespace, name: str | None) -> None:
        """Make the folder of the run, or take that of the resumed one, and have the loggers write there."""
        resumed = self.checkpoint if self.subcommand == "fit" else None
        run = Run.of_checkpoint(resumed.path, self.project) if resumed else None
        self.run = run or Run.create(Path(config.trainer.default_root_dir or "."), name, self.project)
        if self.subcommand == "fit":
            self.run.lock()
        if self.run.exists:
            self.run.redirect_loggers(loggers_of(config), resumed.content if resumed else None)

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        # Every model is offered what the data know; its hyperparameters are those that it takes.
        for name in set(FROM_DATA) - parameters(type(self.model)):
            self.model.hparams.pop(name, None)
        config = self.config[self.subcommand]
        self.pristine["num_threads"] = int(set_threads(config.num_threads, self.trainer.num_devices))

    def instantiate_trainer(self, **options: Any) -> lightning.pytorch.Trainer:
        config, made = self.config[self.subcommand].trainer, self.config_init[self.subcommand]
        resumed = self.checkpoint if self.subcommand == "fit" else None
        if self.run.exists:
            options["default_root_dir"] = str(self.run.root)
            if config.logger in (None, True):
                options["logger"] = TensorBoardLogger(
                    self.run.root,
                    LOGS,
                    version=self.run.name,
                    # What was logged after the checkpoint makes room for what is logged again.
                    purge_step=resumed.step if resumed else None,
                    default_hp_metric=False,
                )
        plugins = as_list(made.trainer.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            options["plugins"] = [*plugins, CheckpointFiles()]
        step = f"-from-step-{resumed.step}" if resumed else ""
        own = [self.run, *as_list(made.trainer.callbacks), RunConfig(self.pristine, f"config{step}.yaml")]
        every = default_callbacks(*own, made.best_checkpoint, made.last_checkpoint, made.dashboard, *self.callbacks)
        switches = (
            ("enable_checkpointing", Checkpointing),
            ("enable_progress_bar", ProgressBar),
        )
        off = tuple(kind for switch, kind in switches if config[switch] is False)
        callbacks = [callback for callback in every if callback in own or not isinstance(callback, off)]
        made.trainer.callbacks = None  # LightningCLI would add its callbacks to these
        return super().instantiate_trainer(**options, callbacks=callbacks)

    def after_instantiate_classes(self) -> None:
        """Compare the checkpoint with the model, or start from other weights, before anything takes time."""
        config, checkpoint = self.config[self.subcommand], self.checkpoint
        if self.subcommand == "fit" and config.test_after_fit:
            for name, owner in (("test_step", self.model), ("test_dataloader", self.datamodule)):
                if not is_overridden(name, owner):
                    raise UserError(f"--test_after_fit=true: {type(owner).__name__} has no {name}")
        if checkpoint and checkpoint.content:
            checkpoint.check(self.model)
        if self.subcommand != "fit":
            return
        if checkpoint is None:
            if config.init_from is not None:
                weights_only = config.get("weights_only") is not False
                init_from(self.model, config.init_from, config.init_strict, weights_only)
            return
        if checkpoint.content and (longer := checkpoint.finished(self.trainer)):
            rank_zero_info(
                f"{checkpoint.path} is of a finished run, with {checkpoint.step} steps: there is nothing left to do; "
                f"{longer} to train longer"
            )
            sys.exit(0)
        if self.run.exists:
            self.run.keep_table(checkpoint.step)
        self.checkpoint = None  # which may be large

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Lightning's, and schedules that depend on the length of the run."""
        if isinstance(lr_scheduler, Schedule):
            return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.make(lightning_module.trainer)}
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)

    # --------------------------------------------------------------------------------- after the commands

    def after_fit(self) -> None:
        """Test the best checkpoint, or else the last, if asked to."""
        kept = best_or_last(self.trainer)
        if not kept or not self.config.fit.test_after_fit:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, WeightAveraging) for callback in callbacks):
            # It would load the weights to train on, and not their average.
            self.model.load_state_dict(Checkpoint.read(kept, self.config.fit.weights_only is not False).weights)
            kept = ""
        self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=kept or None)

    def after_predict(self) -> None:
        """Name the files that could not be read.

        Raises:
            SystemExit: with code 1, if there are any.
        """
        broken = getattr(self.datamodule, "broken", None) or {}
        if not broken:
            return
        console = Console(stderr=True)
        for path, reason in broken.items():
            console.print(f"{printable(path)}: {reason}", soft_wrap=True, highlight=False, markup=False)
        total = len(broken) + len(self.datamodule.files)
        sys.exit(f"{self.project.name}: error: {len(broken)} of {total} files could not be predicted")


def _keep_randomness(checkpoint: Checkpoint, config: Namespace) -> None:
    """Resume with the seed and the number of threads that the run was started with."""
    saved = checkpoint.run.options if checkpoint.run else {}
    if config.seed_everything is True:
        config.seed_everything = saved.get("seed_everything", True)
    threads = saved.get("num_threads")
    if threads and config.num_threads not in (None, threads):
        rank_zero_warn(
            f"the run was started with --num_threads={threads}, this command has {config.num_threads}: it resumes, but "
            "the last bits of its results may differ from those of the uninterrupted run"
        )
    config.num_threads = config.num_threads or threads


def _refuse_conflicts(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    saved = checkpoint.run.options if checkpoint.run else {}
    if saved and (conflicts := conflicting_options(saved, options)):
        raise UserError(
            f"{checkpoint.path} resumes with the options of its run, and not with {', '.join(conflicts)}; leave them "
            f"out, or start a new run from its weights with --init_from={checkpoint.path}"
        )


def _take_from_checkpoint(checkpoint: Checkpoint, config: Namespace) -> None:
    """Take from the checkpoint the options of the data that belong to the model: images to predict have no labels to
    count. A data module names them in ``from_checkpoint``.
    """
    options = config.data.get("init_args") or {}
    for name in getattr(pkgutil.resolve_name(config.data.class_path), "from_checkpoint", ("num_classes",)):
        if checkpoint.hparams.get(name) is not None and name in options and options[name] is None:
            options[name] = checkpoint.hparams[name]


def parameters(kind: type) -> set[str]:
    """Names of the arguments that a class takes, and of those that it hands on to the classes it inherits from."""
    return {name for base in kind.__mro__ for name in inspect.signature(base.__init__).parameters}  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- running


class _Builder(CLI):
    """Makes what ``predict`` runs with, out of a checkpoint and without its dataset, and runs nothing."""

    linked = ()

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        options = self.config[self.subcommand].model.get("init_args") or {}
        for name in FROM_DATA:
            if self.checkpoint and name in options and name in self.checkpoint.hparams:
                options[name] = self.checkpoint.hparams[name]

    def export(self, **_: Any) -> None:
        """In the place of the trainer's."""


def build(project: Project, ckpt_path: str, args: Sequence[str] = ()) -> CLI:
    """Make the model and the data module of a checkpoint.

    Args:
        project: that runs.
        ckpt_path: the checkpoint.
        args: further options of ``predict``, such as another ``--config`` than its run's.

    Returns:
        what has the model, the data module, a trainer of one device, and the checkpoint.
    """
    alone = ("accelerator=auto", "devices=1", "num_nodes=1", "strategy=auto", "logger=false")  # wherever it was trained
    further = [*(f"--trainer.{option}" for option in alone), *join_values(args)]
    return run(project, with_config(["export", f"--ckpt_path={ckpt_path}", *further], project), cli_class=_Builder)


def run(project: Project, args: list[str], callbacks: Sequence[Callback] = (), cli_class: type[CLI] = CLI) -> CLI:
    """Run one command of ``LightningCLI``.

    Args:
        project: that runs.
        args: as on the command line, the command first.
        callbacks: in addition to those of the config.
        cli_class: to run it with.
    """
    sys.argv[1:] = args  # from which Lightning starts further processes
    command = args[0] if args and args[0] in COMMANDS else ""
    script = project.name.replace("_", "-")
    settings = {"allow_abbrev": False, "exit_on_error": False}  # a typo is no abbreviation
    return cli_class(
        project,
        command,
        callbacks,
        save_config_callback=None,
        trainer_class=Trainer,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_kwargs={
            "prog": script if Path(sys.argv[0]).name == script else project.command(),
            "epilog": f"More commands, each with a --help: {', '.join(more_commands(project))}",
            **settings,
            **{name: {"usage": USAGE, **settings} for name in ([command] if command else COMMANDS)},
        },
        seed_everything_default=1,
    )


def more_commands(project: Project) -> dict[str, str]:
    """Commands that are not subcommands of ``LightningCLI``, by the module whose ``main`` runs each."""
    modules = {name: f"{ENGINE}.engine.{name}" for name in ("sweep", "folds", "serve")}
    return {**modules, **project.commands}


def main(name: str, data_module: str = "", default_config: str = "", commands: Mapping[str, str] | None = None) -> None:
    """Run the command in ``sys.argv``. A user's mistake ends in one message and exit code 1.

    Args:
        name: of the package that runs, as in ``python -m NAME``.
        data_module: import path of the data module to use where the config names none.
        default_config: that ``fit`` takes if it is there and the command names neither a config nor a model.
        commands: further commands, by the module whose ``main(args, project)`` runs each.

    Example:
        >>> main("leaf_id", data_module="leaf_id.data.DataModule", default_config="configs/cnn.yaml")
    """
    project = Project(name, data_module, default_config, commands or {})
    for signum in (signal.SIGINT, signal.SIGTERM):  # until training starts: there is nothing to save
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    leave_out_noise()
    # Once glibc has seen a block of this size freed, it keeps up to twice as much memory for later blocks. Before, it
    # may return to the system after every batch what the next batch then waits for.
    torch.empty(8 * 2**20, dtype=torch.uint8)
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show is a question mark, and no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # your own modules, also for the script, as for python -m
    try:
        _dispatch(project, expand_home(sys.argv[1:]) or ["--help"])
    except (UserError, MisconfigurationException) as error:
        sys.exit(f"{name}: error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"{name}: error: {_full_disk(error)}")


def _dispatch(project: Project, args: list[str]) -> None:
    command, *options = args
    modules = more_commands(project)
    names = [*COMMANDS, *modules]
    if not command.startswith("-") and command not in names:
        meant = closest(command, names)
        raise UserError(
            f"no command {command!r}{f' (did you mean {meant}?)' * bool(meant)}; the commands are {', '.join(names)}"
        )
    if command == "sweep":
        require("sweep", "optuna", "matplotlib")
    if command in modules:
        import_module(modules[command]).main(options, project)
    else:
        run(project, with_config([command, *join_values(options)], project))


def _full_disk(error: OSError) -> str:
    """The message of a full disk: of the checkpoint that did not fit, if the loggers have failed after it."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, UserError):
        first = first.__context__
    place = f"{error.filename}: " if error.filename else ""
    return str(first or f"{place}{error.strerror}; make room, then resume with --ckpt_path=last")
