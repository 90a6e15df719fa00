"""Modules that nobody here wrote, through every command; one's own data, loss, optimizer, schedule and callback."""

import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import others
import pytest
import torch
from common import BEST, CONFIGS, LAST, ROOT, RUN, Run, assert_same_last, checkpoint, curves, predictions
from interrupt import signal_at
from lightning.pytorch import Trainer

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.max_epochs=2")
slow = pytest.mark.slow
NET = "--model=Classifier --model.net=my_net.Net --model.net.width=16".split()
MODULES = ["Own", *(pytest.param(name, marks=slow) for name in ("InSetup", "Scaled"))]


@pytest.mark.parametrize("name", MODULES)
def test_module_trains_resumes_tests_and_exports(cli_in: Run, tmp_path: Path, name: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    fit = ("fit", f"--model=others.{name}", "--model.num_classes=3", *QUIET)
    cli_in(tmp_path / "whole", *fit)
    stopped = cli_in(tmp_path / "stopped", *fit, *signal_at("SIGTERM", "on_train_batch_start", 12), ok=None)
    assert stopped.returncode == 143
    cli_in(tmp_path / "stopped", *fit, "--ckpt_path=last")
    ours, theirs = (tmp_path / kind / RUN for kind in ("stopped", "whole"))
    assert_same_last(ours, theirs, "state_dict", "optimizer_states", "processes")

    best = tmp_path / "whole" / BEST
    assert "test_loss" in cli_in(tmp_path / "whole", "test", "--ckpt_path", best).stdout
    cli_in(tmp_path / "whole", "export", "--ckpt_path", best)
    model = getattr(others, name)(3)
    model.trainer = Trainer(logger=False, accelerator="cpu")
    model.setup("test")
    model.configure_model()
    model.load_state_dict(checkpoint(best)["state_dict"])
    images, target = model.train_dataloader().dataset[:8]
    with torch.no_grad():
        ours = model.eval()(model.on_after_batch_transfer((images, target), 0)[0])
    (theirs,) = onnxruntime.InferenceSession(best.with_suffix(".onnx")).run(None, {"images": images.numpy()})
    np.testing.assert_allclose(theirs, ours.numpy(), atol=1e-5)


def test_curves_of_several_optimizers_go_on(cli_in: Run, tmp_path: Path) -> None:
    """Killed after a step that is not in the checkpoint, the run logs it once."""
    fit = ("fit", "--model=others.TwoOptimizers", "--model.num_classes=3", *QUIET, "--trainer.log_every_n_steps=2")
    fit = (*fit, "--last_checkpoint.every_n_train_steps=6")
    for folder in ("whole", "killed"):
        (tmp_path / folder).mkdir()
    cli_in(tmp_path / "whole", *fit)
    killed = cli_in(tmp_path / "killed", *fit, *signal_at("SIGKILL", "on_train_batch_start", 22), ok=None)
    assert killed.returncode == -signal.SIGKILL
    cli_in(tmp_path / "killed", *fit, "--ckpt_path=last")
    whole = curves(tmp_path / "whole" / RUN)
    assert curves(tmp_path / "killed" / RUN) == whole
    assert [step for step, _ in whole["own"]] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert [step for step, _ in whole["train/loss"]] == [*range(16)]


def warnings(printed: str) -> list[str]:
    """Those of the engine."""
    return [line for line in printed.splitlines() if "warning: " in line]


@pytest.mark.parametrize(
    ("returned", "batches"),
    [
        ("scalar", "pairs"),
        pytest.param("values", "dicts", marks=slow),
        pytest.param("maps", "triples", marks=slow),
        pytest.param("functions", "pairs", marks=slow),
    ],
)
def test_whatever_steps_return_and_batches_are(cli: Run, tmp_path: Path, returned: str, batches: str) -> None:
    """Trained, and predicted as far as there is something to write."""
    options = (f"--model.returned={returned}", f"--model.batches={batches}", "--trainer.log_every_n_steps=1")
    assert warnings(cli("fit", "--model=others.Returns", *options, *QUIET).stderr) == []
    assert checkpoint(tmp_path / LAST)["global_step"] == 16
    assert "val/loss" in curves(tmp_path / RUN)

    done, run = cli("predict", "--ckpt_path", BEST), tmp_path / "lightning_logs/version_1"
    if returned == "values":
        rows = predictions(run)
        assert (rows[0].keys(), len(rows)) == ({"index", "prediction"}, 64)
    else:
        assert "no predictions.csv: predict_step does not return " in warnings(done.stderr)[-1]
        kept = returned != "functions"  # which cannot be saved
        assert (run / "predictions.pt").exists() == kept
        assert not kept or len(checkpoint(run / "predictions.pt")) == 8


def test_monitor_that_is_not_logged(cli: Run, tmp_path: Path) -> None:
    """There is a last checkpoint and a warning; with --monitor there is a best one and none."""
    fit = ("fit", "--model=others.Returns", "--model.monitored=val_mse", "--trainer.log_every_n_steps=1", *QUIET)
    (warning,) = warnings(cli(*fit).stderr)
    assert "by val/loss, and the model logs train_loss, train_loss_step, val_mse; choose one" in warning
    assert [path.name for path in (tmp_path / RUN / "checkpoints").iterdir()] == ["last.ckpt"]
    assert warnings(cli(*fit, "--monitor=val_mse").stderr) == []
    assert (tmp_path / "lightning_logs" / "version_1" / "checkpoints" / "best.ckpt").exists()


# ------------------------------------------------------------------------- from a module in the current folder


@pytest.fixture
def own(cli: Run, tmp_path: Path) -> Run:
    """The command line beside my_net.py."""
    shutil.copy(ROOT / "tests" / "helpers" / "my_net.py", tmp_path)
    return partial(cli, env={"PYTHONPATH": f"{ROOT}:{tmp_path}"})


MODELS = [f"--config={CONFIGS / name}.yaml" for name in ("cnn", "fast", "logistic")] + ["--model=my_net.make"]


@pytest.mark.parametrize("model", [MODELS[0], *(pytest.param(model, marks=slow) for model in MODELS[1:])])
def test_classes_and_sizes_come_from_the_data(own: Run, tmp_path: Path, model: str) -> None:
    """But not the batches of 64 that a config has chosen for another data module."""
    own("fit", model, "--data=my_net.Stripes", "--trainer.max_epochs=1")
    last = checkpoint(tmp_path / LAST)
    assert last["global_step"] == 30
    assert list(last["state_dict"].values())[-1].shape == (3,)  # the last layer's bias
    own("predict", "--ckpt_path", BEST)
    assert list(predictions(tmp_path / "lightning_logs" / "version_1")[0])[-2:] == ["p_1", "p_2"]


@slow
def test_everything_may_be_ones_own(own: Run, tmp_path: Path) -> None:
    done = own(
        *("fit", *NET, "--model=my_net.Smooth", "--data=my_net.Stripes", "--trainer.callbacks+=my_net.Hello"),
        *("--optimizer=my_net.SlowSGD", "--optimizer.lr=0.05", "--lr_scheduler=my_net.Halving"),
        *("--trainer.max_epochs=2", "--test_after_fit=true"),
    )
    assert "hello from a callback" in done.stdout
    assert "Smooth on Stripes after 2 epochs" in done.stdout
    (optimizer,) = checkpoint(tmp_path / LAST)["optimizer_states"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.05 / 4)
    (loss,) = (line.split("│")[2] for line in done.stdout.splitlines() if "test/loss" in line)
    # A smoothed loss is never below the entropy of its labels, (2/3, 1/6, 1/6).
    assert float(loss) >= 0.867
