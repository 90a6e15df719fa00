"""Checkpoints: atomic writes, safe loading, the best and the last, and the state that Lightning leaves out.

Lightning saves the state of model, optimizers, schedulers, loops, callbacks and the stateful loader. With
what is added here, a run that is stopped anywhere and resumed ends in the same bytes.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from mnist_lit.engine.errors import CheckpointError, ConfigurationError, UserError
from mnist_lit.engine.runs import LOGS, Run, relative
from mnist_lit.engine.storage import atomic_save, printable

DEFAULT_MONITOR = "val/loss"
EXCEPTION = "exception.ckpt"

# -------------------------------------------------------------------------------------------- files


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files with atomic writes and safe loading.

    Lightning itself writes to the system's temporary folder and moves the file from there. Where that folder
    is on another disk this is a copy, which may end half-way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        with _writing(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            atomic_save(checkpoint, Path(path))
        if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            rank_zero_warn(f"{path} holds {', '.join(foreign)}: it loads only with --weights_only=false")

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, weights_only=weights_only is not False)
        return _load(path, weights_only is not False)


@contextmanager
def _writing(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint {path} ({error.strerror}); what was saved before is still there: "
            "make room or make the folder writable, then go on with --ckpt_path=last"
        ) from error


def no_such_checkpoint(option: str, path: str | Path) -> str:
    """The message for an option that names no file."""
    return f"--{option}={path}: no such checkpoint; runs keep them in {LOGS}/*/checkpoints"


_LAYOUT = {
    "state_dict": dict,
    "loops": dict,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
}


def read_checkpoint(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """Read a checkpoint of Lightning onto the CPU.

    Args:
        path: the file.
        weights_only: accept tensors and plain values only, so that no code runs out of the file.

    Raises:
        CheckpointError: if the file cannot be read, is damaged, holds anything else or asks for code.

    Example:
        >>> read_checkpoint("lightning_logs/version_0/checkpoints/last.ckpt")["global_step"]
        1564
    """
    checkpoint = _load(path, weights_only)
    try:
        for key, kind in _LAYOUT.items():
            if not isinstance(checkpoint[key], kind):
                raise CheckpointError(_unusable(path, f"{key} in it is no {kind.__name__}"))
        if not all(isinstance(weight, torch.Tensor) for weight in checkpoint["state_dict"].values()):
            raise CheckpointError(_unusable(path, "state_dict in it holds something else than tensors"))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no checkpoint of Lightning (it has no {error})") from error
    return checkpoint


def read_weights(path: str | Path, weights_only: bool = True) -> dict[str, torch.Tensor]:
    """Read weights onto the CPU: of a checkpoint of Lightning, or a plain file of them.

    Args:
        path: a file of ``torch.save`` with a state dict, alone or under ``state_dict`` or ``model``; or, where the
            package safetensors is installed, a ``.safetensors``.
        weights_only: accept tensors and plain values only, so that no code runs out of the file.

    Raises:
        CheckpointError: if the file cannot be read, is damaged, holds anything else or asks for code.
        ConfigurationError: if safetensors is needed and not installed.

    Example:
        >>> list(read_weights("resnet18-f37072fd.pth"))[:2]
        ['conv1.weight', 'bn1.running_mean']
    """
    if Path(path).suffix == ".safetensors":
        if find_spec("safetensors") is None:
            raise ConfigurationError(f"{path} needs the package safetensors: pip install safetensors")
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # as below
            raise CheckpointError(_unusable(path, (str(error) or type(error).__name__).splitlines()[0])) from error
    # torch.save wrote files that are no zip archives until torch 1.6; old weights are still around in them.
    content = _load(path, weights_only, old=True)
    weights: Any = None
    if isinstance(content, dict):
        weights = next((content[key] for key in ("state_dict", "model") if key in content), content)
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise CheckpointError(_unusable(path, "it holds no state dict, which is names and tensors"))
    return weights


def _load(path: str | Path, weights_only: bool, old: bool = False) -> Any:
    """Load a file of ``torch.save`` safely, whatever is in it; Lightning has some without a trainer's state."""
    try:
        if old and not zipfile.is_zipfile(path):
            return torch.load(path, map_location="cpu", weights_only=weights_only)
        with zipfile.ZipFile(path) as file:
            # torch.load neither compares checksums nor bounds what a compressed member grows to.
            if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
            if damaged := file.testzip():
                raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # a hostile file can make zipfile and torch.load raise just about anything
        if isinstance(error, UnpicklingError) and (foreign := _foreign_classes(path)):
            raise CheckpointError(
                f"{path} holds {', '.join(foreign)}, and to load that may run any code; if you trust the file, add "
                "--weights_only=false"
            ) from error
        lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
        raise CheckpointError(_unusable(path, lines[0])) from error


