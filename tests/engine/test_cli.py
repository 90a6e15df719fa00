"""The command line as its users meet it: a process, real files, and what it prints."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from common import CONFIGS, ENVIRONMENT, ROOT, RUN, Run, assert_same, assert_same_weights, checkpoint

from mnist_lit import CNN, MNISTDataModule

EVERY = "--trainer.log_every_n_steps=5"  # the small dataset has 16 steps to an epoch


def run_of(folder: Path, version: int = 0) -> Path:
    return folder / "lightning_logs" / f"version_{version}"


def test_fit_leaves_a_run_that_can_be_tested_predicted_and_reproduced(cli: Run, small: Path, tmp_path: Path) -> None:
    fitted = cli("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small, EVERY)
    run = run_of(tmp_path)
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    assert {path.name for path in run.iterdir() if path.suffix != ".0"} == {
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
        "provenance.json",
        "metrics.json",
        ".lock",
    }
    assert list(run.glob("events.out.tfevents.*"))
    assert {path.name for path in best.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    for metric in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert metric in fitted.stdout
    assert "tensorboard --logdir lightning_logs\n" in fitted.stdout

    # The command that fit printed works as it stands.
    printed = next(line for line in fitted.stdout.splitlines() if "mnist_lit test" in line)
    tested = cli(*shlex.split(printed)[3:])
    assert "test/acc" in tested.stdout
    assert " 3/3 " in tested.stdout  # the progress bar, drawn to its end

    predicted = cli("predict", "--config", run / "config.yaml", "--ckpt_path", best)
    assert " 3/3 " in predicted.stdout
    with (run_of(tmp_path, 2) / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    model = CNN.load_from_checkpoint(best, weights_only=True).eval()
    data = MNISTDataModule(str(small), data_dir=str(tmp_path / "data"))
    data.prepare_data()
    data.setup("predict")
    with torch.no_grad():
        expected = model(data.source.datasets["test"].tensors[0] / 256).softmax(1)  # (300, 10)
    assert [int(row["index"]) for row in rows] == list(range(300))
    assert [int(row["class"]) for row in rows] == expected.argmax(1).tolist()
    found = torch.tensor([[float(row[f"p_{digit}"]) for digit in range(10)] for row in rows])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # six digits are written

    cli("fit", "--config", run / "config.yaml")
    again = checkpoint(run_of(tmp_path, 3) / "checkpoints" / "last.ckpt")
    assert_same_weights(checkpoint(last)["state_dict"], again["state_dict"])


def test_last_checkpoint_is_the_last_and_best_the_best(cli: Run, small: Path, tmp_path: Path) -> None:
    """Where the validation loss gets worse, too: a huge learning rate undoes what epoch 0 has learnt."""
    cli(
        *("fit", "--config", CONFIGS / "logistic.yaml", "--data.dataset", small, EVERY),
        *("--optimizer=SGD", "--optimizer.lr=0.1"),
        *("--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=1000"),
    )
    folder = run_of(tmp_path) / "checkpoints"
    assert checkpoint(folder / "last.ckpt")["epoch"] == 1
    assert checkpoint(folder / "best.ckpt")["epoch"] == 0


def test_clean_run_says_nothing_that_a_user_can_do_nothing_about(cli: Run, small: Path) -> None:
    done = cli("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small, EVERY)
    expected = (
        "Seed set to",
        "`Trainer.fit` stopped: `max_epochs=2` reached",
    )
    assert [line for line in done.stderr.splitlines() if not line.startswith(expected)] == []
    assert "Tip" not in done.stdout


@pytest.mark.slow
def test_real_warnings_stay(cli: Run, small: Path) -> None:
    done = cli("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small, "--data.batch_size=128")  # 8 steps
    assert "smaller than the logging interval" in done.stderr


@pytest.mark.slow
def test_settings_can_be_overridden(cli: Run, small: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("trainer:\n  max_epochs: 3\ndata:\n  batch_size: 100\n")
    cli(
        *("fit", "--config", CONFIGS / "cnn.yaml", "--config", overlay, "--data.dataset", small),
        *("--model=Logistic", "--optimizer=Adam", "--optimizer.lr=2e-3", "--trainer.limit_val_batches=1"),
    )
    saved = checkpoint(run_of(tmp_path) / "checkpoints" / "last.ckpt")
    assert saved["epoch"] == 2
    assert saved["global_step"] == 3 * 10
    assert saved["state_dict"]["net.1.weight"].shape == (10, 784)
    (optimizer,) = saved["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == 2e-3
    assert "exp_avg_sq" in optimizer["state"][0]  # Adam's, not SGD's
    config = yaml.safe_load((run_of(tmp_path) / "config.yaml").read_text())
    assert config["trainer"]["limit_val_batches"] == 1


def test_any_network_trains_in_the_classifier(cli: Run, small: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        """
        model:
          class_path: Classifier
          init_args:
            net:
              class_path: torchvision_free.Net
            lr: 0.2
        trainer: {max_epochs: 1}
        """
    )
    (tmp_path / "torchvision_free.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))\n"
    )
    cli("fit", "--config", "own.yaml", "--data.dataset", small, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})
    saved = checkpoint(run_of(tmp_path) / "checkpoints" / "last.ckpt")
    assert saved["state_dict"]["net.3.weight"].shape == (10, 32)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.2


@pytest.mark.slow
def test_dataset_really_used_is_on_record_and_another_one_is_refused(
    cli: Run, small: Path, tmp_path: Path, digits_dir: Path
) -> None:
    offline = ("--data.url=http://127.0.0.1:9/mnist.pkl.gz", "--data.data_dir", digits_dir)
    quick = (
        "fit",
        "--config",
        CONFIGS / "logistic.yaml",
        "--trainer.limit_train_batches=20",
        "--trainer.limit_val_batches=3",
    )
    fitted = cli(*quick, *offline)
    assert "NOT MNIST" in fitted.stderr
    assert "--data.dataset=digits" in fitted.stderr
    assert "Logistic on digits" in fitted.stdout
    assert yaml.safe_load((run_of(tmp_path) / "hparams.yaml").read_text())["dataset_used"] == "digits"
    last = run_of(tmp_path) / "checkpoints" / "last.ckpt"
    assert checkpoint(last)["MNISTDataModule"]["dataset"] == "digits"

    asked_for = cli(*quick, *offline, "--data.dataset=digits")
    assert "NOT MNIST" not in asked_for.stderr
    longer = (*quick, "--trainer.max_epochs=3")
    refused = cli(*longer, "--data.dataset", small, "--ckpt_path", last, ok=False)
    assert "trained on digits" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_help_may_come_first(cli: Run) -> None:
    assert "More commands, each with a --help: sweep" in cli("--help", "fit").stdout


def test_evaluation_without_a_checkpoint_warns(cli: Run, small: Path) -> None:
    config = ("--config", CONFIGS / "cnn.yaml", "--data.dataset", small)
    assert "the model's weights are random" in cli("validate", *config).stderr


def test_console_script_and_print_config_round_trip(cli: Run, tmp_path: Path) -> None:
    printed = cli("fit", "--config", CONFIGS / "fast.yaml", "--print_config").stdout
    (tmp_path / "printed.yaml").write_text(printed)
    assert cli("fit", "--config", "printed.yaml", "--print_config").stdout == printed


# ---------------------------------------------------------------------------------------- what people type

QUICK = ("--trainer.max_epochs=1", "--dashboard.every_n_epochs=0")


@pytest.mark.parametrize("config", ["--config={}", "--config {}", "-c {}"])
def test_command_line_wins_wherever_it_stands(cli: Run, config: str) -> None:
    named = config.format(CONFIGS / "cnn.yaml").split()
    printed = cli("fit", "--trainer.max_epochs=7", "--model.lr=0.5", *named, "--print_config").stdout
    found = yaml.safe_load(printed)
    assert found["trainer"]["max_epochs"] == 7
    assert found["model"]["init_args"]["lr"] == 0.5
    assert found["data"]["init_args"]["batch_size"] == 64


def test_data_may_be_chosen_with_its_options(cli: Run) -> None:
    chosen = '{"class_path": "MNISTDataModule", "init_args": {"dataset": "digits"}}'
    printed = cli("fit", "--config", CONFIGS / "cnn.yaml", f"--data={chosen}", "--print_config").stdout
    options = yaml.safe_load(printed)["data"]["init_args"]
    assert (options["dataset"], options["batch_size"]) == ("digits", 64)


def test_later_config_overrides_the_earlier_one(cli: Run, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("trainer: {max_epochs: 9}\n")
    printed = cli("fit", "--model.lr=0.5", "--config", CONFIGS / "cnn.yaml", "-c", "more.yaml", "--print_config").stdout
    assert yaml.safe_load(printed)["trainer"]["max_epochs"] == 9


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
    assert "Using the run's config" in tested.stderr
    cli("predict", f"--ckpt_path=~/{best}", "--data.dataset", "~/small.npz", env=home)
    missing = cli("test", "--ckpt_path=~/nowhere.ckpt", env=home, ok=False)
    assert f"{tmp_path}/nowhere.ckpt: no such checkpoint" in missing.stderr


def test_fit_alone_trains_the_default_config(cli: Run, small: Path, tmp_path: Path) -> None:
    refused = cli("fit", "--data.dataset", small, ok=False)
    assert "Traceback" not in refused.stderr
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cnn.yaml").write_text((CONFIGS / "cnn.yaml").read_text())
    done = cli("fit", "--data.dataset", small, *QUICK)
    assert "Using the default config: configs/cnn.yaml" in done.stderr
    assert "CNN on" in done.stdout
    other = cli("fit", "--model=Logistic", "--data.dataset", small, *QUICK)
    assert "default config" not in other.stderr
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


@pytest.mark.slow
def test_without_checkpoints(cli: Run, small: Path, tmp_path: Path) -> None:
    without = "--trainer.enable_checkpointing=false"
    done = cli("fit", "--config", CONFIGS / "cnn.yaml", *QUICK, without, "--data.dataset", small)
    assert "val/loss" in done.stdout
    assert not list(tmp_path.glob("**/*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_other_ways_to_start_processes_end_in_the_same_weights(
    cli_in: Run, small: Path, tmp_path: Path, strategy: str
) -> None:
    weights = []
    for name in ("ddp", strategy):
        (tmp_path / name).mkdir()
        two = ("--trainer.accelerator=cpu", "--trainer.devices=2", f"--trainer.strategy={name}")
        command = ("fit", "--config", CONFIGS / "cnn.yaml", *QUICK, *two, "--data.dataset", small)
        done = cli_in(tmp_path / name, *command, fork=False)
        assert "What comes next" in done.stdout
        weights.append(checkpoint(tmp_path / name / RUN / "checkpoints" / "best.ckpt")["state_dict"])
    assert_same(*weights)
