"""``python -m mnist_lit new``: start a project that uses the engine."""

import argparse
import json
import keyword
import os
import re
import shlex
import subprocess
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from urllib.request import url2pathname

from mnist_lit.engine import Project, UserError

ENGINE = __name__.partition(".")[0]
TEMPLATE = Path(__file__).parent / "template"
BARE = TEMPLATE / "bare"  # files that take the place of others
NAME = "project_name"  # of the package in the template
FOLDERS = "build configs data dist lightning_logs tests".split()  # beside the package


def new(folder: Path, package: str | None = None, bare: bool = False) -> None:
    """Make a project: package, configs, tests, README and CI; a first commit unless it is in a repository.

    Args:
        folder: of the project, which must not exist.
        package: name of its package, by default made from that of the folder.
        bare: start from a data module of thirty lines that reads no files.

    Raises:
        UserError: if there is something at ``folder``, it cannot be written, or the name cannot be used.

    Example:
        >>> new(Path("../leaf-id"))  # with the package leaf_id
    """
    package = package or re.sub(r"[-. ]+", "_", folder.absolute().name.lower())
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z0-9])?", package) or keyword.iskeyword(package):
        raise UserError(f"{package} cannot be the name of a package; choose one such as --package=my_project")
    if package in FOLDERS or ((spec := find_spec(package)) and spec.origin):  # a mere folder has no origin
        raise UserError(f"there is a package {package} already; choose another name with --package")
    if os.path.lexists(folder):
        raise UserError(f"{folder} exists already; name a folder that does not")
    # Without a host, pip before 24.1 rejects the address in the metadata of an installed project.
    wanted = requirement().replace("git+file:///", "git+file://localhost/")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:  # a whole project, or none
            _copy(Path(temporary) / "project", package, bare, wanted)
            os.replace(Path(temporary) / "project", folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    if not _git(folder, "rev-parse", "--is-inside-work-tree"):
        for command in ("init --quiet", "add --all", f"commit --quiet --message 'Start from {ENGINE}'"):
            _git(folder, *shlex.split(command))
    print(f"Made {folder}. What comes next:\n  cd {shlex.quote(str(folder))}")
    print(f"  pip install -e . && {Project(package).command('fit')}\n  pip install -e '.[test]' && pytest")
    if "file:" in wanted:
        print(f"It installs on this machine only; for others write '{ENGINE} @ git+URL@COMMIT' in its pyproject.toml.")


def _copy(folder: Path, package: str, bare: bool, wanted: str) -> None:
    """Copy the template, with the package's name and the requirement in the places of the template's."""
    for root in (TEMPLATE, BARE)[: 1 + bare]:
        for source in root.rglob("*"):
            part = source.relative_to(root)
            if source.is_dir() or part.parts[0] == BARE.name or "cache" in str(part):
                continue
            text = source.read_text(encoding="utf-8").replace(NAME, package)
            if part.name == "pyproject.toml":
                text = re.sub(rf'"{ENGINE}(\[.*?\])?"', rf'"{ENGINE}\1{wanted}"', text)
            target = folder / str(part).replace(NAME, package)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8", newline="\n")
    (folder / ".ci" / "run").chmod(0o755)


def requirement() -> str:
    """What follows the package's name where a project asks for it as it is installed here.

    By PEP 610: ``>=0.2,<1`` from an index, and from git or from a folder whose commit a remote has
    `` @ git+https://host/path@COMMIT``. Any other folder or file is asked for by its ``file://`` address.
    """
    checkout = Path(__file__).parents[2]
    if not list(checkout.glob(f"{ENGINE}-*.dist-info")):  # not where a wheel was unpacked, whatever else is installed
        return f" @ {_pushed(checkout) or checkout.as_uri()}"
    installed = distribution(ENGINE)
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin:
        major, minor, *_ = installed.version.split(".")
        return f">={major}.{minor},<{int(major) + 1}"
    if vcs := origin.get("vcs_info"):
        return f" @ {vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    pushed = _pushed(Path(url2pathname(urlsplit(origin["url"]).path))) if "dir_info" in origin else ""
    return f" @ {pushed or origin['url']}"


def _pushed(checkout: Path) -> str:
    """The address of a checkout's commit on a remote; nothing if no remote has it, or if the package differs."""
    branches = _git(checkout, "branch", "--remotes", "--contains", "HEAD", "--format=%(refname:lstrip=2)")
    if not branches or _git(checkout, "status", "--porcelain", "--", ENGINE):
        return ""
    url = _git(checkout, "remote", "get-url", branches.partition("/")[0])
    url = re.sub(r"^(https?://)[^/]*@", r"\1", url)  # a password stays here
    if "://" not in url:  # as git spells ssh addresses and folders
        ssh = re.fullmatch(r"([^/:]{2,}):(.*)", url)
        url = f"ssh://{ssh[1]}/{ssh[2].lstrip('/')}" if ssh else (checkout / url).resolve().as_uri()
    return f"git+{url}@{_git(checkout, 'rev-parse', 'HEAD')}"


def _git(folder: Path, *args: str) -> str:
    """What git prints in a folder; nothing where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace").strip()


def main(args: list[str], project: Project) -> None:
    """Run the command ``new``.

    Args:
        args: of the command line, without the command.
        project: that runs.
    """
    parser = argparse.ArgumentParser(prog=project.command("new"), description="Start a project.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="of the new project, such as ../my_project")
    parser.add_argument("--package", help="name of its package (default: made from that of the folder)")
    parser.add_argument("--bare", action="store_true", help="start from a short data module that reads no files")
    options = parser.parse_args(args)
    new(options.folder, options.package, options.bare)
