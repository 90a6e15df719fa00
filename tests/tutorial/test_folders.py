"""Folders of images: found, split, decoded, trained on, resumed, predicted and exported, in colour."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import BEST, CONFIGS, OVERLAYS, RUN, Run, checkpoint, predictions
from interrupt import signal_at
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_execution import assert_same_training
from test_resume import assert_same_run

from mnist_lit.engine import ImageDataModule, UserError
from mnist_lit.engine.images import read_image

CLASSES = {"blue box": (50, 60, 210), "green box": (40, 180, 60), "red box": (200, 40, 40)}
FORMATS = ("png", "jpg", "bmp", "webp", "tiff", "gif")
FIT = (
    *("fit", "--config", CONFIGS / "fast.yaml", "--data.dataset=pets", "--data.image_size=32"),
    *("--data.batch_size=64", "--trainer.max_epochs=3"),
)


def make_pets(folder: Path, n: int = 60, size: tuple[int, int] | None = None) -> Path:
    """n images of each of three classes, of mixed sizes and formats: a box of the class's colour on noise."""
    random = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for index in range(n):
            height, width = size or random.integers(40, 90, 2)
            pixels = random.integers(0, 120, (height, width, 3), dtype=np.uint8)
            top, left = random.integers(5, 15, 2)
            pixels[top : top + 20, left : left + 20] = (colour + random.integers(-40, 40, 3)).clip(0, 255)
            Image.fromarray(pixels).save(folder / name / f"{index:04}.{FORMATS[index % len(FORMATS)]}")
    return folder


def opened(folder: Path, data_dir: Path, **options: Any) -> ImageDataModule:
    data = ImageDataModule(str(folder), data_dir=str(data_dir), **options)
    data.prepare_data()
    return data


@pytest.mark.parametrize("limit", [2.0, 1e-9])
def test_classes_are_split_by_fraction_and_seed(tmp_path: Path, limit: float) -> None:
    root = make_pets(tmp_path / "pets", size=(20, 20))
    options = {"valid_fraction": 0.2, "memory_limit": limit}
    one, same, other = (opened(root, tmp_path / "data", split_seed=seed, **options) for seed in (0, 0, 1))
    assert one.class_names == list(CLASSES)
    counts = {split: torch.bincount(labels).tolist() for split, (_, labels) in one.source.splits.items()}
    assert counts == {"train": [42] * 3, "valid": [12] * 3, "test": [6] * 3}
    assert one.digest == same.digest != other.digest
    first, second, third = (
        [data[index][0].numpy().tobytes() for data in m.source.datasets.values() for index in range(len(data))]
        for m in (one, same, other)
    )
    assert first == second != third
    assert sorted(first) == sorted(read_image(path, 3).tobytes() for path in root.rglob("*.*")) == sorted(third)


@pytest.mark.parametrize("valid", ["valid", "Validation", None])
def test_folders_of_splits_are_kept(tmp_path: Path, valid: str | None) -> None:
    """Where there is no folder to validate on, that is chosen from the training images; the test images stay."""
    for split, n in (("train", 20), (valid, 10), ("test", 5)):
        if split:
            make_pets(tmp_path / "pets" / split, n, (20, 20))
    splits = opened(tmp_path / "pets", tmp_path / "data", memory_limit=1e-9).source.splits
    expected = {"train": 60 if valid else 54, "valid": 30 if valid else 6, "test": 15}
    assert {split: len(paths) for split, (paths, _) in splits.items()} == expected
    assert all(b"/test/" in path for path in splits["test"][0])


