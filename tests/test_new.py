"""A project of one's own, made, installed and tested as its owner would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Run

ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MNIST_LIT_ARCHIVE")
}


def shell(command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_project_is_complete_and_has_no_trace_of_the_old_name(cli: Run, tmp_path: Path) -> None:
    done = cli("new", "made/derived_project")
    project = tmp_path / "made" / "derived_project"
    tracked = shell("git ls-files", ROOT).splitlines()
    expected = {re.sub("^mnist_lit/", "derived_project/", name) for name in tracked}
    found = {str(path.relative_to(project)) for path in project.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(".git/")} == expected
    name = "mnist_lit"
    traces = shell(f"grep -rniE '{name.replace('_', '[_-]')}' --exclude-dir=.git . || true", project)
    credit = f"Made from the project template {name}."
    assert traces == f"./README.md:{len((project / 'README.md').read_text().splitlines())}:{credit}\n"
    assert shell("git log --format=%s", project) == "A new project from mnist_lit\n"
    assert shell("git status --short", project) == ""
    assert (project / ".ci" / "run").stat().st_mode & 0o111
    assert "pip install -e '.[test]' && pytest" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("there",), "there exists already"),
        (("project", "--package=torch"), "--package=torch: a package of that name exists"),
        (("project", "--package=tests"), "--package=tests: a package of that name exists"),
        (("my-project",), "--package=my-project: expected a name such as my_project"),
        (("file/project",), "cannot write file/project"),
    ],
)
def test_nothing_is_written_over(cli: Run, tmp_path: Path, arguments: tuple, message: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    done = cli("new", *arguments, ok=False)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_readme_commands_of_a_project_work_at_once(tmp_path: Path) -> None:
    """mnist_lit from its wheel in a fresh environment makes a project there, whose own commands then run."""
    shell(f"{sys.executable} -m venv venv", tmp_path)
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    shell(f"pip wheel --quiet --no-deps --wheel-dir wheels {ROOT}", tmp_path, PATH=path)
    shell("pip install --quiet wheels/*.whl", tmp_path, PATH=path)
    shell("python -m mnist_lit new my_project", tmp_path, PATH=path)
    shell("pip uninstall --quiet --yes mnist_lit", tmp_path, PATH=path)
    project = tmp_path / "my_project"
    first, second = (
        line for line in (project / "README.md").read_text().splitlines() if line.startswith("pip install")
    )
    printed = shell(first, project, PATH=path)
    assert "CNN on " in printed
    assert (project / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt").exists()
    printed = shell(f"{second} tests/test_cli.py", project, PATH=path)
    assert re.search(r"\d+ passed", printed)
    assert "failed" not in printed
