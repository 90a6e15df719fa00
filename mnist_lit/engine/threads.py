"""How many processors a process may use, and how many threads it computes with."""

from __future__ import annotations

import math
import os
from pathlib import Path


def available_cpus(processes: int = 1, groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors for each of several processes on this machine, at least 1.

    Affinity counts and, in a container, its quota (cpu.max in
    https://docs.kernel.org/admin-guide/cgroup-v2.html, or the files of version 1).

    Args:
        processes: that share them.
        groups: where the control groups are mounted.
    """
    cpus: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in ("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"):
        try:
            quota, period = (int(number) for name in names for number in (groups / name).read_text().split())
        except (OSError, ValueError):  # there are no such files, or there is no limit: "max"
            continue
        cpus = min(cpus, quota / period if quota > 0 else math.inf)
    return max(1, int(cpus) // processes)


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
    import torch  # importing it takes a second, which counting processors does not need

    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # without it, Lightning chooses for the processes that it starts
    return num_threads
