"""The command line: ``fit``, ``validate``, ``test``, ``predict`` and ``export`` on ``LightningCLI``."""

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
from typing import Any, Literal, get_type_hints

import lightning.pytorch
import torch
import yaml
from fsspec import open_local
from jsonargparse import ArgumentError, Namespace
from jsonargparse.typing import PositiveInt, register_type
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.callbacks import Checkpoint as Checkpointing
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
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
from mnist_lit.engine.errors import ENGINE, UserError, explain_damage, require
from mnist_lit.engine.export import Trainer
from mnist_lit.engine.last import LastCheckpoint
from mnist_lit.engine.messages import leave_out_noise
from mnist_lit.engine.options import USAGE, closest, did_you_mean, expand_home, with_config
from mnist_lit.engine.project import Project
from mnist_lit.engine.resume import keep_randomness, refuse_conflicts
from mnist_lit.engine.run import LOGS, Run, as_list
from mnist_lit.engine.schedules import Schedule
from mnist_lit.engine.storage import printable
from mnist_lit.engine.threads import set_threads
from mnist_lit.engine.weights import init_from

FROM_DATA = ("num_classes", "num_pixels", "channels", "task")  # arguments that a model may take from the data module
# Lightning's commands and Trainer.export, each with those of its arguments that are not options.
COMMANDS = {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}
# Class weights as numbers: --model.loss.weight=[1,2,1]
register_type(Tensor, serializer=Tensor.tolist, deserializer=lambda numbers: torch.tensor(numbers).float())


def run_options(
    num_threads: PositiveInt | None = None,
    run_name: str | None = None,
    init_from: str | None = None,
    init_strict: bool = True,
    test_after_fit: bool = False,
    monitor: str = DEFAULT_MONITOR,
    mode: Literal["auto", "min", "max"] = "auto",
) -> None:
    """Options of every command.

    Args:
        num_threads: Number of threads to compute with in each process; by default OMP_NUM_THREADS, or else its share of
            the processors. Small networks are as fast with 1, and much faster next to other work. A resumed run keeps
            its number, because the last bits of the results depend on it.
        run_name: Name of the run's folder, instead of version_N.
        init_from: Start a new run from the weights in this checkpoint or file of weights, and from nothing else in it.
        init_strict: Whether all weights must fit; otherwise those that do not are listed and left as they are.
        test_after_fit: Test the best checkpoint after fit, or else the last.
        monitor: Metric that decides which checkpoint is best, when to stop early and what a sweep searches for.
        mode: Whether a lower or a higher value is better; auto goes by the metric's name.
    """


class Parser(LightningArgumentParser):
    """Takes functions in the place of classes, too."""

    def add_function_arguments(self, *args: Any, linked_targets: Any = None, **options: Any) -> list[str]:
        """As in jsonargparse, where only classes may have arguments that are taken from the data module."""
        return super().add_function_arguments(*args, **options)


