"""The overlays in configs/, each on top of a model's config."""

import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from common import CONFIGS, OVERLAYS, RUN, Run, checkpoint, curves

slow, matrix = pytest.mark.slow, pytest.mark.matrix
# Of many epochs they would take most of the time.
NO_PICTURES = ("--dashboard.confusion_matrix=false", "--dashboard.mistakes=0")


class Ran(NamedTuple):
    """What a run has printed and left."""

    folder: Path
    stdout: str
    stderr: str

    @property
    def last(self) -> dict[str, Any]:
        return checkpoint(self.folder / "checkpoints" / "last.ckpt")

    def values(self, tag: str) -> list[float]:
        return [value for _, value in curves(self.folder)[tag]]


@pytest.fixture
def fit(cli: Run, small: Path, tmp_path: Path):
    def run(model: str, *overlays: str, settings: tuple[str, ...] = (), ok: bool = True) -> Ran:
        configs = [f"--config={path}.yaml" for path in (CONFIGS / model, *(OVERLAYS / name for name in overlays))]
        done = cli("fit", *configs, "--data.dataset", small, "--trainer.log_every_n_steps=4", *settings, ok=ok)
        return Ran(tmp_path / RUN, done.stdout, done.stderr)

    return run


def stops_after_three_epochs_without_gain(run: Ran) -> bool:
    losses = run.values("val/loss")
    return losses.index(min(losses)) == len(losses) - 4 < 96


def ends_at_zero(run: Ran) -> bool:
    (schedule,) = run.last["lr_schedulers"]
    return schedule["last_epoch"] == 10 and schedule["_last_lr"] == [pytest.approx(0)]


def cuts_the_rate(run: Ran) -> bool:
    rates = run.values("train/lr")
    return rates[0] == 3 > rates[-1] and {round(b / a, 3) for a, b in pairwise(rates)} == {1, 0.3}


def uses_the_rate_that_was_found(run: Ran) -> bool:
    found = float(re.findall(r"Learning rate set to ([\d.e-]+)", run.stderr)[0])
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["EarlyStopping", "LearningRateFinder"]  # they add up
    assert run.last["global_step"] == 2 * 16  # the steps of the search do not count
    return 1e-3 <= found <= 1 and run.values("train/lr")[0] == pytest.approx(found)


def logs_the_recall_of_each_class(run: Ran) -> bool:
    drawn = curves(run.folder)
    assert {"val/acc", "val/f1"} <= drawn.keys()
    pairs = [(drawn[f"val/recall/{name}"][0], drawn[f"val_acc_of_class/{name}"][0]) for name in "abcdefghij"]
    return all(ours == pytest.approx(other) for ours, other in pairs)


BY_OVERLAY = {
    "overfit": (
        "cnn",
        "--model=FastCNN --model.lr=0.01 --data.batch_size=16 --trainer.max_epochs=10 --dashboard.every_n_epochs=0",
        lambda run: run.last["global_step"] == 100 and run.values("train/loss_epoch")[-1] < 0.01,
    ),
    "debug": ("fast", "", lambda run: "using 3 batch(es)" in run.stderr and not run.folder.exists()),
    "profile": ("cnn", "", lambda run: "SingleDeviceStrategy.backward" in run.stderr),
    "early_stopping": ("logistic", "--model.lr=2", stops_after_three_epochs_without_gain),
    "cosine": ("logistic", "", ends_at_zero),
    "plateau": (
        "logistic",
        "--optimizer.init_args.lr=3 --lr_scheduler.init_args.patience=0 --trainer.check_val_every_n_epoch=2",
        cuts_the_rate,
    ),
    "early_stopping find_lr": ("cnn", "--trainer.max_epochs=2", uses_the_rate_that_was_found),
    "find_batch_size": ("cnn", "", lambda run: run.last["global_step"] == 2),  # 1,000 images
    "accumulate": ("cnn", "", lambda run: run.last["global_step"] == 2 * 4),  # of 16 batches to an epoch
    "compile": ("logistic", "--trainer.max_epochs=1", lambda run: "net.1.weight" in run.last["state_dict"]),
    "per_class": (
        *("cnn", "--trainer.max_epochs=1 --data.class_names=[a,b,c,d,e,f,g,h,i,j]"),
        logs_the_recall_of_each_class,
    ),
}


@pytest.mark.parametrize("overlays", [pytest.param(name, marks=[slow] * (name != "debug")) for name in BY_OVERLAY])
def test_overlay_does_what_it_says(fit, tmp_path: Path, overlays: str) -> None:
    if overlays == "compile" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    model, settings, does_it = BY_OVERLAY[overlays]
    assert does_it(fit(model, *overlays.split(), settings=(*NO_PICTURES, *settings.split())))
    assert not list(tmp_path.glob(".*_*"))  # of the finders


def planned(total: int, warm_up: int) -> list[float]:
    """Learning rates of the steps of warmup.yaml."""
    rise = [0.01 + 0.99 * step / warm_up for step in range(warm_up)]
    fall = [(1 + math.cos(math.pi * step / (total - warm_up))) / 2 for step in range(total - warm_up)]
    return [3e-3 * share for share in rise + fall]


@pytest.mark.parametrize(
    ("setting", "total", "warm_up"),
    [
        ("--trainer.max_epochs=2", 32, 2),  # 16 steps to an epoch, two epochs
        pytest.param("--trainer.accumulate_grad_batches=4", 8, 1, marks=slow),
        pytest.param("--trainer.max_steps=20", 20, 1, marks=[slow, matrix]),
        pytest.param("--model.steps_per_execution=8", 32, 2, marks=[slow, matrix]),
        pytest.param("--lr_scheduler.milestones=[5]", 32, 5, marks=slow),
    ],
)
def test_warm_up_and_cosine_are_as_long_as_the_run(fit, tmp_path: Path, setting: str, total: int, warm_up: int) -> None:
    fit("cnn", "warmup", settings=("--trainer.log_every_n_steps=1", *NO_PICTURES, setting))
    rates = dict(curves(tmp_path / RUN)["train/lr"])
    assert [rates[step] for step in range(total)] == pytest.approx(planned(total, warm_up), rel=1e-5)


@slow
@pytest.mark.parametrize("model", ["fast", pytest.param("cnn", marks=matrix)])
def test_checkpoints_hold_the_average_that_was_validated(fit, cli: Run, small: Path, model: str) -> None:
    settings = ("--trainer.max_epochs=3", "--data.batch_size=64", "--test_after_fit=true", *NO_PICTURES)
    printed = fit(model, "ema", settings=settings).stdout
    last, best = re.search(r"│ val/loss +│ +([\d.]+) │ +([\d.]+) │", printed).groups()
    tested = re.search(r"test/loss +│ +([\d.]+)", printed)[1]
    for command, name, expected in (("validate", "last", last), ("validate", "best", best), ("test", "best", tested)):
        done = cli(command, "--ckpt_path", RUN / "checkpoints" / f"{name}.ckpt", "--data.dataset", small)
        found = re.search(r"(val|test)/loss +│ +([\d.]+)", done.stdout)[2]
        assert float(found) == pytest.approx(float(expected), abs=1e-4)
