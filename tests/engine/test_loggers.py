"""A run is in its folder whatever logs it: each logger alone, two together, none; killed and resumed."""

import csv
import shlex
from pathlib import Path

import pytest
from common import CONFIGS, OVERLAYS, RUN, Run, checkpoint, curves
from interrupt import signal_at

pytestmark = pytest.mark.slow

LOGGERS: dict[str, tuple[object, ...]] = {
    "none": ("--trainer.logger=false",),
    "mlflow": ("--trainer.logger=MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///mlflow.db"),
    "tensorboard+csv": ("--config", OVERLAYS / "csv.yaml"),
    "tensorboard+wandb": ("--config", OVERLAYS / "wandb.yaml"),
    "tensorboard+mlflow": ("--config", OVERLAYS / "mlflow.yaml"),
    "own folder": (
        *("--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=elsewhere", "--trainer.logger.name=mine"),
    ),
}
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
FIT = ("fit", "--config", CONFIGS / "cnn.yaml", "--trainer.log_every_n_steps=4")
STEPS = [15, 31]  # at which val/loss is logged, of two epochs of 16 steps


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.matrix] * (name in ("mlflow", "own folder"))) for name in LOGGERS]
)
def test_killed_resumed_and_tested(cli: Run, small: Path, tmp_path: Path, name: str) -> None:
    for module in {"wandb", "mlflow"} & {*name.split("+")}:
        pytest.importorskip(module, reason="needs the extra [trackers]")
    command = (*FIT, *LOGGERS[name], "--data.dataset", small)
    cli(*command, *signal_at("SIGKILL", "on_train_batch_end", 20), ok=False, env=OFFLINE)
    done = cli(*command, "--ckpt_path=last", env=OFFLINE)
    printed = next(line for line in done.stdout.splitlines() if "mnist_lit test" in line)
    assert "test/acc" in cli(*shlex.split(printed)[3:], env=OFFLINE).stdout

    run = tmp_path / RUN
    assert {path.name for path in (tmp_path / "lightning_logs").iterdir()} == {"version_0", "version_1"}
    assert checkpoint(run / "checkpoints" / "last.ckpt")["global_step"] == 32
    expected = {"config.yaml", "config-from-step-16.yaml", "provenance.json", "metrics.json"}
    assert expected <= {path.name for path in run.iterdir()}
    left = {"lightning_logs", "data", *(("elsewhere",) if name == "own folder" else ())}
    left |= {"mlflow.db", "mlruns"} if "mlflow" in name else set()
    assert {path.name for path in tmp_path.iterdir()} <= left
    if "tensorboard" in name:
        assert [step for step, _ in curves(run)["val/loss"]] == STEPS
        assert "tensorboard --logdir lightning_logs\n" in done.stdout
    if name == "own folder":
        assert "tensorboard --logdir elsewhere/mine\n" in done.stdout
    if "csv" in name:
        with (run / "metrics.csv").open() as file:
            assert [int(row["step"]) for row in csv.DictReader(file) if row.get("val/loss")] == STEPS
    if "wandb" in name:
        runs = sorted(run.glob("wandb/offline-run-*"))
        assert len(runs) == 2
        assert len({path.name.rpartition("-")[2] for path in runs}) == 1  # the name of one run of W&B's
        assert len(list(run.with_name("version_1").glob("wandb/offline-run-*"))) == 1
        assert list(runs[0].glob("files/media/images/train/samples*.png"))
        assert list(runs[1].glob("files/media/images/val/confusion_matrix*.png"))
    if "mlflow" in name:
        assert_in_mlflow(tmp_path, small)


def test_run_without_a_checkpoint_yet_continues_its_own_run(cli: Run, small: Path, tmp_path: Path) -> None:
    """Killed in its first steps."""
    mlflow = pytest.importorskip("mlflow", reason="needs the extra [trackers]")
    command = (*FIT, *LOGGERS["mlflow"], "--data.dataset", small, "--run_name=mine", "--ckpt_path=last")
    cli(*command, *signal_at("SIGKILL", "on_train_batch_end", 3), ok=False)
    cli(*command)
    (run,) = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert run.info.run_name == "mine"


def assert_in_mlflow(folder: Path, small: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = (found for found in client.search_experiments() if found.name != "Default")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs.keys() == {"version_0", "version_1"}
    fitted = runs["version_0"]
    assert {point.step for point in client.get_metric_history(fitted.info.run_id, "val/loss")} == set(STEPS)
    assert fitted.data.params["config/data/init_args/dataset"] == str(small)
    assert "train/lr" in fitted.data.metrics
    pictures = [found.path for found in client.list_artifacts(fitted.info.run_id, "images")]
    assert any("confusion_matrix" in name for name in pictures), pictures
