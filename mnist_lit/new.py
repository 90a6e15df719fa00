"""``python -m mnist_lit new``: a project of one's own out of this one, under another name."""

from __future__ import annotations

import argparse
import keyword
import os
import shlex
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console

PACKAGE = Path(__file__).parent
OLD = PACKAGE.name
# Beside the package in a checkout, and in it where it was installed from a wheel.
TEMPLATE = PACKAGE / "template" if (PACKAGE / "template").exists() else PACKAGE.parent
PARTS = """.ci .github .gitignore .pre-commit-config.yaml LICENSE README.md benchmarks configs
lightning_logs/.gitignore pyproject.toml tests""".split()
CREDIT = f"\nMade from the project template {OLD}.\n"


def new(folder: Path, package: str) -> None:
    """Makes a complete project: package, configs, tests, README, pyproject.toml, CI and a first commit.

    Args:
        folder: of the project, which must not exist.
        package: the name of its package.

    Raises:
        MisconfigurationException: when there is something at ``folder``, it cannot be written, or the name
            cannot be used.
    """
    if folder.exists():
        raise MisconfigurationException(f"{folder} exists already; name a folder that does not")
    if not package.isidentifier() or keyword.iskeyword(package) or package != package.lower():
        raise MisconfigurationException(f"--package={package}: expected a name such as my_project")
    if package in PARTS or find_spec(package):
        raise MisconfigurationException(f"--package={package}: a package of that name exists, choose another")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            project = Path(temporary) / "project"
            _copy(project, package)
            _commit(project)
            os.rename(project, folder)
    except OSError as error:
        raise MisconfigurationException(f"cannot write {folder}: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise MisconfigurationException(f"git could not commit in {folder}: {error.stderr}") from error
    console = Console()
    console.print(f"Made {folder}. What comes next:")
    console.print(f"  cd {shlex.quote(str(folder))}", highlight=False)
    for line in (folder / "README.md").read_text().splitlines():
        if line.startswith("pip install"):
            console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)


def _copy(project: Path, package: str) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "template")
    shutil.copytree(PACKAGE, project / package, ignore=ignored)
    for part in PARTS:
        source, target = TEMPLATE / part, project / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    names = {name(OLD): name(package) for name in (str, str.upper, lambda text: text.replace("_", "-"))}
    for path in project.rglob("*"):
        if path.is_file() and path.suffix not in (".npz", ".png"):
            text = path.read_text()
            for old, name in names.items():
                text = text.replace(old, name)
            path.write_text(text)
    with (project / "README.md").open("a") as readme:
        readme.write(CREDIT)


def _commit(project: Path) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=True)
        return done.stdout

    if shutil.which("git") is None:
        return
    git("init", "--quiet", "--initial-branch=main")
    git("add", "--all")
    someone = subprocess.run(["git", "config", "user.email"], cwd=project, capture_output=True).returncode == 0
    author = [] if someone else ["-c", f"user.name={project.name}", "-c", "user.email="]
    git(*author, "commit", "--quiet", "--message", f"A new project from {OLD}")


def main(args: list[str]) -> None:
    """Makes a project.

    Raises:
        MisconfigurationException: when it cannot be made.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {OLD} new",
        description="Make a project of your own out of this one: package, configs, tests, README, CI.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, help="of the new project, such as ../my_project")
    parser.add_argument("--package", help="the name of its package (default: that of the folder)")
    known = parser.parse_args(args)
    new(known.folder, known.package or known.folder.absolute().name)