class CLI(LightningCLI):
    """``LightningCLI`` that keeps the best and the last checkpoint, reports mistakes early and ends with a table.

    Args:
        classes: the classes of the model and the data module, as in ``LightningCLI``; by default any.
        project: the project that runs; by default the script.
        command: the only command to collect options for, because each takes 0.1 s; "" for all.
        options: as in ``LightningCLI``.

    Example:
        >>> CLI(MyModel, MyDataModule)
    """

    linked: tuple[str, ...] = FROM_DATA

    def __init__(self, *classes: Any, project: Project | None = None, command: str = "", **options: Any) -> None:
        self.project, self.command = project or Project(Path(sys.argv[0]).stem), command
        self.run = Run()  # which the command makes or resumes
        self.checkpoint: Checkpoint | None = None  # which it starts from
        self.step = 0  # at which fit resumes
        self.ckpt_path: str | None = None  # as it was typed
        defaults = {"save_config_callback": None, "trainer_class": Trainer, "parser_class": Parser}
        super().__init__(*classes, **{**defaults, **options})

    # ------------------------------------------------------------------------------------------- options

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command of this process, if it is known, else all."""
        known = COMMANDS if hasattr(self.trainer_class, "export") else LightningCLI.subcommands()
        return {name: skipped for name, skipped in known.items() if self.command in (name, "")}

    @property
    def given(self) -> Namespace:
        """The command's options; with ``run=False``, all options."""
        return self.config.get(str(self.config.get("subcommand")), self.config)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_core_arguments_to_parser(parser)
        self.options = parser  # of the command, or of the last one
        parser.add_function_arguments(run_options)
        parser.add_class_arguments(BestCheckpoint, "best_checkpoint")
        parser.add_class_arguments(LastCheckpoint, "last_checkpoint")
        parser.add_class_arguments(Dashboard, "dashboard")
        parser.link_arguments("monitor", "best_checkpoint.monitor")
        parser.link_arguments("mode", "best_checkpoint.mode")
        if self.project.data_module:
            parser.set_defaults({"data": {"class_path": self.project.data_module}})
        any_class = self.subclass_mode_model and self.subclass_mode_data
        for name in self.linked if any_class else ():  # ignored if the model or the data module has none
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and read the checkpoint that they name.

        Raises:
            UserError: if the arguments are wrong.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise UserError(f"{error}{did_you_mean(sys.argv[2:], self.options)}") from error
        if (command := self.config.get("subcommand", "fit")) is None:
            parser.print_help()
            sys.exit(2)
        config = expand_home(self.given)
        if config.get("lr_scheduler") and not config.get("optimizer", True):  # it may have another name
            raise UserError("--lr_scheduler changes nothing without --optimizer: give both")
        places = {"trainer.default_root_dir": config.trainer, "best_checkpoint.dirpath": config.best_checkpoint}
        for option, section in places.items():
            if "://" in str(place := section.get(option.partition(".")[2])):
                raise UserError(f"--{option}={place}: runs are written to folders; mount it, or copy the run later")
        own = LightningModule.train_dataloader
        brings_data = self.subclass_mode_model and getattr(_model_class(config), "train_dataloader", own) is not own
        if brings_data and self.project.data_module and config.data == self.options.get_defaults().data:
            config.data = None  # the project's data module does not take the place of the model's own loaders
        if "weights_only" not in config:
            return  # no command: the script passes its checkpoint to trainer.fit
        if not any(arg.startswith("--weights_only") for arg in sys.argv):
            config.weights_only = None  # a config may come with the checkpoint, so it cannot switch off safe loading
        # LightningCLI would let hyperparameters in the checkpoint override the config, even class names from an
        # untrusted file. Only the config decides what is built, so the path is put back after that.
        self.ckpt_path, config.ckpt_path = config.get("ckpt_path") or None, None
        self.checkpoint = self._find_checkpoint(command, config)
        if self.checkpoint and command == "fit":
            keep_randomness(self.checkpoint, config)

    def _find_checkpoint(self, command: str, config: Namespace) -> Checkpoint | None:
        path, weights_only = self.ckpt_path, config.weights_only is not False
        if command == "fit" and path and config.trainer.get("fast_dev_run"):
            raise UserError("--trainer.fast_dev_run resumes nothing; leave out --ckpt_path")
        if command == "fit" and path == "last":
            root = Path(config.trainer.get("default_root_dir") or ".")
            return newest_checkpoint(root, config.get("model", {}).get("class_path"), config.run_name, weights_only)
        if path in ("best", "last") or (path is None and command == "export"):
            raise UserError(f"{command} needs the path of a checkpoint in --ckpt_path")
        if path is None:
            if command != "fit":
                rank_zero_warn(f"{command} without --ckpt_path: the model's weights are random")
            return None
        if "://" in path:
            with explain_damage(path):
                path = open_local(f"simplecache::{path}", simplecache={"same_names": True})  # a copy of this process
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
        """Keep a copy of the options, complete them, and find the run's folder."""
        config, checkpoint = self.given, self.checkpoint
        resumed = checkpoint if self.subcommand == "fit" else None
        name, config.run_name = config.run_name, None  # other runs are started from this config, under other names
        self.pristine = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        self.pristine = self.pristine.get(self.subcommand, self.pristine)
        self.chosen = _chosen_for_model(config) if self.subclass_mode_model else {}
        if self.chosen:
            self.pristine["model"].setdefault("init_args", {}).update(self.chosen)
        if resumed:
            self.step = resumed.log_step
            refuse_conflicts(resumed, self.pristine)
        if checkpoint:
            config.ckpt_path = checkpoint.path
            _take_from_checkpoint(checkpoint, config.get("data"), self.datamodule_class)
        for chosen in (*as_list(config.trainer.get("callbacks")), config.get("lr_scheduler")):
            options = chosen.get("init_args") if isinstance(chosen, Namespace) else None
            if options and options.get("monitor") == "auto":
                options["monitor"], options["mode"] = config.monitor, infer_mode(config.monitor, config.mode)
        if self.subcommand == "export" or config.trainer.get("fast_dev_run"):
            return
        project = self.project if self.subcommand else None
        run = Run.of_checkpoint(resumed.path, project) if resumed else None
        root = Path(config.trainer.get("default_root_dir") or ".")
        self.run = run or Run.create(root, name, project, exist_ok=self.ckpt_path == "last")
        if self.subcommand in ("fit", None):
            self.run.lock()
        if self.run.exists:
            loggers = [logger for logger in as_list(config.trainer.get("logger")) if isinstance(logger, Namespace)]
            self.run.redirect_loggers(loggers, self.step)

    def instantiate_classes(self) -> None:
        if self.checkpoint:
            with explain_damage(self.checkpoint.path):  # some options come from there
                self.parser.validate(self.config)
        super().instantiate_classes()
        for name, value in self.chosen.items():
            if (known := getattr(self.datamodule, name, None)) not in (None, value):
                raise UserError(f"--model.{name}={value}: the data say {known}; leave it out, or change the data")
        # Every model is offered all of FROM_DATA; only those that it takes are its hyperparameters.
        for name in set(FROM_DATA) - parameters(type(self.model)).keys():
            self.model.hparams.pop(name, None)
        threads = set_threads(self.given.num_threads, self.trainer.num_devices)
        self.pristine["num_threads"] = int(threads)

    def instantiate_trainer(self, **options: Any) -> lightning.pytorch.Trainer:
        config, made = self.given.trainer, self.config_init.get(str(self.subcommand), self.config_init)
        chosen = as_list(options.pop("callbacks", made.trainer.get("callbacks")))
        ours = dict[str, Any]()
        if self.run.exists:
            ours["default_root_dir"] = str(self.run.root)
            if config.get("logger") in (None, True):
                ours["logger"] = TensorBoardLogger(
                    self.run.root,
                    LOGS,
                    version=self.run.name,
                    purge_step=self.step,  # steps from there on are logged again
                    default_hp_metric=False,
                )
        plugins = as_list(made.trainer.get("plugins"))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            ours["plugins"] = [*plugins, CheckpointFiles()]
        self.run.to_save = self.pristine
        self.run.save_as = f"config-from-step-{self.step}.yaml" if self.step else "config.yaml"
        chosen += made.best_checkpoint, made.last_checkpoint, made.dashboard
        switches = {"enable_checkpointing": Checkpointing, "enable_progress_bar": ProgressBar}
        off = tuple(kind for switch, kind in switches.items() if config.get(switch) is False)
        ours["callbacks"] = default_callbacks(self.run, *chosen, without=off)
        taken = {name: value for name, value in ours.items() if name in config}  # another Trainer may take fewer
        return super().instantiate_trainer(**{**taken, **options})

    def after_instantiate_classes(self) -> None:
        """Check that the checkpoint fits the model, or load the initial weights, before anything takes time."""
        config, checkpoint = self.given, self.checkpoint
        if checkpoint:
            checkpoint.check(self.model)
        if self.subcommand in ("fit", None):
            self._check_start(config, checkpoint)
        if self.run.exists:
            self.run.start_loggers(self.trainer.loggers, self.step)

    def _check_start(self, config: Namespace, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None:
            if config.init_from is not None:
                init_from(self.model, config.init_from, config.init_strict, config.get("weights_only") is not False)
            return
        if not {"optimizer_states", "lr_schedulers"} <= checkpoint.content.keys():
            raise UserError(
                f"{checkpoint.path} holds weights alone: start a new run with --init_from={checkpoint.path}"
            )
        if longer := checkpoint.finished(self.trainer):
            rank_zero_info(
                f"{checkpoint.path} is of a finished run, with {checkpoint.step} steps: there is nothing left to do; "
                f"{longer} to train longer"
            )
            sys.exit(0)
        self.checkpoint = None  # frees its memory

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """As Lightning does, also with a ``Schedule``, which depends on the length of the run, and rare validations."""
        if isinstance(lr_scheduler, Schedule):
            return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.make(lightning_module.trainer)}
        made = LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        if isinstance(lr_scheduler, lightning.pytorch.cli.ReduceLROnPlateau):  # its metric is there after a validation
            made["lr_scheduler"]["frequency"] = lightning_module.trainer.check_val_every_n_epoch or 1
        return made

    # --------------------------------------------------------------------------------- after the commands

    def after_fit(self) -> None:
        """Test the best checkpoint, or else the last, if ``--test_after_fit`` asks for it."""
        kept = best_or_last(self.trainer)
        if kept and self.config.fit.test_after_fit:
            # A callback that averages weights would have Lightning load those to train on, and not their average.
            weights = Checkpoint.read(kept, self.config.fit.weights_only is not False).weights
            self.model.load_state_dict(weights, strict=self.model.strict_loading)
            self.trainer.test(self.model, datamodule=self.datamodule)

    def after_predict(self) -> None:
        """List the files that could not be read; exit with code 1 if there are any."""
        broken = getattr(self.datamodule, "broken", None) or {}
        for path, reason in broken.items():
            print(f"{printable(path)}: {reason}", file=sys.stderr)
        if broken:
            total = len(broken) + len(self.datamodule.files)
            sys.exit(f"{self.project.name}: error: {len(broken)} of {total} files could not be predicted")


