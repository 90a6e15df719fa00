"""What every model config in configs/ has to do: overfit, resume bit for bit, predict, export.

Each runs through the command line, on the CPU and on little data. A new config is tested without a change here; if a
project has other data, ``data`` says which of it to use.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

PACKAGE = "mnist_lit"
ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
MODELS = [name for name, path in CONFIGS.items() if "model" in (yaml.safe_load(path.read_text("utf-8")) or {})]
RUN = Path("lightning_logs/version_0")

Run = Callable[..., Path]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that choose small data; none for the project's default data."""
    with np.load(str(files(f"{PACKAGE}.datasets") / "digits.npz")) as digits:  # 1,797 of 8 x 8, 0..16
        images, labels = (digits["images"] * 15).repeat(3, 1).repeat(3, 2).astype("uint8"), digits["labels"]
    splits = {"train": slice(0, 1200), "valid": slice(1200, 1500), "test": slice(1500, None)}
    arrays = {f"x_{name}": images[part] for name, part in splits.items()}
    arrays |= {f"y_{name}": labels[part].astype("int64") for name, part in splits.items()}
    path = tmp_path_factory.mktemp("data") / "small.npz"
    np.savez(path, **arrays)
    return [f"--data.dataset={path}"]


class Watch(Callback):
    """Write down losses, or what was predicted, and send the process a signal in the middle of an epoch.

    Args:
        path: of the file.
        signum: name of the signal.
        epoch: of the batch after which it is sent.
        batch: the index of that batch.
    """

    def __init__(self, path: str = "", signum: str = "SIGTERM", epoch: int = -1, batch: int = -1) -> None:
        self.path, self.signum, self.epoch, self.batch = path, signum, epoch, batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.path:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            with open(self.path, "a", encoding="utf-8") as file:
                print(float(loss), file=file)
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            os.kill(os.getpid(), signal.Signals[self.signum])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.predict_dataloaders
        torch.save({"samples": len(loader.dataset), "batch": next(iter(loader))}, self.path)


def main(folder: str, arguments: list[str]) -> None:
    """``python -m`` the package, in a folder and with its output in a file."""
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = [PACKAGE, *arguments]
    runpy.run_module(PACKAGE, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="session")
def processes() -> Any:
    """Start processes that have imported the package already: they are forks of one that has."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the tests run at the same time
    sys.path.insert(0, str(ROOT))
    context = multiprocessing.get_context("forkserver")
    slow = ["onnxscript", "torch.onnx._internal.exporter._core"]  # to import, if they are there
    context.set_forkserver_preload([f"{PACKAGE}.engine.cli", f"{PACKAGE}.models", f"{PACKAGE}.data", *slow])
    return context


@pytest.fixture
def run(processes: Any, data: list[str], tmp_path: Path) -> Run:
    """Run a command with a config in a folder of its own; returns that folder."""

    def start(config: str, command: str, *options: str, folder: str = "run", ends_with: int = 0) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        chosen = yaml.safe_load(CONFIGS[config].read_text("utf-8"))
        arguments = [command, f"--config={CONFIGS[config]}", "--trainer.accelerator=cpu", "--trainer.devices=1"]
        arguments += ["--dashboard.every_n_epochs=0", "--trainer.enable_progress_bar=false"]
        if "class_path" not in chosen.get("data", {}):
            arguments += data
        if "steps_per_execution" in chosen["model"].get("init_args", {}):
            arguments += ["--model.init_args.steps_per_execution=1"]  # which counts batches
        process = processes.Process(target=main, args=(str(tmp_path / folder), [*arguments, *options]))
        process.start()
        process.join()
        assert process.exitcode == ends_with, (tmp_path / folder / "output.txt").read_text("utf-8", "replace")
        return tmp_path / folder

    return start


def watch(**options: object) -> list[str]:
    return ["--trainer.callbacks+=test_project.Watch", *(f"--trainer.callbacks.{k}={v}" for k, v in options.items())]


SHORT = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=8", "--trainer.limit_val_batches=2"]
BEST = f"--ckpt_path={RUN}/checkpoints/best.ckpt"


@pytest.mark.parametrize("config", MODELS)
def test_overfits_four_batches(run: Run, config: str) -> None:
    options = ["--trainer.overfit_batches=4", "--trainer.max_epochs=25", "--trainer.callbacks=[]"]
    options.append("--trainer.check_val_every_n_epoch=25")
    folder = run(config, "fit", *options, *watch(path="losses.txt"))
    losses = [float(line) for line in (folder / "losses.txt").read_text("utf-8").split()]
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4]), f"from {losses[:4]} to {losses[-4:]}"


@pytest.mark.parametrize("config", MODELS)
def test_resumes_bit_for_bit(run: Run, config: str) -> None:
    """Stopped in the first epoch and killed in the second, a run ends in the weights of one that was not."""
    options = [*SHORT, "--last_checkpoint.every_n_train_steps=2"]
    whole = run(config, "fit", *options, folder="whole")
    run(config, "fit", *options, *watch(signum="SIGTERM", epoch=0, batch=2), ends_with=128 + signal.SIGTERM)
    options.append("--ckpt_path=last")
    run(config, "fit", *options, *watch(signum="SIGKILL", epoch=1, batch=4), ends_with=-signal.SIGKILL)
    resumed = run(config, "fit", *options)
    ours, theirs = (torch.load(folder / RUN / "checkpoints" / "last.ckpt") for folder in (resumed, whole))
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert bits(ours[key]) == bits(theirs[key]), key


def bits(state: Any) -> Any:
    """A nest of containers with bytes in the place of tensors."""
    if isinstance(state, Mapping):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    return state.numpy().tobytes() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize("config", MODELS)
def test_predicts_every_sample_and_exports_a_model_that_agrees(run: Run, config: str) -> None:
    run(config, "fit", *SHORT)
    exact = "--trainer.precision=32-true"  # as exported models compute
    folder = run(config, "predict", BEST, exact, *watch(path="predicted.pt"))
    (path,) = folder.glob("lightning_logs/*/predictions.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    predicted = torch.load(folder / "predicted.pt")
    assert len(rows) == predicted["samples"]

    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    run(config, "export", BEST)
    batch = predicted["batch"]
    parts = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, torch.Tensor) else batch
    images = next(iter(parts))
    session = onnxruntime.InferenceSession(folder / RUN / "checkpoints" / "best.onnx")
    (predictions, *_) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = [[float(row[key]) for key in row if key.startswith(("p_", "prediction"))] for row in rows]
    np.testing.assert_allclose(predictions.reshape(len(images), -1), expected[: len(images)], rtol=1e-5, atol=1e-5)
