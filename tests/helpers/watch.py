"""Writes down what a process does outside of its folder: files it changes, secrets it reads, programs it starts."""

import os
import resource
import sys
from typing import Any

CHANGES = (
    "os.remove os.rename os.rmdir os.mkdir os.link os.symlink os.truncate os.chmod shutil.rmtree shutil.move".split()
)
PROGRAMS = "os.system os.exec os.posix_spawn os.spawn pty.spawn".split()


def watch(folder: str, secrets: str, log: str) -> None:
    """From now on, append to a log what a run in a folder has no business with, and limit its memory to 8 GiB.

    Args:
        folder: of the run, and with it the temporary files that it may write.
        secrets: a folder that nothing may read.
        log: a file with a line for each event.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30,) * 2)
    allowed = tuple(map(os.path.realpath, (folder, "/dev", "/proc")))
    file = open(log, "a", buffering=1)  # noqa: SIM115, as long as the process

    def outside(path: Any, follow: bool = False) -> bool:
        if not isinstance(path, (str, bytes)):
            return False
        folder, name = os.path.split(os.fsdecode(path))  # a link is renamed and removed, and not what it leads to
        place = os.path.realpath(os.fsdecode(path)) if follow else os.path.join(os.path.realpath(folder), name)
        return not place.startswith(allowed)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        bad = event in PROGRAMS or (event == "subprocess.Popen" and os.path.basename(str(args[0])) != "git")
        bad |= event in CHANGES and any(map(outside, args[:2]))
        if event == "open" and isinstance(args[0], str):
            path, _, flags = args
            bad = os.path.realpath(path).startswith(secrets)
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            bad |= bool(changes) and outside(path, follow=True) and "__pycache__" not in path
        if bad:
            file.write(f"{event} {args}\n")

    sys.addaudithook(hook)
