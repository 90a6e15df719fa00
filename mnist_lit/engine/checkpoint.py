"""Checkpoint files: atomic writes, safe loading, and access to their content."""

import glob
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from packaging.version import Version
from torch import Tensor
from torch.nn.parameter import is_lazy

from mnist_lit.engine.compat import saved_log_step
from mnist_lit.engine.errors import UserError, explain_damage, no_pipe, unusable
from mnist_lit.engine.run import LOGS, Run
from mnist_lit.engine.storage import atomic_save, printable

EXCEPTION = "exception.ckpt"
# Keys that every checkpoint of Lightning has, with values of their kinds; and those that it may have.
LAYOUT = {"state_dict": {}, "loops": {}, "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2"}
HPARAMS: dict[str, Any] = {"hyper_parameters": {}, "datamodule_hyper_parameters": {}}
OPTIONAL = HPARAMS | {"callbacks": {}, "loggers": [], "processes": [{"loaders": [], "sums": {}, "metrics": {}}]}


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files with atomic writes and safe loading.

    Lightning itself writes to the system's temporary folder and moves the file from there. If that folder is on another
    disk, the move is a copy, which may stop half-way.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        with explain_write_errors(path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            atomic_save(checkpoint, Path(path))
        if foreign := _foreign_classes(path):
            rank_zero_warn(f"{path} holds {foreign}: it loads only with --weights_only=false")

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        return load_file(path, weights_only is not False)


@contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn an ``OSError`` into a message that says what to do."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the checkpoint {path} ({error.strerror}); what was saved before is still there: "
            "make room or make the folder writable, then go on with --ckpt_path=last"
        ) from error


def no_such_checkpoint(option: str, path: str | Path) -> str:
    """The message for an option that names a missing file."""
    return f"--{option}={path}: no such checkpoint; runs keep them in {LOGS}/*/checkpoints"


class UnsafeError(UserError):
    """A file can only be loaded by running code in it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of Lightning, read once.

    Args:
        path: the file.
        content: its content.

    Example:
        >>> checkpoint = Checkpoint.read("lightning_logs/version_0/checkpoints/last.ckpt")
        >>> checkpoint.step, checkpoint.run.folder
        (1564, PosixPath('.../lightning_logs/version_0'))
    """

    path: str
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: str | Path, weights_only: bool = True) -> "Checkpoint":
        """Read a file onto the CPU.

        Args:
            path: the file.
            weights_only: whether to load only tensors and plain values, so that no code in the file can run.

        Raises:
            UserError: if the file cannot be read, is damaged, or holds anything else.
        """
        content = load_file(path, weights_only)
        content = HPARAMS | content if isinstance(content, dict) else {}
        for key, example in (LAYOUT | OPTIONAL).items():
            if not same_kinds(content.get(key, OPTIONAL.get(key)), example, counts=True):
                raise UserError(f"{path} is not a checkpoint of Lightning (without {key})")
        if not all(isinstance(weight, Tensor) for weight in content["state_dict"].values()):
            raise UserError(f"{path} is not a checkpoint of Lightning (its state_dict does not only hold tensors)")
        with explain_damage(path):
            Version(content["pytorch-lightning_version"])
        return cls(str(path), content)

    @property
    def step(self) -> int:
        """Number of optimizer steps so far."""
        return self.content["global_step"]

    @property
    def log_step(self) -> int:
        """The step at which loggers go on; Lightning's count for them differs with several optimizers."""
        with explain_damage(self.path):
            return saved_log_step(self.content["loops"]["fit_loop"])

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's state dict."""
        return self.content["state_dict"]

    @property
    def run(self) -> Run | None:
        """The run that wrote it, if it is still in that run's folder."""
        return Run.of_checkpoint(self.path)

    @property
    def hparams(self) -> dict[str, Any]:
        """Hyperparameters of the model and of the data module."""
        return {key: value for part in HPARAMS for key, value in self.content.get(part, {}).items()}

    def hparam(self, name: str) -> Any:
        """A hyperparameter that a command takes; a number larger than the file would fill the memory with classes."""
        value = self.hparams.get(name)
        sizes = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(size, (int, float)) and size > os.path.getsize(self.path) for size in sizes):
            raise UserError(f"{self.path} cannot be used as a checkpoint ({name} of {value} in so small a file)")
        return value if sizes else None

    def finished(self, trainer: Trainer) -> str:
        """How to train longer, if the trainer would have nothing left to do; else "".

        Raises:
            UserError: if the counts of epochs and steps are damaged.
        """
        if not same_kinds(self.content["loops"].get("fit_loop"), trainer.fit_loop.state_dict(), counts=True):
            raise UserError(f"{self.path} cannot be used as a checkpoint (its loops are not Lightning's)")
        with explain_damage(self.path):
            loops = self.content["loops"]["fit_loop"]
            type(trainer.fit_loop)(trainer).load_state_dict(loops)
            epochs = loops["epoch_progress"]["current"]["processed"]
            stopped = [
                int(state["wait_count"]) >= max(int(state["patience"]), 1)
                for key, state in self.content.get("callbacks", {}).items()
                if trainer.early_stopping_callbacks and key.startswith("EarlyStopping")
            ]
        if self.step >= trainer.max_steps >= 0:
            return "raise --trainer.max_steps"
        if trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs:
            return "raise --trainer.max_epochs"
        early = any(stopped) and epochs >= (trainer.min_epochs or 0) and self.step >= (trainer.min_steps or 0)
        return "it was stopped early, so leave out EarlyStopping" if early else ""

    def check(self, model: LightningModule) -> None:
        """Compare the weights with a model's.

        Raises:
            UserError: naming the first that differs.
        """
        later = is_overridden("configure_model", model) or is_overridden("setup", model)  # where layers may be made
        for name, theirs, ours in misfits(self.weights, model) if model.strict_loading else ():
            if ours is None and later:
                continue
            raise UserError(
                f"{self.path} is not of this model: {name} has the shape {theirs} there and {ours} in "
                f"{type(model).__name__}; the config.yaml in the folder of its run is the one that fits"
            )


