"""Photos of digits: what the light, the paper and the table do to a picture changes nothing about the digit."""

from __future__ import annotations

import io
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common import CONFIGS, Run
from PIL import Image, ImageDraw, ImageFilter

from mnist_lit import Classifier, FastCNN, MNISTDataModule
from mnist_lit.datasets.pictures import DigitForm, PictureError, find_pictures, read_picture
from mnist_lit.engine.errors import DatasetError
from mnist_lit.models import accurate_cnn

# ------------------------------------------------------------------------------------------------- drawn digits


def seven(size: int = 280) -> np.ndarray:
    """Ink float32 (size, size) in 0..1."""
    image = Image.new("L", (4 * size, 4 * size))
    points = [(x * 4 * size, y * 4 * size) for x, y in ((0.35, 0.3), (0.62, 0.28), (0.48, 0.72))]
    ImageDraw.Draw(image).line(points, 255, round(0.16 * size), joint="curve")
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def sheet(ink: np.ndarray) -> np.ndarray:
    return 0.9 - 0.7 * ink


def saved(grey: np.ndarray, path: Path, **settings) -> Path:
    Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8)).save(path, **settings)
    return path


def across(size: int = 280) -> np.ndarray:
    return np.broadcast_to(np.linspace(0, 1, size, dtype=np.float32), (size, size))


def dotted() -> np.ndarray:
    picture = sheet(seven())
    for row, column in ((12, 30), (250, 40), (30, 260), (200, 240)):
        picture[row : row + 5, column : column + 5] = 0.1
    return picture


def ruled(squared: bool = False) -> np.ndarray:
    picture = sheet(seven())
    for place in range(5, 280, 28):
        picture[place : place + 2] = np.minimum(picture[place : place + 2], 0.25)
        if squared:
            picture[:, place : place + 2] = np.minimum(picture[:, place : place + 2], 0.25)
    return picture


def framed(first: int, width: int) -> np.ndarray:
    picture = sheet(seven())
    inside = np.zeros((280, 280), bool)
    inside[first + width : 280 - first - width, first + width : 280 - first - width] = True
    inside[:first] = inside[280 - first :] = inside[:, :first] = inside[:, 280 - first :] = True
    return np.where(inside, picture, 0.1)


def on_table() -> np.ndarray:
    row, column = np.mgrid[:280, :280]
    return np.where((column < 20 + row / 10) | (row > 262 - column / 12), 0.15, sheet(seven()))


