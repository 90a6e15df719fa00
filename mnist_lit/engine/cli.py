"""The command line: ``fit``, ``validate``, ``test``, ``predict`` and ``export`` on ``LightningCLI``."""

from __future__ import annotations

import errno
import io
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import jsonargparse._typehints as typehints
import lightning.pytorch
import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback, ModelSummary, WeightAveraging
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from mnist_lit.engine import PROJECT
from mnist_lit.engine.arguments import USAGE, join_values, with_config, with_homes
from mnist_lit.engine.callbacks import ModelTable, NoProfiler, ProgressBar, StopOnNonFinite
from mnist_lit.engine.checkpoints import (
    DEFAULT_MONITOR,
    EXCEPTION,
    BestCheckpoint,
    CheckpointFiles,
    LastCheckpoint,
    RandomState,
    best_checkpoint,
    newest_checkpoint,
    no_such_checkpoint,
    read_checkpoint,
    read_weights,
)
from mnist_lit.engine.dashboards import Dashboard
from mnist_lit.engine.errors import CheckpointError, ConfigurationError, UserError
from mnist_lit.engine.export import Trainer
from mnist_lit.engine.finetuning import first_convolution, rename, to_channels
from mnist_lit.engine.messages import full_disk, leave_out_noise, misfit, raised_by_libraries
from mnist_lit.engine.metrics import Metrics
from mnist_lit.engine.parser import Parser, did_you_mean, options_of
from mnist_lit.engine.predictions import PredictionsFile
from mnist_lit.engine.provenance import Provenance
from mnist_lit.engine.resume import ResumeGuard, different_options, longer_if_finished, restored_options
from mnist_lit.engine.runs import LOGS, Run, RunConfig, as_list, loggers_of, relative
from mnist_lit.engine.schedules import Schedule
from mnist_lit.engine.schema import Print, print_completion, print_schema
from mnist_lit.engine.storage import printable
from mnist_lit.engine.threads import set_threads

LINKED = ("num_classes", "num_pixels", "channels", "task")  # what a model may take from the data module
SCRIPT = PROJECT.replace("_", "-")

LOWER_IS_BETTER = "loss error err mse rmse mae mape nll perplexity wer cer fid ece hamming".split()
HIGHER_IS_BETTER = """acc accuracy f1 f1score precision recall specificity auroc auc ap map iou jaccard dice r2
r2score psnr ssim bleu rouge kappa mcc pearson spearman""".split()


def infer_mode(monitor: str, mode: str) -> str:
    """Whether a lower or a higher value of a metric is better.

    Args:
        monitor: name of the metric.
        mode: ``min``, ``max``, or ``auto`` to tell it from the name.

    Raises:
        ConfigurationError: if the name does not tell.

    Example:
        >>> infer_mode("val/acc", "auto")
        'max'
    """
    words = re.findall(r"[a-z]+\d*", monitor.lower())
    for known, answer in ((LOWER_IS_BETTER, "min"), (HIGHER_IS_BETTER, "max")):
        if mode == "auto" and any(word in known for word in words):
            mode = answer
    if mode == "auto":
        raise ConfigurationError(f"--monitor={monitor}: is lower or higher better? Say --mode=min or --mode=max")
    return mode


def mistake_in_trainer(options: Any) -> str:
    """What is wrong with the options of a trainer before one can be made; nothing if all is well."""
    if not isinstance(options, (dict, Namespace)):
        found = "is empty" if options is None else f"is {options!r}"
        return f"trainer: {found} in the config; leave the line out, or give it options"
    if options["barebones"]:
        return (
            "--trainer.barebones leaves out logger, checkpoints, bar and every callback, which is all that this "
            "command adds to a loop; leave it out, or use Trainer(barebones=True) in a script of your own"
        )
    return ""


