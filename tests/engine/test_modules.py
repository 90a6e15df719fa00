"""Modules that nobody here wrote, through every command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import others
import pytest
import torch
from common import RUN, Run, assert_one_message, assert_same, checkpoint
from interrupt import signal_at
from test_resume import TWO_PROCESSES

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.max_epochs=2")
slow = pytest.mark.slow
MODULES = ["Own", *(pytest.param(name, marks=slow) for name in ("InConfigureModel", "InSetup", "Scaled"))]


@pytest.mark.parametrize("name", MODULES)
def test_module_trains_resumes_tests_and_exports(cli_in: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    fit = ("fit", f"--model=others.{name}", "--model.num_classes=3", *QUIET)
    cli_in(tmp_path / "whole", *fit)
    stopped = cli_in(tmp_path / "stopped", *fit, *signal_at("SIGTERM", "on_train_batch_start", 12), ok=None)
    assert stopped.returncode == 143
    cli_in(tmp_path / "stopped", *fit, "--ckpt_path=last")
    whole, resumed = (checkpoint(tmp_path / kind / RUN / "checkpoints" / "last.ckpt") for kind in ("whole", "stopped"))
    for part in ("state_dict", "optimizer_states", "processes"):
        assert_same(resumed[part], whole[part])

    best = tmp_path / "whole" / RUN / "checkpoints" / "best.ckpt"
    assert "test_loss" in cli_in(tmp_path / "whole", "test", "--ckpt_path", best).stdout
    cli_in(tmp_path / "whole", "export", "--ckpt_path", best)
    model = getattr(others, name)(3)
    model.setup("test")
    model.configure_model()
    model.load_state_dict(checkpoint(best)["state_dict"])
    images, target = model.train_dataloader().dataset[:8]
    with torch.no_grad():
        ours = model.eval()(model.on_after_batch_transfer((images, target), 0)[0])
    (theirs,) = onnxruntime.InferenceSession(best.with_suffix(".onnx")).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)


@slow
def test_two_processes_resume_with_a_loader_of_the_module(cli_in: Run, tmp_path: Path) -> None:
    """Killed in mid-epoch: of four steps of the second epoch two are in the checkpoint."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    fit = ("fit", "--model=others.Own", *QUIET, *TWO_PROCESSES, "--last_checkpoint.every_n_train_steps=3")
    cli_in(tmp_path / "whole", *fit, fork=False)
    cli_in(tmp_path / "stopped", *fit, *signal_at("SIGKILL", "on_train_batch_start", 7), ok=False, fork=False)
    last = RUN / "checkpoints" / "last.ckpt"
    assert checkpoint(tmp_path / "stopped" / last)["global_step"] == 6
    cli_in(tmp_path / "stopped", *fit, "--ckpt_path=last", fork=False)
    whole, resumed = (checkpoint(tmp_path / name / last) for name in ("whole", "stopped"))
    for part in ("state_dict", "optimizer_states", "processes"):
        assert_same(resumed[part], whole[part])


@pytest.mark.parametrize(
    ("option", "message"), [("num_classes=3", "the data say 10"), ("task=multilabel", "multiclass")]
)
def test_option_that_the_data_contradict_is_refused(cli: Run, small: Path, option: str, message: str) -> None:
    refused = cli("fit", "--model=CNN", f"--model.{option}", f"--data.dataset={small}", ok=False)
    assert_one_message(refused, f"--model.{option}: the data say", message)
