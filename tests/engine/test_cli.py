"""The command line as its users meet it: a process, real files, and what it prints."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
import yaml
from common import CONFIGS, ROOT, Run, assert_one_message, assert_same_weights, checkpoint

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


WRONG = {
    "unknown key": (["--trainer.max_epoch=3"], "--trainer.max_epoch=3"),
    "unknown key of the model": (["--model.lrr=3"], "'lrr' is not accepted"),
    "wrong type": (["--trainer.max_epochs=many"], "trainer.max_epochs"),
    "negative batch size": (["--data.batch_size=-1"], 'Parser key "batch_size"'),
    "missing config": (["--config=nowhere.yaml"], "nowhere.yaml"),
    "missing checkpoint": (["--ckpt_path=nowhere.ckpt"], "nowhere.ckpt: no such checkpoint"),
    "unknown model": (["--model=Transformer"], "Transformer"),
    "schedule without optimizer": (["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1"], "--optimizer"),
    "missing dataset": (["--data.dataset=nowhere.npz"], "nowhere.npz: no such dataset"),
    "wrong dataset": (["--data.dataset=wrong.pkl.gz"], "wrong.pkl.gz: damaged, or not a dataset"),
    "no server": (["--data.dataset=mnist", "--data.url=http://127.0.0.1:9/"], "no connection"),
    "unwritable data folder": (["--data.data_dir=file"], "cannot write in the data folder file"),
}


VARIANTS = {"unknown key of the model", "negative batch size", "missing config", "unknown model", "missing dataset"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] if case in VARIANTS else []) for case in WRONG]
)
def test_wrong_input_is_one_clear_message(cli: Run, tmp_path: Path, case: str) -> None:
    arguments, message = WRONG[case]
    (tmp_path / "file").touch()
    (tmp_path / "wrong.pkl.gz").write_bytes(b"wrong")
    refused = cli("fit", "--config", CONFIGS / "cnn.yaml", *arguments, ok=False)
    assert message in refused.stderr
    assert refused.stderr.count("error:") == 1
    assert "Traceback" not in refused.stdout + refused.stderr
    assert len(refused.stderr.splitlines()) < 20
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {name for name in left if "tfevents" not in name} == {"file", "wrong.pkl.gz"}


NEARLY = {  # command, what is in its config.yaml, message
    "command": ("fitt", "", "no command 'fitt' (did you mean fit?); the commands are fit, validate"),
    "option": ("fit --trainr.max_epochs=2", "", "--trainr.max_epochs=2 (did you mean --trainer.max_epochs?)"),
    "option of the model": ("fit --model=CNN --model.lrr=3", "", "'lrr' is not accepted (did you mean lr?)"),
    "option of a function": (
        *("fit --model=Classifier --model.net=mnist_lit.models.accurate_cnn --model.net.chanels=1", ""),
        "'chanels' is not accepted (did you mean channels?)",
    ),
    "option of nothing yet": ("fit --dta.dataset=digits", "", "(did you mean --data.dataset?)"),
    "changed places": ("fit --modle=CNN", "", "--modle=CNN (did you mean --model?)"),
    "two": ("fit --trainer.epochs=3", "", "(did you mean --trainer.min_epochs or --trainer.max_epochs?)"),
    "one dash": ("fit -trainer.max_epochs=3", "", "-trainer.max_epochs=3 (did you mean --trainer.max_epochs?)"),
    "after a stray word": ("fit stray --trainer.max_epoch=3", "", "(did you mean --trainer.max_epochs?)"),
    "model": ("fit --model=CNNN", "", "CNNN (did you mean CNN?)"),
    "optimizer": ("fit --model=CNN --optimizer=AdamWW", "", "AdamWW (did you mean AdamW?)"),
    "logger": ("fit --model=CNN --trainer.logger=CVSLogger", "", "CVSLogger (did you mean CSVLogger?)"),
    "callback": ("fit --model=CNN --trainer.callbacks+=EarlyStoping", "", "EarlyStoping (did you mean EarlyStopping?)"),
    "case": ("fit --model=cnn", "", "cnn (did you mean CNN?)"),
    "case of a command": ("Fit", "", "(did you mean fit?)"),
    "letters": (
        *("fit --model=CNN --optimizer=SDG", ""),
        'Parser key "optimizer": Expected a dot import path string: SDG (did you mean SGD?)',
    ),
    "key": ("fit --config=config.yaml", "trainer: {max_epoch: 3}", "(did you mean trainer.max_epochs?)"),
    "key on top": ("fit --config=config.yaml", "modle: CNN", "(did you mean model?)"),
    "class_path": ("fit --config=config.yaml", "model: {class_pth: CNN}", "(did you mean class_path?)"),
    "key in a list": (
        "fit --config=config.yaml",
        "{model: CNN, trainer: {callbacks: [{class_path: Timer, init_args: {dration: 3}}]}}",
        "'dration' is not accepted (did you mean duration?)",
    ),
}
WRONG_VALUES = {
    "colon at the end": ("fit --model=CNN --mode=min:", "Got value: min:"),
    "two values": ("fit --model=CNN --model.lr 0.1 0.2", "lr takes one value"),
    "error in a module": (
        "fit --model=Classifier --model.net=broken.Net",
        "name 'unknown' is not defined",
        "net=broken.Net",
    ),
    "no file": ("fit --model=my_model.yaml", 'Parser key "model": Expected a path but my_model.yaml'),
    "no file of an optimizer": ("fit --model=CNN --optimizer=o/adam.yaml", "Expected a path but o/adam.yaml"),
    "no file of a callback": ("fit --model=CNN --trainer.callbacks=c.yml", "Expected a path but c.yml"),
    "no file in a model": ("fit --model=Classifier --model.net=n.yaml", 'Parser key "net": Expected a path but n.yaml'),
    "wrong kind": ("fit --model=Classifier --model.metrics=3", "Expected a <class 'dict'>; Given value: metrics=3"),
    "no callback": ("fit --model=CNN --trainer.callbacks=[1]", "Not a valid subclass of Callback. Got value: 1"),
    "no module": ("fit --model=Classifier --model.net=[1,2]", "Not a valid subclass of Module. Got value: [1, 2]"),
    "no command": ("", "no command is given; the commands are fit, validate"),
    "late command": ("--model=CNN fit", "the command comes first, and then its options: fit --model=CNN"),
}


def assert_short_message(refused: CompletedProcess[str], *parts: str) -> None:
    message = assert_one_message(refused, *parts)
    assert len(refused.stderr.removeprefix("Seed set to 1\n").splitlines()) <= 3
    for internal in ("Union", "NestedArg", "NoneType", "Subclass types", "class_path entry"):
        assert internal not in message
    sentences = message.split("; ")
    assert len(sentences) == len(set(sentences))


def some_are_slow(cases: dict[str, tuple]) -> list:
    return [pytest.param(case, marks=pytest.mark.slow if i > 2 else []) for i, case in enumerate(cases)]


@pytest.mark.parametrize("case", some_are_slow(NEARLY))
def test_nearly_right_name_is_suggested(cli: Run, tmp_path: Path, case: str) -> None:
    command, config, message = NEARLY[case]
    (tmp_path / "config.yaml").write_text(config)
    assert_short_message(cli(*command.split(), ok=False), message)


@pytest.mark.parametrize("case", some_are_slow(WRONG_VALUES))
def test_wrong_value_is_named_once(cli: Run, tmp_path: Path, case: str) -> None:
    command, *parts = WRONG_VALUES[case]
    (tmp_path / "broken.py").write_text("unknown\n\nclass Net: ...")
    assert_short_message(cli(*command.split(), ok=False), *parts)


def test_help_may_come_first(cli: Run) -> None:
    assert "More commands, each with a --help: sweep" in cli("--help", "fit").stdout


TRAINERS = {
    "": "trainer: is empty in the config",
    "3": "trainer: is 3 in the config",
    "{barebones: true}": "--trainer.barebones leaves out",
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("command", ["fit", "sweep --space=space.yaml"])
def test_wrong_trainer_is_one_message(cli: Run, tmp_path: Path, command: str, trainer: str) -> None:
    (tmp_path / "config.yaml").write_text(f"model: CNN\ntrainer: {trainer}\n")
    (tmp_path / "space.yaml").write_text("model.init_args.lr: {choices: [0.1, 0.2]}")
    refused = cli(*command.split(), "--config=config.yaml", ok=False)
    assert_one_message(refused, TRAINERS[trainer])
    assert "Trial 1" not in refused.stdout


def test_evaluation_needs_a_checkpoint(cli: Run, small: Path) -> None:
    config = ("--config", CONFIGS / "cnn.yaml", "--data.dataset", small)
    assert "best: test needs the path" in cli("test", *config, "--ckpt_path=best", ok=False).stderr
    assert "random ones" in cli("validate", *config).stderr


def test_console_script_and_print_config_round_trip(cli: Run, tmp_path: Path) -> None:
    printed = cli("fit", "--config", CONFIGS / "fast.yaml", "--print_config").stdout
    (tmp_path / "printed.yaml").write_text(printed)
    assert cli("fit", "--config", "printed.yaml", "--print_config").stdout == printed
