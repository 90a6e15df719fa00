"""One's own model, data, loss, optimizer, schedule and callback, from a folder that has nothing else."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from common import ROOT, Run, checkpoint

RUN = Path("lightning_logs/version_0/checkpoints")
YAML = """
model:
  class_path: Classifier
  init_args:
    net:
      class_path: my_net.Net
      init_args: {width: 16, num_classes: 7}
data:
  dataset: seven.npz
trainer: {max_epochs: 1}
"""


@pytest.fixture(scope="module")
def seven(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file with the classes up to 6, of 32 x 28 pixels."""
    path, arrays = tmp_path_factory.mktemp("seven") / "seven.npz", {}
    with np.load(small) as file:
        for split in ("train", "valid", "test"):
            chosen = file[f"y_{split}"] < 7
            arrays[f"x_{split}"] = np.pad(file[f"x_{split}"][chosen], ((0, 0), (2, 2), (0, 0)))
            arrays[f"y_{split}"] = file[f"y_{split}"][chosen]
    np.savez(path, **arrays)
    return path


@pytest.fixture
def own(cli: Run, seven: Path, tmp_path: Path):
    """The command line beside my_net.py, own.yaml and the dataset of seven classes."""
    for path in (ROOT / "tests" / "helpers" / "my_net.py", seven):
        shutil.copy(path, tmp_path)
    (tmp_path / "own.yaml").write_text(YAML)

    def run(*arguments: object, ok: bool = True):
        return cli(*arguments, ok=ok, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})

    return run


def saved(folder: Path) -> dict:
    return checkpoint(folder / RUN / "last.ckpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["FastCNN", *(pytest.param(m, marks=pytest.mark.matrix) for m in ("CNN", "Logistic"))]
)
def test_classes_and_sizes_come_from_the_data(own, tmp_path: Path, model: str) -> None:
    own("fit", f"--model={model}", "--data.dataset=seven.npz", "--trainer.max_epochs=1")
    shapes = {name: tuple(weight.shape) for name, weight in saved(tmp_path)["state_dict"].items()}
    if model == "Logistic":
        assert shapes["net.1.weight"] == (7, 32 * 28)
    assert list(shapes.values())[-1] == (7,)  # the last layer's bias
    own("test", "--ckpt_path", RUN / "best.ckpt")
    own("predict", "--ckpt_path", RUN / "best.ckpt")
    header = (tmp_path / "lightning_logs" / "version_2" / "predictions.csv").read_text().splitlines()[0]
    assert header.endswith("p_5,p_6")


def test_own_network_trains_from_a_yaml(own, tmp_path: Path) -> None:
    own("fit", "--config=own.yaml")
    assert saved(tmp_path)["state_dict"]["net.4.weight"].shape == (7, 16)


@pytest.mark.slow
def test_everything_may_be_ones_own(own, tmp_path: Path) -> None:
    done = own(
        *("fit", "--config=own.yaml", "--model=my_net.Smooth", "--data=my_net.Stripes"),
        *("--model.net.init_args.num_classes=3", "--optimizer=my_net.SlowSGD", "--optimizer.lr=0.05"),
        *("--lr_scheduler=my_net.Halving", "--trainer.callbacks+=my_net.Hello", "--trainer.max_epochs=2"),
    )
    assert "hello from a callback" in done.stdout
    assert "Smooth on Stripes after 2 epochs" in done.stdout
    last = saved(tmp_path)
    assert last["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.05 / 4)
    tested = own("test", "--ckpt_path", RUN / "best.ckpt").stdout
    loss = re.search(r"test/loss\W+([\d.]+)", tested)
    assert loss is not None
    # A smoothed loss is never below the entropy of its labels, (2/3, 1/6, 1/6).
    assert float(loss[1]) >= 0.867
    own("predict", "--ckpt_path", RUN / "best.ckpt")
