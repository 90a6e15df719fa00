"""``sweep``: hyperparameter search with Optuna. Every trial is a normal run of ``fit``.

The study is in a database, which processes and machines may share; a finished trial is never repeated.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import platform
import re
import sys
import time
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import optuna
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from sqlalchemy.exc import DBAPIError

from mnist_lit.engine.best import infer_mode
from mnist_lit.engine.cli import run
from mnist_lit.engine.errors import ConfigurationError, DivergenceError
from mnist_lit.engine.options import with_config
from mnist_lit.engine.project import Project
from mnist_lit.engine.run import LOGS, relative
from mnist_lit.engine.storage import atomic_write

ATTEMPTS = 3  # to open the database
HEARTBEAT = 5  # seconds; a process that is silent for twice as long counts as dead
# Options of the trainer that say how many processes there are; one is all that a trial may have.
OF_PROCESSES = ("accelerator", "devices", "num_nodes", "strategy")
DONE = TrialState.COMPLETE, TrialState.PRUNED

Space = dict[str, dict[str, Any]]


class TrialBudgetExceeded(Exception):  # noqa: N818, it is no error
    """Another process has taken the last trial."""


class Prune(Callback):
    """Report the metric of every validation to Optuna, and stop a run that falls behind.

    Args:
        trial: of the run.
        monitor: the metric that decides.
        maximize: whether higher is better.
    """

    def __init__(self, trial: optuna.Trial, monitor: str, maximize: bool) -> None:
        self.trial, self.monitor, self.maximize = trial, monitor, maximize
        self.pruned, self.best = False, float("-inf") if maximize else float("inf")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            if self.monitor not in trainer.callback_metrics:
                names = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
                raise ConfigurationError(f"--monitor={self.monitor}: the model logs {names}")
            value = trainer.callback_metrics[self.monitor].item()
            self.best = max(self.best, value) if self.maximize else min(self.best, value)
            self.trial.report(value, trainer.current_epoch)
            self.pruned = trainer.should_stop = self.trial.should_prune()


# -------------------------------------------------------------------------------------------- space


def read_space(path: Path) -> Space:
    """Read what to search: hyperparameters of ``fit`` by their dotted names.

    Args:
        path: a YAML file; per hyperparameter ``low`` and ``high``, optionally ``log: true`` or a ``step``, or
            ``choices``.

    Raises:
        ConfigurationError: naming what is wrong.
    """
    try:
        space = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(space, dict) or not space:
            raise ValueError("expected names of settings, such as model.init_args.lr")
        for name, setting in space.items():
            try:
                setting |= {key: _value(value) for key, value in dict(setting).items()}
                if "choices" in setting:
                    CategoricalDistribution(**setting)
                else:
                    (IntDistribution if _whole(setting) else FloatDistribution)(**setting)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{name}: expected {{low: 0.1, high: 1.0, log: true}} or {{choices: [a, b]}}, "
                    f"found {setting} ({error})"
                ) from error
        return space
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--space={path}: {error}") from error


def _value(value: Any) -> Any:
    """What YAML 1.1 leaves a text though it is a number: 1e-4, where it would want 1.0e-4."""
    if isinstance(value, list):
        return [_value(each) for each in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I) else value


def _whole(setting: dict[str, Any]) -> bool:
    return isinstance(setting["low"], int) and isinstance(setting["high"], int)


def _suggest(trial: optuna.Trial, name: str, setting: dict[str, Any]) -> Any:
    if "choices" in setting:
        return trial.suggest_categorical(name, **setting)
    return (trial.suggest_int if _whole(setting) else trial.suggest_float)(name, **setting)


def grid_of(space: Space) -> dict[str, list[Any]]:
    """All values of each hyperparameter.

    Raises:
        ConfigurationError: for a range that has no steps.
    """
    grid = {}
    for name, setting in space.items():
        if "choices" in setting:
            grid[name] = list(setting["choices"])
            continue
        low, high = setting["low"], setting["high"]
        step = setting.get("step", 1 if _whole(setting) else None)
        if step is None or setting.get("log"):
            raise ConfigurationError(f"--sampler=grid: {name} needs choices, or a step from low to high")
        grid[name] = [low + index * step for index in range(int((high - low) / step + 1e-9) + 1)]
    return grid


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
    maximize = study.direction == StudyDirection.MAXIMIZE

    def alive(found: list[FrozenTrial]) -> int:
        return sum(trial.state in (*DONE, TrialState.RUNNING) for trial in found)

    def objective(trial: optuna.Trial) -> float:
        number = alive(study.get_trials(deepcopy=False)[: trial.number])
        if number >= trials:
            raise TrialBudgetExceeded
        settings = {name: _suggest(trial, name, setting) for name, setting in space.items()}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        Console().rule(f"Trial {number + 1} of {trials}: {text}")
        trial.set_user_attr("process", f"{os.getpid()} on {platform.node()}")
        prune = Prune(trial, monitor, maximize)
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        arguments.append(f"--run_name={study.study_name}-{trial.number}")
        try:
            cli = run(project, ["fit", *fit, *arguments], [prune])
        except DivergenceError as error:
            raise optuna.TrialPruned(str(error)) from error
        trial.set_user_attr("run", relative(cli.run.folder))
        trial.set_user_attr("config", cli.run.config.read_text(encoding="utf-8"))
        if prune.pruned:
            raise optuna.TrialPruned
        return prune.best

    while len(study.get_trials(deepcopy=False, states=DONE)) < trials:
        if alive(study.get_trials(deepcopy=False)) < trials:
            study.optimize(objective, n_trials=1, catch=TrialBudgetExceeded)
        else:  # the other processes are at the last ones; those of a killed one are done again
            optuna.storages.fail_stale_trials(study)
            time.sleep(1)


def status(study: optuna.Study) -> None:
    """Print every trial so far, those that run now with what they have reached."""
    trials = study.get_trials(deepcopy=False)
    monitor = study.user_attrs.get("monitor", "value")
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    columns = ("epochs", monitor, *(name.rpartition(".")[2] for name in names))
    table = Table("run", "state", *(Column(name, justify="right") for name in columns), title=escape(study.study_name))
    for trial in trials:
        reached = trial.value
        if reached is None and trial.last_step is not None:
            reached = trial.intermediate_values[trial.last_step]
        values = (len(trial.intermediate_values), reached, *(trial.params.get(name) for name in names))
        cells = (f"{v:.4g}" if isinstance(v, float) else "" if v is None else str(v) for v in values)
        table.add_row(f"{study.study_name}-{trial.number}", trial.state.name.lower(), *map(escape, cells))
    Console().print(table)


def report(project: Project, study: optuna.Study, folder: Path, monitor: str) -> None:
    """Print the best trials, and write the config of the best one and Optuna's plots.

    Args:
        project: that runs.
        study: with at least one complete trial.
        folder: where ``best.yaml`` and the plots go.
        monitor: the metric that decides.
    """
    import matplotlib

    matplotlib.use("Agg")  # files, no windows
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    console = Console()
    complete = study.get_trials(states=[TrialState.COMPLETE])
    names = list(complete[0].params)
    columns = (monitor, *(name.rpartition(".")[2] for name in names))
    table = Table("run", *(Column(name, justify="right") for name in columns), title="The best trials")
    maximize = study.direction == StudyDirection.MAXIMIZE
    for trial in sorted(complete, key=lambda trial: trial.value or 0.0, reverse=maximize)[:10]:
        values = (trial.value, *(trial.params[name] for name in names))
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(trial.user_attrs["run"], *cells)
    console.print(table)
    folder.mkdir(parents=True, exist_ok=True)
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
        plot(study)
        pyplot.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight")
        pyplot.close("all")
    console.print(f"Wrote {folder}/best.yaml, {', '.join(f'{name}.png' for name in drawn)}", soft_wrap=True)
    again = project.command("fit", "--config", folder / "best.yaml")
    console.print(f"  {again}", soft_wrap=True, highlight=False, markup=False)


def open_study(
    url: str, name: str, direction: StudyDirection, sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.Study:
    """Open a study, and make it first if the database has none of that name.

    Raises:
        ConfigurationError: when the database cannot be used.
    """
    for attempts in reversed(range(ATTEMPTS)):
        try:
            storage = optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT)
            return optuna.create_study(
                storage=storage, study_name=name, direction=direction, sampler=sampler, load_if_exists=True
            )
        except Exception as error:  # whatever the driver of a database says
            # Optuna's tables cannot be made by two processes at once.
            if not attempts or not isinstance(error, DBAPIError):
                raise ConfigurationError(f"--storage={url}: {str(error).splitlines()[0]}") from error
            time.sleep(1)
    raise AssertionError


def _config_of(project: Project, fit: list[str]) -> dict[str, Any]:
    """Options of a fit with these arguments, as its own parser reads them."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        run(project, ["fit", *fit, "--print_config"])
    config = yaml.safe_load(printed.getvalue())
    if not isinstance(config, dict):
        sys.exit(2)  # the parser has printed what is wrong
    return config


