"""Processes that are measured, and what to say of the machine that they ran on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mnist_lit.engine.threads import available_cpus

ROOT = Path(__file__).parents[1]
BUSY = 0.1  # processors that others may use before a run counts as disturbed
CLOCK = {"class_path": "benchmarks.contenders.clock", "init_args": {"path": "clock.json"}}  # a callback of mnist_lit's
Result = dict[str, float]


class Started(NamedTuple):
    """A process that has ended: the moments that its clock took, its own seconds, and what others did meanwhile."""

    moments: dict[str, Any]
    began: float  # seconds since 1970
    ended: float
    others: float  # processors that other programs kept busy on average


def start(
    arguments: list[str], folder: Path, *, root: Path = ROOT, threads: int | None = None, busy: bool = False
) -> Started:
    """Run ``python -m`` with these arguments.

    Args:
        arguments: the module first.
        folder: to run in; the clock leaves ``clock.json`` there.
        root: checkout whose code runs.
        threads: ``OMP_NUM_THREADS``.
        busy: beside a process that spins.

    Raises:
        SystemExit: with what it printed, when it fails.
    """
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with _spinning() if busy else nullcontext():
        before, own, began = _used(), os.times(), time.time()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        ended, now = time.time(), os.times()
        used = now.children_user + now.children_system - own.children_user - own.children_system
        others = max(0.0, (_used() - before - used) / (ended - began))
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return Started(json.loads((folder / "clock.json").read_text(encoding="utf-8")), began, ended, others)


@contextmanager
def _spinning() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _used() -> float:
    """Processor seconds of all programs since the machine has started, its own parents among them (Linux)."""
    user, nice, system, _, _, irq, softirq = map(
        int, Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def medians(results: list[Result]) -> Result:
    """Field by field, and as ``FIELD_from`` and ``FIELD_to`` between which values they lie."""
    columns = {key: [result[key] for result in results] for key in results[0]}
    return {
        name: value
        for key, values in columns.items()
        for name, value in ((key, statistics.median(values)), (f"{key}_from", min(values)), (f"{key}_to", max(values)))
    }


def machine() -> dict[str, Any]:
    """Processor, cores, versions, commit and load."""
    names = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "lightning", "numpy")
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": available_cpus(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": commit or None,
        "load": os.getloadavg()[0],
    }


def described(about: dict[str, Any]) -> str:
    """What ``machine`` has found, in a line."""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['gpu'] or about['cpu']}, {about['cores']} cores, load {about['load']:.1f} before and "
        f"{os.getloadavg()[0]:.1f} after; {versions}; commit {about['commit']}"
    )
