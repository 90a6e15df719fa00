"""Starts mnist_lit again and again and imports it once: every run is a fork, and so a process of its own."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from watch import watch

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
ADDRESS = "MNIST_LIT_FORKS"  # the environment variable that tells it to all processes of a test session


def start(folder: str) -> subprocess.Popen:
    """The server, which ends with its standard input; clients may connect before it has imported everything."""
    os.environ[ADDRESS] = f"{folder}/forks"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.environ[ADDRESS])
        listener.listen()
        # Whatever is installed, the runs are of this checkout.
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        command, fds = [sys.executable, __file__, str(listener.fileno())], [listener.fileno()]
        return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, pass_fds=fds)


def serve(fd: int) -> None:
    """Serve each client in a fork: per line fork a run, answer with its pid and then with its exit code."""
    # ruff: noqa: F401, imported here once for all runs
    with suppress(ImportError):  # extras, of which jsonargparse imports the first in any case
        import omegaconf
        import onnxscript
        import torch.onnx._internal.exporter._core  # takes a second and a half

    from mnist_lit import __main__, data, models
    from mnist_lit.engine import cli, sweep

    gc.freeze()  # what is imported is neither searched for garbage nor copied by any fork
    with socket.socket(fileno=fd) as listener:
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            client, _ = listener.accept()
            if os.fork() == 0:
                break
            client.close()
        else:
            return None
    with client, client.makefile("rw") as lines:
        for line in lines:
            pid = os.fork()
            if pid == 0:
                become(**json.loads(line))
                return __main__.main()
            print(pid, file=lines, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=lines, flush=True)
    return None


def become(folder: str, arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """What a shell does for a new process."""
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, output, APPEND), (2, errors, APPEND)):
        os.dup2(os.open(path, flags), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.argv = ["mnist_lit", *arguments]
    if watched := environment.get("WATCH"):
        watch(folder, *watched.split(os.pathsep))


def wait_for_the_next_second(folder: Path) -> None:
    """TensorBoard reads a run's files of events in the order of second, host and pid of their start.

    Only a fork is fast enough to resume a run in the second in which it was started. Its pid may then
    come first: "10002" is before "9998".
    """
    seconds = {path.name.split(".")[3] for path in folder.rglob("events.out.tfevents.*")}
    while str(int(time.time())) in seconds:
        time.sleep(0.01)


class Forks:
    """Runs of ``serve``'s, one at a time."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(os.environ[ADDRESS])
        self.lines = self.socket.makefile("rwb", buffering=0)
        self.pid = 0

    def start(self, folder: Path, arguments: list[str], environment: dict[str, str], output: Path, errors: Path) -> int:
        """The pid of a run that appends what it prints to two files."""
        wait_for_the_next_second(folder)
        run = {"folder": str(folder), "arguments": arguments, "environment": environment}
        run |= {"output": str(output), "errors": str(errors)}
        self.socket.sendall(json.dumps(run).encode() + b"\n")
        self.pid = int(self.lines.readline())
        return self.pid

    def wait(self) -> int:
        """The exit code of the run, negative for a signal; one that takes longer than ten minutes is killed."""
        if not select.select([self.socket], [], [], 600)[0]:
            os.kill(self.pid, signal.SIGKILL)
        return int(self.lines.readline())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