def _chosen_for_model(config: Namespace) -> dict[str, Any]:
    """Arguments that the command gives to the model although it could take them from the data."""
    options = config.model.get("init_args") or {}
    found = parameters(pkgutil.resolve_name(config.model.class_path))
    return {name: options[name] for name in FROM_DATA if options.get(name) not in (None, found.get(name))}


def _take_from_checkpoint(checkpoint: Checkpoint, section: Namespace | None, datamodule_class: Any) -> None:
    """Take options of the data module that are not given from the checkpoint: images to predict do not tell them.

    A data module lists them in ``from_checkpoint``.
    """
    if section is None:
        return
    path, options = section.get("class_path"), section.get("init_args", section)
    kind = pkgutil.resolve_name(path) if path else datamodule_class
    for name in getattr(kind, "from_checkpoint", ("num_classes",)):
        if name in options and options[name] is None:
            options[name] = checkpoint.hparam(name)


def _model_class(config: Namespace) -> type:
    """The model's class; for a function that makes it, the one that it says to return."""
    kind = pkgutil.resolve_name(config.model.class_path)
    return kind if isinstance(kind, type) else get_type_hints(kind)["return"]


def parameters(kind: Any) -> dict[str, Any]:
    """Arguments of a function, or of a class and of the classes that it inherits from, with their defaults."""
    makers: list[Any] = [kind]
    if isinstance(kind, type):
        makers = [base.__init__ for base in reversed(kind.__mro__)]  # type: ignore[misc]
    taken = [inspect.signature(maker).parameters for maker in makers]
    return {name: argument.default for each in taken for name, argument in each.items()}


