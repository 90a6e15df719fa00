"""A new project, made, installed and tested as its owner would."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import Run

from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.new import new

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "MNIST_LIT_ARCHIVE")}
OLD = "mnist_lit"
CREDIT = f"Made from the project template {OLD}."
LINES = 10_935  # of a project before there were two floors
KINDS = pytest.mark.parametrize("bare", [False, True], ids=["full", "bare"])


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


def command(*args: str | bytes, folder: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """``python -m mnist_lit new``."""
    done = subprocess.run(
        [sys.executable, "-m", OLD, "new", *args],
        cwd=folder,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
    )
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    return done


def files(folder: Path, *ignored: str) -> dict[str, bytes]:
    """The content of all files but those below certain folders, by path."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    ignored = (".git", "__pycache__", *ignored)
    return {name: path.read_bytes() for name, path in paths.items() if not {*ignored} & {*name.split("/")}}


@pytest.fixture(autouse=True)
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git configuration to write to."""
    config = tmp_path / "gitconfig"
    config.write_text("[user]\nname = Someone\nemail = someone@example.com\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(config))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    return config


@KINDS
def test_project_is_complete_and_has_no_trace_of_the_old_name(
    tmp_path: Path, capsys: pytest.CaptureFixture, bare: bool
) -> None:
    project = tmp_path / "made" / "derived_project"
    new(project, bare=bare)
    package = files(ROOT / OLD, "new", *(["datasets", "transforms.py"] if bare else []))
    expected = {f"derived_project/{name}" for name in package if not name.split("/")[-1].startswith(".")}
    expected |= {f"{folder}/{name}" for folder in ("configs", "tests/project") for name in files(ROOT / folder)}
    expected -= {"configs/overlays/augment.yaml", "configs/accurate.yaml"} if bare else set()
    expected |= {"LICENSE", "README.md", "pyproject.toml", ".gitignore", ".pre-commit-config.yaml", ".ci/run"}
    expected |= {".github/workflows/ci.yml", "lightning_logs/.gitignore"}
    found = files(project)
    assert found.keys() == expected
    lines = sum(content.count(b"\n") for name, content in found.items() if not name.endswith(".npz"))
    assert lines <= (0.69 if bare else 0.93) * LINES
    words = r"(?i)mnist|tutorial" if bare else r"(?i)mnist[_-]lit"
    traces = [
        f"{name}: {line}"
        for name, content in found.items()
        if not name.endswith(".npz")
        for line in content.decode("utf-8").splitlines()
        if re.search(words, line)
    ]
    assert traces == [f"README.md: {CREDIT}"]
    assert found["README.md"].decode().splitlines()[-1] == CREDIT
    assert found["README.md"].count(b"\n") <= 70
    assert shell("git log --format='%s, by %an'", project) == f"A new project from {OLD}, by Someone\n"
    assert set(shell("git ls-files", project).split()) == expected
    assert shell("git status --short", project) == ""
    assert (project / ".ci" / "run").stat().st_mode & 0o111
    assert "pip install -e '.[test]' && pytest" in capsys.readouterr().out


@KINDS
def test_nothing_names_what_is_left_out(tmp_path: Path, bare: bool) -> None:
    project = tmp_path / "derived"
    new(project, bare=bare)
    for name in files(project):
        if name.endswith(".md"):
            text = (project / name).read_text(encoding="utf-8")
            for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text):
                assert (project / name).parent.joinpath(link).exists(), f"{name}: {link}"
    pyproject = (project / "pyproject.toml").read_text(encoding="utf-8")
    for word in ("force-include", "derived.new", "playwright", "template", "pythonpath", '"mnist: ', '"gpu: '):
        assert word not in pyproject
    assert ("requests" in pyproject) == ("derived.datasets" in pyproject) == (not bare)
    for name in ("__main__.py", "engine/cli.py", "engine/schema.py"):
        assert not re.search(r"[\"' ]new[\"':,( ]+(start|derived)", (project / "derived" / name).read_text("utf-8"))
    if bare:
        assert len((project / "derived" / "data.py").read_text(encoding="utf-8").splitlines()) < 60


@KINDS
@pytest.mark.parametrize("package", ["x", "my_project", "a_long_name_for_a_project"])
@pytest.mark.skipif(shutil.which("ruff") is None, reason="needs ruff")
def test_code_is_formatted_whatever_the_name(tmp_path: Path, package: str, bare: bool) -> None:
    new(tmp_path / "project", package, bare)
    shell("ruff check . && ruff format --check .", tmp_path / "project")


@pytest.mark.parametrize("folder", ["my-project", "My Project", "my.project", "my_project"])
def test_package_is_named_after_the_folder(tmp_path: Path, folder: str) -> None:
    new(tmp_path / folder)
    assert (tmp_path / folder / "my_project" / "engine" / "cli.py").exists()
    assert "\nmy-project = " in (tmp_path / folder / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("folder", "package", "message"),
    [
        ("there", None, "there exists already"),
        ("nowhere", None, "nowhere exists already"),  # a link that leads nowhere
        ("project", "torch", "--package=torch: a package of that name exists"),
        ("numpy", None, "--package=numpy: a package of that name exists"),
        ("project", "json", "--package=json: a package of that name exists"),
        ("project", OLD, f"--package={OLD}: a package of that name exists"),
        ("project", "tests", "--package=tests: a package of that name exists"),
        ("project", "my-project", "--package=my-project: choose a name such as --package=my_project"),
        ("project", "class", "--package=class: choose a name"),
        ("project", "café", "--package=café: choose a name"),
        ("2024", None, "no package can be called 2024: choose a name"),
        ("file/derived", None, "cannot write .*file/derived: "),
        ("file[/b]/derived", None, r"cannot write .*file\[/b\]/derived: "),
    ],
)
def test_nothing_is_written_over(tmp_path: Path, folder: str, package: str | None, message: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for name in ("file", "file[/b]"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigurationError, match=message):
        new(tmp_path / folder, package)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_command_ends_in_one_message(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "a[/b]").mkdir(parents=True)
    done = cli("new", "a[/b]", ok=False)
    assert done.stderr.endswith(f"{OLD}: error: a[/b] exists already; name a folder that does not\n")


def test_folders_beside_it_take_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder where ``python -m`` is started can be imported."""
    (tmp_path / "here" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    new(Path("../demo"))


def fail_to_sign(config: Path) -> None:
    with config.open("a") as file:
        file.write("[commit]\ngpgsign = true\n[gpg]\nprogram = false\n")


def fail_in_hook(config: Path) -> None:
    hook = config.parent / "hooks" / "pre-commit"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\necho 'not allowed' >&2; exit 1\n")
    hook.chmod(0o755)
    with config.open("a") as file:
        file.write(f"[core]\nhooksPath = {hook.parent}\n")


def fail_in_hook_of_template(config: Path) -> None:
    fail_in_hook(config)
    config.write_text(config.read_text().replace("[core]\nhooksPath", "[init]\ntemplateDir").replace("/hooks", ""))


def fail_to_run(config: Path) -> None:
    config.write_text("no configuration at all [\n")


@pytest.mark.parametrize(
    ("fail", "reason"),
    [
        (fail_to_sign, "git: "),
        (fail_in_hook, "git: not allowed"),
        (fail_in_hook_of_template, "git: not allowed"),
        (fail_to_run, "git: "),
        (None, "git is not installed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_git_that_fails_leaves_a_project_without_a_commit(
    tmp_path: Path, git: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, fail, reason: str
) -> None:
    new(tmp_path / "good", "derived")
    assert "no first commit" not in capsys.readouterr().out
    if fail is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fail(git)
    new(tmp_path / "bad", "derived")
    assert files(tmp_path / "bad") == files(tmp_path / "good")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "no first commit" in line)
    assert re.fullmatch(rf"There is no first commit \({reason}.*\); the files are complete.", line)
    assert not list(tmp_path.glob("bad/.git/refs/heads/*"))


def test_commit_does_not_land_in_another_repository(tmp_path: Path, git: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a hook of that repository, and with a global list of files to ignore."""
    (tmp_path / "other").mkdir()
    shell("git init --quiet", tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / ".git" / "index"))
    (tmp_path / "ignore").write_text("*.npz\nconfigs\n")
    git.write_text(f"[core]\nexcludesFile = {tmp_path / 'ignore'}\n")  # and no name or address of a user
    new(tmp_path / "derived")
    assert not list((tmp_path / "other" / ".git").glob("refs/heads/*"))
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_INDEX_FILE")
    assert set(shell("git ls-files", tmp_path / "derived").split()) == set(files(tmp_path / "derived"))
    assert shell("git log --format=%an", tmp_path / "derived", GIT_CONFIG_GLOBAL=str(git)) == "derived\n"


@pytest.mark.slow
def test_encoding_of_the_terminal_and_brackets_do_no_harm(tmp_path: Path) -> None:
    new(tmp_path / "expected", "derived")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
    done = command("x[/y]/prøject ☃".encode(), "--package=derived", folder=tmp_path, **ascii_only)
    assert b"cd 'x[/y]/pr" in done.stdout
    assert files(tmp_path / "x[" / "y]" / "prøject ☃") == files(tmp_path / "expected")


@KINDS
def test_installed_package_makes_the_same_project(tmp_path: Path, bare: bool) -> None:
    """From the files that a wheel has, without what is beside the package in a checkout."""
    site, ignored = tmp_path / "site", shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / OLD, site / OLD, ignore=ignored)
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject.partition("wheel.force-include]\n")[2].partition("\n\n")[0]
    for source, target in re.findall(r'^"(.*)" = "(.*)"$', section, re.MULTILINE):
        (site / target).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, site / target, ignore=ignored)
        else:
            shutil.copy(ROOT / source, site / target)
    code = f"from pathlib import Path; from {OLD}.new import new; new(Path('derived'), bare={bare})"
    shell(f'{sys.executable} -c "{code}"', tmp_path, PYTHONPATH=str(site))
    new(tmp_path / "expected" / "derived", bare=bare)
    assert files(tmp_path / "derived") == files(tmp_path / "expected" / "derived")


@pytest.mark.slow
@pytest.mark.matrix  # the next test runs it, too
@KINDS
def test_suite_of_a_project_passes(tmp_path: Path, bare: bool) -> None:
    project = tmp_path / "derived"
    new(project, bare=bare)
    printed = shell(f"{sys.executable} -m pytest -n 2", project, PYTHONPATH=str(project))
    assert re.search(r"\d+ passed", printed)
    assert "failed" not in printed
    shell("git status --short | (! grep .)", project)


@pytest.mark.slow
def test_readme_commands_of_a_project_work_at_once(tmp_path: Path) -> None:
    """mnist_lit from its wheel in a fresh environment makes a project there, whose own commands then run."""
    shell(f"{sys.executable} -m venv venv", tmp_path)
    path = f"{tmp_path / 'venv' / 'bin'}:{os.environ['PATH']}"
    shell(f"pip wheel --quiet --no-deps --wheel-dir wheels {ROOT}", tmp_path, PATH=path)
    shell("pip install --quiet wheels/*.whl", tmp_path, PATH=path)
    shell(f"python -m {OLD} new my_project && python -m {OLD} new --bare bare", tmp_path, PATH=path)
    for bare, name in ((False, "my_project"), (True, "bare")):
        new(tmp_path / "expected" / name, bare=bare)
        assert files(tmp_path / name) == files(tmp_path / "expected" / name)
    shell(f"pip uninstall --quiet --yes {OLD}", tmp_path, PATH=path)
    for name, model in (("my_project", "CNN on "), ("bare", "CNN on DataModule")):
        project = tmp_path / name
        lines = (project / "README.md").read_text(encoding="utf-8").splitlines()
        first, second = (line for line in lines if line.startswith("pip install"))
        assert model in shell(first, project, PATH=path)
        assert (project / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt").exists()
        printed = shell(second, project, PATH=path)
        assert re.search(r"\d+ passed", printed)
        assert "failed" not in printed
