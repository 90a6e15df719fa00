"""The tests that a project inherits: what every model config in its ``configs/`` has to do."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

PRELOADED = ["mnist_lit.engine.cli", "mnist_lit.engine.testing", "onnxscript", "torch.onnx"]
QUICK = """--trainer.accelerator=cpu --trainer.devices=1 --trainer.logger=false --trainer.enable_progress_bar=false
--trainer.val_check_interval=1.0 --trainer.check_val_every_n_epoch=1 --dashboard.every_n_epochs=0""".split()
OVERFIT = """--trainer.max_epochs=25 --trainer.overfit_batches=4 --trainer.check_val_every_n_epoch=25
--trainer.callbacks=[]""".split()
SHORT = """--trainer.max_epochs=2 --trainer.limit_train_batches=8 --trainer.limit_val_batches=2
--last_checkpoint.every_n_train_steps=2""".split()
WATCH = f"--trainer.callbacks+={__name__}.Watch"

Start = Callable[..., Callable[..., Path]]


class ProjectSuite:
    """Overfit, resume, predict and export with every config in ``configs/`` that has a model.

    The tests run commands of the project in processes of their own, on the CPU and on a few batches. They fail if a
    weight is never trained, a module trains in eval mode, a resumed run differs in a single bit, or there is not one
    prediction for each sample.

    Attributes:
        package: the project's package.
        options: that each command takes, such as ``--data.dataset=small.npz``.

    Example:
        >>> class TestProject(ProjectSuite):
        ...     package = "leaf_id"
    """

    package: ClassVar[str]
    options: ClassVar[Sequence[str]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test with each config."""
        paths = sorted(metafunc.config.rootpath.glob("configs/*.yaml"))
        models = [path for path in paths if "model" in (yaml.safe_load(path.read_text("utf-8")) or {})]
        metafunc.parametrize("config", models, ids=[path.stem for path in models])

    @pytest.fixture
    def start(self, config: Path, tmp_path: Path) -> Start:
        """Start a command, with a folder for its runs; returns a function that waits for one of its exit codes."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two commands run at the same time
        # On Linux each is a fork of a process that has imported the engine.
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload(PRELOADED)

        def start(command: str, *options: object, folder: str = "run") -> Callable[..., Path]:
            root, output = tmp_path / folder, tmp_path / f"{folder}-{command}.txt"
            places = f"--config={config}", f"--trainer.default_root_dir={root}"
            arguments = [command, *places, *QUICK, *map(str, options), *self.options]
            process = context.Process(target=_run, args=(self.package, config.parents[1], output, arguments))
            process.start()

            def wait(*codes: int) -> Path:
                process.join()
                assert process.exitcode in (codes or (0,)), output.read_text("utf-8", "replace")
                return root

            return wait

        return start

    def test_overfits_a_few_batches(self, start: Start) -> None:
        start("fit", *OVERFIT, WATCH)()

    def test_resumes_bit_for_bit(self, start: Start) -> None:
        """Stopped in the first epoch and killed in the second, a run ends in the state of one that was not."""
        whole = start("fit", *SHORT, folder="whole")
        for epoch, name in enumerate(("SIGTERM", "SIGKILL")):
            number = getattr(signal, name, signal.SIGTERM)  # Windows has the first alone
            kill = (f"--trainer.callbacks.kill={int(number)}", f"--trainer.callbacks.epoch={epoch}")
            start("fit", *SHORT, "--ckpt_path=last", WATCH, *kill)(number, -number, 128 + number)
        resumed = start("fit", *SHORT, "--ckpt_path=last")
        ours, theirs = (torch.load(_checkpoint(wait(), "last")) for wait in (resumed, whole))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert _bits(ours[key]) == _bits(theirs[key]), (
                f"{key} of a resumed run differs: are there random numbers of a generator of your own, state that "
                "is not in the checkpoint, or a training loader that forgets its position?"
            )

    def test_predicts_each_sample_and_exports(self, start: Start) -> None:
        """A sample alone is predicted as in its batch, and the exported file agrees with the model."""
        best = _checkpoint(start("fit", *SHORT)(), "best")
        predict = start("predict", f"--ckpt_path={best}", "--trainer.precision=32-true", WATCH)
        pytest.importorskip("onnxruntime", reason="needs the extra [export]")
        start("export", f"--ckpt_path={best}")()  # compares the two
        predict()


class Watch(Callback):
    """Fail if training or prediction goes wrong in a way that raises no error; send a signal in the midst of an epoch.

    Args:
        kill: number of the signal.
        epoch: of the signal.
    """

    def __init__(self, kill: int = 0, epoch: int = 0) -> None:
        self.kill, self.epoch, self.predicted = kill, epoch, 0
        self.losses: list[float] = []
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(float(outputs["loss"] if isinstance(outputs, Mapping) else outputs))
        if not self.weights:  # after a step, which gives lazy layers their shapes
            trained = ((name, weight) for name, weight in pl_module.named_parameters() if weight.requires_grad)
            self.weights = {name: weight.detach().clone() for name, weight in trained}
        modules = list(_in_eval_mode(pl_module))
        assert not modules, f"in eval mode while training: {', '.join(modules)}"
        if self.kill and (trainer.current_epoch, batch_idx) == (self.epoch, trainer.num_training_batches // 2):
            os.kill(os.getpid(), self.kill)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            weights = dict(pl_module.named_parameters())
            same = [name for name, weight in self.weights.items() if torch.equal(weight, weights[name])]
            assert not same, f"training does not change {', '.join(same)}; is it detached from the loss?"
            first, last = sum(self.losses[:4]) / 4, sum(self.losses[-4:]) / 4
            assert last < 0.5 * first, f"the loss on four batches falls from {first:.4g} to {last:.4g} only"

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self.predicted += len(_predictions(outputs))
        alone = apply_to_collection(batch, Tensor, lambda tensor: tensor[:1])
        for ours, theirs in ((_predictions(pl_module.predict_step(alone, 0)), _predictions(outputs)[:1]),):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.predict_dataloaders
        assert self.predicted == len(loader.dataset), f"{self.predicted} predictions of {len(loader.dataset)} samples"


def _run(package: str, root: Path, output: Path, arguments: list[str]) -> None:
    """``python -m`` the package, in the project's folder."""
    os.chdir(root)
    sys.path.insert(0, str(root))
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = [package, *arguments]
    runpy.run_module(package, run_name="__main__", alter_sys=True)


def _checkpoint(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"lightning_logs/*/checkpoints/{name}.ckpt")
    return path


def _bits(state: Any) -> Any:
    return apply_to_collection(state, Tensor, lambda tensor: tensor.flatten().view(torch.uint8).numpy().tobytes())


def _predictions(outputs: Any) -> Tensor:
    return outputs["preds"] if isinstance(outputs, Mapping) else outputs


def _in_eval_mode(module: nn.Module, name: str = "model") -> Iterator[str]:
    """Names of modules, but for those whose weights are all frozen."""
    weights = list(module.parameters())
    if not weights or any(weight.requires_grad for weight in weights):
        if not module.training:
            yield name
        for part, child in module.named_children():
            yield from _in_eval_mode(child, f"{name}.{part}")
