"""A run: one folder with everything that it writes, whatever its loggers."""

import atexit
import csv
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

import yaml
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from mnist_lit.engine.errors import UserError, no_pipe, require
from mnist_lit.engine.project import Project
from mnist_lit.engine.storage import atomic_write

LOGS = "lightning_logs"
# Loggers with runs of their own: their package, and the options that name a run and choose the one to resume.
REMOTE_LOGGERS = {"WandbLogger": ("wandb", "name", "id"), "MLFlowLogger": ("mlflow", "run_name", "run_id")}
LOCK_TIMEOUT = 15.0  # s: the workers of a killed process hold its lock until they notice that it is gone

_held: list[FileLock] = []  # the lock of this process's run, not in the callback, which is copied to processes


class Run(Callback):
    """A run's folder, name, config and checkpoints.

    Args:
        folder: the run's folder. None in all processes but the first, which learn it when they are connected.
        project: the project whose command line started it; None in a script or a notebook.

    Example:
        >>> run = Run.of(trainer)
        >>> run.folder, run.config, run.checkpoints
        (PosixPath('lightning_logs/version_0'), PosixPath('.../config.yaml'), PosixPath('.../checkpoints'))
    """

    def __init__(self, folder: Path | None = None, project: Project | None = None) -> None:
        self._folder = folder
        self.project = project
        self.save_as = ""  # file name for the options below
        self.to_save: Mapping[str, Any] = {}

    @classmethod
    def create(
        cls, root: Path, name: str | None = None, project: Project | None = None, exist_ok: bool = False
    ) -> "Run":
        """Make the folder of a new run in ``lightning_logs`` under ``root``, by default the next ``version_N``.

        Processes that start at the same time get different ones.

        Raises:
            UserError: if there is a run of this name, or the folder cannot be written.
        """
        if name and Path(name).name != name:
            raise UserError(f"--run_name={name}: expected the name of one folder, without {os.sep}")
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return cls(project=project)
        logs = root.absolute() / LOGS
        numbers = [path.name.removeprefix("version_") for path in logs.glob("version_*")]
        version = max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
        while True:
            folder = logs / (name or f"version_{version}")
            try:
                logs.mkdir(parents=True, exist_ok=True)
                folder.mkdir(exist_ok=exist_ok and name is not None)
                break
            except OSError as error:
                if name and folder.exists():
                    raise UserError(f"--run_name={name}: there is such a run already in {logs}") from error
                if not folder.exists():
                    raise UserError(
                        f"cannot write in {root / LOGS} ({error.strerror}); choose another place for runs with "
                        "--trainer.default_root_dir"
                    ) from error
            version += 1  # another process was faster
        atexit.register(_remove_if_empty, folder)  # if the start fails before anything is written
        return cls(folder, project)

    @classmethod
    def of_checkpoint(cls, path: str | Path, project: Project | None = None) -> "Run | None":
        """The run that wrote a checkpoint, if the file is still in that run's folder."""
        checkpoints = Path(path).absolute().parent
        found = checkpoints.name == "checkpoints" and checkpoints.parent.parent.name == LOGS
        return cls(checkpoints.parent, project) if found else None

    @classmethod
    def of(cls, trainer: Trainer) -> "Run":
        """The run of a trainer; without the command line, in the folder of Lightning's first logger."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        run = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        return run or cls(Path(trainer.log_dir or trainer.default_root_dir))

    def lock(self) -> None:
        """Keep other processes from training in this folder until this one ends or trains in another one.

        Raises:
            UserError: if another process trains in it, a link leads out of it, or it holds a pipe or a device.
        """
        if rank_zero_only.rank or not self.exists:  # type: ignore[attr-defined]
            return
        # Somebody else may have made the folder; nothing is written outside of it.
        for path in (*self.folder.iterdir(), *self.checkpoints.glob("*")):
            if no_pipe(path).is_symlink() and not Path(os.path.realpath(path)).is_relative_to(self.folder.resolve()):
                raise UserError(
                    f"{relative(path)} is a link out of the run's folder; remove it to train in that folder"
                )
        while _held:
            _held.pop().release()
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout:
            raise UserError(
                f"{relative(self.folder)} is being trained by another process; wait until it has ended, or start "
                "a new run without --ckpt_path"
            ) from None
        except OSError as error:  # not every file system has locks
            rank_zero_warn(f"{relative(self.folder)} is not locked ({error}): train it in one process at a time")
        _held.append(lock)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(str(self._folder or ""))
        self._folder = Path(folder) if folder else None
        if stage != "fit":
            self._save(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the config, now that no check can refuse it any more."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or not self.exists or not self.save_as:
            return
        path = self.folder / self.save_as
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(self.config_text, encoding="utf-8")
        for logger in trainer.loggers:
            if not (trainer.ckpt_path or isinstance(logger, (TensorBoardLogger, CSVLogger))):  # they have the file
                logger.log_hyperparams({"config": self.to_save})

    @property
    def folder(self) -> Path:
        """The run's folder."""
        assert self._folder is not None, "asked for before the processes were connected"
        return self._folder

    @property
    def exists(self) -> bool:
        """Whether the run has a folder; with ``fast_dev_run`` it has none."""
        return self._folder is not None

    @property
    def root(self) -> Path:
        """The parent of ``lightning_logs``."""
        return self.folder.parents[1]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def config(self) -> Path:
        """The file with the options that the run was started with."""
        return self.folder / "config.yaml"

    @property
    def config_text(self) -> str:
        """Its content."""
        return yaml.safe_dump(dict(self.to_save), sort_keys=False, allow_unicode=True)

    @property
    def options(self) -> dict[str, Any]:
        """The options in that file; empty if there is no file, or it is not a run's."""
        with suppress(OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError):
            content = yaml.safe_load(no_pipe(self.config).read_text("utf-8"))
            chosen = [content.get("model", {}), *as_list(content["trainer"].get("callbacks"))]
            kinds = [(type(each.get("class_path", "")), type(each.get("init_args") or {})) for each in chosen]
            return content if set(kinds) == {(str, dict)} else {}
        return {}

    @property
    def checkpoints(self) -> Path:
        """The folder of best.ckpt and last.ckpt."""
        return self.folder / "checkpoints"

    def redirect_loggers(self, loggers: list[Namespace], step: int = 0) -> None:
        """Make the loggers in a config write into this run's folder, unless the config names another place.

        Loggers with runs of their own continue those that an earlier start in this folder has made.

        Args:
            loggers: their sections of the config.
            step: the step of the checkpoint that is resumed; 0 for a new run.
        """
        known = list[tuple[str, str]]()
        with suppress(OSError, ValueError, TypeError):  # not there, or damaged
            known = [(kind, own) for kind, own in json.loads(self._own_runs.read_text("utf-8"))]
        for logger in loggers:
            options, kind = logger.get("init_args") or Namespace(), logger.class_path.rpartition(".")[2]
            if kind in ("TensorBoardLogger", "CSVLogger") and (options.name, options.get("version")) == (LOGS, None):
                options["save_dir"], options["version"] = str(self.root), self.name
                if "purge_step" in options:
                    options["purge_step"] = step
            if kind in REMOTE_LOGGERS:
                package, name, key = REMOTE_LOGGERS[kind]
                require("trackers", package)
                options[name] = options.get(name) or self.name
                if same := next((run for run in known if run[0] == kind), None):
                    known.remove(same)
                    options[key] = options.get(key) or same[1]
            if kind == "WandbLogger" and options.get("save_dir") in (None, "."):
                options["save_dir"] = str(self.folder)

    def start_loggers(self, loggers: Sequence[Any], step: int = 0) -> None:
        """Start the loggers' own runs, and keep their names for the next start in this folder.

        CSVLogger deletes its table when it starts. It gets the rows before the checkpoint back.

        Args:
            loggers: those of the trainer.
            step: the step of the checkpoint that is resumed.

        Raises:
            UserError: if one cannot be started, such as without a key or a server.
        """
        started = []
        for logger in loggers:
            kind = type(logger).__name__
            if rank_zero_only.rank:  # type: ignore[attr-defined]
                continue
            if isinstance(logger, CSVLogger) and step and (table := Path(logger.log_dir, "metrics.csv")).is_file():
                lines = table.read_text("utf-8").rpartition("\n")[0].splitlines()  # the last one may be incomplete
                rows: list[Any] = [row for row in csv.DictReader(lines) if int(row["step"]) < step]
                logger.experiment.metrics = rows
                logger.save()
            if kind not in REMOTE_LOGGERS:
                continue
            waiting = Timer(5, rank_zero_warn, [f"{kind} waits for its server; Ctrl-C ends that"])
            waiting.start()
            try:
                _ = logger.experiment
            except Exception as error:  # whatever a client raises: no key, no server
                reason = str(error) or type(error).__name__
                raise UserError(f"{kind} cannot start a run: {reason.splitlines()[0]}") from error
            finally:
                waiting.cancel()
            started.append([kind, str(logger.version)])
        if started:
            self._own_runs.write_text(json.dumps(started), encoding="utf-8")

    @property
    def _own_runs(self) -> Path:
        return self.folder / "loggers.json"


def relative(path: str | Path) -> str:
    """A path relative to the current folder; absolute if it is on another drive."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def as_list(chosen: Any) -> list[Any]:
    """An option that may be a single value, a list or nothing, as a list."""
    return list(chosen) if isinstance(chosen, (list, tuple)) else [chosen] if chosen else []


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [".lock"]:
            (folder / ".lock").unlink()
        folder.rmdir()
