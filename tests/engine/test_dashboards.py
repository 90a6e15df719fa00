"""TensorBoard as it is seen: the real server on a run's folder, over HTTP."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import plain
import pytest
import requests
import torch
import torch.nn.functional as F
from browser import tensorboard
from common import CONFIGS, RUN, Run
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_lit.engine import Dashboard, Metrics
from mnist_lit.engine.outputs import display
from mnist_lit.engine.sheets import confusion_sheet, contact_sheet


@pytest.mark.slow
def test_server_has_scalars_images_charts_and_hparams(cli: Run, small: Path, tmp_path: Path) -> None:
    """Of a run and a test of it."""
    common = ("--config", CONFIGS / "cnn.yaml", "--data.dataset", small, "--trainer.log_every_n_steps=4")
    cli("fit", *common)
    cli("test", *common, "--ckpt_path", RUN / "checkpoints" / "best.ckpt")
    with tensorboard(tmp_path / "lightning_logs", runs=2) as address:
        assert_served(f"{address}/data/plugin")


def assert_served(plugins: str) -> None:
    def get(path: str, **parameters: Any) -> Any:
        response = requests.get(f"{plugins}/{path}", params=parameters, timeout=30)
        response.raise_for_status()
        return response.json()

    def post(path: str, **request: Any) -> Any:
        return requests.post(f"{plugins}/{path}", data=json.dumps(request), timeout=30).json()

    scalars = get("scalars/tags")["version_0"]
    expected = {"train/loss", "train/acc", "train/loss_epoch", "train/acc_epoch", "val/loss", "val/acc"}
    expected |= {"train/lr", "train/gradient_norm", *(f"val_acc_of_class/{digit}" for digit in range(10))}
    assert expected <= scalars.keys()
    images = get("images/tags")
    assert {"train/samples", "val/confusion_matrix", "val/mistakes"} == images["version_0"].keys()
    assert {"test/confusion_matrix", "test/mistakes"} == images["version_1"].keys()

    charts = get("custom_scalars/layout")["category"][0]["chart"]
    assert ["train/loss_epoch", "val/loss"] in [chart["multiline"]["tag"] for chart in charts]

    experiment = post("hparams/experiment", experimentName="")
    assert {"lr", "momentum", "batch_size"} <= {info["name"] for info in experiment["hparamInfos"]}
    assert {"val/loss", "val/acc"} <= {info["name"]["tag"] for info in experiment["metricInfos"]}
    asked = {"allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]}
    groups = post("hparams/session_groups", **asked, colParams=[], startIndex=0, sliceSize=10)
    found = {value["name"]["tag"]: value["value"] for value in groups["sessionGroups"][0]["metricValues"]}
    losses = get("scalars/scalars", run="version_0", tag="val/loss")
    assert found["val/loss"] == pytest.approx(losses[-1][2])


LABELS = torch.tensor([0, 0, 1, 2, 0, 1, 0, 2, 0, 1])
CONFUSED = torch.tensor([[0, 5, 0], [0, 3, 0], [0, 0, 2]])  # rows true, columns predicted


class Known(LightningDataModule):
    """Ten images (1, 8, 8). Pixel 0 has the label, pixel 1 how confident the model will be, the rest is a pattern."""

    num_classes, class_names = 3, ("cat", "dog", "horse")

    def __init__(self) -> None:
        super().__init__()
        images = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        images[:, 0, 0, 0], images[:, 0, 0, 1] = LABELS / 10, torch.arange(10) / 10
        self.images, self.data = images, TensorDataset(images, LABELS)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=4)

    test_dataloader = predict_dataloader = val_dataloader = train_dataloader


class Model(plain.Model):
    """Its predictions are known: it takes every cat for a dog."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ParameterList([torch.zeros(1)])

    def forward(self, images: Tensor) -> Tensor:
        label, confidence = (images[:, 0, 0, 0] * 10).round().long(), 2 + images[:, 0, 0, 1]
        return F.one_hot(label.clamp(min=1), 3) * confidence[:, None] + 0 * self.net[0]


