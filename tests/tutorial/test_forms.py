"""The form of the training data is found out, travels in the checkpoint, and is that of what is predicted."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import CONFIGS, RUN, Run, checkpoint
from PIL import Image
from torch import Tensor

from mnist_lit.datasets.digits import make_digits
from mnist_lit.datasets.forms import find_digit_form
from mnist_lit.datasets.mnist import read_mnist
from mnist_lit.engine.data.loaders import BatchTensorDataset

MNIST = {"side": 28, "box": 20, "light_on_dark": True, "centred_by": "mass"}


def scaled(images: Tensor, side: int) -> Tensor:
    pixels = F.interpolate(images.float(), (side, side), mode="bilinear", align_corners=False)
    return pixels.round().to(torch.uint8)


def form_of(images: Tensor) -> dict | None:
    return find_digit_form(BatchTensorDataset(images, torch.zeros(len(images))))


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return make_digits().train[0][:2000]  # uint8 (n, 1, 28, 28)


def test_digits_have_mnists_form(digits: Tensor) -> None:
    for images, expected in (
        (digits, MNIST),
        (255 - digits, {**MNIST, "light_on_dark": False}),
        (F.pad(digits, (6, 6, 6, 6)), {**MNIST, "side": 40}),
        (scaled(digits, 64), {**MNIST, "side": 64, "box": 46}),
    ):
        found = form_of(images)
        assert found is not None
        assert found == {**expected, "box": found["box"]}
        assert found["box"] == pytest.approx(expected["box"], rel=0.1)  # the embedded ones are a little larger


def test_other_images_have_none(digits: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (500, 1, 28, 28), dtype=torch.uint8, generator=generator)
    shifted = torch.stack([image.roll(int(by), 2) for image, by in zip(digits, torch.arange(2000) % 28, strict=True)])
    for name, images in {
        "noise": noise,
        "blank": torch.zeros_like(digits),
        "colour": digits.repeat(1, 3, 1, 1),
        "cut": digits[:, :, 4:24, 4:24],
        "oblong": digits[:, :, 2:],
        "on noise": (digits // 2 + noise.repeat(4, 1, 1, 1) // 2),
        "anywhere": shifted,
    }.items():
        assert form_of(images) is None, name


@pytest.mark.mnist
def test_mnist_has_its_own_form(mnist_archive: Path) -> None:
    assert form_of(read_mnist(mnist_archive).splits.train[0]) == MNIST


OTHERS = {
    "dark on light": lambda images: 255 - images,
    "64 x 64": lambda images: scaled(images, 64),
    "64 x 64, dark on light": lambda images: 255 - scaled(images, 64),
}


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if "," in k else pytest.mark.matrix) for k in OTHERS])
def test_pictures_are_brought_into_the_form_of_the_training_data(
    cli: Run, mnist_archive: Path, tmp_path: Path, kind: str
) -> None:
    """Of 200 pictures, dark on light and light on dark, as many are right as of the test images in that form."""
    splits, arrays = read_mnist(mnist_archive).splits, {}
    for name, (images, labels), n in zip(("train", "valid", "test"), splits, (20_000, 1000, 1000), strict=True):
        arrays[f"x_{name}"], arrays[f"y_{name}"] = OTHERS[kind](images[:n]).numpy(), labels[:n].numpy()
    np.savez(tmp_path / "own.npz", **arrays)
    cli("fit", "--config", CONFIGS / "fast.yaml", "--data.dataset=own.npz", "--trainer.max_epochs=2")
    best = RUN / "checkpoints" / "best.ckpt"
    form = checkpoint(tmp_path / best)["datamodule_hyper_parameters"]["digit_form"]
    assert form["light_on_dark"] == ("dark" not in kind)

    (tmp_path / "pictures").mkdir()
    images, labels = (split[:200] for split in splits.test)
    for index, image in enumerate(images[:, 0].numpy()):
        pixels = 255 - image if index % 2 else image
        Image.fromarray(np.pad(pixels, 20, constant_values=255 * (index % 2))).save(
            tmp_path / "pictures" / f"{index:03}.png"
        )
    (tmp_path / "own.npz").unlink()
    cli("predict", "--ckpt_path", best, "--data.images=pictures")
    with (tmp_path / "lightning_logs" / "version_1" / "predictions.csv").open() as file:
        right = sum(int(row["class"]) == label for row, label in zip(csv.DictReader(file), labels, strict=True))
    print(f"{kind}: {right} of 200")
    assert right >= 192
