"""Number of processors that a process may use, and of threads that it computes with."""

import os
from contextlib import suppress
from pathlib import Path


def available_cpus(processes: int = 1, limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Number of processors for each of several processes on this machine, at least 1.

    Respects the affinity and a container's quota (https://docs.kernel.org/admin-guide/cgroup-v2.html).
    """
    cpus: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # there is no such file, or no limit: "max"
        quota, period = map(int, limit.read_text("utf-8").split())
        cpus = min(cpus, quota / period)
    return max(1, int(cpus) // processes)


def set_threads(num_threads: int | None, processes: int = 1) -> int:
    """Set the number of threads of this process and those that it starts, and return it.

    By default it is ``OMP_NUM_THREADS``, or else an equal share of the processors.
    """
    import torch  # takes a second, which counting processors does not need

    chosen = os.environ.get("OMP_NUM_THREADS", "")
    number = num_threads or (int(chosen) if chosen.isdigit() else 0) or available_cpus(processes)
    torch.set_num_threads(number)
    os.environ["OMP_NUM_THREADS"] = str(number)  # without it, Lightning chooses for the processes that it starts
    return number
