"""The overlays in configs/, each on top of a model's config."""

from __future__ import annotations

import csv
import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from common import CONFIGS, OVERLAYS, RUN, Run, checkpoint, curves

# Of many epochs they would take most of the time.
NO_PICTURES = ("--dashboard.confusion_matrix=false", "--dashboard.mistakes=0")


@pytest.fixture
def fit(cli: Run, small: Path):
    def run(model: str, *overlays: str, settings: tuple[str, ...] = (), ok: bool = True):
        configs = [f"--config={path}.yaml" for path in (CONFIGS / model, *(OVERLAYS / name for name in overlays))]
        return cli("fit", *configs, "--data.dataset", small, "--trainer.log_every_n_steps=4", *settings, ok=ok)

    return run


def values(folder: Path, tag: str) -> list[float]:
    return [value for _, value in curves(folder / RUN)[tag]]


def last(folder: Path) -> dict:
    return checkpoint(folder / RUN / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_overfit_drives_the_loss_of_ten_batches_to_zero(fit, tmp_path: Path) -> None:
    quick = ("--model.lr=0.01", "--data.batch_size=16", "--trainer.max_epochs=20", "--dashboard.every_n_epochs=0")
    fit("cnn", "overfit", settings=("--model=FastCNN", *quick))
    assert last(tmp_path)["global_step"] == 20 * 10
    losses = values(tmp_path, "train/loss_epoch")
    assert losses[-1] < 0.01 < losses[0]


def test_debug_leaves_no_run(fit, tmp_path: Path) -> None:
    done = fit("fast", "debug")
    assert "will run the requested loop using 3 batch(es)" in done.stderr
    assert not list(tmp_path.glob("lightning_logs/*"))


@pytest.mark.slow
def test_profile_prints_a_table(fit) -> None:
    printed = fit("cnn", "profile").stderr
    assert re.search(r"run_training_batch\s+\|", printed)
    assert re.search(r"\[Strategy\]SingleDeviceStrategy.backward\s+\|", printed)


@pytest.mark.slow
def test_early_stopping_ends_when_nothing_gets_better(fit, tmp_path: Path) -> None:
    fit("logistic", "early_stopping", settings=("--model.lr=2",))
    losses = values(tmp_path, "val/loss")
    assert 4 <= len(losses) < 100
    assert min(losses[-3:]) >= min(losses)
    assert losses.index(min(losses)) == len(losses) - 4


@pytest.mark.slow
def test_cosine_falls_to_zero(fit, tmp_path: Path) -> None:
    fit("logistic", "cosine", settings=NO_PICTURES)
    (schedule,) = last(tmp_path)["lr_schedulers"]
    assert schedule["last_epoch"] == 10
    assert schedule["_last_lr"] == [pytest.approx(0)]


@pytest.mark.slow
def test_plateau_cuts_the_learning_rate(fit, tmp_path: Path) -> None:
    settings = ("--optimizer.init_args.lr=3", "--lr_scheduler.init_args.patience=0", *NO_PICTURES)
    fit("logistic", "plateau", settings=settings)
    rates = values(tmp_path, "train/lr")
    assert rates[0] == 3
    assert rates[-1] < 3
    assert {round(after / before, 3) for before, after in pairwise(rates)} == {1, 0.3}


def planned(total: int, warm_up: int) -> list[float]:
    """Learning rates of the steps of warmup.yaml, from PyTorch's own schedulers."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warm_up)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warm_up)
    schedule, rates = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warm_up]), []
    for _ in range(total):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(
    ("setting", "total", "warm_up"),
    [
        ("--trainer.max_epochs=2", 32, 2),  # 16 steps to an epoch, two epochs
        pytest.param("--trainer.accumulate_grad_batches=4", 8, 1, marks=pytest.mark.slow),
        pytest.param("--trainer.max_steps=20", 20, 1, marks=pytest.mark.slow),
        pytest.param("--model.steps_per_execution=8", 32, 2, marks=pytest.mark.slow),
        pytest.param("--lr_scheduler.milestones=[5]", 32, 5, marks=pytest.mark.slow),
    ],
)
def test_warm_up_and_cosine_are_as_long_as_the_run(fit, tmp_path: Path, setting: str, total: int, warm_up: int) -> None:
    fit("cnn", "warmup", settings=("--trainer.log_every_n_steps=1", *NO_PICTURES, setting))
    rates = dict(curves(tmp_path / RUN)["train/lr"])
    assert [rates[step] for step in range(total)] == pytest.approx(planned(total, warm_up), rel=1e-5)


@pytest.mark.slow
def test_learning_rate_is_found_and_used(fit, tmp_path: Path) -> None:
    done = fit("cnn", "early_stopping", "find_lr", settings=("--trainer.max_epochs=2",))
    found = re.search(r"Learning rate set to ([\d.e-]+)", done.stderr)
    assert found is not None
    assert 1e-3 <= float(found[1]) <= 1
    assert values(tmp_path, "train/lr")[0] == pytest.approx(float(found[1]))
    assert last(tmp_path)["global_step"] == 2 * 16  # the steps of the search do not count
    assert not list(tmp_path.glob(".lr_find*"))
    config = yaml.safe_load((tmp_path / RUN / "config.yaml").read_text())
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["EarlyStopping", "LearningRateFinder"]  # they add up


@pytest.mark.slow
def test_batch_size_is_found_and_used(fit, tmp_path: Path) -> None:
    done = fit("cnn", "find_batch_size")
    assert "will continue with full run using batch size 1024" in done.stderr
    assert last(tmp_path)["global_step"] == 2  # 1,000 images
    assert not list(tmp_path.glob(".scale_batch_size*"))


@pytest.mark.parametrize("overlay", ["gpu", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_gpu_needs_one(fit, overlay: str) -> None:
    if torch.cuda.is_available():
        fit("fast", overlay)
        return
    refused = fit("fast", overlay, ok=False)
    assert "error: No supported gpu backend found!" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_overlay_keeps_the_names_of_weights(fit, tmp_path: Path) -> None:
    fit("fast", "compile", settings=("--trainer.max_epochs=1",))
    assert "net.0.weight" in last(tmp_path)["state_dict"]


@pytest.mark.slow
def test_metrics_of_each_class_are_logged(fit, tmp_path: Path) -> None:
    fit("cnn", "per_class", settings=("--trainer.max_epochs=1", "--data.class_names=[a,b,c,d,e,f,g,h,i,j]"))
    expected = {"val/acc", "val/f1", *(f"val/recall/{name}" for name in "abcdefghij")}
    drawn = curves(tmp_path / RUN)
    assert expected <= drawn.keys()
    for name in "abcdefghij":
        assert drawn[f"val/recall/{name}"][0] == pytest.approx(drawn[f"val_acc_of_class/{name}"][0])


@pytest.mark.slow
def test_regression_learns_values_and_is_tested_predicted_and_exported(cli: Run, small: Path, tmp_path: Path) -> None:
    """By configuration alone, on the brightness of an image. Metrics are not as coarse as a model in bfloat16."""
    arrays = dict(np.load(small))
    for split in ("train", "valid", "test"):
        arrays[f"y_{split}"] = arrays[f"x_{split}"].mean((1, 2), dtype=np.float32) / 128
    np.savez(tmp_path / "bright.npz", **arrays)
    configs = (f"--config={CONFIGS / 'fast.yaml'}", f"--config={OVERLAYS / 'regression.yaml'}")
    quick = ("--data.batch_size=128", "--trainer.max_epochs=4", "--optimizer.lr=0.01")
    for version, (precision, target) in enumerate({"32-true": None, "bf16-true": torch.bfloat16}.items()):
        precise = (f"--trainer.precision={precision}", f"--run_name={precision}")
        assert "confusion matrix" not in cli("fit", *configs, "--data.dataset=bright.npz", *quick, *precise).stderr
        best = f"--ckpt_path=lightning_logs/{precision}/checkpoints/best.ckpt"
        assert "test/mae" in cli("test", best).stdout
        cli("predict", best)
        tested, predicted = (tmp_path / f"lightning_logs/version_{2 * version + part}" for part in range(2))
        with (predicted / "predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows[0].keys() == {"index", "prediction"}
        values = np.array([float(row["prediction"]) for row in rows])
        right = torch.from_numpy(arrays["y_test"]).to(target).double().numpy()
        error = np.mean((values - right) ** 2)
        assert error < 0.05
        assert json.loads((tested / "metrics.json").read_text())["test/mse"] == pytest.approx(error, rel=1e-4)
    assert "Wrote" in cli("export", "--ckpt_path=lightning_logs/32-true/checkpoints/best.ckpt", "--format=pt2").stdout


@pytest.mark.slow
def test_table_beside_tensorboard_in_the_folder_of_the_run(fit, tmp_path: Path) -> None:
    """And when the run is resumed, and when another run is started from its config."""
    fit("cnn", "csv", settings=("--trainer.max_epochs=1",))
    run = tmp_path / RUN
    fit("cnn", "csv", settings=("--ckpt_path=last",))
    fit("cnn", settings=("--config", str(run / "config.yaml")))
    names = {path.name for path in run.iterdir()}
    assert {"metrics.csv", "metrics-to-step-16.csv", "config.yaml", "checkpoints"} <= names
    assert [step for step, _ in curves(run)["val/loss"]] == [15, 31]
    with (run / "metrics.csv").open() as file:
        assert max(int(row["step"]) for row in csv.DictReader(file)) == 31
    assert (tmp_path / "lightning_logs" / "version_1" / "metrics.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fast", pytest.param("cnn", marks=pytest.mark.matrix)])
def test_checkpoints_hold_the_average_that_was_validated(fit, cli: Run, small: Path, model: str) -> None:
    settings = ("--trainer.max_epochs=3", "--data.batch_size=64", "--test_after_fit=true", *NO_PICTURES)
    printed = fit(model, "ema", settings=settings).stdout
    last, best = re.search(r"│ val/loss +│ +([\d.]+) │ +([\d.]+) │", printed).groups()
    tested = re.search(r"test/loss +│ +([\d.]+)", printed)[1]
    run = Path("lightning_logs/version_0")
    for command, name, expected in (("validate", "last", last), ("validate", "best", best), ("test", "best", tested)):
        done = cli(command, "--ckpt_path", run / "checkpoints" / f"{name}.ckpt", "--data.dataset", small)
        found = re.search(r"(val|test)/loss +│ +([\d.]+)", done.stdout)[2]
        assert float(found) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.slow
def test_accumulation_makes_fewer_steps(fit, tmp_path: Path) -> None:
    fit("cnn", "accumulate")
    assert last(tmp_path)["global_step"] == 2 * 4  # of 16 batches to an epoch


def test_every_overlay_is_tried_here() -> None:
    above = Path(__file__).read_text().partition("def test_every_overlay")[0]
    overlays = {path.stem for path in OVERLAYS.glob("*.yaml")}
    elsewhere = {"augment", "ddp", "finetune", "mixup", "mlflow", "nodes", "speed", "wandb"}
    assert overlays - set(re.findall(r"[\"'](\w+)(?:\.yaml)?[\"']", above)) == elsewhere
    readme = (CONFIGS / "README.md").read_text()
    assert [name for name in overlays if f"{name}.yaml" not in readme] == []


@pytest.mark.parametrize(
    "precision", ["bf16-true", *(pytest.param(p, marks=pytest.mark.slow) for p in ("16-true", "64-true"))]
)
@pytest.mark.parametrize("config", ["cnn", pytest.param("logistic", marks=pytest.mark.slow)])
def test_images_come_in_the_dtype_of_the_model(fit, tmp_path: Path, config: str, precision: str) -> None:
    fit(config, settings=(f"--trainer.precision={precision}", "--trainer.max_epochs=1", "--test_after_fit=true"))
    dtypes = {weight.dtype for weight in last(tmp_path)["state_dict"].values()}
    assert dtypes == {{"b": torch.bfloat16, "1": torch.float16, "6": torch.float64}[precision[0]]}
