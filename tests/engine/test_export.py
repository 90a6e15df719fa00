"""One file out of a checkpoint, and what it predicts where mnist_lit is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from common import CONFIGS, ROOT, Run
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mnist_lit import CNN, FastCNN, Logistic
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.export import Trainer

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
onnx = pytest.importorskip("onnx", reason="needs the extra [export]")

BEST = Path("lightning_logs/version_0/checkpoints/best.ckpt")


def exported(path: Path) -> tuple[Callable[..., Tensor], dict]:
    """What the file predicts, read with nothing but onnxruntime or torch, and its metadata."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        found = session.get_modelmeta().custom_metadata_map
        metadata = {key: json.loads(value) if value[0] in "{[0123456789" else value for key, value in found.items()}
        names = [each.name for each in session.get_inputs()]

        def predict(*inputs: Tensor) -> Tensor:
            given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
            return torch.from_numpy(session.run(None, given)[0])

        return predict, metadata
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["metadata.json"])


# ------------------------------------------------------------------------------------------ any module, any batch


class Plain(LightningModule):
    """Batches (x, y), and no predict_step; preprocessing of its own."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Linear(4, 2)

    def test_dataloader(self) -> DataLoader:
        return DataLoader([(torch.arange(4.0) + i, i % 2) for i in range(7)], batch_size=4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] / 10, *batch[1:]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Tokens(LightningModule):
    """Batches of dicts, of which the mask counts and the labels do not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def test_dataloader(self) -> DataLoader:
        rows = [{"ids": torch.arange(5) + i % 4, "mask": torch.arange(5) <= i, "labels": i % 2} for i in range(7)]
        return DataLoader(rows, batch_size=4)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        mask = batch["mask"][..., None].float()  # (B, T, 1)
        return {"preds": self.head((self.embed(batch["ids"]) * mask).sum(1)).softmax(1)}


class Untraceable(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def saved(model: LightningModule, folder: Path) -> Path:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "any.ckpt")
    return folder / "any.ckpt"


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("kind", [Plain, Tokens])
def test_file_takes_the_tensors_that_count(tmp_path: Path, kind: type, suffix: str) -> None:
    model = kind()
    path = saved(model, tmp_path)
    Trainer(accelerator="cpu", logger=False).export(model, ckpt_path=str(path), format=suffix)
    predict, metadata = exported(path.with_suffix(f".{suffix}"))
    (first, *_) = model.test_dataloader()
    if kind is Plain:
        inputs, expected = [first[0]], model(first[0] / 10)
    else:
        inputs, expected = [first["ids"], first["mask"]], model.predict_step(first, 0)["preds"]
        assert metadata["classes"] == [0, 1]
    torch.testing.assert_close(predict(*inputs), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_one_message_and_leaves_no_file(tmp_path: Path) -> None:
    model = Plain(Untraceable(4, 4))
    path = saved(model, tmp_path)
    with pytest.raises(UserError, match=r"torch\.export cannot follow Untraceable: "):
        Trainer(accelerator="cpu", logger=False).export(model, ckpt_path=str(path))
    assert [path.name for path in tmp_path.iterdir()] == ["any.ckpt"]


# ------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def fitted(cli_in: Run, small: Path, tmp_path_factory: pytest.TempPathFactory):
    """Makes the run of a config and an exported file, once: the folder, the file, and what export printed."""
    made = {}

    def make(config: str, suffix: str) -> tuple[Path, Path, str]:
        if config not in made:
            made[config] = folder = tmp_path_factory.mktemp(config)
            settings = ("--config", CONFIGS / f"{config}.yaml", "--data.dataset", small, "--trainer.max_epochs=1")
            cli_in(folder, "fit", *settings)
        folder = made[config]
        done = cli_in(folder, "export", "--ckpt_path", BEST, "--format", suffix)  # with the config.yaml of the run
        return folder, (folder / BEST).with_suffix(f".{suffix}"), done.stdout

    return make


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize(("config", "kind"), [("cnn", CNN), ("fast", FastCNN), ("logistic", Logistic)])
def test_file_agrees_with_the_checkpoint(
    cli_in: Run, fitted, small: Path, config: str, kind: type[LightningModule], suffix: str
) -> None:
    folder, path, printed = fitted(config, suffix)
    assert f"Wrote {BEST.with_suffix(f'.{suffix}')}, which takes batches of images (1, 28, 28); " in printed
    assert not list(path.parent.glob(".part*"))

    predict, metadata = exported(path)
    model = kind.load_from_checkpoint(folder / BEST, weights_only=True).eval()
    with np.load(small) as arrays:
        images, labels = torch.from_numpy(arrays["x_test"])[:, None], torch.from_numpy(arrays["y_test"])
    for batch in (images, images[:1], images.repeat(4, 1, 1, 1)[:1000]):
        with torch.no_grad():
            expected = model(batch / 256).softmax(1)  # (B, 10)
        torch.testing.assert_close(predict(batch), expected, rtol=0, atol=1e-5)

    assert metadata["classes"] == list(range(10))
    assert metadata["dataset"] == str(small)
    assert metadata["global_step"] == (4 if config == "fast" else 16)
    assert metadata["versions"]["torch"] == torch.__version__
    right = (predict(images).argmax(1) == labels).float().mean().item()
    assert metadata["metrics"]["test/acc"] == pytest.approx(right, abs=1e-6)
    tested = cli_in(folder, "test", "--ckpt_path", BEST)
    loss = re.search(r"test/loss\W+([\d.]+)", tested.stdout)
    assert loss is not None
    assert metadata["metrics"]["test/loss"] == pytest.approx(float(loss[1]), abs=1e-5)
    if suffix == "onnx":
        onnx.checker.check_model(path, full_check=True)


@pytest.mark.slow
def test_example_in_the_readme_needs_onnxruntime_alone(fitted, small: Path) -> None:
    folder, _, _ = fitted("fast", "onnx")
    example = re.search(r"```python\n(.*?onnxruntime.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    with np.load(small) as arrays:
        pixels = arrays["x_test"][0]
    Image.fromarray(pixels).save(folder / "seven.png")
    model = FastCNN.load_from_checkpoint(folder / BEST, weights_only=True).eval()
    expected = model(torch.from_numpy(pixels)[None, None] / 256).argmax().item()
    example_run = example[1] + "import sys\nassert not {'torch', 'mnist_lit', 'onnx'} & sys.modules.keys()\n"
    done = subprocess.run([sys.executable, "-c", example_run], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"