def same_kinds(theirs: Any, ours: Any, counts: bool = False) -> bool:
    """Whether what a nest has in common with an example is of its kinds. None in the example stands for anything, and
    ``counts`` for numbers that are whole and not negative.
    """
    if isinstance(ours, Mapping):
        if not isinstance(theirs, Mapping):
            return False
        there = [key for key, value in ours.items() if key in theirs or type(value) in (int, float)]
        return all(same_kinds(theirs.get(key), ours[key], counts) for key in there)
    if isinstance(ours, (list, tuple)):
        return isinstance(theirs, (list, tuple)) and all(map(same_kinds, theirs, ours))
    if isinstance(ours, (int, float)) and not isinstance(ours, bool):
        whole = type(theirs) is int and abs(theirs) < 2**63  # as others store them
        return whole and theirs >= 0 if counts else whole or isinstance(theirs, float)
    return ours is None or type(theirs) is type(ours)


Shape = tuple[int, ...] | None  # None where there is no such weight


def misfits(weights: Mapping[str, Tensor], model: LightningModule) -> list[tuple[str, Shape, Shape]]:
    """Names of weights whose shapes differ from a model's, with the shape in the file and in the model."""
    ours = model.state_dict()
    shapes = {
        name: tuple(tuple(each[name].shape) if name in each else None for each in (weights, ours))
        for name in sorted(ours.keys() | weights.keys())
        if not (name in ours and name in weights and is_lazy(ours[name]))
    }
    return [(name, there, here) for name, (there, here) in shapes.items() if there != here]


def load_file(path: str | Path, weights_only: bool, old: bool = False) -> Any:
    """Load a file written by ``torch.save``, whatever is in it.

    Args:
        path: the file.
        weights_only: whether to load only tensors and plain values.
        old: whether to accept the format of torch before 1.6, which is not a zip archive.

    Raises:
        UserError: if it cannot be read, is damaged, or can only be loaded by running code in it.
    """
    no_pipe(path)
    try:
        if not old or zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                # torch.load neither compares checksums nor limits the size of a decompressed member.
                if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
                    raise ValueError("it is compressed, which torch.save never does")
                if damaged := file.testzip():
                    raise ValueError(f"{damaged} in it is damaged")
        return torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:  # a hostile file can make zipfile and torch.load raise almost anything
        if isinstance(error, UnpicklingError) and (foreign := _foreign_classes(path)):
            raise UnsafeError(
                f"{path} holds {foreign}, and to load that may run any code; if you trust the file, add "
                "--weights_only=false"
            ) from error
        raise unusable(path, error) from error


def _foreign_classes(path: str | Path) -> str:
    """Names of the classes and functions in a file of ``torch.save`` that are not safe to load, if it can be read."""
    with suppress(Exception):  # as above; the error of loading is the one to report
        return ", ".join(sorted(map(printable, torch.serialization.get_unsafe_globals_in_checkpoint(path))))
    return ""


def newest_checkpoint(
    root_dir: Path, model: str | None = None, run_name: str | None = None, weights_only: bool = True
) -> Checkpoint | None:
    """Find the checkpoint to resume from after an interruption.

    Runs are tried from the one that wrote a checkpoint last, and in each run ``last.ckpt`` comes first. A warning names
    every one that is passed over because it is damaged, or its model's class path is another.

    Raises:
        UserError: if there are checkpoints but none of them loads, or one only loads with ``weights_only=False``.
    """

    def newest(folder: Path) -> int:
        return max((path.stat().st_mtime_ns for path in folder.glob("*.ckpt")), default=0)

    damaged, name = None, glob.escape(run_name) if run_name else "*"
    for folder in sorted(root_dir.glob(f"{LOGS}/{name}/checkpoints"), key=newest, reverse=True):
        other = Run(folder.parent).options.get("model", {}).get("class_path", model)
        if model not in (None, other):
            rank_zero_warn(f"{folder} is of {other} and not of {model}: passed over")
            continue
        for path in sorted(folder.glob("*.ckpt"), key=lambda path: (path.name != "last.ckpt", path.name)):
            if path.name == EXCEPTION:  # saved when a step failed
                continue
            try:
                checkpoint = Checkpoint.read(path, weights_only)
            except UnsafeError:
                raise
            except UserError as error:
                rank_zero_warn(f"{error}: passed over")
                damaged = error
                continue
            rank_zero_info(f"--ckpt_path=last: resuming from {path}")
            return checkpoint
    if damaged:
        raise UserError(f"--ckpt_path=last: no checkpoint loads; {damaged}") from damaged
    rank_zero_info("--ckpt_path=last: there is no checkpoint yet, this run starts from scratch")
    return None
