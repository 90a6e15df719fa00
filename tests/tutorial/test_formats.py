"""Arrays as people have them: decoded, trained on, tested, predicted and resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import BEST, CONFIGS, OVERLAYS, Run, checkpoint, predictions
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import Subset, TensorDataset, random_split

from mnist_lit import Classifier
from mnist_lit.engine import ImageDataModule, UserError, eval_dataloader, train_dataloader
from mnist_lit.transforms import MixUp

FIT = ("fit", "--config", CONFIGS / "cnn.yaml", "--trainer.max_steps=10", "--dashboard.every_n_epochs=0")
CLASSES = np.arange(400) % 4
RANDOM = np.random.default_rng(0)
BYTES = RANDOM.integers(0, 256, (400, 12, 12)).astype(np.uint8)
BYTES[np.arange(400), :, CLASSES * 3] = 255  # a bright column tells the class
WAVES = RANDOM.normal(size=(400, 2, 10, 16)).astype(np.float32)
LABELS = (RANDOM.random((400, 5)) < 0.3).astype(np.float32)
UNIT = BYTES.astype(np.float32) / 255

IMAGES = {  # what is given, and what becomes of it
    "bytes": (BYTES, BYTES[:, None]),
    "bytes as int64": (BYTES.astype(np.int64), BYTES[:, None]),
    "float32 0..255": (BYTES.astype(np.float32), BYTES[:, None]),
    "bool": (BYTES > 99, (BYTES > 99)[:, None].astype(np.uint8) * 255),
    "0 and 1": ((BYTES > 99).astype(float), (BYTES > 99)[:, None].astype(np.float32)),
    "rows of 0..1": (UNIT.reshape(400, -1), UNIT[:, None]),
    "float64 -1..1": (np.sin(BYTES.astype(float)), np.sin(BYTES.astype(float)).astype(np.float32)[:, None]),
    "float16": ((UNIT / 3).astype(np.float16), (UNIT / 3).astype(np.float16)[:, None]),
    "uint16": (BYTES.astype(np.uint16) * 257, (BYTES.astype(np.float32) * 257)[:, None]),
    "spectrograms": (WAVES, WAVES),
    "channels last": (np.moveaxis(WAVES, 1, 3), WAVES),
    "RGB": (np.stack([BYTES] * 3, -1), np.stack([BYTES] * 3, 1)),
}


class Given(ImageDataModule):
    """Arrays in memory, as a subclass reads them."""

    def __init__(self, pairs: dict, folder: Path, **options: Any) -> None:
        super().__init__("given", data_dir=str(folder), **options)
        self.pairs = pairs

    def find(self) -> tuple[str, str]:
        return "given", "version 1"

    def read(self, path: object) -> dict:
        return self.pairs


def opened(folder: Path, x: np.ndarray, y: np.ndarray, **options: Any) -> ImageDataModule:
    data = Given({"train": (x, y), "valid": (x[:9], y[:9])}, folder, **options)
    data.prepare_data()
    return data


@pytest.mark.parametrize("case", IMAGES)
def test_images_keep_what_they_are(tmp_path: Path, case: str) -> None:
    given, expected = IMAGES[case]
    images, _ = opened(tmp_path, given, CLASSES).source.splits["train"]
    assert images.numpy().dtype == expected.dtype
    np.testing.assert_array_equal(images.numpy(), expected)


NAMES = np.array(["ash", "beech", "cedar", "date"])
MASKS = RANDOM.integers(0, 2, (400, 12, 12)) * 255
TARGETS = {  # what is given, what becomes of it, task and names
    "classes": (CLASSES, CLASSES, "multiclass", None),
    "column": (CLASSES[:, None], CLASSES, "multiclass", None),
    "gaps": (CLASSES * 100, CLASSES, "multiclass", ["0", "100", "200", "300"]),
    "from 1": (CLASSES + 1, CLASSES, "multiclass", ["1", "2", "3", "4"]),
    "names": (NAMES[CLASSES], CLASSES, "multiclass", NAMES.tolist()),
    "bytes": (np.array([b"a", b"b", b"c", b"d"])[CLASSES], CLASSES, "multiclass", list("abcd")),
    "bool": (CLASSES > 1, (CLASSES > 1).astype(int), "multiclass", ["False", "True"]),
    "one-hot": (np.eye(4)[CLASSES], CLASSES, "multiclass", list("0123")),
    "masks": (MASKS, MASKS // 255, "multiclass", ["0", "255"]),
    "labels": (LABELS, LABELS, "multilabel", None),
    "values": (CLASSES + 0.5, (CLASSES + 0.5).astype(np.float32), "regression", None),
    "several values": (WAVES[:, :, 0, 0], WAVES[:, :, 0, 0], "regression", None),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_tell_the_task(tmp_path: Path, case: str) -> None:
    given, expected, task, names = TARGETS[case]
    data = opened(tmp_path, BYTES, given)
    np.testing.assert_array_equal(data.source.splits["train"][1].numpy(), expected)
    assert (data.task, data.class_names) == (task, names)


WRONG = {
    "too few targets": ((BYTES, CLASSES[:99]), "as many targets as images expected in the train split, found 99"),
    "texts as images": ((np.array([["a"]] * 400), CLASSES), "of numbers expected"),
    "NaN": ((BYTES * np.float32("nan"), CLASSES), "finite pixels expected"),
    "one class": ((BYTES, CLASSES * 0), "has one class, expected two"),
    "tables as targets": ((BYTES, np.stack([CLASSES] * 3, 1)), r"targets \(n,\), .*found int64 \(409, 3\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_named(tmp_path: Path, case: str) -> None:
    with pytest.raises(UserError, match=WRONG[case][1]):
        opened(tmp_path, *WRONG[case][0])


def test_validation_images_are_held_out_of_each_class(tmp_path: Path) -> None:
    data = Given({"train": (BYTES, np.sort(CLASSES))}, tmp_path)
    data.prepare_data()
    assert torch.bincount(data.source.splits["valid"][1], minlength=4).clamp(16, 17).sum() == 67
    with pytest.raises(UserError, match="no test split"):
        data.test_dataloader()


def write(path: Path, x: np.ndarray, y: np.ndarray, **others: np.ndarray) -> Path:
    np.savez(path, x_train=x, y_train=y, x_valid=x[:80], y_valid=y[:80], x_test=x[80:120], y_test=y[80:120], **others)
    return path


NET = "--model=Classifier", "--model.net=torch.nn.Conv2d"
PIXELS = *NET, *(f"--model.net.{option}" for option in ("in_channels=1", "out_channels=2", "kernel_size=1"))
TRAINED = {  # images, targets, metric, what predictions.csv has of each sample, and options
    "spectrograms": (WAVES, CLASSES, "test/acc", [f"p_{number}" for number in range(4)], ()),
    "names": (BYTES, NAMES[CLASSES], "test/acc", [f"p_{name}" for name in NAMES], ()),
    "labels": (BYTES, LABELS, "test/acc", [f"prediction_{number}" for number in range(5)], ()),
    "several values": (BYTES, WAVES[:, :, 0, 0], "test/mse", ["prediction_0", "prediction_1"], ()),
    "masks": (BYTES, MASKS, "test/acc", None, PIXELS),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c != "names")) for c in TRAINED])
def test_arrays_from_training_to_prediction(cli: Run, tmp_path: Path, case: str) -> None:
    x, y, metric, columns, options = TRAINED[case]
    write(tmp_path / "own.npz", x, y)
    done = cli(*FIT, "--data.dataset=own.npz", "--model.lr=0.001", "--test_after_fit=true", *options)
    assert ("float images from" in done.stdout + done.stderr) == (case == "spectrograms")
    assert metric in done.stdout
    write(tmp_path / "few.npz", x[::2], y[::2])  # which lacks two of the classes
    cli("predict", "--ckpt_path", BEST, "--data.dataset=few.npz")
    run = tmp_path / "lightning_logs" / "version_1"
    if columns:
        assert list(predictions(run)[0])[-len(columns) :] == columns
    else:
        assert torch.load(run / "predictions.pt", weights_only=True)[0].shape == (40, 2, 12, 12)


def test_classes_are_numbered_as_the_model_does(tmp_path: Path) -> None:
    write(tmp_path / "own.npz", BYTES[::2], NAMES[CLASSES[::2]])  # ash and cedar
    write(tmp_path / "elm.npz", BYTES, np.array(["ash", "beech", "elm", "date"])[CLASSES])
    model = {"data_dir": str(tmp_path / "data"), "class_names": NAMES.tolist()}
    data = ImageDataModule(str(tmp_path / "own.npz"), **model)
    data.prepare_data()
    assert data.source.splits["train"][1].unique().tolist() == [0, 2]
    with pytest.raises(UserError, match="has the class elm, which is not one of ash"):
        ImageDataModule(str(tmp_path / "elm.npz"), **model).prepare_data()


# ------------------------------------------------------------------------------------------- weights and metrics


def test_weights_of_classes_and_metrics_of_any_number(cli: Run, tmp_path: Path) -> None:
    keep = (CLASSES != 3) | (np.arange(400) % 8 == 3)  # the last class is rare
    write(tmp_path / "own.npz", BYTES[keep], CLASSES[keep])
    fit = (*FIT, "--data.dataset=own.npz", "--config", OVERLAYS / "per_class.yaml", "--trainer.max_steps=6")
    assert "val/recall/3" in cli(*fit, "--model.balanced=true").stdout
    cli("test", "--ckpt_path", BEST)
    cli(*fit, "--model.loss=torch.nn.CrossEntropyLoss", "--model.loss.weight=[1,2,1,1]", "--run_name=given")
    given = Path("lightning_logs/given/checkpoints/best.ckpt")
    for path, weight in ((BEST, [350 / 4 / 100] * 3 + [350 / 4 / 50]), (given, [1, 2, 1, 1])):
        assert checkpoint(tmp_path / path)["state_dict"]["loss.weight"].tolist() == weight


def test_mixed_targets_are_counted_by_their_larger_share(tmp_path: Path) -> None:
    """Each class is a channel: a network that takes the means of the channels gets every share right."""
    channels = np.eye(4, dtype=np.uint8)[CLASSES, :, None, None].repeat(8, 2).repeat(8, 3) * 255
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4, bias=False))
    nn.init.eye_(net[2].weight)
    options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, "log_every_n_steps": 1}
    trainer = Trainer(max_epochs=1, **options)
    trainer.fit(Classifier(net, lr=0, num_classes=4), datamodule=opened(tmp_path, channels, CLASSES, mix=MixUp()))
    assert trainer.callback_metrics["train/acc"] == trainer.callback_metrics["val/acc"] == 1


# ------------------------------------------------------------------------------------------- subsets and folds


@pytest.mark.parametrize("make", [train_dataloader, eval_dataloader])
def test_datasets_and_subsets_are_batched(make) -> None:
    whole = TensorDataset(torch.arange(50.0)[:, None], torch.arange(50))
    few, many = random_split(whole, [20, 30])
    for part in (whole, few, many, Subset(many, range(7))):
        seen = [(x[:, 0].long(), y) for x, y in make(part, 8, **({"seed": 0} if make is train_dataloader else {}))]
        assert all(torch.equal(x, y) for x, y in seen)
        assert sorted(torch.cat([y for _, y in seen]).tolist()) == sorted(int(y) for _, y in part)


def test_folds_share_every_image_evenly(tmp_path: Path) -> None:
    path = str(write(tmp_path / "own.npz", BYTES, CLASSES))
    seen, digests = [], set()
    for fold in range(5):
        data = ImageDataModule(path, data_dir=str(tmp_path / "data"), folds=5, fold=fold)
        data.prepare_data()
        train, valid, test = (data.source.splits[split] for split in ("train", "valid", "test"))
        assert torch.bincount(valid[1]).tolist() == [24] * 4  # of 480
        assert len(train[1]) == 384
        assert len(test[1]) == 40
        seen += [image.numpy().tobytes() for image in valid[0]]
        digests.add(data.digest)
    assert sorted(seen) == sorted(image.tobytes() for image in np.concatenate([BYTES, BYTES[:80]]))
    assert len(digests) == 5


def test_all_folds_at_once_print_their_mean(cli: Run, tmp_path: Path) -> None:
    write(tmp_path / "own.npz", BYTES, CLASSES)
    done = cli("folds", *FIT[1:], "--data.dataset=own.npz", "--data.folds=3", "--trainer.max_epochs=1")
    (row,) = (line for line in done.stdout.splitlines() if "val/acc" in line and line.count("│") == 7)
    *folds, mean, deviation = (float(cell) for cell in row.split("│")[2:-1])
    assert mean == pytest.approx(np.mean(folds), abs=1e-4)
    assert deviation == pytest.approx(np.std(folds, ddof=1), abs=1e-4)
    digests = {checkpoint(path)["MNISTDataModule"]["digest"] for path in tmp_path.rglob("last.ckpt")}
    assert len(digests) == 3
