"""What made a run, in its folder: command, code, versions, machine, and how it ended."""

import hmac
import json
import os
import platform
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lit.engine.best import best_checkpoint
from mnist_lit.engine.errors import ENGINE, no_pipe
from mnist_lit.engine.run import Run
from mnist_lit.engine.storage import atomic_write

PACKAGES = ("torch", "lightning", "torchmetrics", "jsonargparse", "numpy")


class Provenance(Callback):
    """Write ``provenance.json``, ``git.diff`` and ``metrics.json`` in the run's folder.

    ``provenance.json`` is a list with an object for each start of the run: command, git commit and whether files differ
    from it, the engine's version and commit, other versions, device, host, a signature of ``config.yaml``, start and
    end (UTC), and how it ended; a killed process has no end. ``git.diff`` holds the difference to the commit, without
    new files. ``metrics.json`` holds the final metrics, and the best checkpoint with its score.

    Example:
        >>> Trainer(callbacks=[Provenance()])
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._starts = list[dict[str, Any]]()  # of the run; the last one is this process's
        self._metrics = dict[str, Any]()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = Run.of(trainer)  # in every process: the first one tells the others where the run is
        if not trainer.is_global_zero or not run.exists or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if run.folder == self._folder:  # a test after the fit
            return
        self._folder = run.folder
        commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
        device = trainer.strategy.root_device
        start = {
            "command": shlex.join([run.project.name, *sys.argv[1:]]) if run.project else shlex.join(sys.argv),
            "git": {"commit": commit.strip(), "dirty": bool(changes)} if commit else None,
            "engine": engine(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
            "processes": trainer.world_size,
            "threads": torch.get_num_threads(),
            "host": socket.gethostname(),
            "start": _now(),
            "signature": _signature(run.config_text),
            "end": None,
            "exit": None,
        }
        self._starts = [*_read_starts(self._folder), start]
        if changes and (diff := _git("diff", "HEAD")):
            _write(self._folder / "git.diff", diff)
        _write(self._folder / "provenance.json", self._starts)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        code = exception.code if isinstance(exception, SystemExit) else None
        signals = {128 + number: number.name for number in signal.Signals}
        first = (str(exception).splitlines() or [""])[0]
        self._end(trainer, signals.get(code, f"{type(exception).__name__}: {first}"))  # type: ignore[arg-type]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end(trainer, "finished")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the metrics before the last checkpoint, after which a run that is killed is not resumed."""
        self._save_metrics(trainer)

    def _end(self, trainer: Trainer, reason: str) -> None:
        if not self._starts or self._folder is None or not self._folder.exists():
            return
        self._starts[-1] |= {"end": _now(), "exit": reason, "epoch": trainer.current_epoch, "step": trainer.global_step}
        _write(self._folder / "provenance.json", self._starts)
        self._save_metrics(trainer)

    def _save_metrics(self, trainer: Trainer) -> None:
        # A test after a fit adds its metrics to the fit's.
        self._metrics |= {name: _finite(value) for name, value in sorted(trainer.callback_metrics.items())}
        best: Any = best_checkpoint(trainer)
        if path := getattr(best, "best_model_path", ""):
            self._metrics["best"] = {"checkpoint": Path(path).name, str(best.monitor): _finite(best.best_model_score)}
            self._metrics["best"]["step"] = getattr(best, "best_step", None)
        if self._metrics and self._starts and self._folder:
            _write(self._folder / "metrics.json", self._metrics)


def written_here(run: Run) -> bool:
    """Whether this user wrote a run's config.yaml on this machine, by its signature."""
    with suppress(OSError):
        ours = _signature(run.config.read_text(encoding="utf-8"))
        starts = [start for start in _read_starts(run.folder) if isinstance(start, dict)]
        return ours is not None and not run.config.is_symlink() and ours in [start.get("signature") for start in starts]
    return False


def _signature(config: str) -> str | None:
    """Signature with a key that is made once per user and machine; None if the key cannot be saved."""
    with suppress(OSError, RuntimeError):  # such as a home that cannot be written
        key = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / ENGINE / "key"
        if not key.exists():
            key.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(key) as part:
                part.touch(mode=0o600)
                part.write_bytes(secrets.token_bytes(32))
        return hmac.new(key.read_bytes(), config.encode(), "sha256").hexdigest()
    return None


@cache
def engine() -> dict[str, str | None]:
    """The engine's ``version`` and, if it was installed from git, its ``commit``."""
    try:
        installed = distribution(ENGINE)
        origin = json.loads(installed.read_text("direct_url.json") or "{}")  # of PEP 610
        return {"version": installed.version, "commit": origin.get("vcs_info", {}).get("commit_id")}
    except PackageNotFoundError:  # a checkout that is not installed
        return {"version": None, "commit": None}


def engine_version() -> str:
    """The engine's version and commit, such as ``mnist_lit 0.2.0 (0a1b2c3)``."""
    version, commit = engine().values()
    return f"{ENGINE} {version or 'that is not installed'}" + (f" ({commit[:7]})" if commit else "")


def _read_starts(folder: Path) -> list[Any]:
    file = folder / "provenance.json"
    with suppress(OSError, ValueError):
        starts = [] if file.is_symlink() else json.loads(no_pipe(file).read_text(encoding="utf-8"))
        return starts if isinstance(starts, list) else []
    return []


def _write(path: Path, content: str | dict | list) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
            part.write_text(text, encoding="utf-8")
    except OSError as error:  # does not end the run
        rank_zero_warn(f"{path.name} is not written: {error}")


def _finite(value: torch.Tensor | None) -> float | None:
    """A number, or None for nan and inf, which JSON does not have."""
    return value.item() if value is not None and value.isfinite() else None


def _git(*arguments: str) -> str:
    """Output of git; empty if there is no git or no repository."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["git", *arguments], capture_output=True, timeout=20, check=True)
        return done.stdout.decode("utf-8", "replace")
    return ""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
