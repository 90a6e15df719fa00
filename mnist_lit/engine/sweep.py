"""``sweep``: hyperparameter search with Optuna. Every trial is a normal run of ``fit``.

The study is a queue of trials in a database, which processes and machines may share. Each trial is taken by one of
them, and queued again if that one dies; a finished trial is never repeated.
"""

import argparse
import io
import itertools
import math
import time
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import matplotlib
import optuna
import yaml
from filelock import FileLock
from jsonargparse import get_loader
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from matplotlib import pyplot
from optuna.trial import TrialState
from optuna.visualization import matplotlib as plots
from rich.console import Console
from rich.markup import escape

from mnist_lit.engine.best import infer_mode
from mnist_lit.engine.cli import run
from mnist_lit.engine.divergence import DivergenceError
from mnist_lit.engine.errors import UserError, no_pipe
from mnist_lit.engine.options import with_config
from mnist_lit.engine.project import Project
from mnist_lit.engine.run import LOGS, relative
from mnist_lit.engine.storage import atomic_write

HEARTBEAT = 15  # seconds; a process that is silent for twice as long counts as dead
DONE = TrialState.COMPLETE, TrialState.PRUNED
AHEAD = TrialState.WAITING, TrialState.RUNNING
PLOTS = "optimization_history", "intermediate_values", "slice", "parallel_coordinate", "param_importances"

Space = dict[str, dict[str, Any]]  # by option: {low: 0.1, high: 1.0, log: true} or {choices: [a, b]}


class Prune(Callback):
    """Report the metric of every validation to Optuna, and stop a run that falls behind."""

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor
        self.values, self.pruned = list[float](), False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            raise UserError(f"--monitor={self.monitor}: the model logs {', '.join(trainer.callback_metrics)}")
        self.values.append(trainer.callback_metrics[self.monitor].item())
        self.trial.report(self.values[-1], len(self.values))
        self.pruned = trainer.should_stop = self.trial.should_prune()


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Have Optuna pick a value for each option."""
    picked: dict[str, Any] = {}
    for name, setting in space.items():
        if "choices" in setting:
            picked[name] = trial.suggest_categorical(name, setting["choices"])
        else:
            whole = isinstance(setting["low"], int) and isinstance(setting["high"], int)
            picked[name] = (trial.suggest_int if whole else trial.suggest_float)(name, **setting)
    return picked


class QueueEmptyError(Exception):
    """Another process has taken the last trial."""


def enqueue(study: optuna.Study, trials: int, grid: list[dict[str, Any]] | None = None) -> None:
    """Queue what the study lacks of a number of trials; only those of a grid have their settings already."""
    known = study.get_trials(False, (*DONE, *AHEAD))
    queued = [trial.user_attrs.get("queued") for trial in known]
    lacking = [{}] * trials if grid is None else [settings for settings in grid if settings not in queued]
    for settings in lacking[: max(trials - len(known), 0)]:
        study.enqueue_trial(settings, user_attrs={"queued": settings})


def sweep(project: Project, study: optuna.Study, space: Space, fit: list[str], monitor: str) -> None:
    """Run the trials in the queue, and wait for those that other processes run, in case one of them dies."""

    def objective(trial: optuna.Trial) -> float:
        if "queued" not in trial.user_attrs:
            raise QueueEmptyError
        settings = [f"{name}={value}" for name, value in suggest(trial, space).items()]
        Console().rule(escape(f"Trial {trial.number}: {', '.join(settings)}"))
        prune = Prune(trial, monitor)
        settings += [f"run_name={study.study_name}-{trial.number}", "trainer.devices=1", "trainer.num_nodes=1"]
        try:
            cli = run(project, ["fit", *fit, *(f"--{setting}" for setting in settings)], [prune])
        except DivergenceError as error:
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("run", relative(cli.run.folder))
        trial.set_user_attr("config", cli.run.config.read_text(encoding="utf-8"))
        values = [value for value in prune.values if math.isfinite(value)]
        if prune.pruned or not values:
            raise optuna.TrialPruned
        return max(values) if study.direction.name == "MAXIMIZE" else min(values)

    while ahead := study.get_trials(False, AHEAD):
        if any(trial.state == TrialState.WAITING for trial in ahead):
            study.optimize(objective, n_trials=1, catch=QueueEmptyError)
        else:
            time.sleep(1)
            optuna.storages.fail_stale_trials(study)


def report(project: Project, study: optuna.Study, monitor: str, folder: Path) -> None:
    """Print the best trial, and write its config and Optuna's plots into the folder."""
    if not study.get_trials(False, [TrialState.COMPLETE]):
        raise UserError("no trial came to an end: every one diverged or was pruned")
    best = study.best_trial
    settings = ", ".join(f"{name}={value}" for name, value in best.params.items())
    print(f"The best trial is {best.number}, {monitor} {best.value:.4g}: {settings}")
    with atomic_write(folder / "best.yaml") as part:
        part.write_text(best.user_attrs["config"], encoding="utf-8")
    matplotlib.use("Agg")  # files, no windows
    for name in PLOTS:
        with suppress(RuntimeError, ValueError):  # such as the importances of one trial
            getattr(plots, f"plot_{name}")(study)
            pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        pyplot.close("all")
    print(f"The plots are in {folder}, the best config, too. Train with it again:")
    print(f"  {project.command('fit', '--config', folder / 'best.yaml')}")


