"""One file out of a checkpoint, and what it predicts where mnist_lit is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from common import CONFIGS, ROOT, Run
from PIL import Image
from torch import Tensor

from mnist_lit import CNN, FastCNN, Logistic, MNISTDataModule

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
onnx = pytest.importorskip("onnx", reason="needs the extra [export]")

pytestmark = pytest.mark.slow  # tests/project exports every config and compares, too

CHECKPOINTS = Path("lightning_logs/version_0/checkpoints")
BEST = CHECKPOINTS / "best.ckpt"


def exported(path: Path) -> tuple[Callable[[Tensor], Tensor], dict]:
    """What the file predicts, read with nothing but onnxruntime or torch, and its metadata."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        found = session.get_modelmeta().custom_metadata_map
        metadata = {key: json.loads(value) if value[0] in "{[0123456789" else value for key, value in found.items()}
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), metadata
    extra = {"metadata.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["metadata.json"])


def assert_agrees(model: torch.nn.Module, predict: Callable[[Tensor], Tensor], images: Tensor) -> None:
    with torch.no_grad():
        expected = model(images / 256).softmax(1)  # (B, 10)
        torch.testing.assert_close(predict(images), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def fitted(cli_in: Run, small: Path, tmp_path_factory: pytest.TempPathFactory):
    """Makes the run of a config and an exported file, once: the folder, the file, and what export printed."""
    made = {}

    def make(config: str, suffix: str) -> tuple[Path, Path, str]:
        if (config, suffix) not in made:
            folder = tmp_path_factory.mktemp(config)
            settings = ("--config", CONFIGS / f"{config}.yaml", "--data.dataset", small, "--trainer.max_epochs=1")
            cli_in(folder, "fit", *settings)
            done = cli_in(folder, "export", "--ckpt_path", BEST, "--format", suffix)  # with the config.yaml of the run
            made[config, suffix] = folder, (folder / BEST).with_suffix(f".{suffix}"), done.stdout
        return made[config, suffix]

    return make


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("config", ["cnn", "fast", "logistic"])
def test_file_agrees_with_the_checkpoint(cli_in: Run, fitted, small: Path, config: str, suffix: str) -> None:
    folder, path, printed = fitted(config, suffix)
    assert f"Wrote {BEST.with_suffix(f'.{suffix}')}: images of" in printed
    assert not list(path.parent.glob(".part*"))

    predict, metadata = exported(path)
    model = {"cnn": CNN, "fast": FastCNN, "logistic": Logistic}[config]
    model = model.load_from_checkpoint(folder / BEST, weights_only=True).eval()
    with np.load(small) as arrays:
        images, labels = torch.from_numpy(arrays["x_test"])[:, None], torch.from_numpy(arrays["y_test"])
    for batch in (images, images[:1], images.repeat(4, 1, 1, 1)[:1000]):
        assert_agrees(model, predict, batch)
    generator = torch.Generator().manual_seed(0)
    for n in (1, 1000):
        other_size = torch.randint(256, (n, 1, 40, 36), dtype=torch.uint8, generator=generator)
        if config == "logistic":
            with pytest.raises(Exception, match=r"(?i)size|shape|dimension|28"):
                predict(other_size)
        else:
            assert_agrees(model, predict, other_size)

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


@pytest.mark.mnist
@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_whole_test_split_of_mnist(cli: Run, mnist_dir: Path, tmp_path: Path, suffix: str) -> None:
    common = ("--config", CONFIGS / "cnn.yaml", "--data.data_dir", mnist_dir, "--data.dataset=mnist")
    cli("fit", *common, "--trainer.max_epochs=1")
    cli("export", *common, "--ckpt_path", CHECKPOINTS / "best.ckpt", "--format", suffix)
    cli("export", *common, "--ckpt_path", CHECKPOINTS / "last.ckpt", "--format", suffix, "--output=own.onnx")
    assert (tmp_path / "own.onnx").exists()
    predict, metadata = exported(tmp_path / CHECKPOINTS / f"best.{suffix}")
    model = CNN.load_from_checkpoint(tmp_path / CHECKPOINTS / "best.ckpt", weights_only=True).eval()
    data = MNISTDataModule("mnist", data_dir=str(mnist_dir))
    data.prepare_data()
    data.setup("test")
    assert_agrees(model, predict, data.source.datasets["test"].tensors[0])
    assert metadata["dataset"] == "mnist"


def test_example_in_the_readme_needs_onnxruntime_alone(fitted, small: Path) -> None:
    folder, _, _ = fitted("fast", "onnx")
    example = re.search(r"```python\n(.*?onnxruntime.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    assert len([line for line in example[1].splitlines() if line]) == 5
    with np.load(small) as arrays:
        pixels = arrays["x_test"][0]
    Image.fromarray(pixels).save(folder / "seven.png")
    model = FastCNN.load_from_checkpoint(folder / BEST, weights_only=True).eval()
    expected = model(torch.from_numpy(pixels)[None, None] / 256).argmax().item()
    example_run = example[1] + "import sys\nassert not {'torch', 'mnist_lit', 'onnx'} & sys.modules.keys()\n"
    done = subprocess.run([sys.executable, "-c", example_run], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


def test_what_cannot_be_exported_is_one_message_and_leaves_no_file(cli: Run, small: Path, tmp_path: Path) -> None:
    settings = ("--config", CONFIGS / "logistic.yaml", "--data.dataset", small)
    no_checkpoint = cli("export", *settings, ok=False)
    assert "--ckpt_path: export needs the path of a checkpoint" in no_checkpoint.stderr
    own = ("--model=Classifier", "--model.net=untraceable.Net")
    cli("fit", *settings, *own)
    done = cli("export", "--ckpt_path", CHECKPOINTS / "best.ckpt", ok=False)
    assert "mnist_lit: error: torch.export cannot follow Net: " in done.stderr
    assert "Traceback" not in no_checkpoint.stderr + done.stderr
    assert {path.name for path in (tmp_path / CHECKPOINTS).iterdir()} == {"best.ckpt", "last.ckpt"}
