"""``sweep``: hyperparameter search with Optuna. Every trial is a normal run of ``fit``.

The study is in a database, which processes and machines may share; a finished trial is never repeated.
"""

from __future__ import annotations

import argparse
import io
import math
import time
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import optuna
import yaml
from filelock import FileLock
from jsonargparse import get_loader
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from optuna.trial import TrialState
from rich.console import Console
from rich.markup import escape

from mnist_lit.engine.best import infer_mode
from mnist_lit.engine.cli import run
from mnist_lit.engine.divergence import DivergenceError
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.options import with_config
from mnist_lit.engine.project import Project
from mnist_lit.engine.run import LOGS, relative
from mnist_lit.engine.storage import atomic_write

HEARTBEAT = 5  # seconds; a process that is silent for twice as long counts as dead
DONE = TrialState.COMPLETE, TrialState.PRUNED

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


def read_space(path: Path) -> Space:
    """Read what to search: per option ``low`` and ``high``, optionally ``log: true`` or a ``step``, or ``choices``."""
    try:
        space = get_loader("yaml")(path.read_text(encoding="utf-8"))  # as a config: 1e-4 is a number
        suggest(optuna.create_study().ask(), space)
    except (AttributeError, KeyError, OSError, TypeError, ValueError, yaml.YAMLError) as error:
        expected = "options with {low: 0.1, high: 1.0, log: true} or {choices: [a, b]}"
        raise UserError(f"--space={path}: expected {expected} ({error})") from error
    return space


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


def sweep(project: Project, study: optuna.Study, space: Space, trials: int, fit: list[str], monitor: str) -> None:
    """Run trials until the study has enough, pruned ones included, by whichever of the processes that share it."""

    def objective(trial: optuna.Trial) -> float:
        settings = [f"{name}={value}" for name, value in suggest(trial, space).items()]
        Console().rule(escape(f"Trial {trial.number}: {', '.join(settings)}"))
        prune = Prune(trial, monitor)
        own = (f"run_name={study.study_name}-{trial.number}", "trainer.devices=1", "trainer.num_nodes=1")
        try:
            cli = run(project, ["fit", *fit, *(f"--{option}" for option in (*settings, *own))], [prune])
        except DivergenceError as error:
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("run", relative(cli.run.folder))
        trial.set_user_attr("config", cli.run.config.read_text(encoding="utf-8"))
        values = [value for value in prune.values if math.isfinite(value)]
        if prune.pruned or not values:
            raise optuna.TrialPruned
        return max(values) if study.direction.name == "MAXIMIZE" else min(values)

    while len(study.get_trials(False, DONE)) < trials:
        if len(study.get_trials(False, (*DONE, TrialState.RUNNING))) < trials:
            study.optimize(objective, n_trials=1)
        else:  # other processes run the last ones; those of a killed process are done again
            optuna.storages.fail_stale_trials(study)
            time.sleep(1)


def report(project: Project, study: optuna.Study, folder: Path) -> None:
    """Print the best trial, and write its config and Optuna's plots into the folder."""
    import matplotlib

    matplotlib.use("Agg")  # files, no windows
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    console = Console(soft_wrap=True, highlight=False, markup=False)
    best = study.best_trial
    settings = ", ".join(f"{name}={value}" for name, value in best.params.items())
    console.print(f"The best trial is {best.number}, {study.user_attrs['monitor']} {best.value:.4g}: {settings}")
    with atomic_write(folder / "best.yaml") as part:
        part.write_text(best.user_attrs["config"], encoding="utf-8")
    drawn: dict[str, Any] = {
        "history": plots.plot_optimization_history,
        "curves": plots.plot_intermediate_values,
        "slices": plots.plot_slice,
        "parallel": plots.plot_parallel_coordinate,
        "importances": plots.plot_param_importances,
    }
    for name, plot in drawn.items():
        with suppress(RuntimeError, ValueError):  # such as the importances of one trial
            plot(study)
            pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        pyplot.close("all")
    console.print(f"The plots are in {folder}, the best config, too. Train with it again:")
    console.print(f"  {project.command('fit', '--config', folder / 'best.yaml')}")


def main(args: list[str], project: Project) -> None:
    """Start a sweep or resume one."""
    parser = argparse.ArgumentParser(
        prog=project.command("sweep"),
        usage="%(prog)s --config FILE --space FILE [--trials N] [--KEY=VALUE ...]",
        description="Search hyperparameters with Optuna for the best --monitor. Options that are not listed here go to "
        "the fit of every trial, which runs on one device. The same command again resumes where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("--space", type=Path, required=True, help="what to search, see configs/sweep.yaml")
    parser.add_argument("--trials", type=int, help="in all, also those done before (default: 20, or the whole grid)")
    parser.add_argument(
        "--sampler",
        choices=["tpe", "random", "grid"],
        default="tpe",
        help="Optuna's (default: tpe, which learns); grid runs every combination of choices to its end",
    )
    parser.add_argument("--study", default="sweep", help="name of the study (default: sweep)")
    parser.add_argument(
        "--storage", help="any of Optuna's database addresses (default: a SQLite file in lightning_logs/STUDY)"
    )
    known, fit = parser.parse_known_args(args)
    folder = Path(LOGS) / known.study
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    space, trials = read_space(known.space), known.trials or 20
    # Optuna's samplers draw new seeds in every process: several of them share a study.
    options: dict[str, Any] = {"sampler": optuna.samplers.RandomSampler() if known.sampler == "random" else None}
    if known.sampler == "grid":
        if open_ranges := [name for name, setting in space.items() if "choices" not in setting]:
            raise UserError(f"--sampler=grid: {open_ranges[0]} needs choices")
        grid = {name: setting["choices"] for name, setting in space.items()}
        options = {"sampler": optuna.samplers.GridSampler(grid), "pruner": optuna.pruners.NopPruner()}
        size = math.prod(map(len, grid.values()))
        trials = min(known.trials or size, size)
    _, *fit = with_config(["fit", *fit], project)
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        run(project, ["fit", *fit, "--print_config"])  # a mistake in the options ends the sweep before its first trial
    config = yaml.safe_load(printed.getvalue())
    options["direction"] = f"{infer_mode(config['monitor'], config['mode'])}imize"
    folder.mkdir(parents=True, exist_ok=True)
    storage = known.storage or f"sqlite:///{folder}/study.db"
    with FileLock(folder / ".lock"):  # Optuna's tables cannot be made by two processes at once
        database = optuna.storages.RDBStorage(storage, heartbeat_interval=HEARTBEAT)
        study = optuna.create_study(storage=database, study_name=known.study, load_if_exists=True, **options)
    if study.user_attrs.get("space", space) != space:
        raise UserError(f"the study {known.study} has another space; name a new one with --study")
    study.set_user_attr("space", space)
    study.set_user_attr("monitor", config["monitor"])
    sweep(project, study, space, trials, fit, config["monitor"])
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise UserError(f"none of {trials} trials came to an end: every one diverged or was pruned")
    report(project, study, folder)
