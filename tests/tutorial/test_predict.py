"""Image files of digits: brought into MNIST's form, predicted, written down; files that cannot be read are named."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from common import CONFIGS, Run
from PIL import Image

from mnist_lit import MNISTDataModule
from mnist_lit.datasets.pictures import PictureError, read_picture

FIT = ("fit", "--config", CONFIGS / "fast.yaml", "--trainer.max_epochs=1")
BEST = "lightning_logs/version_0/checkpoints/best.ckpt"


def predictions(folder: Path, version: int) -> list[dict[str, str]]:
    with (folder / "lightning_logs" / f"version_{version}" / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def saved(image: np.ndarray, path: Path, mode: str = "L", **settings) -> Path:
    Image.fromarray(image).convert(mode).save(path, **settings)
    return path


def on_paper(pixels: np.ndarray) -> Image.Image:
    """Eight times as large, somewhere on a sheet of 400 x 300."""
    sheet = Image.new("L", (400, 300), 0)
    sheet.paste(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC), (130, 50))
    return sheet


def transparent(pixels: np.ndarray) -> Image.Image:
    black = Image.new("L", pixels.shape[::-1], 0)
    return Image.merge("RGBA", [black, black, black, Image.fromarray(pixels)])


VARIANTS: dict[str, tuple[str, Callable[[np.ndarray], Image.Image], dict]] = {
    "as it is": ("png", Image.fromarray, {}),
    "inverted": ("png", lambda pixels: Image.fromarray(255 - pixels), {}),
    "400 x 300": ("png", on_paper, {}),
    "shifted": ("png", lambda pixels: Image.fromarray(np.pad(pixels, ((9, 1), (0, 12)))), {}),
    "rgba": ("png", transparent, {}),
    "jpeg": ("jpg", lambda pixels: Image.fromarray(255 - np.asarray(on_paper(pixels))), {"quality": 50}),
    "webp": ("webp", on_paper, {"quality": 50}),
    "bmp": ("bmp", lambda pixels: Image.fromarray(pixels).convert("RGB"), {}),
}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.mnist
def test_mnist_images_in_every_form_are_predicted_as_the_tensors(
    cli: Run, mnist_dir: Path, tmp_path: Path, record_property
) -> None:
    """Within one point of the accuracy on the tensors of the same 1,000 test images."""
    data = MNISTDataModule("mnist", data_dir=str(mnist_dir))
    data.prepare_data()
    data.setup("test")
    images, labels = (split[:1000].numpy() for split in data.source.datasets["test"].tensors)
    common = ("--data.data_dir", mnist_dir, "--data.dataset=mnist")
    cli(*FIT, *common)
    cli("predict", "--config", CONFIGS / "fast.yaml", "--ckpt_path", BEST, *common)

    def accuracy(rows: list[dict[str, str]]) -> float:
        return float(np.mean([int(row["class"]) == label for row, label in zip(rows, labels, strict=False)]))

    expected = accuracy(predictions(tmp_path, 1)[:1000])
    assert expected > 0.97
    for version, (name, (suffix, make, settings)) in enumerate(VARIANTS.items(), start=2):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for index, pixels in enumerate(images):
            make(pixels).save(folder / f"{index:04}.{suffix}", **settings)
        arguments = ("predict", "--config", CONFIGS / "fast.yaml", "--ckpt_path", BEST)
        cli(*arguments, "--data.images", f"{folder}/*.{suffix}")
        rows = predictions(tmp_path, version)
        assert [Path(row["file"]).stem for row in rows] == [f"{index:04}" for index in range(1000)]
        found = accuracy(rows)
        record_property("accuracy", f"{name}: {found:.3f}, tensors {expected:.3f}")
        print(f"{name}: {found:.3f}, tensors {expected:.3f}")
        assert abs(found - expected) <= 0.01


@pytest.mark.slow
def test_thousand_good_and_twenty_broken_files(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*FIT, "--data.dataset", small)
    folder = tmp_path / "mixed"
    folder.mkdir()
    with np.load(small) as arrays:
        images = arrays["x_train"]
    for index, pixels in enumerate(images):
        saved(pixels, folder / f"{index:04}.png")
    whole = (folder / "0000.png").read_bytes()
    for index in range(20):
        broken = [b"", whole[: len(whole) // 2], b"no image", whole[:40] + b"\0" * 50][index % 4]
        (folder / f"broken{index}.png").write_bytes(broken)
    arguments = ("predict", "--config", CONFIGS / "fast.yaml", "--ckpt_path", BEST, "--data.images", folder)
    done = cli(*arguments, ok=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("mnist_lit: error: 20 of 1020 files could not be predicted")
    assert all(f"broken{index}.png: " in done.stderr for index in range(20))
    assert "Traceback" not in done.stderr
    rows = predictions(tmp_path, 1)
    assert len(rows) == 1000
    assert done.stdout.count("%") == 20
    assert "... and 980 more" in done.stdout
    assert all(sum(float(row[f"p_{digit}"]) for digit in range(10)) == pytest.approx(1, abs=1e-4) for row in rows)
    with Image.open(tmp_path / "lightning_logs" / "version_1" / "predictions.png") as sheet:
        assert sheet.size == (840, 2000)


@pytest.mark.parametrize("images", ["nothing/*.png", "missing.png"])
def test_pattern_that_nothing_fits(cli: Run, small: Path, images: str) -> None:
    config = ("--config", CONFIGS / "cnn.yaml", "--data.dataset", small)
    done = cli("predict", *config, "--data.images", images, ok=False)
    assert f"--data.images={images}: no such image" in done.stderr
    assert "Traceback" not in done.stderr


def digit() -> np.ndarray:
    """A seven, of MNIST's size and in its place."""
    pixels = np.zeros((28, 28), np.uint8)
    pixels[4:7, 6:20] = 200
    for row in range(7, 24):
        pixels[row, 19 - (row - 7) // 3 : 22 - (row - 7) // 3] = 255
    return pixels


def test_mode_and_polarity_make_no_difference(tmp_path: Path) -> None:
    expected, _ = read_picture(saved(digit(), tmp_path / "l.png"))
    assert expected.shape == (28, 28)
    assert expected.dtype == np.uint8
    for name, image in {
        "inverted": Image.fromarray(255 - digit()),
        "rgb": Image.fromarray(digit()).convert("RGB"),
        "palette": Image.fromarray(digit()).convert("P"),
        "black on nothing": transparent(digit()),
        "16 bits": Image.fromarray(digit().astype(np.uint16) * 257),
        "margin": Image.fromarray(np.pad(255 - digit(), 30, constant_values=255)),
    }.items():
        image.save(tmp_path / f"{name}.png")
        off = np.abs(read_picture(tmp_path / f"{name}.png")[0] - expected.astype(int)).max()
        assert off <= 1, name


def test_digit_fills_the_box_around_its_centre_of_mass(tmp_path: Path) -> None:
    pixels = np.zeros((300, 500), np.uint8)
    pixels[20:220, 400:440] = 255  # a one, 200 x 40, in a corner
    image = read_picture(saved(pixels, tmp_path / "one.png"))[0] / 255
    assert (image.any(1).sum(), image.any(0).sum()) == (20, 4)
    centre = [(image.sum(axis) * (np.arange(28) + 0.5)).sum() / image.sum() for axis in (1, 0)]
    assert centre == pytest.approx([14, 14])


def test_empty_paper_is_no_digit(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="nothing is on it"):
        read_picture(saved(np.full((28, 28), 255, np.uint8), tmp_path / "empty.png"))
