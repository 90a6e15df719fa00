"""Modules that nobody here wrote, through every command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import others
import pytest
import torch
from common import RUN, Run, assert_same, checkpoint
from interrupt import signal_at

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.max_epochs=2")
slow = pytest.mark.slow
MODULES = ["Own", *(pytest.param(name, marks=slow) for name in ("InSetup", "Scaled"))]


@pytest.mark.parametrize("name", MODULES)
def test_module_trains_resumes_tests_and_exports(cli_in: Run, tmp_path: Path, name: str) -> None:
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
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
