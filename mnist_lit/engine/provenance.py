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
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lit.engine.best import best_checkpoint
from mnist_lit.engine.errors import ENGINE
from mnist_lit.engine.run import Run
from mnist_lit.engine.storage import atomic_write

Content = TypeVar("Content", dict, list)
PACKAGES = ("torch", "lightning", "torchmetrics", "jsonargparse", "numpy")


class Provenance(Callback):
    """Write ``provenance.json``, ``git.diff`` and ``metrics.json`` in the run's folder.

    ``provenance.json`` is a list with an object for each start of the run: command, git commit and whether
    files differ from it, the engine's version and commit, other versions, device, host, start and end (UTC),
    and how it ended; a process that was killed leaves no end. ``git.diff`` holds what differs from the commit,
    without new files. ``metrics.json`` holds the final metrics, and the best checkpoint with its score.

    Example:
        >>> Trainer(callbacks=[Provenance()])
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._starts = list[dict[str, Any]]()  # of the run; the last one is that of this process

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = Run.of(trainer)  # in every process: the first one tells the others where the run is
        if not trainer.is_global_zero or not run.exists or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if run.folder == self._folder:  # a test after the fit
            return
        self._folder = run.folder
        with _warn_on_error():
            commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
            start = {
                "command": shlex.join([run.project.name, *sys.argv[1:]]) if run.project else shlex.join(sys.argv),
                "git": {"commit": commit.strip(), "dirty": bool(changes)} if commit else None,
                "engine": engine(),
                "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
                "device": _device(trainer),
                "processes": trainer.world_size,
                "threads": torch.get_num_threads(),
                "host": socket.gethostname(),
                "start": _now(),
                "end": None,
                "exit": None,
            }
            self._folder.mkdir(parents=True, exist_ok=True)
            if changes and (diff := _git("diff", "HEAD")):
                _write(self._folder / "git.diff", diff)
            self._starts = [*_read(self._folder / "provenance.json", list), start]
            _write(self._folder / "provenance.json", self._starts)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        code = exception.code if isinstance(exception, SystemExit) else None
        signals = {128 + number: number.name for number in signal.Signals}
        first = (str(exception).splitlines() or [""])[0]
        self._end(trainer, signals.get(code, f"{type(exception).__name__}: {first}"))  # type: ignore[arg-type]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end(trainer, "finished")

    def _end(self, trainer: Trainer, reason: str) -> None:
        if not self._starts or self._folder is None or not self._folder.exists():
            return
        ended = {"end": _now(), "exit": reason, "epoch": trainer.current_epoch, "step": trainer.global_step}
        with _warn_on_error():
            self._starts[-1] |= ended
            _write(self._folder / "provenance.json", self._starts)
            metrics: dict[str, Any] = {name: _finite(value) for name, value in sorted(trainer.callback_metrics.items())}
            best: Any = best_checkpoint(trainer)
            if path := getattr(best, "best_model_path", ""):
                score = best.best_model_score
                score = None if score is None else _finite(score)
                metrics["best"] = {"checkpoint": Path(path).name, str(best.monitor): score}
            if metrics:  # those of a test after a fit stand beside the fit's
                file = self._folder / "metrics.json"
                _write(file, _read(file, dict) | metrics)


@cache
def engine() -> dict[str, str | None]:
    """The engine's ``version`` and, where it was installed from git or runs from a checkout, its ``commit``."""
    known: dict[str, str | None] = {"version": None, "commit": None}
    checkout = "-C", str(Path(__file__).parent)
    with suppress(PackageNotFoundError, ValueError):  # a checkout that is not installed
        installed = distribution(ENGINE)
        known["version"] = installed.version
        origin = json.loads(installed.read_text("direct_url.json") or "{}")  # of PEP 610
        known["commit"] = origin.get("vcs_info", {}).get("commit_id")
    if _git(*checkout, "ls-files", __file__):  # else the commit is that of a project around its environment
        known["commit"] = _git(*checkout, "rev-parse", "HEAD").strip()
    return known


def engine_version() -> str:
    """The engine's version and commit in short.

    Example:
        >>> engine_version()
        'mnist_lit 0.2.0 (0a1b2c3)'
    """
    known = engine()
    commit = f" ({known['commit'][:7]})" if known["commit"] else ""
    return f"{ENGINE} {known['version'] or 'that is not installed'}{commit}"


@contextmanager
def _warn_on_error() -> Iterator[None]:
    """Keep whatever fails from ending the run."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"provenance.json and metrics.json are not written: {error}")


def _finite(value: torch.Tensor) -> float | None:
    """For JSON, which knows neither nan nor inf."""
    return value.item() if value.isfinite() else None


def _read(path: Path, kind: type[Content]) -> Content:
    """The content of a file; empty if there is none, or one of another kind."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()


def _write(path: Path, content: str | dict | list) -> None:
    with atomic_write(path) as part:
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        part.write_text(text, encoding="utf-8")


def _git(*arguments: str) -> str:
    """What git prints here; nothing where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _device(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