def images_of(run: Path) -> dict[str, list[tuple[int, np.ndarray]]]:
    """Per tag the steps and pictures."""
    events = EventAccumulator(str(run)).Reload()

    def pixels(png: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(png)).convert("L"))

    tags = events.Tags()["images"]
    return {tag: [(shown.step, pixels(shown.encoded_image_string)) for shown in events.Images(tag)] for tag in tags}


def fit(folder: Path, dashboard: Dashboard, model: LightningModule | None = None) -> Path:
    """A plain ``Trainer`` with the module whose predictions are known, three steps to an epoch."""
    options = {"logger": TensorBoardLogger(folder), "enable_checkpointing": True, "log_every_n_steps": 3}
    trainer = plain.fit(model or Model(), folder, dashboard, Metrics({}), data=Known(), **options)
    return Path(trainer.log_dir or "")


def test_parts_are_chosen(tmp_path: Path) -> None:
    assert images_of(fit(tmp_path, Dashboard(0))) == {}
    run = fit(tmp_path, Dashboard(2, 0, confusion_matrix=False, gradient_norm=False))
    tags = EventAccumulator(str(run)).Reload().Tags()
    assert tags["images"] == ["train/samples"]
    assert "train/gradient_norm" not in tags["scalars"]
    shown = images_of(fit(tmp_path, Dashboard(2, samples=0)))
    steps = {tag: [step for step, _ in pictures] for tag, pictures in shown.items()}
    assert steps == {"val/confusion_matrix": [5], "val/mistakes": [5]}


def test_part_that_fails_is_left_out(tmp_path: Path) -> None:
    class OneClass(Model):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
            return {**self.training_step(batch, batch_idx), "preds": self(batch[0])[:, :1]}

    with pytest.warns(UserWarning, match="no confusion_matrix in the dashboard"):
        run = fit(tmp_path, Dashboard(), OneClass())
    assert "val/confusion_matrix" not in images_of(run)


def test_pictures_show_what_the_model_does(tmp_path: Path) -> None:
    """Rows of the confusion matrix are true classes, mistakes are "target > prediction", the worst first; class names
    come from the data module, and go into the checkpoint.
    """
    run, images = fit(tmp_path, Dashboard(mistakes=4)), Known().images
    shown, names = {tag: pictures[-1][1] for tag, pictures in images_of(run).items()}, ["cat", "dog", "horse"]
    assert (shown["val/confusion_matrix"] == np.asarray(confusion_sheet(CONFUSED, names))).all()
    worst = [index for index in reversed(range(10)) if LABELS[index] == 0][:4]
    sure = Model()(images).softmax(1).amax(1)[worst]
    captions = [f"cat > dog {confidence:.0%}" for confidence in sure.tolist()]
    assert (shown["val/mistakes"] == np.asarray(contact_sheet(display(images[worst]), captions))).all()
    captions = [names[label] for label in LABELS[:4]]
    assert (shown["train/samples"] == np.asarray(contact_sheet(display(images[:4]), captions))).all()
    scalars = EventAccumulator(str(run)).Reload()
    assert [scalars.Scalars(f"val_acc_of_class/{name}")[-1].value for name in names] == [0, 1, 1]
    (path,) = run.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["class_names"] == names


# --------------------------------------------------------------------------------------------------- sheets


def test_confusion_matrix_is_shaded_by_the_share_of_its_row() -> None:
    counts = torch.tensor([[75, 25, 0], [0, 0, 0], [1, 0, 99]])
    sheet = np.asarray(confusion_sheet(counts, ["a", "b", "c"]))
    cell = 650 // 3
    margin = len(sheet) - 3 * cell
    corners = sheet[margin + 5 :: cell, margin + 5 :: cell]  # where no number is
    roots = np.sqrt([[0.75, 0.25, 0], [0, 0, 0], [0.01, 0, 0.99]])
    assert corners.tolist() == np.round(255 * (1 - roots)).tolist()
