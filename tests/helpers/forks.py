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
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


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


def start(folder: Path, *run_of: Any) -> Any:
    """Start a run with arguments and environment, that appends what it prints to two files; returns its process."""
    wait_for_the_next_second(folder)
    process = CONTEXT.Process(target=run, args=(folder, *run_of))
    process.start()
    return process


def wait(process: Any) -> int:
    """The exit code of a run, negative for a signal; one that takes longer than ten minutes is killed."""
    process.join(600)
    process.kill()
    process.join()
    return process.exitcode
