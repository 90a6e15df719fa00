"""A new project, made, installed, tested and updated as its owner would."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml
from common import ROOT

from mnist_lit.engine import UserError
from mnist_lit.new import new

ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MNIST_LIT_ARCHIVE")}
REQUIREMENT = "from mnist_lit.new import requirement; print(requirement())"


def shell(command: str, folder: Path, ok: bool = True, **environment: str) -> str:
    line, environment = ["bash", "-euo", "pipefail", "-c", command], ENVIRONMENT | environment
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.fixture(autouse=True)
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom git knows."""
    (tmp_path / "gitconfig").write_text("[user]\nname = Someone\nemail = someone@example.com\n")
    for variables in (os.environ, ENVIRONMENT):
        monkeypatch.setitem(variables, "GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
        monkeypatch.setitem(variables, "GIT_CONFIG_NOSYSTEM", "1")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clone of this package, whose commit is on the branch of a bare repository ``origin.git``."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "mnist_lit", folder / "mnist_lit", ignore=shutil.ignore_patterns("*cache*"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    shell("git init --quiet --bare --initial-branch=main ../origin.git && git init --quiet", folder)
    shell("git add --all && git commit --quiet -m Engine && git remote add origin ../origin.git", folder)
    shell("git push --quiet origin HEAD:main", folder)
    return folder


# ------------------------------------------------------------------------------------------------ what is in it


@pytest.mark.parametrize(("name", "bare"), [("x", False), ("A long name-for a project", True)])
def test_project_is_small_and_complete(tmp_path: Path, capsys: pytest.CaptureFixture, name: str, bare: bool) -> None:
    project = tmp_path / "made" / name
    new(project, bare=bare)
    found = {path: (project / path).read_text("utf-8") for path in shell("git ls-files", project).split()}
    lines = {path: text.count("\n") for path, text in found.items()}
    assert len(found) <= 40
    assert sum(count for path, count in lines.items() if path.endswith(".py")) <= 160
    assert sum(lines.values()) <= 720
    assert not any("project_name" in path + text for path, text in found.items())
    assert not any("mnist" in re.sub("mnist_lit", "", text) for text in found.values())
    for path, text in found.items():
        for link in re.findall(r"\]\(([^):#]+)\)", text) if path.endswith(".md") else ():
            assert (project / path).parent.joinpath(link).exists(), f"{path}: {link}"
    assert shell("git status --short && git log --format='%s, by %an'", project) == "Start from mnist_lit, by Someone\n"
    assert (project / ".ci" / "run").stat().st_mode & 0o111
    assert "  pip install -e . && python -m " in capsys.readouterr().out
    if shutil.which("ruff"):
        shell("ruff check . && ruff format --check .", project)


def test_overlays_do_what_those_of_this_project_do() -> None:
    for path in (ROOT / "mnist_lit/new/template/configs/overlays").glob("*.yaml"):
        ours = (ROOT / "configs/overlays" / path.name).read_text("utf-8")
        theirs = path.read_text("utf-8").replace("project_name", "mnist_lit")
        assert yaml.safe_load(theirs) == yaml.safe_load(ours), path.name


@pytest.mark.parametrize(
    ("folder", "package", "message"),
    [
        ("there", None, "there exists already"),
        ("nowhere", None, "nowhere exists already"),  # a link that leads nowhere
        ("numpy", None, "a package numpy already"),
        ("project", "tests", "a package tests already"),
        ("project", "my-project", "my-project cannot be the name of a package"),
        ("project", "class", "class cannot be the name"),
        ("file/derived", None, "cannot write .*file/derived: "),
    ],
)
def test_nothing_is_written_over(tmp_path: Path, folder: str, package: str | None, message: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        new(tmp_path / folder, package)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_repository_in_a_repository_or_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell("git init --quiet mono", tmp_path)
    new(tmp_path / "mono" / "leaf_id")
    monkeypatch.setenv("PATH", "")
    new(tmp_path / "leaf_id")
    assert not list(tmp_path.glob("**/leaf_id/.git"))


# ------------------------------------------------------------------------------------------- what it asks for


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({}, ">=0.2,<1"),
        ({"vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}, " @ git+https://host/it.git@c0ffee"),
        ({"archive_info": {}, "url": "file:///wheels/it.whl"}, " @ file:///wheels/it.whl"),
        ({"dir_info": {}, "url": "file:///nowhere/it"}, " @ file:///nowhere/it"),
    ],
    ids=["index", "git", "wheel", "folder"],
)
def test_requirement_follows_from_the_installation(tmp_path: Path, origin: dict, expected: str) -> None:
    """By the files that pip leaves."""
    shutil.copytree(ROOT / "mnist_lit", tmp_path / "site" / "mnist_lit", ignore=shutil.ignore_patterns("*cache*"))
    metadata = tmp_path / "site" / "mnist_lit-0.2.7.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mnist_lit\nVersion: 0.2.7\n")
    if origin:
        (metadata / "direct_url.json").write_text(json.dumps({"url": "https://host/it.git"} | origin))
    assert shell(f"{sys.executable} -c '{REQUIREMENT}'", tmp_path, PYTHONPATH="site") == expected + "\n"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("true", "git+file://{parent}/origin.git@{commit}"),
        ("git remote set-url origin git@host:me/it.git", "git+ssh://git@host/me/it.git@{commit}"),
        ("git remote set-url origin https://me:secret@host/it", "git+https://host/it@{commit}"),
        ("touch notes.txt && git checkout --quiet --detach", "git+file://{parent}/origin.git@{commit}"),
        ("git commit --quiet --allow-empty -m Mine", "file://{parent}/checkout"),
        ("echo >> mnist_lit/__init__.py", "file://{parent}/checkout"),
        ("rm -rf .git", "file://{parent}/checkout"),
    ],
)
def test_requirement_of_a_checkout_is_its_commit_on_a_remote(checkout: Path, change: str, expected: str) -> None:
    commit = shell("git rev-parse HEAD", checkout).strip()
    shell(change, checkout)
    printed = shell(f"{sys.executable} -c '{REQUIREMENT}'", checkout)
    assert printed.strip() == "@ " + expected.format(parent=checkout.parent, commit=commit)


