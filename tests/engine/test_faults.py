"""What goes wrong ends in one message, and nothing that was there before is lost."""

import io
import os
import pickle
import random
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch
from common import CONFIGS, RUN, Run, assert_one_message, assert_same, checkpoint
from hostile import Calls, hostile

from mnist_lit.engine.checkpoint import Checkpoint
from mnist_lit.engine.errors import UserError

LAST = RUN / "checkpoints" / "last.ckpt"
slow = pytest.mark.slow
LOGISTIC = ("--config", CONFIGS / "logistic.yaml", "--trainer.log_every_n_steps=4")


@pytest.fixture(scope="module")
def saved(cli_in: Run, tmp_path_factory: pytest.TempPathFactory, small: Path) -> Path:
    """The last checkpoint of a run of logistic.yaml."""
    folder = tmp_path_factory.mktemp("saved")
    cli_in(folder, "fit", *LOGISTIC, "--data.dataset", small)
    return folder / LAST


def test_divergence_stops_with_the_last_good_checkpoint(cli: Run, small: Path, tmp_path: Path) -> None:
    """A learning rate that is fine for the first epoch of 16 steps and absurd in the second."""
    done = cli(
        *("fit", *LOGISTIC, "--data.dataset", small, "--optimizer=SGD", "--optimizer.lr=0.1"),
        *("--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=1e39"),
        ok=False,
    )
    assert_one_message(done, "the learning rate 1e+38", "lower learning rate")
    assert re.search(r"the loss is (nan|inf) at step 1[78] \(epoch 1\)", done.stderr)
    kept = checkpoint(tmp_path / LAST)
    assert kept["global_step"] == 16
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
    assert {path.name for path in (tmp_path / LAST).parent.iterdir()} == {"last.ckpt", "best.ckpt"}


# ------------------------------------------------------------------------------ untrusted checkpoints


def as_checkpoint(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def hostile_checkpoints(whole: bytes, marker: Path) -> dict[str, bytes]:
    touch = Calls(os.system, f"touch {marker}")
    good = torch.load(io.BytesIO(whole), weights_only=True)
    changes = {
        "os.system in the weights": {"state_dict": {"w": touch}},
        "os.system in the hyperparameters": {"hyper_parameters": {"lr": touch}},
        "a module": {"state_dict": torch.nn.Linear(2, 2)},
        "weights that are none": {"state_dict": {"net.1.weight": 3}},
        "a step that is none": {"global_step": "many"},
        "more steps than there can be": {"global_step": 1 << 63},
        "hyperparameters that are none": {"datamodule_hyper_parameters": "x"},
        "a version that is none": {"pytorch-lightning_version": "new"},
        "gigabytes": {"state_dict": {"w": Calls(bytearray, 1 << 38)}},
        "a huge tensor": {"state_dict": {"w": Calls(torch.zeros, 1 << 40)}},
    }
    return {
        **{name: as_checkpoint(good | changed) for name, changed in changes.items()},
        **hostile(marker),
        "the old format": pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(touch),
        "a list": as_checkpoint([1, 2, 3]),
        "nothing": b"",
    }


@slow
def test_corrupted_checkpoints_never_run_and_are_named(saved: Path, tmp_path: Path) -> None:
    """200 of them: cut, flipped, spliced, and made to harm. Memory grows by less than 64 MiB."""
    whole, chance = saved.read_bytes(), random.Random(1)
    original, marker, path = checkpoint(saved), tmp_path / "executed", tmp_path / "bad.ckpt"
    bad = hostile_checkpoints(whole, marker)
    for number in range(174):
        place, source, damaged = chance.randrange(len(whole)), chance.randrange(len(whole)), bytearray(whole)
        if number % 3 == 0:
            del damaged[place:]
        elif number % 3 == 1:
            damaged[place] ^= 1 << chance.randrange(8)
        else:
            damaged[place : place + 100] = whole[source : source + 100]
        bad[f"{number}"] = bytes(damaged)

    before, messages = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for name, data in bad.items():
        path.write_bytes(data)
        try:
            # What is damaged where nothing is read, such as the padding between members, is the original.
            assert_same(Checkpoint.read(path).content, original, name)
        except UserError as error:
            messages.append(str(error))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
    assert not marker.exists()
    assert len(messages) >= 150
    named = "cannot be used as a checkpoint|is not a checkpoint of Lightning|holds .* --weights_only=false"
    assert [message for message in messages if not re.match(f"{path} ({named})", message)] == []
    # A test of the test: torch.load believes what is refused here.
    torch.load(io.BytesIO(bad["os.system in the weights"]), weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        pytest.param("other classes", "net.1.bias has the shape (7,) there and (10,) in Logistic", marks=slow),
        ("another dataset", "the checkpoint was trained on digits, this run has"),
        pytest.param("a step size of text", "its optimizer_states do not fit", marks=slow),
        # It would be a list of so many names.
        pytest.param("too many classes", f"num_classes of {10**30} in so small a file", marks=slow),
    ],
)
def test_foreign_checkpoint_is_one_clear_message(
    cli: Run, saved: Path, small: Path, tmp_path: Path, case: str, message: str
) -> None:
    """``test_mistakes.py`` has more of them."""
    content = checkpoint(saved)
    if case == "other classes":
        content["state_dict"] = {name: w[:7] for name, w in content["state_dict"].items()}
    elif case == "a step size of text":
        content["optimizer_states"][0]["param_groups"][0]["lr"] = "x"
    elif case == "too many classes":
        content["hyper_parameters"]["num_classes"] = 10**30
    else:
        content["MNISTDataModule"] |= {"dataset": "digits", "digest": "another"}
    torch.save(content, tmp_path / "bad.ckpt")
    fit = ("fit", *LOGISTIC, "--data.dataset", small, "--trainer.max_epochs=3")
    assert_one_message(cli(*fit, "--ckpt_path=bad.ckpt", ok=False), message)


