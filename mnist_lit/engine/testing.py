"""The tests that a project inherits, for every config with a model in its ``configs/``."""

import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

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

    The tests run the project's commands in separate processes, on the CPU and on a few batches. They fail if a weight
    is never trained, a module trains in eval mode, a resumed run differs in a single bit, or the number of predictions
    differs from the number of samples.

    Attributes:
        package: the project's package.
        options: options for every command, such as ``--data.dataset=small.npz``.

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
        """Start a command; returns a function that waits for one of its exit codes and returns the runs' folder."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # two commands run at the same time
        # On Linux, each is forked from a process that has imported the engine.
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        context.set_forkserver_preload(["mnist_lit.engine.cli", __name__, "omegaconf", "onnxscript", "torch.onnx"])

        def start(command: str, *options: str, folder: str = "run") -> Callable[..., Path]:
            places = f"--config={config}", f"--trainer.default_root_dir={tmp_path / folder}"
            arguments = [command, *places, *QUICK, *options, *self.options]
            process = context.Process(target=_run, args=(self.package, config.parents[1], arguments))
            process.start()

            def wait(*codes: int) -> Path:
                process.join()
                assert process.exitcode in (codes or (0,)), f"{command} ended with {process.exitcode}, see its output"
                return tmp_path / folder

            return wait

        return start

    def test_overfits_a_few_batches(self, start: Start) -> None:
        start("fit", *OVERFIT, WATCH)()

    def test_resumes_bit_for_bit(self, start: Start) -> None:
        """A run that is stopped in the first epoch and killed in the second ends as an uninterrupted one."""
        whole = start("fit", *SHORT, folder="whole")
        for epoch, name in enumerate(("SIGTERM", "SIGKILL")):
            number = getattr(signal, name, signal.SIGTERM)  # Windows only has the first
            kill = (f"--trainer.callbacks.kill={int(number)}", f"--trainer.callbacks.epoch={epoch}")
            start("fit", *SHORT, "--ckpt_path=last", WATCH, *kill)(number, -number, 128 + number)
        states = []
        for wait in (start("fit", *SHORT, "--ckpt_path=last"), whole):
            (path,) = wait().glob("lightning_logs/*/checkpoints/last.ckpt")
            states.append(apply_to_collection(torch.load(path), Tensor, _bits))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert states[0][key] == states[1][key], (
                f"{key} of a resumed run differs: are there random numbers of a generator of your own, state that "
                "is not in the checkpoint, or a training loader that forgets its position?"
            )

    def test_predicts_each_sample_and_exports(self, start: Start) -> None:
        """A sample is predicted alone as in its batch, and the exported file agrees with the model."""
        (best,) = start("fit", *SHORT)().glob("lightning_logs/*/checkpoints/best.ckpt")
        predict = start("predict", f"--ckpt_path={best}", "--trainer.precision=32-true", WATCH)
        pytest.importorskip("onnxruntime", reason="needs the extra [export]")
        start("export", f"--ckpt_path={best}")()  # compares the two
        predict()


class Watch(Callback):
    """Fail if training or prediction goes wrong without an error; send a signal in the middle of an epoch.

    Args:
        kill: number of the signal; 0 sends none.
        epoch: epoch in which to send it.
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
            self.weights = {name: weight.detach().clone() for name, weight in _trainable(pl_module).items()}
        resting = [name for name, part in pl_module.named_modules() if not part.training and _trainable(part)]
        assert not resting, f"in eval mode while training: {', '.join(name or 'all' for name in resting)}"
        if self.kill and (trainer.current_epoch, batch_idx) == (self.epoch, trainer.num_training_batches // 2):
            os.kill(os.getpid(), self.kill)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.overfit_batches:  # type: ignore[attr-defined]
            weights = _trainable(pl_module)
            same = [name for name in weights.keys() & self.weights if torch.equal(weights[name], self.weights[name])]
            assert not same, f"training does not change {', '.join(sorted(same))}; is it detached from the loss?"
            first, last = sum(self.losses[:4]) / 4, sum(self.losses[-4:]) / 4
            assert last < 0.5 * first, f"the loss on four batches falls from {first:.4g} to {last:.4g} only"

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        alone = pl_module.predict_step(apply_to_collection(batch, Tensor, lambda tensor: tensor[:1]), batch_idx)
        single, batched = (each["preds"] if isinstance(each, Mapping) else each for each in (alone, outputs))
        torch.testing.assert_close(single, batched[:1], rtol=1e-4, atol=1e-5)
        self.predicted += len(batched)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader: Any = trainer.predict_dataloaders
        assert self.predicted == len(loader.dataset), f"{self.predicted} predictions of {len(loader.dataset)} samples"


def _run(package: str, root: Path, arguments: list[str]) -> None:
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.argv = [package, *arguments]
    runpy.run_module(package, run_name="__main__", alter_sys=True)  # as python -m does


def _bits(tensor: Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def _trainable(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}