@pytest.mark.slow
@pytest.mark.parametrize("bare", [False, pytest.param(True, marks=pytest.mark.matrix)], ids=["full", "bare"])
def test_readme_commands_work_at_once_and_after_an_update(tmp_path: Path, checkout: Path, bare: bool) -> None:
    """In a fresh virtual environment, which finds what this one has installed but for mnist_lit."""
    shell(f"{sys.executable} -m venv venv", tmp_path)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "installed.pth").write_text(sysconfig.get_path("purelib"))
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"

    shell(f"python -m mnist_lit new ../leaf_id {'--bare' * bare}", checkout, PATH=path)
    project, commit = tmp_path / "leaf_id", shell("git rev-parse HEAD", checkout).strip()
    wanted = f"git+file://localhost{tmp_path}/origin.git@{commit}"
    assert (project / "pyproject.toml").read_text("utf-8").count(wanted) >= 3
    commands = [line for line in (project / "README.md").read_text("utf-8").splitlines() if line.startswith("pip ")]
    assert "CNN on " in shell(commands[0], project, PATH=path)
    assert (project / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt").exists()
    assert re.search("3 passed in", shell(commands[1], project, PATH=path))
    assert shell("git status --short", project) == ""

    shell("echo 'FIXED = True' >> mnist_lit/__init__.py && git commit --quiet -am Fix", checkout)
    update = shell("git push --quiet origin HEAD:main && git rev-parse HEAD", checkout).strip()
    shell(f"sed -i s/{commit}/{update}/ pyproject.toml && pip uninstall --quiet --yes mnist_lit", project, PATH=path)
    shell("pip install --quiet -e .", project, PATH=path)
    shell("python -c 'import mnist_lit; assert mnist_lit.FIXED'", project, PATH=path)


# --------------------------------------------------------------------------------------------------- its suite

NET, TRAIN, PREDICT = "return self.net(images)", "preds = self(images)\n", "return self(images).softmax(1)"
BROKEN = {
    NET: "return self.net[-1](self.net[:-1](images).detach())",
    TRAIN: TRAIN[:-1] + " + random.SystemRandom().random() * images.mean()\n",
    PREDICT: PREDICT.replace("(1)", "(0)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (BROKEN, ("training does not change ", "a resumed run differs", "not close")),
        pytest.param(
            *({TRAIN: "self.net.eval()\n        " + TRAIN}, ("in eval mode while training: net",)),
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_suite_finds_a_broken_module(tmp_path: Path, changes: dict[str, str], messages: tuple[str, ...]) -> None:
    new(tmp_path / "leaf_id", bare=True)
    models = tmp_path / "leaf_id" / "leaf_id" / "models.py"
    text = models.read_text("utf-8").replace("import torch\n", "import random\n\nimport torch\n", 1)
    for old, broken in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, broken)
    models.write_text(text)
    printed = shell(f"{sys.executable} -m pytest", tmp_path / "leaf_id", ok=False, PYTHONPATH=str(ROOT))
    assert [message for message in messages if message not in printed] == []