def _foreign_classes(path: str | Path) -> list[str]:
    """Names of what is neither a tensor nor a plain value in a file of ``torch.save``, as far as it can be read."""
    try:
        return sorted(map(printable, torch.serialization.get_unsafe_globals_in_checkpoint(path)))
    except Exception:  # as above; the error that is reported is the one of loading
        return []


def _unusable(path: str | Path, reason: str) -> str:
    return f"{path} is no checkpoint that can be used ({reason})"


def newest_checkpoint(root_dir: Path, model: str | None = None) -> Path | None:
    """Find the checkpoint to resume from after an interruption.

    It is the last one of the run that wrote one most recently, else that run's best, else those of the run
    before. Warns of each that is passed over because it does not load or is of another model.

    Args:
        root_dir: parent of ``lightning_logs``.
        model: class path of the model, or None for any.
    """

    def newest(folder: Path) -> int:
        return max((path.stat().st_mtime_ns for path in folder.glob("*.ckpt")), default=0)

    folders = sorted(root_dir.glob(f"{LOGS}/*/checkpoints"), key=newest, reverse=True)
    for folder in folders:
        for path in sorted(folder.glob("*.ckpt"), key=lambda path: (path.name != "last.ckpt", path.name)):
            if path.name == EXCEPTION:  # of a step that was broken off
                continue
            try:
                checkpoint = read_checkpoint(path)
            except CheckpointError as error:
                rank_zero_warn(f"{error}: passed over")
                continue
            other = checkpoint.get("options", {}).get("model", {}).get("class_path", model)
            if model is None or other == model:
                return path
            rank_zero_warn(f"{path} is of {other} and not of {model}: passed over")
            break
    return None


# --------------------------------------------------------------------------------------------- best


