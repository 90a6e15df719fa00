"""How many processors there are for a process, and how many threads it computes with."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cpus(processes: int = 1, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors for each of a number of processes on this machine, at least 1.

    Counted are those that the process may run on and, in a container, its quota (see cpu.max in
    https://docs.kernel.org/admin-guide/cgroup-v2.html).

    Args:
        processes: that share them.
        groups: where the control groups are mounted.
    """
    cpus: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(cpus, _quota(groups))) // processes)


def _quota(groups: Path) -> float:
    """Processors that a container may use; infinite where there is no limit."""
    files = [groups / "cpu.max"], [groups / "cpu/cpu.cfs_quota_us", groups / "cpu/cpu.cfs_period_us"]  # version 2, 1
    for version in files:
        try:
            quota, period = " ".join(file.read_text() for file in version).split()
            return int(quota) / int(period) if int(quota) > 0 else math.inf
        except (OSError, ValueError):  # no such files, or "max"
            continue
    return math.inf


def set_threads(num_threads: int | None, processes: int = 1) -> int:
    """Compute with a number of threads in this process, and in those that it starts.

    Args:
        num_threads: by default ``OMP_NUM_THREADS``, and without that an equal share of the processors.
        processes: that share them.

    Returns:
        the number.
    """
    if num_threads is None:
        chosen = os.environ.get("OMP_NUM_THREADS", "")
        num_threads = int(chosen) if chosen.isdigit() and int(chosen) else available_cpus(processes)
    import torch  # which it takes a second to import, and no processors to count

    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # without which Lightning chooses for the processes it starts
    return num_threads
