"""Any LightningModule and any LightningDataModule trains, whatever its steps return and its batches are."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import CONFIGS, RUN, Run, assert_one_message, checkpoint, curves

CHECKPOINTS = RUN / "checkpoints"
QUICK = ("--trainer.max_epochs=1", "--trainer.log_every_n_steps=1")


def warnings(printed: str) -> list[str]:
    """Those of the engine."""
    return [line for line in printed.splitlines() if "warning: " in line]


def predicted(folder: Path, name: str) -> Path:
    return folder / "lightning_logs" / "version_1" / f"predictions.{name}"


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ("Scalars", "Pairs"),
        pytest.param("Nothing", "Triples", marks=pytest.mark.slow),
        pytest.param("Values", "Dicts", marks=pytest.mark.slow),
        pytest.param("Columns", "Triples", marks=pytest.mark.slow),
        pytest.param("Maps", "Pairs", marks=pytest.mark.slow),
        pytest.param("Nothing", "Dicts", marks=pytest.mark.slow),
    ],
)
def test_whatever_steps_return_and_batches_are(cli: Run, tmp_path: Path, model: str, data: str) -> None:
    """Trained, and predicted as far as there is something to write; with one warning for what is left out."""
    fitted = cli("fit", f"--model=returns.{model}", f"--data=returns.{data}", *QUICK)
    assert f"{model} on {data} after 1 epoch," in fitted.stdout
    (warning,) = warnings(fitted.stderr)
    assert "no confusion matrix, accuracy per class and mistakes in the dashboard: " in warning
    assert "--dashboard.confusion_matrix=false --dashboard.mistakes=0 leaves it out" in warning
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"best.ckpt", "last.ckpt"}
    assert checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["global_step"] == 3
    assert "val/loss" in curves(tmp_path / RUN)

    done = cli("predict", "--ckpt_path", CHECKPOINTS / "best.ckpt")
    if model in ("Values", "Columns"):
        with predicted(tmp_path, "csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows[0].keys() == {"index", "prediction"}
        assert len(rows) == 600
    else:
        (warning,) = warnings(done.stderr)
        assert "no predictions.csv: predict_step returns " in warning
        assert len(torch.load(predicted(tmp_path, "pt"), weights_only=True)) == 3
        assert not predicted(tmp_path, "csv").exists()


@pytest.mark.slow
def test_switches_that_the_warning_names_silence_it(cli: Run) -> None:
    switches = ("--dashboard.confusion_matrix=false", "--dashboard.mistakes=0")
    done = cli("fit", "--model=returns.Scalars", "--data=returns.Triples", *QUICK, *switches)
    assert warnings(done.stderr) == []


def test_data_of_ones_own_keep_their_batch_size(cli: Run, tmp_path: Path) -> None:
    """Whatever the config has chosen for another data module: 600 images are 3 batches of 256."""
    cli("fit", "--config", CONFIGS / "cnn.yaml", "--data=returns.Pairs", *QUICK)
    assert checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["global_step"] == 3


def test_no_validation_at_all(cli: Run, tmp_path: Path) -> None:
    done = cli("fit", "--model=returns.Nothing", "--data=returns.NoValidation", *QUICK)
    (warning,) = warnings(done.stderr)
    assert "no best.ckpt is kept: it is chosen by val/loss, and the model logs nothing" in warning
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["last.ckpt"]
    assert "--ckpt_path lightning_logs/version_0/checkpoints/last.ckpt" in done.stdout


@pytest.mark.slow
def test_metric_of_another_name(cli: Run, tmp_path: Path) -> None:
    """There is a last checkpoint and a warning; with --monitor there is a best one and none."""
    arguments = ("fit", "--model=returns.OtherName", "--data=returns.Pairs", "--dashboard.every_n_epochs=0", *QUICK)
    done = cli(*arguments)
    (warning,) = warnings(done.stderr)
    assert "no best.ckpt is kept: it is chosen by val/loss, and the model logs val_mse; choose" in warning
    assert "--monitor" in warning
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["last.ckpt"]

    done = cli(*arguments, "--monitor=val_mse")
    assert warnings(done.stderr) == []
    assert (tmp_path / "lightning_logs" / "version_1" / "checkpoints" / "best.ckpt").exists()


def test_metric_that_nobody_logs_is_refused_before_training(cli: Run, small: Path, tmp_path: Path) -> None:
    config = ("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small)
    done = cli(*config, "--monitor=val/typo", "--mode=min", ok=False)
    assert_one_message(done, "--monitor=val/typo: there is no such metric", "val/acc, val/loss", "--mode")
    assert not list(tmp_path.rglob("*.ckpt"))
    done = cli(*config, "--monitor=val/typo", ok=False)
    assert_one_message(done, "--monitor=val/typo: is lower or higher better?", "--mode=min")


@pytest.mark.slow
def test_three_best_by_another_metric(cli: Run, small: Path, tmp_path: Path) -> None:
    config = ("fit", "--config", CONFIGS / "logistic.yaml", "--data.dataset", small, "--trainer.max_epochs=5")
    cli(*config, "--monitor=val/acc", "--best_checkpoint.save_top_k=3", "--trainer.log_every_n_steps=4")
    by_step = {step + 1: value for step, value in curves(tmp_path / RUN)["val/acc"]}
    assert len(set(by_step.values())) == 5  # so that it is clear which three are the best
    best = sorted(by_step, key=lambda step: by_step[step])[-3:]
    assert best != sorted(by_step)[-3:] != sorted(by_step)[:3]
    names = {f"best-epoch={step // 16 - 1}-step={step}.ckpt" for step in best}
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"last.ckpt", *names}


# ------------------------------------------------------------------------------- by configuration alone


@pytest.mark.slow
def test_label_smoothing(cli: Run, small: Path, tmp_path: Path) -> None:
    """The loss that is logged is the chosen one."""
    loss = ("--model.loss=torch.nn.CrossEntropyLoss", "--model.loss.label_smoothing=0.1")
    cli("fit", "--config", CONFIGS / "logistic.yaml", "--data.dataset", small, "--model.lr=0.1", *loss, *QUICK)
    weight, bias = checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["state_dict"].values()
    with np.load(small) as arrays:
        images, labels = torch.from_numpy(arrays["x_valid"]).flatten(1) / 256, torch.from_numpy(arrays["y_valid"])
    logits = images @ weight.T + bias  # (300, 10)
    smoothed, plain = (F.cross_entropy(logits, labels, label_smoothing=share).item() for share in (0.1, 0))
    ((_, logged),) = curves(tmp_path / RUN)["val/loss"]
    assert logged == pytest.approx(smoothed, rel=1e-5)
    assert abs(smoothed - plain) > 0.01 * plain  # they can be told apart


FILES = {"config.yaml", "checkpoints", "provenance.json", "metrics.json", ".lock"}
NAMES = "zero one two three four five six seven eight nine".split()
NAMED = ("--config", CONFIGS / "logistic.yaml")


@pytest.mark.slow
def test_names_of_the_classes_are_everywhere(cli: Run, small: Path, tmp_path: Path) -> None:
    """In the checkpoint, and from there in tables, whoever predicts."""
    cli("fit", *NAMED, "--data.dataset", small, f"--data.class_names=[{', '.join(NAMES)}]", *QUICK)
    assert checkpoint(tmp_path / CHECKPOINTS / "best.ckpt")["class_names"] == NAMES
    assert {f"val_acc_of_class/{name}" for name in NAMES} <= curves(tmp_path / RUN).keys()

    # Not from the config of the run, which has them, too.
    done = cli("predict", *NAMED, "--data.dataset", small, "--ckpt_path", CHECKPOINTS / "best.ckpt")
    with predicted(tmp_path, "csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "class", "confidence", *(f"p_{name}" for name in NAMES)]
    for row in rows:
        assert row["confidence"] == row[f"p_{row['class']}"] == max(row[f"p_{name}"] for name in NAMES)
    assert rows[0]["class"] in done.stdout


@pytest.mark.slow
def test_names_of_the_classes_are_exported(cli: Run, small: Path, tmp_path: Path) -> None:
    cli("fit", *NAMED, "--data.dataset", small, f"--data.class_names=[{', '.join(NAMES)}]", *QUICK)
    cli("export", *NAMED, "--data.dataset", small, "--ckpt_path", CHECKPOINTS / "best.ckpt")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    session = onnxruntime.InferenceSession(tmp_path / CHECKPOINTS / "best.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == NAMES


# ---------------------------------------------------------------------------------------------- mistakes


def test_misconfiguration_that_a_module_finds_is_one_message(cli: Run) -> None:
    done = cli("fit", "--model=returns.UserMistake", "--data=returns.Pairs", *QUICK, ok=False)
    assert_one_message(done, "this module needs a GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_error_of_lightnings_in_an_option_is_one_message(cli: Run) -> None:
    arguments = ("fit", "--model=returns.Nothing", "--data=returns.Pairs", "--trainer.accelerator=gpu")
    assert_one_message(cli(*arguments, ok=False), "No supported gpu backend found!")


# ----------------------------------------------------------------------------------------------- loggers


@pytest.mark.slow
@pytest.mark.parametrize("logger", ["false", "returns.Remote"])
def test_run_has_a_folder_whatever_its_logger(cli: Run, small: Path, tmp_path: Path, logger: str) -> None:
    """With its config and checkpoints, from which it is resumed and predicted; others are in test_loggers.py."""
    fit = ("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small, "--trainer.log_every_n_steps=4")
    done = cli(*fit, f"--trainer.logger={logger}", "--trainer.max_epochs=1")
    assert {path.name for path in (tmp_path / RUN).iterdir()} == FILES
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"best.ckpt", "last.ckpt"}
    assert f"--ckpt_path {CHECKPOINTS}/best.ckpt" in done.stdout
    if logger == "returns.Remote":
        assert "logged train/loss at 3: " in done.stdout
        assert "logged val/acc at 15: " in done.stdout
        assert "picture val/confusion_matrix at 15: 698 x 698" in done.stdout
    resumed = cli(*fit, f"--trainer.logger={logger}", "--ckpt_path=last")
    assert f"resuming from {CHECKPOINTS}/last.ckpt" in resumed.stderr
    assert checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["global_step"] == 32
    cli("predict", "--ckpt_path", CHECKPOINTS / "best.ckpt")
    assert predicted(tmp_path, "csv").exists()
