"""``python -m mnist_lit new``: start a project from this one, under another name."""

from __future__ import annotations

import argparse
import io
import keyword
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import PathFinder
from pathlib import Path

from mnist_lit.engine.errors import ENGINE as PROJECT
from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.engine.project import Project
from mnist_lit.new.template import ROOT, write_project

RESERVED = (PROJECT, *"build configs data dist lightning_logs tests".split())  # folders of a project
# Set by git for its hooks, these would lead its commands to another repository.
GIT_PLACES = """GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_COMMON_DIR GIT_OBJECT_DIRECTORY
GIT_ALTERNATE_OBJECT_DIRECTORIES GIT_NAMESPACE GIT_PREFIX""".split()


def new(folder: Path, package: str | None = None, bare: bool = False) -> None:
    """Make a complete project: package, configs, tests, README, CI and a first commit.

    Args:
        folder: of the project, which must not exist.
        package: name of its package, by default made from that of the folder.
        bare: leave out the example's datasets, and start from a data module to be replaced.

    Raises:
        ConfigurationError: if there is something at ``folder``, it cannot be written, or the name cannot be used.

    Example:
        >>> new(Path("../my-project"))  # with the package my_project
    """
    if os.path.lexists(folder):
        raise ConfigurationError(f"{folder} exists already; name a folder that does not")
    package = _package_name(folder, package)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
            project = Path(temporary) / "project"
            write_project(project, package, bare)
            problem = _commit(project, package)
            os.rename(project, folder)
    except OSError as error:
        raise ConfigurationError(f"cannot write {folder}: {error.strerror}") from error
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the folder's name may not be in the terminal's encoding
    print(f"Made {folder}. What comes next:\n  cd {shlex.quote(str(folder))}")
    for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("pip install"):
            print(f"  {line}")
    if problem:
        print(f"There is no first commit ({problem}); the files are complete.")


def _package_name(folder: Path, package: str | None) -> str:
    name = package or re.sub(r"[-. ]+", "_", folder.absolute().name.lower())
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z0-9])?", name) or keyword.iskeyword(name):
        what = f"--package={name}" if package else f"no package can be called {name}"
        raise ConfigurationError(f"{what}: choose a name such as --package=my_project")
    by_chance = [Path.cwd().resolve(), ROOT.resolve()]  # all of whose folders can be imported
    path = [entry for entry in sys.path if entry and Path(entry).resolve() not in by_chance]
    if name in RESERVED or name in sys.stdlib_module_names or PathFinder.find_spec(name, path):
        raise ConfigurationError(f"--package={name}: a package of that name exists, choose another")
    return name


def _commit(project: Path, package: str) -> str | None:
    """Make the first commit. Returns what went wrong, in one line, or else None."""

    def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in GIT_PLACES}
        return subprocess.run(
            ["git", *arguments],
            cwd=project,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,  # for one that waits for a passphrase
        )

    if shutil.which("git") is None:
        return "git is not installed"
    try:
        author = []
        for key, value in (("user.name", package), ("user.email", "")):
            if git("config", key).returncode:
                author += ["-c", f"{key}={value}"]
        for command in (
            ["init", "--quiet"],
            ["symbolic-ref", "HEAD", "refs/heads/main"],
            ["add", "--all", "--force"],  # whatever git is told to ignore elsewhere
            [*author, "commit", "--quiet", "--message", f"A new project from {PROJECT}"],
        ):
            done = git(*command)
            if done.returncode:
                lines = (done.stderr or done.stdout).decode(errors="replace").split("\n")
                said = next((line.strip() for line in lines if line.strip()), f"exit code {done.returncode}")
                return f"git: {said}"
    except subprocess.TimeoutExpired as error:
        return f"git did not answer within {error.timeout:.0f} seconds"
    except OSError as error:
        return f"git: {error.strerror}"
    return None


def main(args: list[str], project: Project) -> None:
    """Run the command ``new``.

    Args:
        args: of the command line, without the command.
        project: that runs.
    """
    parser = argparse.ArgumentParser(
        prog=project.command("new"),
        description="Start a project from this one: package, configs, tests, README, CI.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="of the new project, such as ../my_project")
    parser.add_argument("--package", help="name of its package (default: made from that of the folder)")
    parser.add_argument(
        "--bare",
        action="store_true",
        help="leave out the example's datasets; data.py is a short data module to be replaced",
    )
    known = parser.parse_args(args)
    new(known.folder, known.package, known.bare)
