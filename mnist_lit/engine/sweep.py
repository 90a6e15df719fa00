"""``sweep``: hyperparameter search with Optuna. Every trial is a normal run of ``fit``.

The study is in a database, which processes and machines may share; a finished trial is never repeated.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import time
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import optuna
import yaml
from jsonargparse import get_loader
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from mnist_lit.engine.best import infer_mode
from mnist_lit.engine.cli import CLI, run
from mnist_lit.engine.divergence import DivergenceError
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.options import with_config
from mnist_lit.engine.project import Project
from mnist_lit.engine.run import LOGS, relative
from mnist_lit.engine.storage import atomic_write

HEARTBEAT = 5  # seconds; a process that is silent for twice as long counts as dead
DONE = TrialState.COMPLETE, TrialState.PRUNED

Space = dict[str, BaseDistribution]


class TrialBudgetExceeded(Exception):  # noqa: N818, it is not an error
    """Another process has taken the last trial."""


class OneProcess(CLI):
    """The command line of a trial, which refuses to start further processes."""

    def before_fit(self) -> None:
        if self.trainer.world_size > 1:
            raise UserError(
                f"a sweep's trials run in one process each, and not in {self.trainer.world_size}: --trainer.devices=1 "
                "--trainer.num_nodes=1; for several GPUs start as many sweeps of the same study, each with a "
                "CUDA_VISIBLE_DEVICES of its own"
            )


class Prune(Callback):
    """Report the metric of every validation to Optuna, and stop a run that falls behind.

    Args:
        trial: of the run.
        monitor: the metric that decides.
    """

    def __init__(self, trial: optuna.Trial, monitor: str) -> None:
        self.trial, self.monitor = trial, monitor
        self.values, self.pruned = list[float](), False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self.monitor not in trainer.callback_metrics:
            names = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise UserError(f"--monitor={self.monitor}: the model logs {names}")
        self.values.append(trainer.callback_metrics[self.monitor].item())
        self.trial.report(self.values[-1], len(self.values))
        self.pruned = trainer.should_stop = self.trial.should_prune()


# -------------------------------------------------------------------------------------------- space


def read_space(path: Path) -> Space:
    """Read what to search: options of ``fit`` by their dotted names.

    Args:
        path: a YAML file; per option ``low`` and ``high``, optionally ``log: true`` or a ``step``, or ``choices``.

    Raises:
        UserError: naming what is wrong.
    """
    try:
        settings = get_loader("yaml")(path.read_text(encoding="utf-8"))  # as a config: 1e-4 is a number
        if not isinstance(settings, dict) or not settings:
            raise ValueError("expected names of options, such as model.init_args.lr")
        return {name: _distribution(name, setting) for name, setting in settings.items()}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--space={path}: {error}") from error


def _distribution(name: str, setting: Any) -> BaseDistribution:
    try:
        if "choices" in setting:
            return CategoricalDistribution(**setting)
        whole = isinstance(setting["low"], int) and isinstance(setting["high"], int)
        return (IntDistribution if whole else FloatDistribution)(**setting)
    except (KeyError, TypeError, ValueError) as error:
        expected = "{low: 0.1, high: 1.0, log: true} or {choices: [a, b]}"
        raise ValueError(f"{name}: expected {expected}, not {setting} ({error})") from error


def _suggest(trial: optuna.Trial, name: str, options: Any) -> Any:
    if isinstance(options, CategoricalDistribution):
        return trial.suggest_categorical(name, options.choices)
    suggest = trial.suggest_int if isinstance(options, IntDistribution) else trial.suggest_float
    return suggest(name, options.low, options.high, step=options.step, log=options.log)


def _grid(name: str, options: Any) -> list[Any]:
    """All values of an option.

    Raises:
        UserError: for a range that has no steps.
    """
    if isinstance(options, CategoricalDistribution):
        return list(options.choices)
    if options.step is None or options.log:
        raise UserError(f"--sampler=grid: {name} needs choices, or a step from low to high")
    number = int((options.high - options.low) / options.step + 1e-9) + 1
    return [options.low + index * options.step for index in range(number)]


# ------------------------------------------------------------------------------------------- trials


def sweep(project: Project, study: optuna.Study, space: Space, trials: int, fit: list[str], monitor: str) -> None:
    """Run trials until the study has enough of them, by whichever of the processes that share it.

    Args:
        project: whose ``fit`` runs each trial.
        study: with the trials so far.
        space: what to search.
        trials: number of trials in all, pruned ones included.
        fit: arguments of ``fit`` that all trials have in common.
        monitor: the metric that decides.
    """
    better = max if study.direction == StudyDirection.MAXIMIZE else min

    def alive(upto: int | None = None) -> int:
        found = study.get_trials(deepcopy=False)[:upto]
        return sum(trial.state in (*DONE, TrialState.RUNNING) for trial in found)

    def objective(trial: optuna.Trial) -> float:
        if (number := alive(trial.number)) >= trials:
            raise TrialBudgetExceeded
        settings = {name: _suggest(trial, name, options) for name, options in space.items()}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        Console().rule(f"Trial {number + 1} of {trials}: {escape(text)}")
        trial.set_user_attr("process", f"{os.getpid()} on {platform.node()}")
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        arguments.append(f"--run_name={study.study_name}-{trial.number}")
        prune = Prune(trial, monitor)
        try:
            cli = run(project, ["fit", *fit, *arguments], [prune], OneProcess)
        except DivergenceError as error:
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("run", relative(cli.run.folder))
        trial.set_user_attr("config", cli.run.config.read_text(encoding="utf-8"))
        values = [value for value in prune.values if math.isfinite(value)]
        if prune.pruned or not values:
            raise optuna.TrialPruned
        return better(values)

    while len(study.get_trials(deepcopy=False, states=DONE)) < trials:
        if alive() < trials:
            study.optimize(objective, n_trials=1, catch=TrialBudgetExceeded)
        else:  # other processes run the last ones; those of a killed process are done again
            optuna.storages.fail_stale_trials(study)
            time.sleep(1)


def print_trials(study: optuna.Study, trials: Iterable[FrozenTrial], title: str) -> None:
    """Print a table of trials, those that run now with what they have reached."""
    trials = list(trials)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    numbers = ("validations", study.user_attrs.get("monitor", "value"), *(name.rpartition(".")[2] for name in names))
    table = Table("run", "state", *(Column(name, justify="right") for name in numbers), title=escape(title))
    for trial in trials:
        reached = trial.value
        if reached is None and trial.last_step is not None:
            reached = trial.intermediate_values[trial.last_step]
        values = (len(trial.intermediate_values), reached, *(trial.params.get(name) for name in names))
        cells = (f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in values)
        table.add_row(f"{study.study_name}-{trial.number}", trial.state.name.lower(), *map(escape, cells))
    Console().print(table)


def report(project: Project, study: optuna.Study, folder: Path) -> None:
    """Print the best trials, and write the config of the best one and Optuna's plots.

    Args:
        project: that runs.
        study: with at least one complete trial.
        folder: where ``best.yaml`` and the plots go.
    """
    import matplotlib

    matplotlib.use("Agg")  # files, no windows
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    console = Console(soft_wrap=True, highlight=False, markup=False)
    complete = study.get_trials(states=[TrialState.COMPLETE])
    maximize = study.direction == StudyDirection.MAXIMIZE
    ranked = sorted(complete, key=lambda trial: trial.value or 0.0, reverse=maximize)
    print_trials(study, ranked[:10], "The best trials")
    with atomic_write(folder / "best.yaml") as part:
        part.write_text(study.best_trial.user_attrs["config"], encoding="utf-8")
    drawn: dict[str, Any] = {
        "history": plots.plot_optimization_history,
        "curves": plots.plot_intermediate_values,
        "slices": plots.plot_slice,
        "parallel": plots.plot_parallel_coordinate,
    }
    if len(complete) > 1:
        drawn["importances"] = plots.plot_param_importances
    for name, plot in drawn.items():
        try:
            plot(study)
            pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        except (RuntimeError, ValueError) as error:  # such as importances of one trial
            console.print(f"{name}.png is not drawn: {error}")
        pyplot.close("all")
    console.print(f"The plots are in {folder}, the best config, too. Train with it again:")
    console.print(f"  {project.command('fit', '--config', folder / 'best.yaml')}")


def open_study(url: str, name: str, **options: Any) -> optuna.Study:
    """Open a study, and make it first if the database has none of that name.

    Args:
        url: of the database, as for Optuna.
        name: of the study.
        options: of ``optuna.create_study``.

    Raises:
        UserError: when the database cannot be used.
    """
    for last in (False, False, True):  # Optuna's tables cannot be made by two processes at once
        try:
            storage = optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT)
            return optuna.create_study(storage=storage, study_name=name, load_if_exists=True, **options)
        except Exception as error:  # whatever the driver of a database raises
            if last:
                raise UserError(f"--storage={url}: {str(error).partition(chr(10))[0]}") from error
            time.sleep(1)
    raise AssertionError


def _options(project: Project, fit: list[str]) -> dict[str, Any]:
    """Options of a fit with these arguments, as its own parser reads them."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        run(project, ["fit", *fit, "--print_config"])
    return yaml.safe_load(printed.getvalue())