def main(args: list[str], project: Project) -> None:
    """Start a sweep or resume one."""
    description = """Search hyperparameters with Optuna for the best --monitor. Options that are not listed here go to
        the fit of every trial, which runs on one device. The same command again resumes where it stopped."""
    parser = argparse.ArgumentParser(project.command("sweep"), description=description, allow_abbrev=False)
    parser.add_argument("--space", type=Path, required=True, help="what to search, see configs/sweep.yaml")
    parser.add_argument("--trials", type=int, help="in all, also those done before (default: 20, or the whole grid)")
    how = "tpe learns from the trials before (default); grid runs every combination of choices to its end"
    parser.add_argument("--sampler", choices=["tpe", "grid"], default="tpe", help=how)
    parser.add_argument("--study", default="sweep", help="name of the study (default: sweep)")
    parser.add_argument("--storage", help="a database's address for Optuna (default: SQLite in lightning_logs/STUDY)")
    known, fit = parser.parse_known_args(args)
    folder = Path(LOGS) / known.study
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        space: Space = get_loader("yaml")(no_pipe(known.space).read_text("utf-8"))  # as a config: 1e-4 is a number
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--space={known.space}: {error}") from error
    grid, options = None, dict[str, Any]()
    if known.sampler == "grid":
        choices = (setting["choices"] for setting in space.values())
        grid = [dict(zip(space, picked, strict=True)) for picked in itertools.product(*choices)]
        options = {"pruner": optuna.pruners.NopPruner()}
    _, *fit = with_config(["fit", *fit], project)
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        run(project, ["fit", *fit, "--print_config"])  # a mistake in the options ends the sweep before its first trial
    config = yaml.safe_load(printed.getvalue())
    options["direction"] = f"{infer_mode(config['monitor'], config['mode'])}imize"
    folder.mkdir(parents=True, exist_ok=True)
    storage = known.storage or f"sqlite:///{folder}/study.db"
    with FileLock(folder / ".lock"):  # Optuna's tables cannot be made by two processes at once
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback()
        database = optuna.storages.RDBStorage(
            storage, heartbeat_interval=HEARTBEAT, heartbeat_stale_trial_callback=retry
        )
        study = optuna.create_study(storage=database, study_name=known.study, load_if_exists=True, **options)
        enqueue(study, known.trials or (20 if grid is None else len(grid)), grid)
    sweep(project, study, space, fit, config["monitor"])
    report(project, study, config["monitor"], folder)