def _check_trainer(options: dict[str, Any]) -> None:
    """Make a trainer of these options before the first trial, and find out how many processes it would start.

    Raises:
        ConfigurationError: if it is more than one.
        MisconfigurationException: if Lightning refuses the options.
    """
    parser = LightningArgumentParser()
    parser.add_class_arguments(Trainer, "trainer")
    leaves_nothing = {"callbacks": None, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    made = parser.instantiate_classes(parser.parse_object({"trainer": options | leaves_nothing})).trainer
    if made.world_size > 1:
        option = "num_nodes" if made.num_nodes > 1 else "devices"
        raise ConfigurationError(
            f"a sweep's trials run in one process each, and not in {made.world_size}: --trainer.{option}=1; for "
            "several GPUs start as many sweeps of the same study, each with a CUDA_VISIBLE_DEVICES of its own"
        )


def main(args: list[str], project: Project) -> None:
    """Start a sweep or resume one.

    Args:
        args: of the command line, without the command.
        project: that runs.

    Raises:
        ConfigurationError: when the space or the storage cannot be used.
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
        "--sampler", choices=["tpe", "random", "grid"], default="tpe", help="Optuna's (default: tpe, which learns)"
    )
    parser.add_argument("--status", action="store_true", help="print the trials so far, also while others run")
    parser.add_argument("--study", default="sweep", help="name of the study (default: sweep)")
    parser.add_argument(
        "--storage",
        help="any of Optuna's database addresses (default: a SQLite file in lightning_logs/STUDY)",
    )
    known, fit = parser.parse_known_args(args)
    folder = Path(LOGS) / known.study
    url = known.storage or f"sqlite:///{folder}/study.db"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    if known.status:
        if known.storage is None and not (folder / "study.db").is_file():
            raise ConfigurationError(f"--status: there is no study in {folder} yet")
        try:
            return status(optuna.load_study(study_name=known.study, storage=url))
        except KeyError:
            raise ConfigurationError(f"--status: there is no study {known.study} in {url}") from None
    if known.space is None:
        parser.error("--space: a sweep needs a file that says what to search, such as configs/sweep.yaml")
    space = read_space(known.space)
    if fixed := [name for name in space if name in {f"trainer.{option}" for option in OF_PROCESSES}]:
        raise ConfigurationError(f"--space={known.space}: {fixed[0]} cannot be searched, all trials run in one process")
    # Optuna's samplers draw new seeds in every process: several of them share a study.
    sampler: optuna.samplers.BaseSampler | None = optuna.samplers.RandomSampler() if known.sampler == "random" else None
    trials = known.trials or 20
    if known.sampler == "grid":
        grid = grid_of(space)
        sampler, size = optuna.samplers.GridSampler(grid), math.prod(map(len, grid.values()))
        trials = min(known.trials or size, size)
    _, *fit = with_config(["fit", *fit], project)
    config = _config_of(project, fit)
    monitor, mode = config["monitor"], infer_mode(config["monitor"], config["mode"])
    _check_trainer(config["trainer"])
    if known.storage is None:
        folder.mkdir(parents=True, exist_ok=True)
    study = open_study(url, known.study, StudyDirection[f"{mode.upper()}IMIZE"], sampler)
    if study.user_attrs.setdefault("space", space) != space:
        raise ConfigurationError(f"the study {known.study} has another space; name a new one with --study")
    study.set_user_attr("space", space)
    study.set_user_attr("monitor", monitor)
    sweep(project, study, space, trials, fit, monitor)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise ConfigurationError(f"none of {trials} trials came to an end: every one diverged or was pruned")
    report(project, study, folder, monitor)
