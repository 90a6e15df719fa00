"""What people type: options anywhere, homes, no config, another encoding, the script."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from common import CONFIGS, ENVIRONMENT, RUN, Run, assert_one_message

QUICK = ("--trainer.max_epochs=1", "--dashboard.every_n_epochs=0")


@pytest.mark.parametrize("config", ["--config={}", "--config {}", "-c {}"])
def test_command_line_wins_wherever_it_stands(cli: Run, config: str) -> None:
    named = config.format(CONFIGS / "cnn.yaml").split()
    printed = cli("fit", "--trainer.max_epochs=7", "--model.lr=0.5", *named, "--print_config").stdout
    found = yaml.safe_load(printed)
    assert found["trainer"]["max_epochs"] == 7
    assert found["model"]["init_args"]["lr"] == 0.5
    assert found["data"]["init_args"]["batch_size"] == 64


def test_later_config_overrides_the_earlier_one(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 9}\n")
    printed = cli("fit", "--model.lr=0.5", "--config", CONFIGS / "cnn.yaml", "-c", "more.yaml", "--print_config").stdout
    assert yaml.safe_load(printed)["trainer"]["max_epochs"] == 9


def test_config_without_a_file_is_one_message(cli: Run) -> None:
    refused = cli("fit", "--trainer.max_epochs=1", "--config", ok=False)
    assert_one_message(refused, "--config", "expected one argument")
    assert "python -m mnist_lit fit --config FILE" in refused.stderr


def test_home_is_found_everywhere(cli: Run, small: Path, tmp_path: Path) -> None:
    """In a config, after an equals sign, and within quotes."""
    home = {"HOME": str(tmp_path)}
    (tmp_path / "small.npz").symlink_to(small)
    text = (CONFIGS / "logistic.yaml").read_text().replace("  batch_size: 64", "  dataset: ~/small.npz")
    (tmp_path / "own.yaml").write_text(text)
    cli("fit", "--config=~/own.yaml", "--trainer.default_root_dir=~/runs", *QUICK, env=home)
    best = f"runs/{RUN}/checkpoints/best.ckpt"
    assert (tmp_path / best).is_file()
    tested = cli("test", "--ckpt_path", f"~/{best}", env=home)
    assert "The config is the run's" in tested.stderr
    cli("predict", f"--ckpt_path=~/{best}", "--data.dataset", "~/small.npz", env=home)
    missing = cli("test", "--ckpt_path=~/nowhere.ckpt", env=home, ok=False)
    assert f"{tmp_path}/nowhere.ckpt: no such checkpoint" in missing.stderr


def test_fit_alone_trains_the_default_config(cli: Run, small: Path, tmp_path: Path) -> None:
    refused = cli("fit", "--data.dataset", small, ok=False)
    assert "Traceback" not in refused.stderr
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cnn.yaml").write_text((CONFIGS / "cnn.yaml").read_text())
    done = cli("fit", "--data.dataset", small, *QUICK)
    assert "No --config is given: it is configs/cnn.yaml" in done.stderr
    assert "CNN on" in done.stdout
    other = cli("fit", "--model=Logistic", "--data.dataset", small, *QUICK)
    assert "No --config" not in other.stderr
    assert "Logistic on" in other.stdout


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("latin-1", "cp1252"))]
)
@pytest.mark.slow
def test_terminal_of_another_encoding(small: Path, tmp_path: Path, encoding: str) -> None:
    command = [sys.executable, "-m", "mnist_lit", "fit", "--config", CONFIGS / "logistic.yaml", *QUICK]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*command, "--data.dataset", small], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(encoding)
    assert "val/loss" in done.stdout.decode(encoding)


@pytest.mark.slow
def test_script_finds_your_modules(small: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("mnist-lit")
    if not script.exists():
        pytest.skip("the package is not installed")
    (tmp_path / "mine.py").write_text("from mnist_lit import CNN\nclass Mine(CNN):\n    pass\n")
    command = [script, "fit", "--model=mine.Mine", "--data.dataset", small, *QUICK]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert "Mine on" in done.stdout, done.stderr


def test_table_shows_the_best_epoch_beside_the_last(cli: Run, small: Path) -> None:
    """A huge learning rate undoes what the first epoch has learnt."""
    worse = ("--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=1000")
    sgd = ("--optimizer=SGD", "--optimizer.lr=0.1", *worse)
    done = cli("fit", "--config", CONFIGS / "logistic.yaml", "--data.dataset", small, *sgd)
    assert "best: epoch 1" in done.stdout
    last, best = map(float, re.findall(r"val/loss +│ +([\d.]+) +│ +([\d.]+)", done.stdout)[0])
    assert best < last
    assert f"The run is in {RUN}" in done.stdout