CHANGES: dict[str, Callable[[], np.ndarray]] = {
    "gradient": lambda: sheet(seven()) * (1 - 0.8 * across()),
    "gradient over a close-up": lambda: sheet(seven())[45:240, 60:210] * np.linspace(1, 0.2, 195)[:, None],
    "gradient on a board": lambda: (0.15 + 0.7 * seven()) * (1 - 0.7 * across().T),
    "negative": lambda: 1 - sheet(seven()) * (1 - 0.7 * across()),
    "soft shadow": lambda: sheet(seven()) * (1 - 0.5 * ((across() - 0.4) * 8).clip(0, 1)),
    "hard shadow": lambda: sheet(seven()) * np.where(across() + across().T > 0.9, 0.5, 1),
    "vignette": lambda: sheet(seven()) * (1 - 1.2 * ((across() - 0.5) ** 2 + (across().T - 0.5) ** 2)),
    "specks": dotted,
    "ruled": ruled,
    "squared": lambda: ruled(squared=True),
    "frame": lambda: framed(0, 18),
    "box": lambda: framed(30, 4),
    "table": on_table,
    "smudge": lambda: sheet(seven()) * np.where((across() < 0.35) & (across().T > 0.6), 0.88, 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_drawn_digit_comes_out_as_on_clean_paper(tmp_path: Path, change: str) -> None:
    clean, _ = read_picture(saved(sheet(seven()), tmp_path / "clean.png"))
    changed, warning = read_picture(saved(CHANGES[change](), tmp_path / "changed.jpg", quality=90))
    assert not warning
    # The centre of mass may round to the next pixel.
    shifted = [np.roll(changed, (down, right), (0, 1)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    off = min(np.abs(image - clean.astype(float)).mean() / clean.mean() for image in shifted)
    assert off < 0.45, f"{off:.2f} of the ink"


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("light", [False, True])
def test_two_digits_are_warned_of(tmp_path: Path, axis: int, light: bool) -> None:
    ink = np.concatenate([seven(), seven()], axis)
    image, warning = read_picture(saved(ink if light else sheet(ink), tmp_path / "two.png"))
    assert "more than one digit" in warning
    assert image.shape == (28, 28)


def test_texture_is_warned_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    patches = np.kron(rng.random((14, 14)) < 0.4, np.ones((20, 20)))
    try:
        _, warning = read_picture(saved(0.9 - 0.6 * patches, tmp_path / "texture.png"))
    except PictureError:
        return
    assert warning


def test_empty_photo_has_nothing_on_it(tmp_path: Path) -> None:
    paper = 0.8 + np.random.default_rng(1).normal(0, 0.01, (280, 280))
    with pytest.raises(PictureError, match="nothing is on it"):
        read_picture(saved(paper, tmp_path / "empty.jpg", quality=80))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_twelve_megapixels_take_bounded_time_and_memory(tmp_path: Path, suffix: str) -> None:
    small = Image.fromarray((sheet(seven()) * (1 - 0.6 * across()) * 255).astype(np.uint8)).convert("RGB")
    small.save(tmp_path / "small.png")
    small.resize((4000, 3000)).save(tmp_path / f"large.{suffix}")
    expected, _ = read_picture(tmp_path / "small.png")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    image, _ = read_picture(tmp_path / f"large.{suffix}")
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # kilobytes
    assert image.mean() == pytest.approx(expected.mean(), rel=0.5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 300), (64, 64)])
def test_any_size_is_a_digit_or_an_error_that_says_why(tmp_path: Path, shape: tuple[int, int]) -> None:
    pixels = np.ones(shape)
    pixels[: shape[0] // 2 + 1, shape[1] // 3 : shape[1] // 2] = 0
    try:
        image, _ = read_picture(saved(pixels, tmp_path / "picture.png"))
    except PictureError:
        return
    assert image.shape == (28, 28)


def test_digit_in_the_form_of_another_training_set(tmp_path: Path) -> None:
    path = saved(sheet(seven()), tmp_path / "seven.png")
    image, _ = read_picture(path, DigitForm(side=32, box=32, light_on_dark=False, centred_by="box"))
    assert image.shape == (32, 32)
    assert image.dtype == np.uint8
    rows, columns = (np.flatnonzero((image < 128).any(axis)) for axis in (1, 0))
    assert rows[0] <= 1
    assert rows[-1] >= 30
    assert abs(columns[0] - (31 - columns[-1])) <= 1
    assert np.median(image) == 255


# ------------------------------------------------------------------------------------------------- finding files


def test_folders_of_classes_hidden_and_other_files(tmp_path: Path) -> None:
    for name in (
        "0/a.png",
        "0/notes.txt",
        "1/b.TIFF",
        "1/deep/not_read.png",
        ".hidden/c.png",
        "1/._b.png",
        "2/x[1].gif",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    found, passed_over = find_pictures([str(tmp_path)])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["0/a.png", "1/b.TIFF", "2/x[1].gif"]
    assert passed_over == [tmp_path / "0/notes.txt"]
    assert find_pictures([str(tmp_path / "2/x[1].gif")]) == ([tmp_path / "2/x[1].gif"], [])
    assert find_pictures([f"{tmp_path}/[01]"])[0] == found[:2]
    assert find_pictures([f"{tmp_path}/1/*.TIFF"])[0] == [tmp_path / "1/b.TIFF"]
    with pytest.raises(DatasetError, match="no such image"):
        find_pictures([str(tmp_path / "nothing")])


# ------------------------------------------------------------------------------------------------- MNIST, by hundreds


def strokes(pixels: np.ndarray, length: float, pen: float) -> np.ndarray:
    """The digit's ink in its box, the longer side ``length``; the lower ``pen``, the thicker."""
    rows, columns = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    cut = np.pad(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    scale = length / max(cut.shape)
    size = max(2, round(cut.shape[1] * scale)), max(2, round(cut.shape[0] * scale))
    soft = np.asarray(Image.fromarray(cut).resize(size, Image.Resampling.BICUBIC), np.float32) / 255
    return ((soft - pen) * max(2, scale) + 0.5).clip(0, 1)


def drawn(height: int, width: int, draw: Callable[[ImageDraw.ImageDraw, float], None]) -> np.ndarray:
    image = Image.new("L", (3 * width, 3 * height))
    draw(ImageDraw.Draw(image), 3)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32) / 255


def slope(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """From 0 in one corner or at one side to 1 at the opposite one."""
    angle = rng.uniform(0, 2 * np.pi)
    row, column = np.mgrid[:height, :width]
    values = np.cos(angle) * column / width + np.sin(angle) * row / height
    return (values - values.min()) / (values.max() - values.min())


def lighting(kind: str, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    if kind in (low := {"mild": (0.7, 0.85), "medium": (0.4, 0.6), "strong": (0.15, 0.25)}):
        return 1 - (1 - rng.uniform(*low[kind])) * slope(rng, height, width)
    if kind in ("soft shadow", "hard shadow"):
        blur = rng.uniform(0.05, 0.2) if kind == "soft shadow" else 2.5 / max(height, width)
        steps = ((slope(rng, height, width) - rng.uniform(0.25, 0.75)) / blur + 0.5).clip(0, 1)
        return 1 - (1 - rng.uniform(0.45, 0.75)) * steps
    if kind == "vignette":
        row, column = np.mgrid[:height, :width]
        radius = ((column / width - 0.5) ** 2 + (row / height - 0.5) ** 2) * 2
        return 1 - rng.uniform(0.4, 0.8) * radius ** rng.uniform(0.8, 1.6)
    return np.ones((height, width))


def clutter(kind: str, rng: np.random.Generator, height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """What is on the paper beside the digit, in 0..1; ``box`` is the digit's left, top, right, bottom."""
    size = max(height, width)

    def specks(draw: ImageDraw.ImageDraw, scale: float) -> None:
        for _ in range(rng.integers(1, 9)):
            radius = rng.uniform(0.002, 0.008) * size * scale
            x, y = rng.uniform(0, width * scale), rng.uniform(0, height * scale)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), 255)

    def lines(draw: ImageDraw.ImageDraw, scale: float) -> None:
        tilt, gap = np.tan(np.deg2rad(rng.uniform(-4, 4))), rng.uniform(0.06, 0.2) * size
        thick = max(1, round(max(1, rng.uniform(0.002, 0.008) * size) * scale))
        for place in np.arange(-size, 2 * size, gap) * scale:
            draw.line((0, place, width * scale, place + tilt * width * scale), 255, thick)
            if kind == "squared":
                draw.line((place, 0, place - tilt * height * scale, height * scale), 255, thick)

    def frame(draw: ImageDraw.ImageDraw, scale: float) -> None:
        left, top, right, bottom = rng.uniform(0.01, 0.1, 4) * size * scale
        draw.rectangle((0, 0, width * scale, height * scale), 255)
        draw.rectangle((left, top, width * scale - right, height * scale - bottom), 0)

    def table(draw: ImageDraw.ImageDraw, scale: float) -> None:
        w, h = width * scale, height * scale
        for side in rng.permutation(4)[: rng.integers(1, 4)]:
            p, q = rng.uniform(0.03, 0.2, 2)
            across, down = ((0, p * h), (w, q * h)), ((p * w, 0), (q * w, h))
            near = [(0, 0), (w, 0), *reversed(across)] if side < 2 else [(0, 0), (0, h), *reversed(down)]
            flip = side % 2
            draw.polygon([(w - x if flip else x, h - y if flip else y) for x, y in near], 255)

    def around(draw: ImageDraw.ImageDraw, scale: float) -> None:
        tilt, thick = np.deg2rad(rng.uniform(-3, 3)), rng.uniform(0.005, 0.02) * size
        left, top, right, bottom = np.array(box) + rng.uniform(0.05, 0.1, 4) * size * [-1, -1, 1, 1]
        x, y = (left + right) / 2, (top + bottom) / 2
        corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top), (right, top)]
        turned = [
            (x + (a - x) * np.cos(tilt) - (b - y) * np.sin(tilt), y + (a - x) * np.sin(tilt) + (b - y) * np.cos(tilt))
            for a, b in corners
        ]
        draw.line([(a * scale, b * scale) for a, b in turned], 255, max(2, round(thick * scale)), joint="curve")

    kinds = {"specks": specks, "ruled": lines, "squared": lines, "frame": frame, "table": table, "box": around}
    return drawn(height, width, kinds[kind]) if kind in kinds else np.zeros((height, width))


ROOM = {"frame": 0.13, "table": 0.22, "box": 0.14}  # of the picture at each side, for what is there


def photo(digits: list[np.ndarray], kind: str, rng: np.random.Generator) -> io.BytesIO:
    """A file with one digit, or with two beside or above each other."""
    size, aspect = np.exp(rng.uniform(np.log(100), np.log(800))), rng.uniform(0.75, 1.33)
    height, width = round(size * min(1, 1 / aspect)), round(size * min(1, aspect))
    pen, share = rng.uniform(0.3, 0.5), rng.uniform(0.2, 0.8)
    room = ROOM.get(kind, 0.04)
    if len(digits) == 1:
        ink = strokes(digits[0], min(share, 1 - 2 * room) * min(height, width), pen)
    else:
        lengths = rng.uniform(0.2, 0.38) * min(height, width) * rng.permutation([1, rng.uniform(0.55, 1)])
        one, other = (strokes(pixels, length, pen) for pixels, length in zip(digits, lengths, strict=True))
        axis, gap = int(rng.integers(2)), max(3, round(rng.uniform(0.12, 0.6) * max(lengths)))
        shape = np.maximum(one.shape, other.shape)
        shape[axis] = one.shape[axis] + other.shape[axis] + gap
        ink = np.zeros(shape, np.float32)
        ink[: one.shape[0], : one.shape[1]] = one
        ink[-other.shape[0] :, -other.shape[1] :] = other
    top, left = (
        round(rng.uniform(room * whole, max(room * whole, (1 - room) * whole - part)))
        for whole, part in zip((height, width), ink.shape, strict=True)
    )
    placed = np.zeros((height, width), np.float32)
    placed[top : top + ink.shape[0], left : left + ink.shape[1]] = ink[: height - top, : width - left]

    paper, dark = rng.uniform(0.65, 1), rng.uniform(0.05, 0.3)
    look = rng.choice(["paper", "paper", "negative", "board"])
    if look == "board":
        paper, dark = rng.uniform(0.1, 0.25), rng.uniform(0.7, 1)
    other = clutter(kind, rng, height, width, (left, top, left + ink.shape[1], top + ink.shape[0]))
    tone = paper + (dark - paper) * (rng.uniform(0.15, 1) if kind in ("ruled", "squared") else rng.uniform(0.7, 1))
    picture = paper * (1 - other) + tone * other
    if kind == "smudges":
        for _ in range(rng.integers(1, 4)):
            row, column = np.mgrid[:height, :width]
            y, x, high, wide = rng.uniform(0, height), rng.uniform(0, width), *(rng.uniform(0.03, 0.2, 2) * size)
            blot = np.exp(-(((row - y) / high) ** 2) - ((column - x) / wide) ** 2)
            picture = picture + (dark - paper) * rng.uniform(0.05, 0.25) * blot
    picture = (picture * (1 - placed) + dark * placed) * lighting(kind, rng, height, width)
    if look == "negative":
        picture = 1 - picture
    picture = picture + rng.normal(0, rng.uniform(0, 0.02), picture.shape)
    image = Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.004) * size)))
    file = io.BytesIO()
    if rng.random() < 0.75:
        image.save(file, "JPEG", quality=int(rng.integers(40, 96)))
    else:
        image.save(file, "PNG")
    return file


