"""The command line as its users meet it: a process, real files, and what it prints."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from common import CONFIGS, ENVIRONMENT, RUN, Run, assert_same, checkpoint, predictions

from mnist_lit import CNN

QUICK = ("--trainer.max_epochs=1", "--dashboard.every_n_epochs=0")
LOGISTIC = ("fit", "--config", CONFIGS / "logistic.yaml")
slow = pytest.mark.slow


def run_of(folder: Path, version: int = 0) -> Path:
    return folder / "lightning_logs" / f"version_{version}"


def test_fit_leaves_a_run_that_can_be_tested_predicted_and_reproduced(cli: Run, small: Path, tmp_path: Path) -> None:
    fitted = cli("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small, "--trainer.log_every_n_steps=5")
    run = run_of(tmp_path)
    best, last = run / "checkpoints" / "best.ckpt", run / "checkpoints" / "last.ckpt"
    names = {"checkpoints", "config.yaml", "hparams.yaml", "provenance.json", "metrics.json", ".lock"}
    assert {path.name for path in run.iterdir() if path.suffix != ".0"} == names
    assert list(run.glob("events.out.tfevents.*"))
    assert {path.name for path in best.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    for metric in ("train/loss", "train/acc", "val/loss", "val/acc"):
        assert metric in fitted.stdout
    assert "tensorboard --logdir lightning_logs\n" in fitted.stdout
    # Nothing that a user can do nothing about.
    expected = ("Seed set to", "`Trainer.fit` stopped: `max_epochs=2` reached")
    assert [line for line in fitted.stderr.splitlines() if not line.startswith(expected)] == []
    assert "Tip" not in fitted.stdout

    # The command that fit printed works as it stands.
    printed = next(line for line in fitted.stdout.splitlines() if "mnist_lit test" in line)
    tested = cli(*shlex.split(printed)[3:])
    assert "test/acc" in tested.stdout
    assert " 3/3 " in tested.stdout  # the progress bar, drawn to its end

    cli("predict", "--config", run / "config.yaml", "--ckpt_path", best)
    rows = predictions(run_of(tmp_path, 2))
    model = CNN.load_from_checkpoint(best, weights_only=True).eval()
    with np.load(small) as arrays, torch.no_grad():
        predicted = model(torch.from_numpy(arrays["x_test"])[:, None] / 256).softmax(1)  # (300, 10)
    assert [int(row["index"]) for row in rows] == list(range(300))
    assert [int(row["class"]) for row in rows] == predicted.argmax(1).tolist()
    found = torch.tensor([[float(row[f"p_{digit}"]) for digit in range(10)] for row in rows])
    torch.testing.assert_close(found, predicted, rtol=0, atol=1e-6)  # six digits are written

    cli("fit", "--config", run / "config.yaml")
    again = checkpoint(run_of(tmp_path, 3) / "checkpoints" / "last.ckpt")
    assert_same(checkpoint(last)["state_dict"], again["state_dict"])


def test_last_is_the_last_and_best_the_best_also_in_the_table(cli: Run, small: Path, tmp_path: Path) -> None:
    """Where the validation loss gets worse: a huge learning rate undoes what the first epoch has learnt."""
    worse = ("--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=1000")
    done = cli(*LOGISTIC, "--data.dataset", small, "--optimizer=SGD", "--optimizer.lr=0.1", *worse)
    folder = run_of(tmp_path) / "checkpoints"
    assert (checkpoint(folder / "last.ckpt")["epoch"], checkpoint(folder / "best.ckpt")["epoch"]) == (1, 0)
    assert "best: epoch 1" in done.stdout
    last, best = map(float, re.findall(r"val/loss +│ +([\d.]+) +│ +([\d.]+)", done.stdout)[0])
    assert best < last
    assert f"The run is in {RUN}" in done.stdout
    address = (folder / "last.ckpt").as_uri()  # of a copy elsewhere
    assert "is of a finished run" in cli(*LOGISTIC, "--data.dataset", small, "--ckpt_path", address).stderr


@slow
def test_dataset_really_used_is_on_record(cli: Run, tmp_path: Path) -> None:
    quick = (*LOGISTIC, "--trainer.limit_train_batches=20", "--trainer.limit_val_batches=3")
    fitted = cli(*quick, "--data.url=http://127.0.0.1:9/mnist.pkl.gz")
    assert "NOT MNIST" in fitted.stderr
    assert "Logistic on digits" in fitted.stdout
    assert yaml.safe_load((run_of(tmp_path) / "hparams.yaml").read_text())["dataset_used"] == "digits"
    assert checkpoint(run_of(tmp_path) / "checkpoints" / "last.ckpt")["MNISTDataModule"]["dataset"] == "digits"


@slow
def test_evaluation_without_a_checkpoint_warns(cli: Run, small: Path) -> None:
    done = cli("validate", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small)
    assert "the model's weights are random" in done.stderr


MORE = "{run_name: 2026-01-02, trainer: {max_epochs: 9}, model: {init_args: {lr: 0.3}}}"
ENV = "{trainer: {max_epochs: '${oc.env:EPOCHS}'}, data: {init_args: {dataset: '${oc.env:DATA}'}}}"
CHOSEN = '{"class_path": "MNISTDataModule", "init_args": {"dataset": "digits"}}'


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (f"--model.lr=0.5 -c={CONFIGS}/cnn.yaml -c more.yaml --data='{CHOSEN}'", (9, 0.5, "digits")),
        # Not the options of another class.
        pytest.param(f"--model=FastCNN -c={CONFIGS}/cnn.yaml", (2, 0.02, "auto"), marks=slow),
        # But those of an overlay that names no class.
        pytest.param("--model=FastCNN -c more.yaml", (9, 0.3, "auto"), marks=slow),
        pytest.param(
            *(f"-c={CONFIGS}/cnn.yaml -c env.yaml", (9, 0.1, "digits")),
            marks=[slow, pytest.mark.skipif(find_spec("omegaconf") is None, reason="needs the extra [omegaconf]")],
        ),
    ],
)
def test_command_line_wins_wherever_it_stands(cli: Run, tmp_path: Path, arguments: str, expected: tuple) -> None:
    """And a later config overrides the earlier one. What is printed prints the same."""
    (tmp_path / "more.yaml").write_text(MORE)
    (tmp_path / "env.yaml").write_text(ENV)
    environment = {"EPOCHS": "9", "DATA": "digits"}
    printed = cli("fit", *shlex.split(arguments), "--print_config", env=environment).stdout
    config = yaml.safe_load(printed)
    model, data = (config[part]["init_args"] for part in ("model", "data"))
    assert (config["trainer"]["max_epochs"], model["lr"], data["dataset"]) == expected
    (tmp_path / "printed.yaml").write_text(printed)
    assert cli("fit", "--config", "printed.yaml", "--print_config").stdout == printed


@slow
def test_home_is_found_everywhere(cli: Run, small: Path, tmp_path: Path) -> None:
    """In a config, after an equals sign, and within quotes."""
    home = {"HOME": str(tmp_path)}
    (tmp_path / "small.npz").symlink_to(small)
    text = (CONFIGS / "logistic.yaml").read_text().replace("  batch_size: 64", "  dataset: ~/small.npz")
    (tmp_path / "own.yaml").write_text(text)
    cli("fit", "--config=~/own.yaml", "--trainer.default_root_dir=~/runs", *QUICK, env=home)
    best = f"runs/{RUN}/checkpoints/best.ckpt"
    assert (tmp_path / best).is_file()
    tested = cli("test", "--ckpt_path", f"~/{best}", "--data.dataset", "~/small.npz", env=home)
    assert "Using the run's config" in tested.stderr


@slow
def test_fit_alone_trains_the_default_config(cli: Run, small: Path, tmp_path: Path) -> None:
    assert "Traceback" not in cli("fit", "--data.dataset", small, ok=False).stderr
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cnn.yaml").write_text((CONFIGS / "cnn.yaml").read_text())
    done = cli("fit", "--data.dataset", small, *QUICK)
    assert "Using the default config: configs/cnn.yaml" in done.stderr
    assert "CNN on" in done.stdout
    assert "default config" not in cli("fit", "--model=Logistic", "--data.dataset", small, *QUICK).stderr


@slow
def test_script_finds_your_modules_and_prints_what_the_terminal_can_show(small: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("mnist-lit")
    if not script.exists():
        pytest.skip("the package is not installed")
    (tmp_path / "mine.py").write_text("from mnist_lit import CNN\nclass Mine(CNN):\n    pass\n")
    command = [script, "fit", "--model=mine.Mine", "--data.dataset", small, *QUICK]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert "Mine on" in done.stdout.decode("ascii"), done.stderr


OWN = """
from lightning.pytorch import Callback, Trainer

