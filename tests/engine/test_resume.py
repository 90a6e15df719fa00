"""Stopped anywhere and started again, a run ends exactly where it would have ended."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_same, checkpoint, curves
from forks import Forks

# 16 steps to an epoch; saved every 5, logged every 4. Everything that may go wrong is switched on.
SETTINGS = """
seed_everything: 7
model:
  class_path: Classifier
  init_args: {net: {class_path: interrupt.Chance}}
optimizer: {class_path: SGD, init_args: {lr: 0.02, momentum: 0.9}}
lr_scheduler: {class_path: StepLR, init_args: {step_size: 1, gamma: 0.7}}
trainer: {max_epochs: 3, log_every_n_steps: 4, enable_progress_bar: false}
last_checkpoint: {every_n_train_steps: 5}
"""


def fit(cli: Run, folder: Path, small: Path, *arguments: object, ok: bool = True):
    (folder / "settings.yaml").write_text(SETTINGS)
    settings = ("fit", "--config", "settings.yaml", "--data.dataset", small, *arguments)
    starts_anew = "--trainer.strategy=ddp" in arguments  # each of its processes, with a command of its own
    return cli(*settings, ok=ok, fork=not starts_anew)


STATE = ("state_dict", "optimizer_states", "lr_schedulers", "processes", "metrics", "global_step", "epoch")


def assert_same_run(interrupted: Path, whole: Path) -> None:
    ours, theirs = (checkpoint(run / "checkpoints" / "last.ckpt") for run in (interrupted, whole))
    for key in STATE:
        assert_same(ours[key], theirs[key], key)
    best, other = (checkpoint(run / "checkpoints" / "best.ckpt") for run in (interrupted, whole))
    assert_same(best["state_dict"], other["state_dict"])
    assert curves(interrupted) == curves(whole)
    for tag, points in curves(whole).items():
        steps = [step for step, _ in points]
        if tag != "epoch":  # which Lightning writes with the training and with the validation metrics
            assert steps == sorted(set(steps)), tag


@pytest.fixture(scope="module")
def whole_runs() -> dict[str, Path]:
    return {}


@pytest.fixture
def whole(cli: Run, small: Path, tmp_path_factory: pytest.TempPathFactory, whole_runs: dict[str, Path]):
    """Makes the uninterrupted run of some settings, once."""

    def run(*settings: str) -> Path:
        name = shlex.join(settings)
        if name not in whole_runs:
            folder = tmp_path_factory.mktemp("whole")
            fit(cli, folder, small, *settings, f"--trainer.default_root_dir={folder}")
            whole_runs[name] = folder / RUN
        return whole_runs[name]

    return run


def interrupt(signum: str, hook: str, step: int, rank: int | None = None) -> tuple[str, ...]:
    settings = {"signum": signum, "hook": hook, "step": step, "rank": rank}
    return (
        "--trainer.callbacks+=interrupt.SignalAt",
        *(f"--trainer.callbacks.{key}={value}" for key, value in settings.items() if value is not None),
    )


WORKERS = ("--data.num_workers=2",)
PLATEAU = (
    *("--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--lr_scheduler.monitor=val/loss"),
    *("--lr_scheduler.patience=0", "--lr_scheduler.threshold=0.5"),
)
slow = pytest.mark.slow

STOPS = [
    (("SIGKILL", "on_train_batch_end", 8), ()),
    *(
        pytest.param(stop, settings, marks=slow if settings == WORKERS else [slow, pytest.mark.matrix])
        for stop, settings in [
            (("SIGTERM", "on_train_batch_start", 20), ()),
            (("SIGINT", "on_validation_batch_start", 16), ()),
            (("SIGKILL", "on_validation_batch_start", 32), ()),
            (("SIGKILL", "on_train_batch_end", 2), ()),
            (("SIGKILL", "on_train_batch_end", 5), ()),
            (("SIGKILL", "on_train_batch_start", 5), ()),
            (("SIGKILL", "on_train_batch_end", 16), ()),
            (("SIGKILL", "on_validation_end", 16), ()),
            (("SIGKILL", "on_train_epoch_end", 16), ()),
            (("SIGKILL", "on_train_epoch_start", 16), ()),
            (("SIGKILL", "on_train_batch_end", 17), ()),
            (("SIGKILL", "on_train_epoch_end", 48), ()),
            (("SIGTERM", "on_train_epoch_start", 32), ()),
            (("SIGTERM", "on_train_batch_end", 47), ()),
            (("SIGTERM", "on_train_batch_end", 31), ()),
            (("SIGINT", "on_train_batch_end", 12), ("--trainer.log_every_n_steps=1",)),
            (("SIGTERM", "on_train_batch_start", 9), WORKERS),
            (("SIGKILL", "on_train_batch_start", 24), WORKERS),
            (("SIGKILL", "on_train_epoch_start", 16), WORKERS),
            (("SIGKILL", "on_train_batch_end", 18), PLATEAU),
            (("SIGKILL", "on_train_batch_end", 43), PLATEAU),
            (("SIGKILL", "on_train_batch_end", 18), ("--trainer.log_every_n_steps=5",)),
            (("SIGTERM", "on_train_batch_end", 8), ("--trainer.val_check_interval=5",)),
            (("SIGKILL", "on_train_batch_end", 12), ("--trainer.val_check_interval=4",)),
            (("SIGTERM", "on_train_batch_end", 3), ("--trainer.accumulate_grad_batches=3",)),
            (("SIGKILL", "on_train_batch_end", 8), ("--trainer.accumulate_grad_batches=3",)),
            (("SIGTERM", "on_train_batch_end", 21), ("--trainer.max_steps=40",)),
            (("SIGKILL", "on_train_batch_end", 18), ("--trainer.max_steps=40",)),
        ]
    ),
]


@pytest.mark.parametrize(("stop", "settings"), STOPS, ids=lambda value: "-".join(map(str, value)))
def test_resumed_run_is_the_uninterrupted_one(
    cli: Run, small: Path, tmp_path: Path, whole, stop: tuple[str, str, int], settings: tuple[str, ...]
) -> None:
    stopped = fit(cli, tmp_path, small, *settings, *interrupt(*stop), ok=False)
    assert stopped.returncode == {"SIGKILL": -9, "SIGINT": 130, "SIGTERM": 143}[stop[0]]
    assert "Traceback" not in stopped.stderr
    if stop[0] != "SIGKILL":
        said = [line for line in stopped.stderr.splitlines() if line.startswith("Stopped at step")]
        assert len(said) == 1
        assert re.search(rf"by {stop[0]}. To go on: .*--ckpt_path {RUN}/checkpoints/last.ckpt", said[0])
    saved = (tmp_path / RUN / "checkpoints" / "last.ckpt").exists()
    resumed = fit(cli, tmp_path, small, *settings, "--ckpt_path=last")
    if saved:
        assert "resuming from lightning_logs/version_0/checkpoints/last.ckpt" in resumed.stderr
    runs = sorted((tmp_path / "lightning_logs").iterdir())
    assert_same_run(runs[-1], whole(*settings))


TWO_PROCESSES = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")


@slow
@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(("SIGKILL", "on_train_batch_end", 11), marks=pytest.mark.matrix),
        ("SIGTERM", "on_train_batch_end", 3, 0),
    ],
)
def test_two_processes_resume_as_one(cli: Run, small: Path, tmp_path: Path, whole, stop: tuple) -> None:
    """Both are killed; and one of them alone is asked to stop, which stops both with a checkpoint."""
    stopped = fit(cli, tmp_path, small, *TWO_PROCESSES, *interrupt(*stop), ok=False)
    assert stopped.returncode == {"SIGKILL": -9, "SIGTERM": 143}[stop[0]]
    fit(cli, tmp_path, small, *TWO_PROCESSES, "--ckpt_path=last")
    assert_same_run(tmp_path / RUN, whole(*TWO_PROCESSES))


def test_second_ctrl_c_stops_at_once(cli: Run, small: Path, tmp_path: Path) -> None:
    """Two in the same step: the checkpoint that the first asks for is never made."""
    twice = [*interrupt("SIGINT", "on_train_batch_start", 8), *interrupt("SIGINT", "on_train_batch_start", 8)]
    stopped = fit(cli, tmp_path, small, *twice, ok=False)
    assert stopped.returncode == -signal.SIGINT
    assert checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")["global_step"] == 5


KILLED = {
    "chance": ("--config", "settings.yaml"),
    "one cycle": (
        *("--config", CONFIGS / "fast.yaml", "--data.batch_size=64", "--trainer.max_epochs=3"),
        "--trainer.log_every_n_steps=4",
    ),
    "TensorBoard and W&B": ("--config", "settings.yaml", "--config", OVERLAYS / "wandb.yaml"),
}


@slow
@pytest.mark.parametrize(
    "kind", ["chance", *(pytest.param(kind, marks=pytest.mark.matrix) for kind in list(KILLED)[1:])]
)
def test_forty_killed_runs_end_as_the_uninterrupted_one(forks: Forks, small: Path, tmp_path: Path, kind: str) -> None:
    """Killed at random moments, one to three times each; every fourth has to make its dataset first, and three
    of eight are met for the first time in a phase that chance may miss.
    """
    if "W&B" in kind:
        pytest.importorskip("wandb", reason="needs the extra [trackers]")
    chance, environment = random.Random(1), ENVIRONMENT | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    data = {
        "small": ("--data.dataset", small),
        "digits": (
            "--data.dataset=digits",
            "--trainer.limit_train_batches=16",
            "--trainer.limit_val_batches=3",
        ),
    }

    def start(folder: Path, name: str, *arguments: object) -> int:
        folder.mkdir(exist_ok=True)
        (folder / "settings.yaml").write_text(SETTINGS)
        settings = ["fit", *map(str, KILLED[kind] + data[name] + arguments)]
        settings += ["--last_checkpoint.every_n_train_steps=3", "--trainer.callbacks+=interrupt.Phase"]
        return forks.start(folder, settings, environment, folder / "output", folder / "output")

    seconds = {}
    for name in data:
        started = time.monotonic()
        start(tmp_path / name, name)
        assert forks.wait() == 0, (tmp_path / name / "output").read_text()
        seconds[name] = time.monotonic() - started

    kills: Counter[str] = Counter()
    for i in range(40):
        name, folder, attempt = "small" if i % 4 else "digits", tmp_path / f"killed-{i}", 0
        while True:
            pid = start(folder, name, "--ckpt_path=last")
            if attempt < 3 and (attempt == 0 or chance.random() < 0.5):
                met, phase = {1: "data", 2: "training", 3: "validation"}.get(i % 8), folder / "phase"
                deadline = time.monotonic() + 10
                if attempt == 0 and met:
                    while not (phase.exists() and phase.read_text() == met) and time.monotonic() < deadline:
                        time.sleep(0.001)
                else:
                    time.sleep(chance.uniform(0, 0.9 * seconds[name]))
                with suppress(ProcessLookupError):  # it may be done already
                    os.kill(pid, signal.SIGKILL)
            code = forks.wait()
            if code == 0 and attempt == 0:  # the machine has become faster
                seconds[name] *= 0.8
                shutil.rmtree(folder)
                continue
            if code == 0:
                break
            assert code == -signal.SIGKILL, (folder / "output").read_text()
            phase = folder / "phase"
            kills[phase.read_text() if phase.exists() else "start"] += 1
            phase.unlink(missing_ok=True)
            attempt += 1
        assert "Traceback" not in (folder / "output").read_text()
        runs = sorted((folder / "lightning_logs").iterdir())
        assert_same_run(runs[-1], tmp_path / name / RUN)
    print(f"{kind}: 40 of 40 runs end in the uninterrupted run's bytes, after {kills.total()} kills: {dict(kills)}")
    assert kills.total() >= 40
    assert {"data", "training", "validation", "checkpoint"} <= kills.keys()
