"""One file out of a checkpoint, and what it predicts where mnist_lit is not."""

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
from common import BEST, CONFIGS, ROOT, Run
from lightning.pytorch import LightningModule
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mnist_lit import FastCNN
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.export import Trainer

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")


def exported(path: Path) -> tuple[Callable[..., Tensor], dict]:
    """What the file predicts, read with nothing but onnxruntime or torch, and its metadata."""
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        program = torch.export.load(path, extra_files=extra)
        return program.module(), json.loads(extra["metadata.json"])
    session = onnxruntime.InferenceSession(path)
    found = session.get_modelmeta().custom_metadata_map
    names = [each.name for each in session.get_inputs()]

    def predict(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, dict(zip(names, map(Tensor.numpy, inputs), strict=True)))[0])

    return predict, {key: json.loads(value) if value[0] in "{[0123456789" else value for key, value in found.items()}


# ------------------------------------------------------------------------------------------ batches of any kind


class Tokens(LightningModule):
    """Batches of dicts, of which the mask counts and the labels do not; ``test_modules.py`` has plainer modules."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), head or nn.Linear(4, 2)

    def test_dataloader(self) -> DataLoader:
        rows = [{"ids": torch.arange(5) + i % 4, "mask": torch.arange(5) <= i, "labels": i % 2} for i in range(7)]
        return DataLoader(rows, batch_size=4)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        mask = batch["mask"][..., None].float()  # (B, T, 1)
        return {"preds": self.head((self.embed(batch["ids"]) * mask).sum(1)).softmax(1)}


class Untraceable(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def export(model: LightningModule, folder: Path, format: str) -> Path:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_model_summary=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(folder / "any.ckpt")
    trainer.export(model, ckpt_path=str(folder / "any.ckpt"), format=format)
    return folder / f"any.{format}"


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_file_takes_the_tensors_that_count(tmp_path: Path, format: str) -> None:
    predict, metadata = exported(export(model := Tokens(), tmp_path, format))
    (first, *_) = model.test_dataloader()
    found, expected = predict(first["ids"], first["mask"]), model.predict_step(first, 0)["preds"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert metadata["classes"] == [0, 1]


def test_what_cannot_be_exported_is_one_message_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torch\.export cannot follow Tokens: "):
        export(Tokens(Untraceable(4, 4)), tmp_path, "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["any.ckpt"]


# ------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_file_agrees_with_the_checkpoint(cli: Run, small: Path, tmp_path: Path) -> None:
    """Every other config of a model is exported in ``tests/project``."""
    names = "zero one two three four five six seven eight nine".split()
    classes = f"--data.class_names=[{', '.join(names)}]"
    cli("fit", "--config", CONFIGS / "fast.yaml", "--data.dataset", small, classes, "--trainer.max_epochs=1")
    model = FastCNN.load_from_checkpoint(tmp_path / BEST, weights_only=True).eval()
    with np.load(small) as arrays:
        images = torch.from_numpy(arrays["x_test"])[:, None]
    for format in ("onnx", "pt2"):
        path = BEST.with_suffix(f".{format}")
        printed = cli("export", "--ckpt_path", BEST, "--format", format).stdout  # with the config.yaml of the run
        assert f"Wrote {path}, which takes batches of images (1, 28, 28); " in printed
        predict, metadata = exported(tmp_path / path)
        for batch in (images, images[:1], images.repeat(4, 1, 1, 1)[:1000]):
            with torch.no_grad():
                expected = model(batch / 256).softmax(1)  # (B, 10)
            torch.testing.assert_close(predict(batch), expected, rtol=0, atol=1e-5)
        assert metadata["classes"] == names
        assert metadata["dataset"] == str(small)
        assert metadata["global_step"] == 4
        assert metadata["versions"]["torch"] == torch.__version__
    assert not list((tmp_path / BEST).parent.glob(".part*"))

    example = re.search(r"```python\n(.*?onnxruntime.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "seven.png")
    alone = example[1] + "import sys\nassert not {'torch', 'mnist_lit', 'onnx'} & sys.modules.keys()\n"
    done = subprocess.run([sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{model(images[:1] / 256).argmax().item()}\n"
