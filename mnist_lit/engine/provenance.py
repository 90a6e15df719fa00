"""What made a run, in its folder: command, code, versions, machine, and how it ended."""

from __future__ import annotations

import json
import platform
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lit.engine.best import best_checkpoint
from mnist_lit.engine.run import Run
from mnist_lit.engine.storage import atomic_write

Content = TypeVar("Content", dict, list)
PACKAGES = ("torch", "lightning", "torchmetrics", "jsonargparse", "numpy")


class Provenance(Callback):
    """Write ``provenance.json``, ``git.diff`` and ``metrics.json`` in the run's folder.

    ``provenance.json`` is a list with an object for each start of the run: command, git commit and whether
    files differ from it, versions, device, host, start and end (UTC), and how it ended; a process that was
    killed leaves no end. ``git.diff`` holds what differs from the commit, without new files.
    ``metrics.json`` holds the final metrics, and with which value which checkpoint is the best.

    Example:
        >>> Trainer(callbacks=[Provenance()])
    """

    def __init__(self) -> None:
        self._start: dict[str, Any] = {}  # of this process
        self._earlier: list[Any] = []  # starts of the same run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = Run.of(trainer)
        if self._start or not trainer.is_global_zero or not run.exists or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
        self._start = {
            "command": shlex.join([run.project.name, *sys.argv[1:]]) if run.project else shlex.join(sys.argv),
            "git": {"commit": commit.strip(), "dirty": bool(changes)} if commit else None,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
            "device": _device(trainer),
            "processes": trainer.world_size,
            "threads": torch.get_num_threads(),
            "host": socket.gethostname(),
            "start": _now(),
            "end": None,
            "exit": None,
        }
        with _looking_on():
            run.folder.mkdir(parents=True, exist_ok=True)
            if changes and (diff := _git("diff", "HEAD")):
                with atomic_write(run.folder / "git.diff") as part:
                    part.write_text(diff, encoding="utf-8")
            self._earlier = _read(run.folder / "provenance.json", list)
            _write(run.folder / "provenance.json", [*self._earlier, self._start])

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        code = exception.code if isinstance(exception, SystemExit) else None
        known = {128 + known: known.name for known in signal.Signals}
        if code in known:
            self._end(trainer, known[code])
        else:
            first = (str(exception).splitlines() or [""])[0]
            self._end(trainer, f"{type(exception).__name__}: {first}")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "finished")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._end(trainer, "finished")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "finished")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, "finished")

    def _end(self, trainer: Trainer, reason: str) -> None:
        run = Run.of(trainer)
        if not self._start or not run.folder.exists():
            return
        self._start |= {"end": _now(), "exit": reason, "epoch": trainer.current_epoch, "step": trainer.global_step}
        with _looking_on():
            _write(run.folder / "provenance.json", [*self._earlier, self._start])
            self._write_metrics(trainer, run)

    @staticmethod
    def _write_metrics(trainer: Trainer, run: Run) -> None:
        metrics: dict[str, Any] = {name: _finite(value) for name, value in sorted(trainer.callback_metrics.items())}
        best = best_checkpoint(trainer)
        if path := getattr(best, "best_model_path", ""):
            score = getattr(best, "best_model_score", None)
            metrics["best"] = {
                "checkpoint": Path(path).name,
                str(getattr(best, "monitor", None)): None if score is None else _finite(score),
            }
        if metrics:
            # Those of a test after a fit stand beside the fit's.
            _write(run.folder / "metrics.json", {**_read(run.folder / "metrics.json", dict), **metrics})


@contextmanager
def _looking_on() -> Iterator[None]:
    """Keep an error of writing from ending the run."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"no provenance.json and metrics.json are written: {error}")


def _finite(value: torch.Tensor) -> float | None:
    """For JSON, which knows neither nan nor inf."""
    return value.item() if value.isfinite() else None


def _read(path: Path, kind: type[Content]) -> Content:
    """What a file holds; nothing if there is none, or if it holds something of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()


def _write(path: Path, content: dict | list) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _git(*arguments: str) -> str:
    """What git prints here; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