def with_pets(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: change(make_pets(root, 4, (20, 20)) / "red box")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


MISTAKES = {
    "nothing": (lambda root: None, "no such dataset"),
    "a pipe": (os.mkfifo, "no such dataset; .* and no device or pipe"),
    "an empty folder": (lambda root: (root / "cats").mkdir(parents=True), "no images in folders of their own"),
    "several sizes": (lambda root: make_pets(root, 4), "images of 12 sizes, .*choose one with --data.image_size"),
    "half an image": (with_pets(lambda pets: half(pets / "0000.png")), r"0000\.png: not a readable image"),
    "a device as an image": (with_pets(lambda pets: (pets / "1.png").symlink_to("/dev/zero")), "a link to nothing"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_used_is_named_at_once(tmp_path: Path, case: str) -> None:
    make, message = MISTAKES[case]
    make(tmp_path / "pets")
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "pets", tmp_path / "data")


# ------------------------------------------------------------------------------------------------ decoding


def test_grey_stays_grey_and_links_are_no_circles(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 30), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = tmp_path / "grey" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "grey" / "a" / "circle").symlink_to(tmp_path / "grey")
    data = opened(tmp_path / "grey", tmp_path / "data")
    assert (data.channels, data.num_pixels) == (1, 600)
    found = [image.numpy().tobytes() for images, _ in data.source.splits.values() for image in images]
    assert sorted(found) == sorted(image.tobytes() for image in pixels)
    assert opened(tmp_path / "grey", tmp_path / "data", channels=3).channels == 3


def test_every_mode_becomes_what_a_viewer_shows(tmp_path: Path) -> None:
    colour = np.zeros((10, 20, 3), np.uint8)
    colour[:, 10:] = (200, 100, 50)
    shown = Image.fromarray(colour)
    clear = Image.merge("RGBA", [*shown.split(), Image.fromarray((colour[..., 0] > 0).astype(np.uint8) * 255)])
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held upright
    for name, image, options in (
        ("rgb.png", shown, {}),
        ("palette.gif", shown.convert("P", palette=Image.Palette.ADAPTIVE), {}),
        ("cmyk.tiff", shown.convert("CMYK"), {}),
        ("turned.png", shown.rotate(90, expand=True), {"exif": turned}),
    ):
        image.save(tmp_path / name, **options)
        np.testing.assert_allclose(read_image(tmp_path / name, 3).transpose(1, 2, 0), colour, atol=2, err_msg=name)
    clear.save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 3)[:, 0, 0].tolist() == [255, 255, 255]
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(read_image(tmp_path / "deep.png", 1)).tolist() == [40000 // 257]
    assert read_image(tmp_path / "rgb.png", 3, (8, 8)).shape == (3, 8, 8)


def test_image_that_breaks_off_is_named_by_a_worker(tmp_path: Path) -> None:
    folder = make_pets(tmp_path / "pets", 6, (32, 32)) / "red box"
    half(folder / "0000.png")
    for path in folder.iterdir():
        path.with_suffix(".png").write_bytes((folder / "0000.png").read_bytes())
    data = opened(tmp_path / "pets", tmp_path / "data", memory_limit=1e-9, num_workers=1)
    with pytest.raises(UserError, match=r"\A[^\n]*red box/000\d\.png: not a readable image[^\n]*\Z"):
        list(data.train_dataloader())


def test_fast_copy_follows_names_sizes_and_times(tmp_path: Path) -> None:
    folder, data = make_pets(tmp_path / "pets", 6, (20, 20)), tmp_path / "data"
    before = opened(folder, data).digest
    (copy,) = (data / "copies").glob("*.pt")
    made = copy.stat().st_mtime_ns
    assert opened(folder, data).digest == before
    assert copy.stat().st_mtime_ns == made
    os.utime(folder / "red box" / "0000.png", ns=(1, 1))
    assert opened(folder, data).digest == before  # the same images in another copy
    assert copy.stat().st_mtime_ns > made
    (folder / "red box" / "0000.png").rename(folder / "red box" / "0006.png")
    assert opened(folder, data).digest != before


# ------------------------------------------------------------------------------------------ from end to end


def test_colour_from_training_to_prediction(cli: Run, tmp_path: Path) -> None:
    make_pets(tmp_path / "pets")
    cli(*FIT)
    saved = checkpoint(tmp_path / BEST)
    assert saved["class_names"] == list(CLASSES)
    assert saved["datamodule_hyper_parameters"]["image_size"] == [32, 32]
    events = EventAccumulator(str(tmp_path / RUN), size_guidance={"images": 0}).Reload()
    (tmp_path / "sheet.png").write_bytes(events.Images("train/samples")[-1].encoded_image_string)
    assert np.ptp(np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"), int), 2).max() > 30

    shutil.rmtree(tmp_path / "data")  # predicting needs nothing of the training data
    (tmp_path / "pets").rename(tmp_path / "new")
    # A file with a pattern's characters in its name, and one that is not UTF-8.
    for name in (b"[d].png", b"a\xff.png"):
        shutil.copy(tmp_path / "new/blue box/0000.png", os.path.join(os.fsencode(tmp_path / "new/blue box"), name))
    done = cli("predict", "--ckpt_path", BEST, "--data.images", "new")
    rows = predictions(tmp_path / "lightning_logs" / "version_1")
    assert {"new/blue box/[d].png", "new/blue box/a\\xff.png", "new/red box/0001.jpg"} <= {row["file"] for row in rows}
    assert list(rows[0]) == ["file", "class", "confidence", "warning", *(f"p_{name}" for name in CLASSES)]
    right = sum(Path(row["file"]).parent.name == row["class"] for row in rows)
    assert f"Right: {right} of 182, an accuracy of {right / 182:.4f}" in done.stdout
    assert right > 160
    sheet = Image.open(tmp_path / "lightning_logs" / "version_1" / "predictions.png")
    assert np.ptp(np.asarray(sheet, int), 2).max() > 60


PETS = ("--data.dataset=pets", "--data.image_size=32", "--data.batch_size=16")
AUGMENT, MIX = (("--config", OVERLAYS / name, "--data.dataset=digits.npz") for name in ("augment.yaml", "mixup.yaml"))
STEPS = ("--model.steps_per_execution=4", "--data.num_workers=1")
FILES = ("--data.memory_limit=1e-9", "--data.num_workers=0")
BY_WORKERS = ("--data.memory_limit=1e-9", "--data.num_workers=2")
RESUMES = {  # options of all runs, of the killed one, of the one that resumes it
    "files, resumed in memory": (PETS, FILES, ()),
    "files by workers, as in memory": (PETS, BY_WORKERS, BY_WORKERS),
    "augmented, in other executions": (AUGMENT, STEPS, STEPS),
    "mixed": (MIX, (), ()),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * bool(i)) for i, c in enumerate(RESUMES)])