# ------------------------------------------------------------------------------------------------- running


class _Builder(CLI):
    """Builds what ``predict`` needs from a checkpoint, without its dataset, and runs nothing."""

    linked = ()

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        options = self.config[self.subcommand].model.get("init_args") or {}
        for name in FROM_DATA:
            if self.checkpoint and name in options and name in self.checkpoint.hparams:
                options[name] = self.checkpoint.hparam(name)

    def export(self, **_: Any) -> None:
        """Replaces the trainer's."""


def build(project: Project, ckpt_path: str, args: Sequence[str] = ()) -> CLI:
    """Read a checkpoint and build its model, its data module and a trainer on one device.

    Args:
        project: the project that runs.
        ckpt_path: the checkpoint.
        args: options of ``predict``, such as a ``--config`` other than its run's.
    """
    alone = ("accelerator=auto", "devices=1", "num_nodes=1", "strategy=auto", "logger=false")  # wherever it was trained
    command = ["export", f"--ckpt_path={ckpt_path}", *(f"--trainer.{option}" for option in alone), *args]
    return run(project, with_config(command, project), cli_class=_Builder)


def run(project: Project, args: list[str], callbacks: Sequence[Callback] = (), cli_class: type[CLI] = CLI) -> CLI:
    """Run one command of ``CLI``, with callbacks in addition to those in its config."""
    sys.argv[1:] = args  # Lightning starts further processes with these
    command = args[0] if args and args[0] in COMMANDS else ""
    script = project.name.replace("_", "-")
    settings = {"allow_abbrev": False, "exit_on_error": False}  # a typo is not an abbreviation
    return cli_class(
        project=project,
        command=command,
        trainer_defaults={"callbacks": list(callbacks)},
        parser_kwargs={
            "prog": script if Path(sys.argv[0]).name == script else project.command(),
            "epilog": f"More commands, each with a --help: {', '.join(more_commands(project))}",
            **settings,
            **{name: {"usage": USAGE, **settings} for name in ([command] if command else COMMANDS)},
        },
        seed_everything_default=1,
    )