@slow
def test_config_and_not_the_checkpoint_says_what_is_built(cli: Run, saved: Path, small: Path, tmp_path: Path) -> None:
    """Class names out of a stranger's file would be imported."""
    stranger = {"hyper_parameters": {"_class_path": "torch.nn.Module", "_instantiator": "os.system"}}
    torch.save(checkpoint(saved) | stranger, tmp_path / "foreign.ckpt")
    assert "test/acc" in cli("test", *LOGISTIC, "--data.dataset", small, "--ckpt_path=foreign.ckpt").stdout


@pytest.mark.parametrize("foreign", ["machine", *(pytest.param(kind, marks=slow) for kind in ("edited", "link"))])
def test_config_that_was_not_written_here_is_not_taken_unasked(
    cli: Run, saved: Path, tmp_path: Path, foreign: str
) -> None:
    """It names classes, which are code."""
    run = tmp_path / RUN
    shutil.copytree(saved.parents[1], run)
    if foreign == "link":
        (run / "config.yaml").rename(tmp_path / "elsewhere.yaml")
        (run / "config.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    elif foreign == "edited":
        (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\n")
    environment = {"XDG_STATE_HOME": str(tmp_path)} if foreign == "machine" else {}
    refused = cli("test", "--ckpt_path", LAST, ok=False, env=environment)
    assert_one_message(refused, f"--config={RUN}/config.yaml")


def test_no_config_switches_off_safe_loading(cli: Run, saved: Path, tmp_path: Path) -> None:
    run = tmp_path / RUN
    shutil.copytree(saved.parents[1], run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("weights_only: null", "weights_only: false"))
    content = checkpoint(saved) | {"callbacks": Calls(os.system, f"touch {tmp_path}/ran")}
    (run / "checkpoints" / "last.ckpt").write_bytes(as_checkpoint(content))
    refused = cli("test", "--config", run / "config.yaml", "--ckpt_path", LAST, ok=False)
    assert_one_message(refused, "--weights_only=false")
    assert not (tmp_path / "ran").exists()


@slow
def test_last_passes_over_what_is_broken(cli: Run, saved: Path, small: Path, tmp_path: Path) -> None:
    """And takes the one before; with none that loads it does not start from scratch."""
    old, new = (tmp_path / f"lightning_logs/version_{version}/checkpoints" for version in range(2))
    for folder, age in ((old, 200), (new, 100)):
        shutil.copytree(saved.parent, folder)
        for path in folder.iterdir():
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    resume = ("fit", *LOGISTIC, "--data.dataset", small, "--ckpt_path=last")
    (new / "last.ckpt").write_bytes(b"broken")
    assert f"{new.relative_to(tmp_path)}/best.ckpt is of a finished run" in cli(*resume).stderr
    (new / "best.ckpt").write_bytes(b"broken")
    named = cli(*resume, "--run_name=version_1", ok=False)
    assert_one_message(named, "no checkpoint loads", "best.ckpt cannot be used as a checkpoint")
    done = cli(*resume, "--trainer.max_epochs=3")
    assert done.stderr.count(": passed over\n") == 2
    assert checkpoint(old / "last.ckpt")["epoch"] == 2

    content = checkpoint(saved) | {"hyper_parameters": {"folder": tmp_path}}  # harmless, but no plain value
    for path in old.iterdir():
        path.write_bytes(as_checkpoint(content))
    assert_one_message(cli(*resume, ok=False), "last.ckpt holds pathlib", "--weights_only=false")


# ------------------------------------------------------------------------------------------- trouble in a run


def test_full_disk_loses_no_checkpoint(cli: Run, saved: Path, small: Path, tmp_path: Path) -> None:
    """The checkpoint to resume from stays whole when the next one does not fit: no file may exceed 32 KiB."""
    folder = tmp_path / LAST.parent
    shutil.copytree(saved.parents[1], tmp_path / RUN)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    resume = ("fit", *LOGISTIC, "--data.dataset", small, "--ckpt_path=last", "--trainer.max_epochs=3")
    resume = (*resume, "--dashboard.every_n_epochs=0")  # whose pictures would not fit, either
    done = cli(*resume, "--trainer.callbacks+=interrupt.FileSizeLimit", ok=False)
    assert_one_message(done, "cannot write the checkpoint", "File too large", "--ckpt_path=last")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    cli(*resume)
    assert checkpoint(folder / "last.ckpt")["epoch"] == 2


@slow
@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_train_batch_end", 20), pytest.param("on_validation_end", 32, marks=pytest.mark.matrix)],
)
def test_error_in_training_keeps_the_weights_and_shows_its_traceback(
    cli: Run, small: Path, tmp_path: Path, hook: str, step: int
) -> None:
    """Weights to start a new run from, and none to resume from."""
    fit = ("fit", *LOGISTIC, "--data.dataset", small)
    failed = cli(*fit, "--trainer.callbacks+=interrupt.Fail", f"--trainer.callbacks.hook={hook}", ok=False)
    assert "Traceback" in failed.stderr
    assert "ZeroDivisionError: a mistake of mine" in failed.stderr
    exception = RUN / "checkpoints" / "exception.ckpt"
    assert checkpoint(tmp_path / exception)["global_step"] == step
    refused = cli(*fit, f"--ckpt_path={exception}", ok=False)
    assert_one_message(refused, "a step failed", f"--init_from={exception}")
    assert f"resuming from {LAST}" in cli(*fit, "--ckpt_path=last").stderr
    cli(*fit, f"--init_from={exception}")