def test_resumed_run_equals_the_whole_one(cli: Run, small: Path, tmp_path: Path, case: str) -> None:
    """Killed in an epoch; images are read in the same order and changed in the same way."""
    options, cut, resumed = RESUMES[case]
    make_pets(tmp_path / "pets", 40)
    (tmp_path / "digits.npz").symlink_to(small)
    fit = ("fit", "--config", CONFIGS / "fast.yaml", *options)
    fit += ("--trainer.max_epochs=2", "--trainer.log_every_n_steps=3", "--last_checkpoint.every_n_train_steps=1")
    cli(*fit, "--run_name=whole")
    kill = signal_at("SIGKILL", "on_train_batch_end", 8 if cut == STEPS else 5)
    assert cli(*fit, *cut, *kill, "--run_name=cut", ok=False).returncode == -9
    cli(*fit, *resumed, "--ckpt_path=lightning_logs/cut/checkpoints/last.ckpt")
    logs = tmp_path / "lightning_logs"
    same = assert_same_training if resumed else assert_same_run  # other loaders may keep other notes
    same(logs / "cut", logs / "whole")


@pytest.mark.slow
def test_normalization_is_part_of_prediction(cli: Run, small: Path, tmp_path: Path) -> None:
    config = ("--config", CONFIGS / "cnn.yaml", "--data.dataset", small, "--trainer.max_epochs=1")
    cli("fit", *config, "--data.mean=[0.2]", "--data.std=[0.3]")
    tables = []
    for options in ((), ("--data.mean=[0.2]", "--data.std=[0.3]"), ("--data.mean=[0.0]", "--data.std=[1.0]")):
        cli("predict", *config, *options, "--ckpt_path", BEST)
        tables.append((tmp_path / "lightning_logs" / f"version_{len(tables) + 1}" / "predictions.csv").read_text())
    assert tables[0] == tables[1] != tables[2]  # the checkpoint knows
