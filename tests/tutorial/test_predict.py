"""Image files of digits: brought into the form of the training data, predicted, written down; broken ones are named."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from common import CONFIGS, Run, predictions
from PIL import Image
from torch import Tensor

from mnist_lit.datasets.pictures import find_digit_size, fit_pictures
from mnist_lit.engine import UserError
from mnist_lit.engine.images import find_images, read_picture

FIT = ("fit", "--config", CONFIGS / "fast.yaml")
PREDICT = ("predict", "--ckpt_path", "lightning_logs/version_0/checkpoints/best.ckpt", "--data.images")


def read_digit(path: Path) -> tuple[np.ndarray, str]:
    return read_picture(path, 1, None, fit_pictures({}))


def on_paper(pixels: np.ndarray) -> Image.Image:
    """Eight times as large, somewhere on a sheet of 400 x 300."""
    sheet = Image.new("L", (400, 300), 0)
    sheet.paste(Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC), (130, 50))
    return sheet


VARIANTS: dict[str, tuple[Callable[[np.ndarray], Image.Image], str]] = {
    "as it is": (Image.fromarray, "png"),
    "inverted": (lambda pixels: Image.fromarray(255 - pixels), "png"),
    "16 bits": (lambda pixels: Image.fromarray(pixels.astype(np.uint16) * 257), "png"),
    "shifted": (lambda pixels: Image.fromarray(np.pad(pixels, ((9, 1), (0, 12)))), "png"),
    "rgb": (lambda pixels: Image.fromarray(pixels).convert("RGB"), "bmp"),
    "on paper": (on_paper, "webp"),
    "jpeg": (lambda pixels: Image.fromarray(255 - np.asarray(on_paper(pixels))), "jpg"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_format_mode_and_polarity_make_no_difference(digits: np.ndarray, tmp_path: Path, name: str) -> None:
    make, suffix = VARIANTS[name]
    for number, pixels in enumerate(digits[:10]):
        Image.fromarray(pixels).save(tmp_path / "digit.png")
        make(pixels).save(tmp_path / f"{number}.{suffix}", quality=50)
        expected, _ = read_digit(tmp_path / "digit.png")
        found, warning = read_digit(tmp_path / f"{number}.{suffix}")
        assert not warning
        if make(pixels).size == (28, 28):
            assert np.abs(found.astype(int) - expected).max() <= 1
        else:
            assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9


def test_digit_fills_the_box_of_its_form(tmp_path: Path) -> None:
    pixels = np.zeros((300, 500), np.uint8)
    pixels[20:220, 400:440] = 255  # a one, 200 x 40, in a corner
    Image.fromarray(pixels).save(tmp_path / "one.png")
    image = read_digit(tmp_path / "one.png")[0][0] / 255
    assert (image.any(1).sum(), image.any(0).sum()) == (20, 4)
    centre = [(image.sum(axis) * (np.arange(28) + 0.5)).sum() / image.sum() for axis in (1, 0)]
    assert centre == pytest.approx([14, 14], abs=0.5)


# ------------------------------------------------------------------------------------------------- the form


NOISE = torch.randint(256, (1000, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
FORMS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "digits": (lambda images: images, True),
    "floats": (lambda images: images / 127.5 - 1, True),
    "dark on light": (lambda images: 255 - images, False),
    "more margin": (lambda images: F.pad(images, (6, 6, 6, 6)), False),
    "noise": (lambda images: NOISE, False),
    "blank": (torch.zeros_like, False),
    "colour": (lambda images: images.repeat(1, 3, 1, 1), False),
    "on noise": (lambda images: images // 2 + NOISE // 2, False),
    "anywhere": (lambda images: torch.stack([image.roll(by % 28, 2) for by, image in enumerate(images)]), False),
}


@pytest.mark.parametrize("name", FORMS)
def test_single_digits_are_known_from_other_images(digits: np.ndarray, name: str) -> None:
    change, expected = FORMS[name]
    assert bool(find_digit_size(change(torch.from_numpy(digits[:, None])))) == expected


# ------------------------------------------------------------------------------------------------- the command


def test_good_files_are_predicted_and_broken_ones_are_named(cli: Run, small: Path, tmp_path: Path) -> None:
    cli(*FIT, "--trainer.max_epochs=1", "--data.dataset", small)
    folder = tmp_path / "mixed"
    folder.mkdir()
    with np.load(small) as arrays:
        for index, pixels in enumerate(arrays["x_train"][:210]):
            Image.fromarray(pixels).save(folder / f"{index:04}.png")
    whole = (folder / "0000.png").read_bytes()
    for index, broken in enumerate((b"", whole[: len(whole) // 2], b"no image", whole[:40] + b"\0" * 50)):
        (folder / f"broken{index}.png").write_bytes(broken)
    done = cli(*PREDICT, folder, ok=False)
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("mnist_lit: error: 4 of 214 files could not be predicted")
    assert all(f"broken{index}.png: " in done.stderr for index in range(4))
    assert "Traceback" not in done.stderr
    assert "accuracy" not in done.stdout  # the folder is not named like a class
    rows = predictions(tmp_path / "lightning_logs" / "version_1")
    assert len(rows) == 210
    assert all(sum(float(row[f"p_{digit}"]) for digit in range(10)) == pytest.approx(1, abs=1e-4) for row in rows)
    with Image.open(tmp_path / "lightning_logs" / "version_1" / "predictions.png") as sheet:
        assert sheet.size == (840, 2000)


def test_folders_of_classes_hidden_and_other_files(tmp_path: Path) -> None:
    for name in ("0/a.png", "0/notes.txt", "1/b.TIFF", "1/deep/c.png", ".hidden/c.png", "1/._b.png", "2/x[1].gif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    found = find_images([str(tmp_path)])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["0/a.png", "1/b.TIFF", "1/deep/c.png", "2/x[1].gif"]
    for pattern, expected in {"2/x[1].gif": found[3:], "[01]": found[:3], "1/*.TIFF": found[1:2]}.items():
        assert find_images([f"{tmp_path}/{pattern}"]) == expected
    with pytest.raises(UserError, match="no such image"):
        find_images([f"{tmp_path}/nothing/*.png"])