def more_commands(project: Project) -> dict[str, str]:
    """Commands that are not subcommands of ``LightningCLI``, with the module whose ``main`` runs each."""
    modules = {name: f"{ENGINE}.engine.{name}" for name in ("sweep", "folds", "serve")}
    return {**modules, **project.commands}


def main(name: str, data_module: str = "", default_config: str = "", commands: Mapping[str, str] | None = None) -> None:
    """Run the command in ``sys.argv``. A user's mistake ends in one message and exit code 1.

    Args:
        name: name of the package, as in ``python -m NAME``.
        data_module: import path of the data module to use if the config names none.
        default_config: config that ``fit`` uses if it exists and the command names neither a config nor a model.
        commands: further commands, with the module whose ``main(args, project)`` runs each.

    Example:
        >>> main("leaf_id", data_module="leaf_id.data.DataModule", default_config="configs/cnn.yaml")
    """
    project = Project(name, data_module, default_config, commands or {})
    for signum in (signal.SIGINT, signal.SIGTERM):  # until training starts: there is nothing to save
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    leave_out_noise()
    for stream in (sys.stdout, sys.stderr):  # characters that the terminal cannot show become question marks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # so that the installed script finds your modules, as python -m does
    try:
        _dispatch(project, expand_home(sys.argv[1:]) or ["--help"])
    except (UserError, MisconfigurationException) as error:
        sys.exit(f"{name}: error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"{name}: error: {error}; make room, then resume with --ckpt_path=last")


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
        run(project, with_config(args, project))
