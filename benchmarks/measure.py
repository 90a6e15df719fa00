"""Processes that are measured, and what to say of the machine that they ran on."""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mnist_lit.engine.threads import available_cpus

ROOT = Path(__file__).parents[1]
Result = dict[str, float]


def start(arguments: list[str], folder: Path, root: Path = ROOT) -> tuple[dict[str, Any], float]:
    """Run ``python -m`` with these arguments; returns what its clock has taken, and seconds from start to exit.

    Args:
        arguments: the module first.
        folder: to run in; the clock leaves ``clock.json`` there.
        root: checkout whose code runs.

    Raises:
        SystemExit: with what it printed, when it fails.
    """
    command, environment = [sys.executable, "-m", *arguments], {**os.environ, "PYTHONPATH": str(root)}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads((folder / "clock.json").read_text(encoding="utf-8")), seconds


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
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu and cpu[1],
        "cores": available_cpus(),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "numpy")),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "load": os.getloadavg()[0],
    }


def described(about: dict[str, Any]) -> str:
    """What ``machine`` has found, in a line."""
    load = f"load {about['load']:.1f} before and {os.getloadavg()[0]:.1f} after"
    return f"{about['processor']}, {about['cores']} cores, {load}; {about['versions']}; commit {about['commit']}"