class BestCheckpoint(ModelCheckpoint):
    """Keep the best checkpoint: ``best.ckpt``, or the best few with epoch and step in their names.

    Args:
        monitor: metric that decides which is best.
        mode: ``min`` if lower is better, ``max`` if higher is. On the command line ``auto`` goes by the name.
        save_top_k: number of checkpoints to keep.
        filename: without ``.ckpt``, may contain ``{epoch}``, ``{step}`` and metrics.
        options: as in Lightning's ``ModelCheckpoint``. ``dirpath`` is by default ``checkpoints`` in the run's
            folder.

    Raises:
        ConfigurationError: before training, if the model logs no such metric.

    Example:
        >>> Trainer(callbacks=[BestCheckpoint(monitor="val/acc", mode="max", save_top_k=3)])
    """

    def __init__(
        self,
        monitor: str = DEFAULT_MONITOR,
        mode: Literal["auto", "min", "max"] = "min",
        save_top_k: int = 1,
        filename: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            filename=filename or ("best" if save_top_k == 1 else "best-{epoch}-{step}"),
            monitor=monitor,
            mode="min" if mode == "auto" else mode,
            save_top_k=save_top_k,
            enable_version_counter=False,
            **options,
        )
        self._warned = False
        self.best_epoch, self.best_metrics = 0, dict[str, float]()  # counted from 1; all of that epoch's

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Absolute, because ModelCheckpoint forgets the best of a folder that is named in another way.
        if self.dirpath or Run.of(trainer).exists:
            self.dirpath = os.path.abspath(self.dirpath or Run.of(trainer).checkpoints)
        super().setup(trainer, pl_module, stage)
        if not self._every_n_train_steps and not self._train_time_interval:
            self.on_train_batch_end = None  # type: ignore[assignment]  # Lightning passes over it; 1 % of a small step

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second ``ModelCheckpoint`` that writes the same files."""
        for other in trainer.checkpoint_callbacks:
            if isinstance(other, ModelCheckpoint) and not isinstance(other, BestCheckpoint):
                names = {other.filename, other.CHECKPOINT_NAME_LAST if other.save_last else None}
                for name in names & {self.filename, "last"} if str(other.dirpath) == str(self.dirpath) else ():
                    raise ConfigurationError(
                        f"a {type(other).__name__} of trainer.callbacks writes {name}.ckpt, as --best_checkpoint or "
                        "--last_checkpoint do; give it another filename or dirpath"
                    )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse monitors that nothing logs, those of early stopping and schedulers, too."""
        owners: list[tuple[Any, Any]] = [(callback, callback) for callback in trainer.early_stopping_callbacks]
        owners += [(config.scheduler, config) for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        # Others may be logged by training, which has not begun.
        wanted = [
            (f"{type(owner).__name__} with monitor=", its.monitor)
            for owner, its in owners
            if its.strict and str(its.monitor).startswith("val")
        ]
        if self.monitor != DEFAULT_MONITOR and not str(self.monitor).startswith("train"):
            wanted.append(("--monitor=", self.monitor))
        for name, monitor in wanted:
            if monitor not in trainer.callback_metrics:
                raise ConfigurationError(f"{name}{monitor}: there is no such metric; {self._way_out(trainer)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self._is_logged(trainer):
            super().on_validation_end(trainer, pl_module)
            self._keep_metrics(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_logged(trainer):
            super().on_train_epoch_end(trainer, pl_module)
            self._keep_metrics(trainer)

    def _keep_metrics(self, trainer: Trainer) -> None:
        saved = self._last_global_step_saved == trainer.global_step and self._last_checkpoint_saved
        if saved and self._last_checkpoint_saved == self.best_model_path:
            self.best_epoch, self.best_metrics = trainer.current_epoch + 1, _values(trainer)

    @staticmethod
    def _way_out(trainer: Trainer) -> str:
        names = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        return f"the model logs {names}; choose one of these with --monitor and --mode"

    def _is_logged(self, trainer: Trainer) -> bool:
        if self.monitor in trainer.callback_metrics:
            return True
        if not self._warned:
            rank_zero_warn(f"no best.ckpt is kept: it is chosen by {self.monitor}, and {self._way_out(trainer)}")
        self._warned = True
        return False

    def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        """As Lightning's, but a metric such as val/loss in the name makes no subfolder."""
        name = super().format_checkpoint_name(*args, **kwargs)
        folder = str(self.dirpath or "")
        return os.path.join(folder, os.path.relpath(name, folder or ".").replace(os.sep, "_"))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "best_epoch": self.best_epoch, "best_metrics": self.best_metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best ones so far, wherever the run's folder has been moved to."""
        if not self.dirpath:
            return
        old, new = state_dict.get("dirpath") or self.dirpath, str(self.dirpath)

        def moved(path: str) -> str:
            return os.path.join(new, os.path.relpath(path, old)) if path else path

        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        paths = {name: moved(state_dict[name]) for name in names}
        kept = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        if all(os.path.exists(path) for path in kept):
            super().load_state_dict({**state_dict, **paths, "dirpath": new, "best_k_models": kept})
            self.best_epoch = state_dict.get("best_epoch", 0)
            self.best_metrics = state_dict.get("best_metrics", {})


def best_checkpoint(trainer: Trainer) -> Checkpoint | None:
    """The callback that keeps the best checkpoint, whatever others there are."""
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint)]
    return ours[0] if ours else trainer.checkpoint_callback


# --------------------------------------------------------------------------------------------- last


def _do_nothing() -> None:
    """In the place of a method that is not needed."""


class LastCheckpoint(Checkpoint):
    """Keep ``last.ckpt``: after every epoch, every ``every_n_train_steps`` and when the run is asked to stop.

    Ctrl-C or SIGTERM ends the run after the current step (a validation that follows is finished first), with
    a checkpoint and exit code 130 or 143. A second one ends it at once. Several processes agree every
    ``AGREE_EVERY`` batches whether one of them was asked, because to agree is to wait for each other.

    The uninterrupted run passes through every state that is saved here, and what it has logged until then is
    on disk before the checkpoint replaces the one before, so that a resumed run leaves the same curves.

    Args:
        every_n_train_steps: optimizer steps that may be lost.

    Example:
        >>> Trainer(callbacks=[LastCheckpoint(every_n_train_steps=100)])
    """

    PENDING = "last.pending"
    AGREE_EVERY = 16

    def __init__(self, every_n_train_steps: PositiveInt = 500) -> None:
        self.every_n_train_steps = every_n_train_steps
        self._run = Run()
        self._folder = Path()
        self._pending, self._saved_step = False, 0
        self._asked = 0  # this process, by a signal
        self._signal = 0  # that all processes stop for
        self._handlers: dict[int, Any] = {}
        self._metrics: dict[str, float] = {}  # of an epoch that ends in the checkpoint
        self._before: dict[str, float] = {}  # of this epoch, until the checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._run = Run.of(trainer)
        if self._run.exists:
            self._folder = self._run.checkpoints

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loop = trainer.fit_loop
        if trainer.ckpt_path and loop._data_fetcher is not None:
            # A schedule that asks for trainer.estimated_stepping_batches makes Lightning set up the training loader
            # before it restores the loops, and then the position in the epoch is never loaded (Lightning issue 20550).
            # Dropped here, the loader is set up again after that.
            loop._data_fetcher.teardown()
            loop._data_fetcher = loop._combined_loader = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._handlers[signum] = signal.signal(signum, self._stop)
        # Before every step Lightning broadcasts whether there was a SIGTERM, and waits for the answer; these handlers
        # and on_train_batch_end do that, and more seldom.
        vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = _do_nothing
        if self._metrics:
            self._step_plateaus(trainer, pl_module, trainer.current_epoch, self._metrics)
        self._metrics = {}

    @staticmethod
    def _step_plateaus(trainer: Trainer, pl_module: LightningModule, epochs: int, metrics: dict[str, float]) -> None:
        """Step the schedulers that depend on a metric, where Lightning does not."""
        for config in trainer.lr_scheduler_configs:
            due = config.reduce_on_plateau and config.interval == "epoch" and epochs % config.frequency == 0
            if due and config.monitor in metrics:
                pl_module.lr_scheduler_step(config.scheduler, metrics[config.monitor])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self._asked = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        rank_zero_info(f"{signal.Signals(signum).name}: stopping after this step; once more stops at once")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1:
            self._signal = self._asked
        elif (batch_idx + 1) % self.AGREE_EVERY == 0 or trainer.is_last_batch:  # all save together
            asked = torch.tensor(self._asked, device=pl_module.device)
            self._signal = int(trainer.strategy.reduce(asked, reduce_op="max"))
        due = trainer.global_step // self.every_n_train_steps > self._saved_step // self.every_n_train_steps
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if (due or self._signal) and not accumulating and not self._evaluation_follows(trainer, batch_idx):
            self._save(trainer)

    @staticmethod
    def _evaluation_follows(trainer: Trainer, batch_idx: int) -> bool:
        """Whether validation or the end of the epoch comes before the next batch. Lightning resumes after
        them from what is saved here, so that their metrics would be missing.
        """
        if trainer.check_val_every_n_epoch is None:
            batch_idx = trainer.fit_loop.total_batch_idx
        every = trainer.val_check_batch
        validates = trainer.enable_validation and every is not None and (batch_idx + 1) % every == 0
        return trainer.is_last_batch or validates

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics, self._before = {**self._before, **_values(trainer)}, {}
        if trainer.max_steps == -1:  # otherwise Lightning would count the epoch twice when it resumes from here
            # Lightning steps the schedulers that depend on a metric after this hook. The metrics go into the
            # checkpoint, and a resumed run makes up for that step.
            self._metrics = metrics
            self._save(trainer)
            self._metrics = {}
        if trainer.fit_loop.restarting:  # in the epoch that it was resumed in Lightning leaves that step out
            self._step_plateaus(trainer, pl_module, trainer.current_epoch + 1, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"metrics": self._metrics, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._metrics, self._before = state_dict["metrics"], state_dict.get("before", {})

    def _save(self, trainer: Trainer) -> None:
        if not self._metrics:
            self._before = {**self._before, **_values(trainer)}
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(self._folder / self.PENDING, weights_only=False)
            self._pending, self._saved_step = True, trainer.global_step

    # The hooks that come next after what Lightning logs of the step or of the epoch.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._commit(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._commit(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved_step != trainer.global_step:
            self._save(trainer)
        self._commit(trainer)

    def _commit(self, trainer: Trainer) -> None:
        if not self._pending:
            return
        self._pending = False
        last = self._folder / "last.ckpt"
        for logger in trainer.loggers:
            logger.save()
        if trainer.is_global_zero:
            with _writing(last):
                os.replace(self._folder / self.PENDING, last)
        if self._signal:
            said = f"Stopped at step {trainer.global_step} by {signal.Signals(self._signal).name}"
            if project := self._run.project:
                config, ckpt_path = relative(self._run.config), relative(last)
                said += f". To go on: {project.command('fit', '--config', config, '--ckpt_path', ckpt_path)}"
            rank_zero_info(said)
            sys.exit(128 + self._signal)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the current weights in ``exception.ckpt``. A step that was broken off is no state to resume
        from exactly, so ``--ckpt_path=last`` keeps to ``last.ckpt``.
        """
        if not isinstance(exception, Exception) or isinstance(exception, UserError):
            return
        started = bool(self._handlers)
        if not started or trainer.world_size > 1 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        vanished = not self._run.folder.exists()
        path = self._folder / EXCEPTION
        trainer.save_checkpoint(path)
        cause = exception.__cause__ or exception  # Lightning's logger makes a ValueError of whatever it meets
        if isinstance(cause, OSError) and (vanished or cause.errno == errno.ENOSPC):
            run = relative(self._run.folder)
            what = "has vanished, with its curves and checkpoints," if vanished else "has a full disk"
            raise CheckpointError(
                f"{run} {what} while training; the weights after step {trainer.global_step} are in {relative(path)}"
            ) from exception


def _values(trainer: Trainer) -> dict[str, float]:
    return {name: metric.item() for name, metric in trainer.callback_metrics.items()}


class RandomState(Callback):
    """Save the state of the random generators of every process in checkpoints, and restore it; and how many
    threads have computed, because they differ in the last bits.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        numpy_state = np.random.get_state(legacy=False)
        assert isinstance(numpy_state, dict)
        numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
        state = {
            "python": random.getstate(),
            "numpy": numpy_state,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all(),
        }
        states = [state] * trainer.world_size
        if torch.distributed.is_initialized():
            torch.distributed.all_gather_object(states, state)
        checkpoint["random_states"] = states  # one for each process
        checkpoint["num_threads"] = torch.get_num_threads()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("random_states", [])
        if trainer.state.fn != "fit":
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint has the random state of {len(states)} processes, this run has "
                f"{trainer.world_size}: it resumes, but not exactly as the uninterrupted run would have"
            )
            return
        state = states[trainer.global_rank]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
