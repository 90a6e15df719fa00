"""One's own model, data, loss, optimizer, schedule and callback, from a module in the current folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from common import ROOT, RUN, Run, checkpoint, predictions

BEST, LAST = (RUN / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
NET = "--model=Classifier --model.net=my_net.Net --model.net.width=16".split()


@pytest.fixture
def own(cli: Run, small: Path, tmp_path: Path):
    """The command line beside my_net.py and a dataset file with the classes up to 6, of 32 x 28 pixels."""
    shutil.copy(ROOT / "tests" / "helpers" / "my_net.py", tmp_path)
    arrays = {}
    with np.load(small) as file:
        for split in ("train", "valid", "test"):
            chosen = file[f"y_{split}"] < 7
            arrays[f"x_{split}"] = np.pad(file[f"x_{split}"][chosen], ((0, 0), (2, 2), (0, 0)))
            arrays[f"y_{split}"] = file[f"y_{split}"][chosen]
    np.savez(tmp_path / "seven.npz", **arrays)

    def run(*arguments: object):
        return cli(*arguments, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})

    return run


@pytest.mark.parametrize(
    "model", [NET, *(pytest.param([f"--model={m}"], marks=pytest.mark.slow) for m in ("FastCNN", "Logistic"))]
)
def test_classes_and_sizes_come_from_the_data(own, tmp_path: Path, model: list[str]) -> None:
    own("fit", *model, "--data.dataset=seven.npz", "--trainer.max_epochs=1")
    shapes = {name: tuple(weight.shape) for name, weight in checkpoint(tmp_path / LAST)["state_dict"].items()}
    assert shapes.get("net.1.weight") == (7, 32 * 28) or "--model=Logistic" not in model
    assert list(shapes.values())[-1] == (7,)  # the last layer's bias
    own("predict", "--ckpt_path", BEST)
    assert list(predictions(tmp_path / "lightning_logs" / "version_1")[0])[-2:] == ["p_5", "p_6"]


@pytest.mark.slow
def test_everything_may_be_ones_own(own, tmp_path: Path) -> None:
    done = own(
        *("fit", *NET, "--model=my_net.Smooth", "--data=my_net.Stripes", "--trainer.callbacks+=my_net.Hello"),
        *("--optimizer=my_net.SlowSGD", "--optimizer.lr=0.05", "--lr_scheduler=my_net.Halving"),
        *("--trainer.max_epochs=2", "--test_after_fit=true"),
    )
    assert "hello from a callback" in done.stdout
    assert "Smooth on Stripes after 2 epochs" in done.stdout
    (optimizer,) = checkpoint(tmp_path / LAST)["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.05 / 4)
    (loss,) = (line.split("│")[2] for line in done.stdout.splitlines() if "test/loss" in line)
    # A smoothed loss is never below the entropy of its labels, (2/3, 1/6, 1/6).
    assert float(loss) >= 0.867
