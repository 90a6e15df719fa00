"""Starts mnist_lit again and again and imports it once: every run is a fork, and so a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path


def serve() -> None:
    """Per line ``[folder, arguments]`` of stdin: forks a run there, prints its pid and then its exit code."""
    from mnist_lit import cli

    for line in sys.stdin:
        folder, arguments = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os._exit(run(cli.main, folder, arguments))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(main, folder: str, arguments: list[str]) -> int:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    sys.argv = ["mnist_lit", *arguments]
    code: int | str | None = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


class Forks:
    """Runs of ``serve``'s, one at a time. What they print goes to the file ``output`` in their folder."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, folder: Path, *arguments: object) -> int:
        """The pid of a run."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        print(json.dumps([str(folder), list(map(str, arguments))]), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        """The exit code of the run, negative for a signal."""
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


if __name__ == "__main__":
    serve()