def main(args: list[str], project: Project) -> None:
    """Start a sweep or resume one.

    Args:
        args: of the command line, without the command.
        project: that runs.

    Raises:
        UserError: when the space or the storage cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog=project.command("sweep"),
        usage="%(prog)s --config FILE --space FILE [--trials N] [--KEY=VALUE ...]",
        description="Search hyperparameters with Optuna for the best --monitor. Options that are not listed here go to "
        "the fit of every trial. The same command again resumes where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("--space", type=Path, help="what to search, see configs/sweep.yaml")
    parser.add_argument(
        "--trials", type=int, help="in all, also those done before (default: 20; with --sampler=grid the whole grid)"
    )
    parser.add_argument(
        "--sampler",
        choices=["tpe", "random", "grid"],
        default="tpe",
        help="Optuna's (default: tpe, which learns); grid runs every combination to its end",
    )
    parser.add_argument("--status", action="store_true", help="print the trials so far, also while others run")
    parser.add_argument("--study", default="sweep", help="name of the study (default: sweep)")
    parser.add_argument(
        "--storage", help="any of Optuna's database addresses (default: a SQLite file in lightning_logs/STUDY)"
    )
    known, fit = parser.parse_known_args(args)
    folder = Path(LOGS) / known.study
    url = known.storage or f"sqlite:///{folder}/study.db"
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if known.status:
        if known.storage is None and not (folder / "study.db").is_file():
            raise UserError(f"--status: there is no study in {folder} yet")
        try:
            study = optuna.load_study(study_name=known.study, storage=url)
        except KeyError:
            raise UserError(f"--status: there is no study {known.study} in {url}") from None
        return print_trials(study, study.get_trials(deepcopy=False), known.study)
    if known.space is None:
        parser.error("--space: a sweep needs a file that says what to search, such as configs/sweep.yaml")
    space, trials = read_space(known.space), known.trials or 20
    options: dict[str, Any] = {}
    # Optuna's samplers draw new seeds in every process: several of them share a study.
    if known.sampler == "random":
        options["sampler"] = optuna.samplers.RandomSampler()
    if known.sampler == "grid":
        grid = {name: _grid(name, distribution) for name, distribution in space.items()}
        options = {"sampler": optuna.samplers.GridSampler(grid), "pruner": optuna.pruners.NopPruner()}
        size = math.prod(map(len, grid.values()))
        trials = min(known.trials or size, size)
    _, *fit = with_config(["fit", *fit], project)
    config = _options(project, fit)
    monitor, mode = config["monitor"], infer_mode(config["monitor"], config["mode"])
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(url, known.study, direction=f"{mode}imize", **options)
    described = {name: distribution_to_json(distribution) for name, distribution in space.items()}
    if study.user_attrs.get("space", described) != described:
        raise UserError(f"the study {known.study} has another space; name a new one with --study")
    study.set_user_attr("space", described)
    study.set_user_attr("monitor", monitor)
    sweep(project, study, space, trials, fit, monitor)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise UserError(f"none of {trials} trials came to an end: every one diverged or was pruned")
    report(project, study, folder)
