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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_one_message, assert_same, checkpoint, curves
from forks import Forks
from interrupt import signal_at

from mnist_lit.engine import Run as RunFolder

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
CODES = {"SIGKILL": -signal.SIGKILL, "SIGINT": 130, "SIGTERM": 143}
STATE = ("state_dict", "optimizer_states", "lr_schedulers", "processes", "metrics", "global_step", "epoch")
slow, matrix = pytest.mark.slow, pytest.mark.matrix


def fit(cli: Run, folder: Path, small: Path, *arguments: object, ok: bool = True):
    (folder / "settings.yaml").write_text(SETTINGS)
    settings = ("fit", "--config", "settings.yaml", "--data.dataset", small, *arguments)
    starts_anew = "--trainer.strategy=ddp" in arguments  # each of its processes, with a command of its own
    return cli(*settings, ok=ok, fork=not starts_anew)


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


WORKERS = "--data.num_workers=2"
PLATEAU = (
    "--lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau --lr_scheduler.monitor=val/loss "
    "--lr_scheduler.patience=0 --lr_scheduler.threshold=0.5"
)
TWO_PROCESSES = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
STOPS = [
    pytest.param(stop, settings.split(), id=f"{stop} {settings}", marks=marks)
    for marks, stop, settings in [
        ((), "SIGKILL on_train_batch_end 8", ""),
        (slow, "SIGTERM on_train_batch_start 9", WORKERS),
        (slow, "SIGKILL on_train_batch_start 24", WORKERS),
        # One of the two alone is asked to stop, which stops both with a checkpoint.
        (slow, "SIGTERM on_train_batch_end 3 0", " ".join(TWO_PROCESSES)),
        *(
            ((slow, matrix), stop, settings)
            for stop, settings in [
                ("SIGTERM on_train_batch_start 20", ""),
                ("SIGINT on_validation_batch_start 16", ""),
                ("SIGKILL on_validation_batch_start 32", ""),
                ("SIGKILL on_train_batch_end 2", ""),
                ("SIGKILL on_train_batch_end 5", ""),
                ("SIGKILL on_train_batch_start 5", ""),
                ("SIGKILL on_train_batch_end 16", ""),
                ("SIGKILL on_validation_end 16", ""),
                ("SIGKILL on_train_epoch_end 16", ""),
                ("SIGKILL on_train_epoch_start 16", ""),
                ("SIGKILL on_train_batch_end 17", ""),
                ("SIGKILL on_train_epoch_end 48", ""),
                ("SIGTERM on_train_epoch_start 32", ""),
                ("SIGTERM on_train_batch_end 47", ""),
                ("SIGTERM on_train_batch_end 31", ""),
                ("SIGINT on_train_batch_end 12", "--trainer.log_every_n_steps=1"),
                ("SIGKILL on_train_epoch_start 16", WORKERS),
                ("SIGKILL on_train_batch_end 18", PLATEAU),
                ("SIGKILL on_train_batch_end 43", PLATEAU),
                ("SIGKILL on_train_batch_end 18", "--trainer.log_every_n_steps=5"),
                ("SIGTERM on_train_batch_end 8", "--trainer.val_check_interval=5"),
                ("SIGKILL on_train_batch_end 12", "--trainer.val_check_interval=4"),
                ("SIGTERM on_train_batch_end 3", "--trainer.accumulate_grad_batches=3"),
                ("SIGKILL on_train_batch_end 8", "--trainer.accumulate_grad_batches=3"),
                ("SIGTERM on_train_batch_end 21", "--trainer.max_steps=40"),
                ("SIGKILL on_train_batch_end 18", "--trainer.max_steps=40"),
                ("SIGKILL on_train_batch_end 11", " ".join(TWO_PROCESSES)),
            ]
        ),
    ]
]


@pytest.mark.parametrize(("stop", "settings"), STOPS)
def test_resumed_run_is_the_uninterrupted_one(
    cli: Run, small: Path, tmp_path: Path, whole, stop: str, settings: list[str]
) -> None:
    signum, hook, *place = stop.split()
    stopped = fit(cli, tmp_path, small, *settings, *signal_at(signum, hook, *map(int, place)), ok=False)
    assert stopped.returncode == CODES[signum]
    if signum != "SIGKILL":
        assert "Traceback" not in stopped.stderr or settings == [*TWO_PROCESSES]
        (said,) = (line for line in stopped.stderr.splitlines() if line.startswith("Stopped at step"))
        assert re.search(rf"by {signum}. To go on: .*--ckpt_path {RUN}/checkpoints/last.ckpt", said)
    saved = (tmp_path / RUN / "checkpoints" / "last.ckpt").exists()
    resumed = fit(cli, tmp_path, small, *settings, "--ckpt_path=last")
    assert saved == (f"resuming from {RUN}/checkpoints/last.ckpt" in resumed.stderr)
    runs = sorted((tmp_path / "lightning_logs").iterdir())
    assert_same_run(runs[-1], whole(*settings))


