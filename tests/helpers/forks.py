"""Starts mnist_lit again and again and imports it once: every run is a fork, and so a process of its own."""

import gc
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from watch import watch

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
PRELOADED = """__main__ forks omegaconf onnxscript torch.onnx._internal.exporter._core mnist_lit.__main__ mnist_lit.data
mnist_lit.models mnist_lit.engine.cli mnist_lit.engine.sweep mnist_lit.engine.testing""".split()


def run(folder: Path, arguments: list[str], environment: dict[str, str], output: Path, errors: Path) -> None:
    """What a shell does for a new process, and then the command."""
    multiprocessing.set_start_method(None, force=True)  # the platform's, and not that of this process
    gc.freeze()  # what is imported is neither searched for garbage nor copied
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, APPEND), (2, errors, APPEND)):
        os.dup2(os.open(path, flags), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["mnist_lit", *arguments]
    if watched := environment.get("WATCH"):
        watch(str(folder), *watched.split(os.pathsep))
    from mnist_lit.__main__ import main

    main()


def wait_for_the_next_second(folder: Path) -> None:
    """TensorBoard reads a run's files of events in the order of second, host and pid of their start.

    Only a fork is fast enough to resume a run in the second in which it was started. Its pid may then
    come first: "10002" is before "9998".
    """
    seconds = {path.name.split(".")[3] for path in folder.rglob("events.out.tfevents.*")}
    while str(int(time.time())) in seconds:
        time.sleep(0.01)


class Forks:
    """Runs, one at a time."""

    def __init__(self) -> None:
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def start(self, folder: Path, *run_of: Any) -> int:
        """The pid of a run with arguments and environment, that appends what it prints to two files."""
        wait_for_the_next_second(folder)
        self.process = self.context.Process(target=run, args=(folder, *run_of))
        self.process.start()
        return self.process.pid

    def wait(self) -> int:
        """The exit code of the run, negative for a signal; one that takes longer than ten minutes is killed."""
        self.process.join(600)
        self.process.kill()
        self.process.join()
        return self.process.exitcode
