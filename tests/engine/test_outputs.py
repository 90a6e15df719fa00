"""Any LightningModule and any LightningDataModule trains, whatever its steps return and its batches are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from common import CONFIGS, RUN, Run, assert_one_message, checkpoint, curves, predictions

CHECKPOINTS = RUN / "checkpoints"
QUICK = ("--trainer.max_epochs=1", "--trainer.log_every_n_steps=1")
LOGISTIC = ("--config", CONFIGS / "logistic.yaml")
slow = pytest.mark.slow


def warnings(printed: str) -> list[str]:
    """Those of the engine."""
    return [line for line in printed.splitlines() if "warning: " in line]


@pytest.mark.parametrize(
    ("returned", "data"),
    [("scalar", "Pairs"), *(pytest.param(*case, marks=slow) for case in (("values", "Dicts"), ("maps", "Triples")))],
)
def test_whatever_steps_return_and_batches_are(cli: Run, tmp_path: Path, returned: str, data: str) -> None:
    """Trained, and predicted as far as there is something to write."""
    fitted = cli("fit", "--model=returns.Module", f"--model.returned={returned}", f"--data=returns.{data}", *QUICK)
    assert f"Module on {data} after 1 epoch," in fitted.stdout
    assert warnings(fitted.stderr) == []
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"best.ckpt", "last.ckpt"}
    assert checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["global_step"] == 3
    assert "val/loss" in curves(tmp_path / RUN)

    done = cli("predict", "--ckpt_path", CHECKPOINTS / "best.ckpt")
    if returned == "values":
        rows = predictions(tmp_path / "lightning_logs" / "version_1")
        assert rows[0].keys() == {"index", "prediction"}
        assert len(rows) == 600
    else:
        *_, warning = warnings(done.stderr)  # after Lightning's, that nothing was returned
        assert "no predictions.csv: predict_step does not return " in warning
        assert len(checkpoint(tmp_path / "lightning_logs" / "version_1" / "predictions.pt")) == 3


def test_data_of_ones_own_keep_their_batch_size(cli: Run, tmp_path: Path) -> None:
    """Whatever the config has chosen for another data module: 600 images are 3 batches of 256."""
    cli("fit", "--config", CONFIGS / "cnn.yaml", "--data=returns.Pairs", *QUICK)
    assert checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["global_step"] == 3


def test_monitor_that_is_not_logged(cli: Run, tmp_path: Path) -> None:
    """There is a last checkpoint and a warning; with --monitor there is a best one and none."""
    fit = ("fit", "--model=returns.Module", "--model.monitored=val_mse", "--data=returns.Pairs", *QUICK)
    (warning,) = warnings(cli(*fit).stderr)
    assert "no best.ckpt is kept: it is chosen by val/loss, and the model logs val_mse; choose" in warning
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["last.ckpt"]
    assert warnings(cli(*fit, "--monitor=val_mse").stderr) == []
    assert (tmp_path / "lightning_logs" / "version_1" / "checkpoints" / "best.ckpt").exists()


@slow
def test_names_of_the_classes_are_everywhere(cli: Run, small: Path, tmp_path: Path) -> None:
    """In the checkpoint, and from there in tables and exported files, whoever predicts."""
    names = "zero one two three four five six seven eight nine".split()
    data = (*LOGISTIC, "--data.dataset", small)
    cli("fit", *data, f"--data.class_names=[{', '.join(names)}]", *QUICK)
    assert checkpoint(tmp_path / CHECKPOINTS / "best.ckpt")["class_names"] == names
    assert {f"val_acc_of_class/{name}" for name in names} <= curves(tmp_path / RUN).keys()

    # Not from the config of the run, which has them, too.
    done = cli("predict", *data, "--ckpt_path", CHECKPOINTS / "best.ckpt")
    rows = predictions(tmp_path / "lightning_logs" / "version_1")
    assert list(rows[0]) == ["index", "class", "confidence", *(f"p_{name}" for name in names)]
    for row in rows:
        assert row["confidence"] == row[f"p_{row['class']}"] == max(row[f"p_{name}"] for name in names)
    assert rows[0]["class"] in done.stdout

    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    cli("export", *data, "--ckpt_path", CHECKPOINTS / "best.ckpt")
    session = onnxruntime.InferenceSession(tmp_path / CHECKPOINTS / "best.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == names


def test_misconfiguration_that_a_module_finds_is_one_message(cli: Run) -> None:
    done = cli("fit", "--model=returns.UserMistake", "--data=returns.Pairs", *QUICK, ok=False)
    assert_one_message(done, "this module needs a GPU")


@slow
def test_run_has_a_folder_whatever_its_logger(cli: Run, small: Path, tmp_path: Path) -> None:
    """With its config and checkpoints, from which it is resumed and predicted; others are in test_loggers.py."""
    fit = ("fit", "--config", CONFIGS / "cnn.yaml", "--data.dataset", small, "--trainer.log_every_n_steps=4")
    done = cli(*fit, "--trainer.logger=returns.Remote", "--trainer.max_epochs=1")
    files = {"config.yaml", "checkpoints", "provenance.json", "metrics.json", ".lock"}
    assert {path.name for path in (tmp_path / RUN).iterdir()} == files
    assert f"--ckpt_path {CHECKPOINTS}/best.ckpt" in done.stdout
    assert "logged train/loss at 3: " in done.stdout
    assert "logged val/acc at 15: " in done.stdout
    assert "picture val/confusion_matrix at 15: 698 x 698" in done.stdout
    cli(*fit, "--trainer.logger=false", "--ckpt_path=last")
    assert checkpoint(tmp_path / CHECKPOINTS / "last.ckpt")["global_step"] == 32
    cli("predict", "--ckpt_path", CHECKPOINTS / "best.ckpt")
    assert predictions(tmp_path / "lightning_logs" / "version_1")