class Own(CLI):
    def add_arguments_to_parser(self, parser):
        parser.add_argument("--note")

def trainer(max_epochs: int, callbacks: list[Callback] | None = None) -> Trainer:
    return Trainer(max_epochs=max_epochs, callbacks=callbacks)

Own(CNN, MNISTDataModule, trainer_class=trainer)
"""


@slow
@pytest.mark.parametrize(
    ("script", "command", "refusal"),
    [
        ("CLI(CNN, MNISTDataModule)", ["fit"], "--model.lr=0.7 (0.05 in the checkpoint)"),
        (OWN, ["fit", "--note=mine"], "--model.lr=0.7 (0.05 in the checkpoint)"),
        (
            "cli = CLI(CNN, MNISTDataModule, run=False)\ncli.trainer.fit(cli.model, cli.datamodule)",
            *([], "unrecognized arguments: --ckpt_path=last"),
        ),
    ],
    ids=["classes", "own parser and trainer", "run=False"],
)
def test_script_names_its_classes(small: Path, tmp_path: Path, script: str, command: list[str], refusal: str) -> None:
    """Whose arguments are options, as with ``LightningCLI``."""
    (tmp_path / "train.py").write_text(
        f"from mnist_lit import CNN, MNISTDataModule\nfrom mnist_lit.engine import CLI\n{script}"
    )

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        options = [*command, f"--data.dataset={small}", "--trainer.max_epochs=1", *more]
        started = [sys.executable, "train.py", *options]
        return subprocess.run(started, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)

    done = run("--model.lr=0.05")
    assert "CNN on" in done.stdout, done.stderr
    config = yaml.safe_load((run_of(tmp_path) / "config.yaml").read_text())
    last = checkpoint(run_of(tmp_path) / "checkpoints" / "last.ckpt")
    assert config["model"]["lr"] == last["hyper_parameters"]["lr"] == 0.05
    assert config["trainer"]["max_epochs"] == last["epoch"] + 1 == 1
    assert refusal in run("--model.lr=0.7", "--ckpt_path=last").stderr