# Of 200. The network of fast.yaml itself is wrong about two of MNIST's own images; the mean of five such sets is 196 or
# more everywhere but in hard shadows and on squared paper, and a single set has up to five fewer or four more.
ALMOST_ALL, MOST = 191, 180
BARS = {
    **dict.fromkeys(("even", "mild", "medium", "strong", "soft shadow", "hard shadow", "vignette"), ALMOST_ALL),
    **dict.fromkeys(("specks", "ruled", "squared"), ALMOST_ALL),
    **dict.fromkeys(("frame", "table", "box", "smudges"), MOST),
}

IN_CI = "strong", "soft shadow", "specks", "ruled", "table", "box"

Model = tuple[Classifier, np.ndarray, np.ndarray]


@pytest.fixture(scope="module", params=["fast", pytest.param("accurate", marks=pytest.mark.matrix)])
def trained(
    cli_in: Run, mnist_dir: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Model:
    """The network of a config, and MNIST's test images uint8 (n, 28, 28) with their labels (n,)."""
    folder, config = tmp_path_factory.mktemp("trained"), CONFIGS / f"{request.param}.yaml"
    cli_in(folder, "fit", "--config", config, "--data.data_dir", mnist_dir, "--data.dataset=mnist")
    path = folder / "lightning_logs" / "version_0" / "checkpoints" / "best.ckpt"
    kind, options = (FastCNN, {}) if request.param == "fast" else (Classifier, {"net": accurate_cnn()})
    data = MNISTDataModule("mnist", data_dir=str(mnist_dir))
    data.prepare_data()
    images, labels = data.source.datasets["test"].tensors
    model = kind.load_from_checkpoint(path, map_location="cpu", weights_only=True, **options)
    return model.eval(), images[:, 0].numpy(), labels.numpy()


@pytest.mark.slow
@pytest.mark.mnist
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in IN_CI else pytest.mark.matrix) for k in BARS])
def test_two_hundred_photos(trained: Model, kind: str, record_property) -> None:
    model, images, labels = trained
    rng = np.random.default_rng([5, list(BARS).index(kind)])
    chosen = rng.integers(0, len(images), 200)
    pictures, warned = [], 0
    for index in chosen:
        try:
            picture, warning = read_picture(photo([images[index]], kind, rng))
        except PictureError:
            picture, warning = np.zeros((28, 28), np.uint8), ""
        pictures.append(torch.from_numpy(picture))
        warned += bool(warning)
    with torch.no_grad():
        predicted = model(torch.stack(pictures)[:, None] / 256).argmax(1).numpy()
    right = int((predicted == labels[chosen]).sum())
    record_property("right", f"{kind}: {right} of 200, {warned} warned of")
    print(f"{kind}: {right} of 200, {warned} warned of")
    assert right >= BARS[kind]
    assert warned <= 5


@pytest.mark.slow
@pytest.mark.mnist
def test_hundred_photos_of_two_digits(trained: Model) -> None:
    _, images, _ = trained
    rng = np.random.default_rng(6)
    warned = 0
    for pair in rng.integers(0, len(images), (100, 2)):
        try:
            warned += bool(read_picture(photo(list(images[pair]), "even", rng))[1])
        except PictureError:
            continue
    print(f"two digits: {warned} of 100 warned of")
    assert warned >= 95
