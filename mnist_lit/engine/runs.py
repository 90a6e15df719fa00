"""Where a run is: one folder with everything that it leaves, whatever its loggers."""

from __future__ import annotations

import atexit
import errno
import os
from contextlib import suppress
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.engine.storage import atomic_write

LOGS = "lightning_logs"


def relative(path: str | Path) -> str:
    """A path as one would type it here; absolute where no relative one leads there, as between drives."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


LOCAL_LOGGERS = ("TensorBoardLogger", "CSVLogger")  # those that write into a run's folder


class Run(Callback):
    """One run: its folder, its name, its config and its checkpoints. Everything else asks here.

    Args:
        folder: of the run. None in a process that is not the first of several: it learns the folder from the
            first one, as soon as they are connected.

    Example:
        >>> run = Run.of(trainer)
        >>> run.folder, run.config, run.checkpoints
        (PosixPath('lightning_logs/version_0'), PosixPath('.../config.yaml'), PosixPath('.../checkpoints'))
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    @classmethod
    def create(cls, root: Path, name: str | None = None) -> Run:
        """Make the folder of a new run. Of several processes that start at once each gets its own.

        Args:
            root: parent of ``lightning_logs``.
            name: of the folder, by default the next ``version_N``.

        Raises:
            ConfigurationError: if there is a run of this name, or the folder cannot be written.
        """
        if name and Path(name).name != name:
            raise ConfigurationError(f"--run_name={name}: expected the name of one folder, without {os.sep}")
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return cls()
        logs = root.absolute() / LOGS
        try:
            logs.mkdir(parents=True, exist_ok=True)
            folder = cls._make(logs, name)
        except FileExistsError as error:
            if name is None or not (logs / name).exists():
                raise ConfigurationError(_unwritable(root, error)) from error
            raise ConfigurationError(f"--run_name={name}: there is such a run already in {logs}") from error
        except OSError as error:
            raise ConfigurationError(_unwritable(root, error)) from error
        atexit.register(_remove_if_empty, folder)  # of a start that fails before it leaves anything
        return cls(folder)

    @staticmethod
    def _make(logs: Path, name: str | None) -> Path:
        if name is not None:
            (logs / name).mkdir()
            return logs / name
        numbers = [path.name.removeprefix("version_") for path in logs.glob("version_*")]
        version = max((int(number) for number in numbers if number.isdigit()), default=-1) + 1
        while True:
            with suppress(FileExistsError):  # another process was faster
                (logs / f"version_{version}").mkdir()
                return logs / f"version_{version}"
            version += 1

    @classmethod
    def of_checkpoint(cls, path: str | Path) -> Run | None:
        """The run that a checkpoint was written by, if it is still in that run's folder."""
        checkpoints = Path(path).absolute().parent
        found = checkpoints.name == "checkpoints" and checkpoints.parents[1].name == LOGS
        return cls(checkpoints.parent) if found else None

    @classmethod
    def of(cls, trainer: Trainer) -> Run:
        """The run of a trainer; without the command line it is in the folder of Lightning's first logger."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, cls):
                return callback
        return cls(Path(trainer.log_dir or trainer.default_root_dir))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.strategy.broadcast(str(self._folder or ""))
        self._folder = Path(folder) if folder else None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notice that the folder was deleted, before a checkpoint of the validation would make another one.

        Raises:
            FileNotFoundError: which saves the weights, see ``LastCheckpoint.on_exception``.
        """
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        if fits and trainer.is_global_zero and self.exists and not self.folder.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.folder))

    @property
    def folder(self) -> Path:
        """Everything that the run leaves is in here."""
        assert self._folder is not None, "asked for before the processes were connected"
        return self._folder

    @property
    def exists(self) -> bool:
        """Whether the run leaves anything at all; with ``fast_dev_run`` it does not."""
        return self._folder is not None

    @property
    def root(self) -> Path:
        """The parent of ``lightning_logs``."""
        return self.folder.parents[1]

    @property
    def name(self) -> str:
        """Of the folder, in ``lightning_logs``."""
        return self.folder.name

    @property
    def config(self) -> Path:
        """What the run was started with."""
        return self.folder / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder of best.ckpt and last.ckpt."""
        return self.folder / "checkpoints"

    def direct(self, logger: Namespace, resumed_step: int | None = None) -> None:
        """Make a logger of the config write into this folder, unless the config names another place.

        Args:
            logger: with ``class_path`` and ``init_args``.
            resumed_step: of the checkpoint that the run is resumed from.
        """
        options = logger.get("init_args") or {}
        local = str(logger.get("class_path", "")).rpartition(".")[2] in LOCAL_LOGGERS
        if not (local and self.exists and options.get("version") is None and options.get("name") == LOGS):
            return
        options["save_dir"], options["version"] = str(self.root), self.name
        if resumed_step is not None and "purge_step" in options:
            options["purge_step"] = resumed_step
        table = self.folder / "metrics.csv"  # which CSVLogger starts again
        if resumed_step is not None and table.exists():
            table.replace(table.with_name(f"metrics-to-step-{resumed_step}.csv"))

    def release(self, logger: Namespace) -> None:
        """Undo ``direct``, for a config from which other runs are started."""
        options = logger.get("init_args") or {}
        if options.get("version") == self.name and options.get("name") == LOGS:
            options["save_dir"], options["version"] = ".", None
            if "purge_step" in options:
                options["purge_step"] = None


def _unwritable(root: Path, error: OSError) -> str:
    return (
        f"cannot write in {root / LOGS} ({error.strerror}); "
        "choose another place for runs with --trainer.default_root_dir"
    )


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


class RunConfig(SaveConfigCallback):
    """Save the complete config in the run's folder. A resumed run keeps the first one."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run, config = Run.of(trainer), self.config.clone()
        loggers = config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if isinstance(logger, Namespace):
                run.release(logger)
        folder = run.folder
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / self.config_filename) as part:
            part.write_text(self.parser.dump(config, skip_none=False), encoding="utf-8")