def test_second_ctrl_c_stops_at_once(cli: Run, small: Path, tmp_path: Path) -> None:
    """Two in the same step: the checkpoint that the first asks for is never made."""
    twice = 2 * signal_at("SIGINT", "on_train_batch_start", 8)
    stopped = fit(cli, tmp_path, small, *twice, ok=False)
    assert stopped.returncode == -signal.SIGINT
    assert checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_eight_starts_at_once_make_eight_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunFolder.create(tmp_path, exist_ok=True), range(8)))
    assert sorted(run.name for run in runs) == [f"version_{number}" for number in range(8)]


@slow
def test_run_that_is_being_trained_is_not_resumed(cli: Run, forks: Forks, small: Path, tmp_path: Path) -> None:
    """Another process waits for it a while, and then leaves it alone."""
    fit(cli, tmp_path, small, *signal_at("SIGTERM", "on_train_batch_end", 20), ok=False)
    wait = ("--trainer.callbacks+=interrupt.WaitFor", f"--trainer.callbacks.path={tmp_path / 'go'}")
    resume = ["fit", "--config=settings.yaml", f"--data.dataset={small}", "--ckpt_path=last"]
    output, other = tmp_path / "output", Forks()
    try:
        other.start(tmp_path, [*resume, *wait], ENVIRONMENT, output, output)
        deadline = time.monotonic() + 60
        while not (tmp_path / "go.waits").exists():
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.01)
        assert_one_message(cli(*resume, ok=False), f"{RUN} is being trained by another process")
        (tmp_path / "go").touch()
        assert other.wait() == 0, output.read_text()
    finally:
        other.close()
    assert checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")["global_step"] == 48


KILLED = {
    "chance": ("--config", "settings.yaml"),
    "one cycle": (
        *("--config", CONFIGS / "fast.yaml", "--data.batch_size=64", "--trainer.max_epochs=3"),
        "--trainer.log_every_n_steps=4",
    ),
    "TensorBoard and W&B": ("--config", "settings.yaml", "--config", OVERLAYS / "wandb.yaml"),
}
DATASETS = {
    "digits": ("--data.dataset=digits", "--trainer.limit_train_batches=16", "--trainer.limit_val_batches=3"),
    "small": (),
}


@slow
@pytest.mark.parametrize("kind", ["chance", *(pytest.param(kind, marks=matrix) for kind in list(KILLED)[1:])])
def test_forty_killed_runs_end_as_the_uninterrupted_one(forks: Forks, small: Path, tmp_path: Path, kind: str) -> None:
    """Killed at random moments, one to three times each; every fourth has to make its dataset first, and three
    of eight are met for the first time in a phase that chance may miss.
    """
    if "W&B" in kind:
        pytest.importorskip("wandb", reason="needs the extra [trackers]")
    chance, environment = random.Random(1), ENVIRONMENT | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}

    def start(folder: Path, name: str, *arguments: object) -> int:
        folder.mkdir(exist_ok=True)
        (folder / "settings.yaml").write_text(SETTINGS)
        data = DATASETS[name] or ("--data.dataset", small)
        settings = ["fit", *map(str, KILLED[kind] + data + arguments)]
        settings += ["--last_checkpoint.every_n_train_steps=3", "--trainer.callbacks+=interrupt.Phase"]
        return forks.start(folder, settings, environment, folder / "output", folder / "output")

    seconds = {}
    for name in DATASETS:
        started = time.monotonic()
        start(tmp_path / name, name)
        assert forks.wait() == 0, (tmp_path / name / "output").read_text()
        seconds[name] = time.monotonic() - started

    kills: Counter[str] = Counter()
    for i in range(40):
        name, folder, attempt = "small" if i % 4 else "digits", tmp_path / f"killed-{i}", 0
        phase, met = folder / "phase", {1: "data", 2: "training", 3: "validation"}.get(i % 8)
        while True:
            pid = start(folder, name, "--ckpt_path=last")
            if attempt < 3 and (attempt == 0 or chance.random() < 0.5):
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
            kills[phase.read_text() if phase.exists() else "start"] += 1
            phase.unlink(missing_ok=True)
            attempt += 1
        assert "Traceback" not in (folder / "output").read_text()
        runs = sorted((folder / "lightning_logs").iterdir())
        assert_same_run(runs[-1], tmp_path / name / RUN)
    print(f"{kind}: 40 of 40 runs end in the uninterrupted run's bytes, after {kills.total()} kills: {dict(kills)}")
    assert kills.total() >= 40
    assert {"data", "training", "validation", "checkpoint"} <= kills.keys()