class CLI(LightningCLI):
    """``LightningCLI`` that keeps the best and the last checkpoint, finds mistakes early and ends with a table."""

    default_data_module = ""
    # Lightning's, and Trainer.export; with the arguments of each that are no options.
    commands: ClassVar = {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}
    linked: tuple[str, ...] = LINKED
    command = ""  # of this process; only its options are collected, because those of each take 0.1 s
    more_commands: tuple[str, ...] = ("sweep",)  # that are no subcommands of LightningCLI
    run = Run()  # that the command makes or resumes
    ckpt_path: str | None = None
    checkpoint: dict[str, Any] | None = None  # its content
    _automatic: Sequence[tuple[Namespace, str | None]] = ()  # options with monitor: auto, and their mode
    _restored: dict[str, Any]  # options that a resumed run takes from its checkpoint
    _any_seed = False  # whether the seed is chosen at random
    _started = 0.0  # when fit began

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command of this process, if it is known, else all."""
        return {name: skipped for name, skipped in CLI.commands.items() if CLI.command in (name, "")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        completion = partial(print_completion, commands=[*self.commands, *self.more_commands])
        for name, printed, what in (
            ("print_schema", print_schema, "a JSON schema of configs"),
            ("print_completion", completion, "bash completion"),
        ):
            parser.add_argument(f"--{name}", action=Print, const=printed, help=f"Print {what}.")
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
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.link_arguments("monitor", "best_checkpoint.monitor")
        parser.link_arguments("mode", "best_checkpoint.mode")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(Dashboard, "dashboard")
        if self.default_data_module:
            parser.set_defaults({"data": {"class_path": self.default_data_module}})
        for name in self.linked:  # ignored if the model or the data module has none
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        # LightningCLI would now read the checkpoint and let its hyperparameters override the config, class names from
        # an untrusted file included. The config decides what is built, so the path is put back after that.
        config = with_homes(self.config[self.config.subcommand])
        self.ckpt_path, config.ckpt_path = config.get("ckpt_path"), None
        self._restored, self._any_seed = {}, config.seed_everything is True

    def before_instantiate_classes(self) -> None:
        config, parser = self.config[self.subcommand], self._parser(self.subcommand)
        if config.get("lr_scheduler") and not config.get("optimizer"):
            parser.error("--lr_scheduler changes nothing without --optimizer: give both")
        if mistake := mistake_in_trainer(config.trainer):
            parser.error(mistake)
        if self.subcommand == "fit":
            config.best_checkpoint.mode = infer_mode(config.monitor, config.mode)
            self._fill_in_monitor(config)
            self._restored = restored_options(config)
            if self._any_seed:
                self._restored.pop("seed_everything")
        self._read_checkpoint(config)
        resumed = self.checkpoint if self.subcommand == "fit" else None
        leaves = self.subcommand != "export" and not config.trainer.fast_dev_run
        run = Run.of_checkpoint(self.ckpt_path) if leaves and resumed and self.ckpt_path else None
        # Not in the run's config.yaml, from which other runs are started.
        name, config.run_name = config.run_name, None
        if run is None and leaves:
            run = Run.create(Path(config.trainer.default_root_dir or "."), name)
        self.run = run or Run()
        if self.subcommand == "fit":
            self.run.lock()
        if self.run.exists:
            self.run.direct(loggers_of(config), resumed)
        # A run's config.yaml is what it was started with; what it was resumed with is kept beside it.
        step = f"-from-step-{resumed['global_step']}" if resumed else ""
        self.save_config_kwargs = {"config_filename": f"config{step}.yaml", "save_to_log_dir": False}

    def _fill_in_monitor(self, config: Namespace) -> None:
        """Hand the metric that decides to every callback and scheduler with ``monitor: auto``."""
        self._automatic = []
        for chosen in (*as_list(config.trainer.callbacks), config.get("lr_scheduler")):
            options = chosen.get("init_args") if isinstance(chosen, Namespace) else None
            if options and options.get("monitor") == "auto":
                self._automatic.append((options, options.get("mode")))
                options["monitor"], options["mode"] = config.monitor, config.best_checkpoint.mode

    def _read_checkpoint(self, config: Namespace) -> None:
        parser = self._parser(self.subcommand)
        if self.subcommand == "fit" and self.ckpt_path and config.trainer.fast_dev_run:
            raise ConfigurationError(
                "--trainer.fast_dev_run makes its few steps from the start and resumes nothing; leave out --ckpt_path"
            )
        if self.subcommand == "fit" and self.ckpt_path == "last":
            self.ckpt_path = self._last_checkpoint(config)
        if self.ckpt_path is None:
            if self.subcommand == "export":
                parser.error("--ckpt_path: export needs the path of a checkpoint")
            if self.subcommand != "fit":
                rank_zero_warn(f"{self.subcommand} without --ckpt_path: the model's weights are random ones")
        elif self.ckpt_path in ("best", "last"):
            parser.error(f"--ckpt_path={self.ckpt_path}: {self.subcommand} needs the path of a checkpoint")
        elif "://" not in self.ckpt_path and self.ckpt_path != "hpc":
            if not Path(self.ckpt_path).exists():
                parser.error(no_such_checkpoint("ckpt_path", self.ckpt_path))
            self.checkpoint = read_checkpoint(self.ckpt_path, config.get("weights_only") is not False)
            self._take_data_options(config)
            if self.subcommand == "fit" and (threads := self.checkpoint.get("num_threads")):
                self._keep_threads(config, threads)
            if self.subcommand == "fit" and Path(self.ckpt_path).name == EXCEPTION:
                raise CheckpointError(
                    f"{self.ckpt_path} is of a step that was broken off by an error, which is no state to resume from; "
                    "resume with --ckpt_path=last, or start a new run from its weights with "
                    f"--init_from={self.ckpt_path}"
                )
        config.ckpt_path = self.ckpt_path

    def _keep_threads(self, config: Namespace, threads: int) -> None:
        if config.num_threads not in (None, threads):
            rank_zero_warn(
                f"the checkpoint is of a run with --num_threads={threads}, this one has {config.num_threads}: it "
                "resumes, but the last bits of its results may differ from those of the uninterrupted run"
            )
        config.num_threads = config.num_threads or threads

    def _last_checkpoint(self, config: Namespace) -> str | None:
        path = newest_checkpoint(Path(config.trainer.default_root_dir or "."), config.model.class_path)
        if path is None:
            rank_zero_info("--ckpt_path=last: there is no checkpoint yet, this run starts from scratch")
            return None
        rank_zero_info(f"--ckpt_path=last: resuming from {path}")
        return str(path)

    def _take_data_options(self, config: Namespace) -> None:
        """Take from the checkpoint the options of the data that belong to the model: images to predict have no labels
        to count. A data module names them in ``from_checkpoint``.
        """
        checkpoint = self.checkpoint or {}
        known = {**checkpoint.get("hyper_parameters", {}), **checkpoint.get("datamodule_hyper_parameters", {})}
        options = config.data.get("init_args") or {}
        for name in getattr(typehints.import_object(config.data.class_path), "from_checkpoint", ("num_classes",)):
            if known.get(name) is not None and name in options and options[name] is None:
                options[name] = known[name]

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # What Lightning says of a logger's library; jsonargparse says beside it what else it has tried.
            if missing := re.search(r"Requirement '.*' not met\..*", str(error)):
                raise ConfigurationError(missing[0]) from error
            cause = error.__cause__ or error.__context__
            if cause and raised_by_libraries(cause.__traceback__, inside="lightning"):
                raise ConfigurationError(str(cause)) from error
            raise
        # Every model is offered what the data know; its hyperparameters are those that it takes.
        taken = options_of(type(self.model))
        for name in LINKED:
            if name not in taken:
                self.model.hparams.pop(name, None)
        config = self.config[self.subcommand]  # in the run's config.yaml, too
        config.num_threads = set_threads(config.num_threads, self.trainer.num_devices)

    def instantiate_trainer(self, **kwargs: Any) -> lightning.pytorch.Trainer:
        config, init = self.config[self.subcommand].trainer, self.config_init[self.subcommand].trainer
        for options, mode in self._automatic:  # so that the run's config.yaml can be used with another --monitor
            options["monitor"], options["mode"] = "auto", mode
        if self.run.exists:
            kwargs["default_root_dir"] = str(self.run.root)
            if config.logger in (None, True):
                resumes = self.subcommand == "fit" and self.checkpoint is not None
                kwargs["logger"] = TensorBoardLogger(
                    self.run.root,
                    LOGS,
                    version=self.run.name,
                    # What was logged after the checkpoint makes room for what is logged again.
                    purge_step=self.checkpoint["global_step"] if resumes and self.checkpoint else None,
                    default_hp_metric=False,
                )
        if config.enable_checkpointing is False:
            parser = self._parser(self.subcommand)
            parser.callback_keys = [key for key in parser.callback_keys if not key.endswith("_checkpoint")]
        plugins, callbacks = as_list(init.plugins), as_list(init.callbacks)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, CheckpointFiles()]
        if config.enable_progress_bar is not False and not any(
            isinstance(callback, AnyProgressBar) for callback in callbacks
        ):
            callbacks = [*callbacks, ProgressBar()]
        if config.enable_model_summary is not False and not any(isinstance(c, ModelSummary) for c in callbacks):
            callbacks = [*callbacks, ModelTable()]
        if config.profiler is None:
            kwargs["profiler"] = NoProfiler()
        if self.subcommand == "predict":
            callbacks = [*callbacks, PredictionsFile()]
        if self.subcommand == "fit":
            callbacks = [*callbacks, ResumeGuard(self._restored)]
        if not any(isinstance(callback, Metrics) for callback in as_list(self.model.configure_callbacks())):
            callbacks = [*callbacks, Metrics()]  # for steps that return the outputs it needs
        return super().instantiate_trainer(**kwargs, callbacks=[self.run, Provenance(), *callbacks])

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except RuntimeError as error:
            net = getattr(self.model, "net", None)
            if net is not None and self.trainer.global_step == 0 and (message := misfit(error, net)):
                raise ConfigurationError(f"--model.net: {message}") from error
            raise

    def after_instantiate_classes(self) -> None:
        """Compare the checkpoint with the model, before anything takes time.

        Raises:
            CheckpointError: naming what differs.
        """
        if self.subcommand == "fit" and self.config.fit.test_after_fit:
            for name, owner in (("test_step", self.model), ("test_dataloader", self.datamodule)):
                if not is_overridden(name, owner):
                    raise ConfigurationError(f"--test_after_fit=true: {type(owner).__name__} has no {name}")
        if self.checkpoint is None:
            self._init_weights()
            return
        if self.subcommand == "fit":
            name = "steps_per_execution"
            steps = self.checkpoint.get("hyper_parameters", {}).get(name, 1)
            if steps != getattr(self.model, name, 1):
                raise CheckpointError(
                    f"{self.ckpt_path} is of a run with {name}={steps}, which counts batches differently; "
                    f"resume with --model.{name}={steps}"
                )
        checkpoint, self.checkpoint = self.checkpoint, None  # which may be large
        misfits = self._misfits(checkpoint["state_dict"]) if self.model.strict_loading else []
        for name, there, here in misfits:
            raise CheckpointError(
                f"{self.ckpt_path} is not of this model: {name} has the shape {there} there "
                f"and {here} in {type(self.model).__name__}; the config.yaml in the folder of "
                "its run is the one that fits"
            )
        if different := different_options(checkpoint.get("options", {}), self._restored):
            raise CheckpointError(
                f"{self.ckpt_path} resumes with the options of its run, and not with {', '.join(different)}; "
                f"leave them out, or start a new run from its weights with --init_from={self.ckpt_path}"
            )
        if self.subcommand == "fit" and (longer := longer_if_finished(checkpoint, self.trainer)):
            rank_zero_info(
                f"{self.ckpt_path} is of a finished run, with {checkpoint['global_step']} steps: there is nothing left "
                f"to do; {longer} to train longer"
            )
            sys.exit(0)
        if self.subcommand == "fit" and self.run.exists:
            self.run.keep_table(checkpoint["global_step"])

    def _misfits(self, theirs: Mapping[str, Tensor]) -> list[tuple[str, Any, Any]]:
        """Names of weights whose shapes differ, with the shape there and here; None where there is none."""
        ours = self.model.state_dict()
        shapes = {
            name: tuple(tuple(w[name].shape) if name in w else None for w in (theirs, ours))
            for name in sorted(ours.keys() | theirs.keys())
            if not (name in ours and name in theirs and is_lazy(ours[name]))
        }
        return [(name, there, here) for name, (there, here) in shapes.items() if there != here]

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Lightning's, and schedules that depend on the length of the run."""
        if isinstance(lr_scheduler, Schedule):
            return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.make(lightning_module.trainer)}
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)

    def _init_weights(self) -> None:
        """Start from the weights of another run, if asked to."""
        config = self.config[self.subcommand]
        path = config.init_from
        if self.subcommand != "fit" or path is None:
            return
        if not Path(path).exists():
            raise CheckpointError(no_such_checkpoint("init_from", path))
        weights = rename(read_weights(path, config.get("weights_only") is not False), self.model.state_dict())
        adapted = [] if config.init_strict else self._adapt_channels(weights)
        misfits = self._misfits(weights)
        left_out = {name for name, _, _ in misfits}
        if not weights.keys() & self.model.state_dict().keys() - left_out:
            raise CheckpointError(
                f"--init_from={path}: none of its weights fits {type(self.model).__name__}; there are "
                f"{_briefly(weights, 3)} there and {_briefly(self.model.state_dict(), 3)} here"
            )
        listed = _briefly([f"{name} ({there} there, {here} here)" for name, there, here in misfits])
        if misfits and config.init_strict:
            raise CheckpointError(
                f"--init_from={path} does not fit {type(self.model).__name__}: {listed}; "
                "--init_strict=false starts from those weights that do"
            )
        self.model.load_state_dict({k: v for k, v in weights.items() if k not in left_out}, strict=False)
        done = [f"Started from the weights of {path}", *adapted, *([f"without {listed}"] if misfits else [])]
        rank_zero_info(", ".join(done))

    def _adapt_channels(self, weights: dict[str, Tensor]) -> list[str]:
        """Adapt weights of the first convolution that are for images of other channels; says which in words."""
        layer, conv = first_convolution(self.model)
        theirs = weights.get(name := f"{layer}.weight")
        if conv is None or theirs is None or theirs.shape == conv.weight.shape or conv.groups > 1:
            return []
        adapted = to_channels(theirs, conv.in_channels) if theirs.ndim == 4 else theirs
        if adapted.shape != conv.weight.shape:
            return []
        weights[name] = adapted
        return [f"{name} from {theirs.shape[1]} to {conv.in_channels} channels"]

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
        sys.exit(f"{PROJECT}: error: {len(broken)} of {total} files could not be predicted")

    def _best_or_last(self) -> str:
        best = getattr(best_checkpoint(self.trainer), "best_model_path", "")
        last = self.run.checkpoints / "last.ckpt" if self.run.exists else Path()
        return best or (str(last) if last.is_file() else "")

    def before_fit(self) -> None:
        self._started = time.monotonic()

    def after_fit(self) -> None:
        """Test, if asked to; print the final metrics and the commands that come next."""
        trainer, run, console = self.trainer, self.run, Console()
        best, epochs, metrics = self._best_or_last(), trainer.current_epoch, dict(trainer.callback_metrics)
        kept = best_checkpoint(trainer)
        # The test restores the callbacks as they were when the best checkpoint was written.
        best_epoch, best_metrics = getattr(kept, "best_epoch", 0), dict(getattr(kept, "best_metrics", {}))
        if best and self.config.fit.test_after_fit:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):
                    callback._average_model = None  # with it the raw weights are loaded, to train on
            trainer.test(self.model, datamodule=self.datamodule, ckpt_path=best, verbose=False)
            metrics |= trainer.callback_metrics
        if not trainer.is_global_zero:
            return
        dataset = getattr(self.datamodule, "dataset_used", type(self.datamodule).__name__)
        taken = timedelta(seconds=round(time.monotonic() - self._started))
        length = f" after {epochs} epoch{'s' * (epochs != 1)}" if epochs else ""  # not known here after ddp_spawn
        title = f"{type(self.model).__name__} on {dataset}{length}, {taken}"
        columns = ["last", *([f"best: epoch {best_epoch}"] if best_metrics else [])]
        table = Table("metric", *(Column(name, justify="right") for name in columns), title=escape(title))
        table.min_width = len(title) + 2
        for name, value in sorted(metrics.items()):
            values = [value, *([best_metrics.get(name)] if best_metrics else [])]
            table.add_row(escape(name), *map(_number, values))
        console.print(table)
        if not best:
            return
        commands = [command for logger in trainer.loggers if (command := _viewer(logger))]
        test = [
            "python",
            "-m",
            PROJECT,
            "test",
            "--config",
            relative(run.config),
            "--ckpt_path",
            relative(best),
        ]
        console.print(f"The run is in {relative(run.folder)}. What comes next:", highlight=False, markup=False)
        for command in (*commands, test):
            console.print(f"  {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)


def _number(value: Any) -> str:
    """Of a metric, for the table; nothing for one that is not there."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _briefly(names: Collection[str], most: int = 8) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(islice(names, most)) or "none") + more


def _viewer(logger: Logger) -> list[str]:
    """The command that shows what a logger has logged; none for one that shows it by itself."""
    if isinstance(logger, TensorBoardLogger):
        return ["tensorboard", "--logdir", relative(logger.root_dir)]
    if isinstance(logger, MLFlowLogger):
        return ["mlflow", "ui", "--backend-store-uri", str(logger._tracking_uri)]
    if isinstance(logger, WandbLogger) and logger._offline:
        return ["wandb", "sync", relative(Path(logger.experiment.dir).parent)]
    return []


class _Predicting(CLI):
    """Makes what ``predict`` runs with, out of a checkpoint and without its dataset, and runs nothing."""

    linked = ()  # to the data module, which would open its dataset
    content: dict[str, Any]  # of the checkpoint

    def _read_checkpoint(self, config: Namespace) -> None:
        super()._read_checkpoint(config)
        options, known = config.model.get("init_args") or {}, (self.checkpoint or {}).get("hyper_parameters", {})
        for name in LINKED:
            if name in options and name in known:
                options[name] = known[name]

    def after_instantiate_classes(self) -> None:
        self.content = self.checkpoint or {}
        super().after_instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(ckpt_path: str, args: Sequence[str] = ()) -> tuple[CLI, dict[str, Any]]:
    """Make the model and the data module of a checkpoint.

    Args:
        ckpt_path: the checkpoint.
        args: further options of ``predict``, such as another ``--config`` than its run's.

    Returns:
        what has the model, the data module and a trainer of one device, and the checkpoint's content.
    """
    alone = ("accelerator=auto", "devices=1", "num_nodes=1", "strategy=auto", "logger=false")  # wherever it was trained
    further = [*join_values(args), *(f"--trainer.{option}" for option in alone)]
    command = with_config(["export", f"--ckpt_path={ckpt_path}", *further])
    built = run(command, cli_class=_Predicting)
    assert isinstance(built, _Predicting)
    return built, built.content


_keep_accepted = typehints.discard_init_args_on_class_path_change


def _keep_related(parser: Any, previous: Any, value: Any) -> None:
    """Give a model or a data module the options of another class only if one of the two inherits from the other.

    jsonargparse hands on every option of the same name: ``--data=my_data.MyData`` would silently take the
    ``batch_size`` that a config has chosen for another data module.
    """
    if previous and previous.get("init_args") and previous["class_path"] != value["class_path"]:
        before, now = (typehints.import_object(spec["class_path"]) for spec in (previous, value))
        if issubclass(now, (LightningModule, LightningDataModule)) and not (
            issubclass(before, now) or issubclass(now, before)
        ):
            previous["init_args"] = Namespace()
    _keep_accepted(parser, previous, value)


def run(args: list[str], callbacks: Sequence[Callback] = (), cli_class: type[CLI] = CLI) -> CLI:
    """Run one command of ``LightningCLI``.

    Args:
        args: as on the command line, the command first.
        callbacks: in addition to those of the config.
        cli_class: to run it with.
    """
    sys.argv[1:] = args  # from which Lightning starts further processes
    CLI.command = args[0] if args and args[0] in CLI.commands else ""
    return cli_class(
        LightningModule,
        LightningDataModule,
        save_config_callback=RunConfig,
        trainer_class=Trainer,
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        # An error is one message and not a screenful of options; a typo is no abbreviation.
        parser_kwargs={
            "prog": SCRIPT if Path(sys.argv[0]).name == SCRIPT else f"python -m {PROJECT}",
            "epilog": f"More commands, each with a --help: {', '.join(CLI.more_commands)}",
            "allow_abbrev": False,
            **{command: {"usage": USAGE} for command in CLI.subcommands()},
        },
        seed_everything_default=1,
        trainer_defaults={"callbacks": [StopOnNonFinite(), RandomState(), *callbacks]},
    )


def main(data_module: str = "", default_config: str = "", commands: Mapping[str, str] | None = None) -> None:
    """Run the command in ``sys.argv``. A user's mistake ends in one message and exit code 1 or 2.

    Args:
        data_module: import path of the data module to use where the config names none.
        default_config: that ``fit`` takes if it is there and the command names neither a config nor a model.
        commands: further commands, by the module whose ``main(args)`` runs each.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):  # until training starts: there is nothing to save
        signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
    leave_out_noise()
    typehints.discard_init_args_on_class_path_change = _keep_related
    # Once glibc has seen a block of this size freed, it keeps up to twice as much memory for later blocks. Before, it
    # may return to the system after every batch what the next batch then waits for.
    torch.empty(8 * 2**20, dtype=torch.uint8)
    for stream in (sys.stdout, sys.stderr):  # what the terminal cannot show is a question mark, and no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if (here := os.getcwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # your own modules, also for the script, as for python -m
    CLI.default_data_module = data_module
    modules = {"sweep": f"{PROJECT}.engine.sweep", **(commands or {})}
    CLI.more_commands = tuple(modules)
    try:
        command, *args = with_homes(sys.argv[1:]) or [""]
        names = [*CLI.commands, *modules]
        if not command.startswith("-") and command not in names:
            wrong = f"no command {command!r}{did_you_mean(command, names)}" if command else "no command is given"
            raise ConfigurationError(f"{wrong}; the commands are {', '.join(names)}")
        if command.startswith("-") and not re.match(r"-[ch]|--(config|help|print_config)\b", command):
            for later in args:
                if later in names:
                    raise ConfigurationError(f"the command comes first, and then its options: {later} {command}")
        if command == "sweep" and find_spec("optuna") is None:
            raise ConfigurationError(f"sweep needs optuna: pip install '{PROJECT}[sweep]'")
        if command in modules:
            import_module(modules[command]).main(args)
        else:
            run(with_config([command, *join_values(args)], default_config))
    except (UserError, MisconfigurationException) as error:
        if isinstance(error, MisconfigurationException) and not raised_by_libraries(error.__traceback__):
            raise
        sys.exit(f"{PROJECT}: error: {error}")
    except (RuntimeError, TypeError, ValueError) as error:
        if not raised_by_libraries(error.__traceback__, inside="lightning"):
            raise
        sys.exit(f"{PROJECT}: error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"{PROJECT}: error: {full_disk(error)}")
