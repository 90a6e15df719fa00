"""``python -m mnist_lit sweep``: many runs of ``fit``, each with settings that Optuna picks after the others.

Every trial is a normal run. What is known of all of them, the study, is in a database, which processes and
machines may share; what is in it is never done again.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import optuna
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Column, Table
from sqlalchemy.exc import DBAPIError

from mnist_lit.archive import replacing
from mnist_lit.callbacks import DivergenceError
from mnist_lit.cli import run

MONITOR = "val/loss"  # what is to become small
ATTEMPTS = 3  # to open the database
HEARTBEAT = 5  # seconds; a process that is silent for twice as long counts as dead
DONE = TrialState.COMPLETE, TrialState.PRUNED

Space = dict[str, dict[str, Any]]


class TooManyError(Exception):
    """Another process was faster with the last trial."""


class Prune(Callback):
    """Tells Optuna the validation loss of every epoch, and ends a run that it calls hopeless."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial, self.pruned, self.best = trial, False, float("inf")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise MisconfigurationException(
                "a sweep's trials run in one process each; for several GPUs start as many sweeps of the same "
                "study, each with a CUDA_VISIBLE_DEVICES of its own"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            loss = trainer.callback_metrics[MONITOR].item()
            self.best = min(self.best, loss)
            self.trial.report(loss, trainer.current_epoch)
            self.pruned = trainer.should_stop = self.trial.should_prune()


# -------------------------------------------------------------------------------------------- space


def read_space(path: Path) -> Space:
    """What to search: settings of ``fit`` by their dotted names.

    Args:
        path: a YAML file; per setting ``low`` and ``high``, and perhaps ``log: true`` or a ``step``, or else
            ``choices``.

    Raises:
        MisconfigurationException: naming what is wrong.
    """
    try:
        space = yaml.safe_load(path.read_text())
        if not isinstance(space, dict) or not space:
            raise ValueError("expected names of settings, such as model.init_args.lr")
        for name, setting in space.items():
            try:
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
        raise MisconfigurationException(f"--space={path}: {error}") from error


def _whole(setting: dict[str, Any]) -> bool:
    return isinstance(setting["low"], int) and isinstance(setting["high"], int)


def _suggest(trial: optuna.Trial, name: str, setting: dict[str, Any]) -> Any:
    if "choices" in setting:
        return trial.suggest_categorical(name, **setting)
    return (trial.suggest_int if _whole(setting) else trial.suggest_float)(name, **setting)


# ------------------------------------------------------------------------------------------- trials


def sweep(study: optuna.Study, space: Space, trials: int, fit: list[str]) -> None:
    """Runs trials until the study has so many, whoever of the processes that share it has done them.

    Args:
        study: with what is known so far.
        space: what to search.
        trials: how many the study shall have in all, pruned ones included.
        fit: the arguments of ``fit`` that all trials have in common.
    """

    def alive(found: list[FrozenTrial]) -> int:
        return sum(trial.state in (*DONE, TrialState.RUNNING) for trial in found)

    def objective(trial: optuna.Trial) -> float:
        number = alive(study.get_trials(deepcopy=False)[: trial.number])
        if number >= trials:
            raise TooManyError
        settings = {name: _suggest(trial, name, setting) for name, setting in space.items()}
        text = ", ".join(f"{name}={value}" for name, value in settings.items())
        Console().rule(f"Trial {number + 1} of {trials}: {text}")
        trial.set_user_attr("process", f"{os.getpid()} on {platform.node()}")
        prune = Prune(trial)
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        arguments.append(f"--run_name={study.study_name}-{trial.number}")
        try:
            cli = run(["fit", *fit, *arguments], [prune])
        except DivergenceError as error:
            raise optuna.TrialPruned(str(error)) from error
        folder = Path(cli.trainer.log_dir or "")
        trial.set_user_attr("run", os.path.relpath(folder))
        trial.set_user_attr("config", (folder / "config.yaml").read_text())
        if prune.pruned:
            raise optuna.TrialPruned
        return prune.best

    while len(study.get_trials(deepcopy=False, states=DONE)) < trials:
        if alive(study.get_trials(deepcopy=False)) < trials:
            study.optimize(objective, n_trials=1, catch=TooManyError)
        else:  # the other processes are at the last ones; those of a killed one are done again
            optuna.storages.fail_stale_trials(study)
            time.sleep(1)


def report(study: optuna.Study, folder: Path) -> None:
    """Prints the best trials, and writes the config of the best one and Optuna's plots.

    Args:
        study: with at least one trial that is complete.
        folder: where ``best.yaml`` and the plots go.
    """
    import matplotlib

    matplotlib.use("Agg")  # files, no windows
    from matplotlib import pyplot
    from optuna.visualization import matplotlib as plots

    console = Console()
    complete = study.get_trials(states=[TrialState.COMPLETE])
    names = list(complete[0].params)
    columns = (MONITOR, *(name.rpartition(".")[2] for name in names))
    table = Table("run", *(Column(name, justify="right") for name in columns), title="The best trials")
    for trial in sorted(complete, key=lambda trial: trial.value or 0.0)[:10]:
        values = (trial.value, *(trial.params[name] for name in names))
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(trial.user_attrs["run"], *cells)
    console.print(table)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "best.yaml") as part:
        part.write_text(study.best_trial.user_attrs["config"])
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
    console.print(f"  python -m mnist_lit fit --config {folder}/best.yaml", soft_wrap=True, highlight=False)


def open_study(url: str, name: str) -> optuna.Study:
    """A study, which is made first where the database has none of that name.

    Raises:
        MisconfigurationException: when the database cannot be used.
    """
    for attempts in reversed(range(ATTEMPTS)):
        try:
            storage = optuna.storages.RDBStorage(url, heartbeat_interval=HEARTBEAT)
            return optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        except Exception as error:  # whatever the driver of a database says
            # Optuna's tables do not bear that two processes make them at once.
            if not attempts or not isinstance(error, DBAPIError):
                raise MisconfigurationException(f"--storage={url}: {str(error).splitlines()[0]}") from error
            time.sleep(1)
    raise AssertionError


def main(args: list[str]) -> None:
    """Runs a sweep or goes on with one.

    Raises:
        MisconfigurationException: when the space or the storage cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mnist_lit sweep",
        usage="%(prog)s --config FILE --space FILE [--trials N] [--KEY=VALUE ...]",
        description="Search settings with Optuna; what is not listed here goes to the fit of every trial. "
        "The same command again goes on where it stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("--space", type=Path, required=True, help="what to search, see configs/sweep.yaml")
    parser.add_argument("--trials", type=int, default=20, help="in all, also those done before (default: 20)")
    parser.add_argument("--study", default="sweep", help="its name (default: sweep)")
    parser.add_argument(
        "--storage",
        help="any of Optuna's database addresses (default: a SQLite file in lightning_logs/STUDY)",
    )
    known, fit = parser.parse_known_args(args)
    space, folder = read_space(known.space), Path("lightning_logs") / known.study
    if known.storage is None:
        folder.mkdir(parents=True, exist_ok=True)
    url = known.storage or f"sqlite:///{folder}/study.db"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    study = open_study(url, known.study)
    if study.user_attrs.setdefault("space", space) != space:
        raise MisconfigurationException(
            f"the study {known.study} has another space; name a new one with --study"
        )
    study.set_user_attr("space", space)
    sweep(study, space, known.trials, fit)
    if not study.get_trials(states=[TrialState.COMPLETE]):
        raise MisconfigurationException(
            f"none of {known.trials} trials came to an end: every one diverged or was pruned"
        )
    report(study, folder)
