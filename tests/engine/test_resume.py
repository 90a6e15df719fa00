"""Stopped anywhere and started again, a run ends exactly where it would have ended."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_one_message, assert_same, checkpoint, curves
from forks import start, wait
from interrupt import signal_at
from test_execution import assert_same_training

from mnist_lit.engine import Run as RunFolder

# Random numbers from every generator, and a scheduler.
CHANCE = """
seed_everything: 7
model:
  class_path: Classifier
  init_args: {net: {class_path: interrupt.Chance}}
optimizer: {class_path: SGD, init_args: {lr: 0.02, momentum: 0.9}}
lr_scheduler: {class_path: StepLR, init_args: {step_size: 1, gamma: 0.7}}
"""
COMMON = (  # 16 steps to an epoch; saved every 5, logged every 4
    *("--trainer.max_epochs=3", "--trainer.log_every_n_steps=4", "--trainer.enable_progress_bar=false"),
    *("--last_checkpoint.every_n_train_steps=5", "--data.batch_size=64", "--dashboard.confusion_matrix=false"),
    *("--dashboard.mistakes=0", "--dashboard.samples=0"),
)
SCHEDULE = ("--config=chance.yaml", "--lr_scheduler=mnist_lit.engine.Schedule")
SCHEDULES = {  # of every step; -1 is as long as the run
    "one_cycle": ("OneCycleLR", {"max_lr": 0.1, "total_steps": -1}),  # momentum, too
    "cosine": ("CosineAnnealingLR", {"T_max": -1}),
    "cyclic": ("CyclicLR", {"base_lr": 0.001, "max_lr": 0.05, "step_size_up": 7}),
}
PLATEAU = "=lightning.pytorch.cli.ReduceLROnPlateau .monitor=val/loss .factor=0.5 .patience=0 .threshold=0.5".split()
MODELS = {
    "chance": ("--config", "chance.yaml", "--config", OVERLAYS / "csv.yaml"),
    **{name: ("--config", CONFIGS / f"{name}.yaml") for name in ("cnn", "fast")},  # all resume in tests/project
    **{
        overlay: ("--config", CONFIGS / f"{model}.yaml", "--config", OVERLAYS / f"{overlay}.yaml")
        for overlay, model in {"warmup": "cnn", "ema": "cnn", "finetune": "fast"}.items()  # which unfreezes at step 16
    },
    **{
        name: (*SCHEDULE, f"--lr_scheduler.schedulers=[{json.dumps({'class_path': kind, 'init_args': options})}]")
        for name, (kind, options) in SCHEDULES.items()
    },
    "plateau": ("--config=chance.yaml", *(f"--lr_scheduler{option}" for option in PLATEAU)),
}
# Over an epoch, and on both sides of its borders.
POINTS = [
    *("on_train_batch_end 8", "on_train_batch_start 0", "on_train_batch_end 5", "on_train_batch_start 9"),
    *("on_train_batch_end 15", "on_validation_batch_start 16", "on_train_epoch_end 16", "on_train_epoch_start 16"),
    *("on_train_batch_end 17", "on_train_batch_start 40", "on_train_batch_end 46"),
]
AT_ONCE = "=TensorBoardLogger", ".save_dir=.", ".flush_secs=0"
TWO_PROCESSES = ("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp")
SETTINGS = {
    "SIGKILL on_train_batch_end 21": ("--data.num_workers=2",),
    "SIGTERM on_train_batch_end 3": ("--trainer.accumulate_grad_batches=3",),  # of 6 steps to an epoch
    "SIGTERM on_train_batch_end 3 0": TWO_PROCESSES,  # one of the two is asked to stop, which stops both
    "SIGKILL on_train_batch_end 11": TWO_PROCESSES,
    # Before the first checkpoint, so that it starts again in its folder.
    "SIGKILL on_train_batch_end 4": ("--run_name=version_0", *(f"--trainer.logger{option}" for option in AT_ONCE)),
    "SIGINT on_train_batch_end 12": ("--trainer.log_every_n_steps=1",),
    "SIGTERM on_train_batch_end 8": ("--trainer.val_check_interval=5",),
    "SIGTERM on_train_batch_end 20": ("--trainer.max_steps=40",),
}
CODES = {"SIGKILL": -signal.SIGKILL, "SIGINT": 130, "SIGTERM": 143}
BEST = ("best_epoch", "best_step", "best_metrics", "best_model_score", "current_score")
STATE = ("state_dict", "optimizer_states", "lr_schedulers", "processes", "metrics", "global_step", "epoch")
slow, matrix = pytest.mark.slow, pytest.mark.matrix


def cases() -> list:
    """Every model with every point and signal, and with every setting; most of them in the full matrix alone."""
    stops = [f"{signum} {point}" for point, signum in product(POINTS, ("SIGKILL", "SIGTERM"))]
    points = [(model, stop, ()) for model, stop in product(MODELS, stops)]
    # Two processes would need find_unused_parameters to freeze.
    settings = [(model, *setting) for model, setting in product(MODELS, SETTINGS.items()) if model != "finetune"]
    marked = [
        pytest.param(*case, marks=[slow] if index % 13 == 0 else [slow, matrix], id=" ".join([*case[:2], *case[2]]))
        for index, case in enumerate([*points[1:], *settings])
    ]
    return [points[0], *marked]


def fit(cli_in: Run, folder: Path, small: Path, *settings: object, ok: bool = True) -> CompletedProcess[str]:
    (folder / "chance.yaml").write_text(CHANCE)
    ddp = "--trainer.strategy=ddp" in settings  # each of its processes, with a command of its own
    return cli_in(folder, "fit", *COMMON, "--data.dataset", small, *settings, ok=ok, fork=not ddp)


def assert_same_run(interrupted: Path, whole: Path) -> None:
    ours, theirs = (checkpoint(run / "checkpoints" / "last.ckpt") for run in (interrupted, whole))
    for key in STATE:
        assert_same(ours[key], theirs[key], key)
    for key in BEST:
        assert_same(*(last["callbacks"]["BestCheckpoint best"][key] for last in (ours, theirs)), key)
    for table in ("metrics.json", "metrics.csv"):
        if (whole / table).exists():
            assert (interrupted / table).read_text() == (whole / table).read_text()
    best, other = (checkpoint(run / "checkpoints" / "best.ckpt") for run in (interrupted, whole))
    assert_same(best["state_dict"], other["state_dict"])
    assert curves(interrupted) == curves(whole)
    for tag, points in curves(whole).items():
        steps = [step for step, _ in points]
        if tag != "epoch":  # which Lightning writes with the training and with the validation metrics
            assert steps == sorted(set(steps)), tag


@pytest.fixture(scope="module")
def whole(cli_in: Run, small: Path, tmp_path_factory: pytest.TempPathFactory):
    """Makes the uninterrupted run of some settings, once."""
    made: dict[tuple, Path] = {}

    def run(*settings: object) -> Path:
        if settings not in made:
            folder = tmp_path_factory.mktemp("whole")
            fit(cli_in, folder, small, *settings)
            made[settings] = folder / RUN
        return made[settings]

    return run


@pytest.mark.parametrize(("model", "stop", "options"), cases())
def test_resumed_run_is_the_uninterrupted_one(
    cli_in: Run, small: Path, tmp_path: Path, whole, model: str, stop: str, options: tuple[str, ...]
) -> None:
    signum, hook, *place = stop.split()
    settings = (*MODELS[model], *options)
    stopped = fit(cli_in, tmp_path, small, *settings, *signal_at(signum, hook, *map(int, place)), ok=False)
    assert stopped.returncode == CODES[signum]
    if signum != "SIGKILL":
        assert "Traceback" not in stopped.stderr or options == TWO_PROCESSES
        (said,) = (line for line in stopped.stderr.splitlines() if line.startswith("Stopped at step"))
        assert re.search(rf"by {signum}. To go on: .*--ckpt_path {RUN}/checkpoints/last.ckpt", said)
    saved = (tmp_path / RUN / "checkpoints" / "last.ckpt").exists()
    resumed = fit(cli_in, tmp_path, small, *settings, "--ckpt_path=last")
    assert saved == (f"resuming from {RUN}/checkpoints/last.ckpt" in resumed.stderr)
    assert_same_run(sorted((tmp_path / "lightning_logs").iterdir())[-1], whole(*settings))


@slow
@pytest.mark.parametrize(
    ("end", "options"),
    [
        (("--trainer.max_steps=20",), ()),
        (signal_at("should_stop", "on_train_batch_end", 20), ()),
        (signal_at("should_stop", "on_train_batch_start", 8), ("--trainer.accumulate_grad_batches=3",)),
    ],
    ids=["max_steps", "should_stop", "should_stop while gradients accumulate"],
)
def test_run_that_ended_within_an_epoch_goes_on(
    cli_in: Run, small: Path, tmp_path: Path, whole, end: tuple, options: tuple
) -> None:
    """With the rest of that epoch, ended by a number of steps or as ``max_time`` ends it; its end was logged, too."""
    settings = (*MODELS["chance"], *options)
    fit(cli_in, tmp_path, small, *settings, *end)
    fit(cli_in, tmp_path, small, *settings, "--ckpt_path=last")
    uninterrupted = whole(*settings)
    ours, theirs = (checkpoint(run / "checkpoints" / "last.ckpt") for run in (tmp_path / RUN, uninterrupted))
    for key in STATE:
        assert_same(ours[key], theirs[key], key)
    assert all(set(points) <= set(curves(tmp_path / RUN)[tag]) for tag, points in curves(uninterrupted).items())


@slow
@pytest.mark.parametrize(
    ("before", "after", "method"),
    [(0, 1, "spawn"), pytest.param(2, 0, "forkserver", marks=matrix)],
)
def test_another_number_of_workers(
    cli_in: Run, small: Path, tmp_path: Path, whole, before: int, after: int, method: str
) -> None:
    """Processes that are no forks are as macOS and Windows start them."""
    model = (*MODELS["cnn"], "--trainer.callbacks+=interrupt.StartMethod", f"--trainer.callbacks.method={method}")
    stop = signal_at("SIGTERM", "on_train_batch_end", 21)
    fit(cli_in, tmp_path, small, *model, f"--data.num_workers={before}", *stop, ok=False)
    fit(cli_in, tmp_path, small, *model, f"--data.num_workers={after}", "--ckpt_path=last")
    assert_same_training(tmp_path / RUN, whole(*MODELS["cnn"]))


def test_second_ctrl_c_stops_at_once(cli_in: Run, small: Path, tmp_path: Path) -> None:
    """Two in the same step: the checkpoint that the first asks for is never made."""
    twice = 2 * signal_at("SIGINT", "on_train_batch_start", 8)
    stopped = fit(cli_in, tmp_path, small, *MODELS["chance"], *twice, ok=False)
    assert stopped.returncode == -signal.SIGINT
    assert checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_eight_starts_at_once_make_eight_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: RunFolder.create(tmp_path, exist_ok=True), range(8)))
    assert sorted(run.name for run in runs) == [f"version_{number}" for number in range(8)]


@slow
def test_run_that_is_being_trained_is_not_resumed(cli_in: Run, small: Path, tmp_path: Path) -> None:
    """Another process waits for it a while, and then leaves it alone."""
    (tmp_path / "chance.yaml").write_text(CHANCE)
    command = ["fit", "--config=chance.yaml", *COMMON, f"--data.dataset={small}", "--ckpt_path=last"]
    output, last = tmp_path / "output", tmp_path / RUN / "checkpoints" / "last.ckpt"
    pause = signal_at("SIGSTOP", "on_train_batch_end", 8)
    trained, deadline = start(tmp_path, [*command, *pause], ENVIRONMENT, output, output), time.monotonic() + 60
    try:
        while not last.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = cli_in(tmp_path, *command, ok=False)
    finally:
        os.kill(trained.pid, signal.SIGCONT)
        assert wait(trained) == 0, output.read_text()
    assert_one_message(refused, f"{RUN} is being trained by another process")
    assert checkpoint(last)["global_step"] == 48


DATASETS = {
    "digits": ("--data.dataset=digits", "--trainer.limit_train_batches=16", "--trainer.limit_val_batches=3"),
    "small": (),
}


@slow
def test_forty_killed_runs_end_as_the_uninterrupted_one(small: Path, tmp_path: Path) -> None:
    """Killed at random moments, one to three times each; every fourth has to make its dataset first, and four
    of eight wait for the first time in a phase that chance may miss.
    """
    chance = random.Random(1)

    def start_in(folder: Path, name: str, *arguments: object, waits: str = "") -> Any:
        folder.mkdir(exist_ok=True)
        (folder / "chance.yaml").write_text(CHANCE)
        data = DATASETS[name] or ("--data.dataset", small)
        settings = ["fit", "--config=chance.yaml", *COMMON, *map(str, data + arguments)]
        settings += ["--last_checkpoint.every_n_train_steps=3", "--trainer.callbacks+=interrupt.Phase"]
        settings += [f"--trainer.callbacks.waits={waits}"]
        return start(folder, settings, ENVIRONMENT, folder / "output", folder / "output")

    seconds = {}
    for name in DATASETS:
        started = time.monotonic()
        assert wait(start_in(tmp_path / name, name)) == 0, (tmp_path / name / "output").read_text()
        seconds[name] = time.monotonic() - started

    kills: Counter[str] = Counter()
    for i in range(40):
        name, folder, attempt = "small" if i % 4 else "digits", tmp_path / f"killed-{i}", 0
        phase = folder / "phase"
        while True:
            waits = {1: "data", 2: "training", 3: "validation", 4: "checkpoint"}.get(i % 8, "") if attempt == 0 else ""
            process = start_in(folder, name, "--ckpt_path=last", waits=waits)
            if attempt < 3 and (attempt == 0 or chance.random() < 0.5):
                deadline = time.monotonic() + 60
                if not waits:
                    time.sleep(chance.uniform(0, 0.9 * seconds[name]))
                while waits and not (phase.exists() and phase.read_text() == waits) and time.monotonic() < deadline:
                    time.sleep(0.001)
                process.kill()  # it may be done already
            code = wait(process)
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
    print(f"40 of 40 runs end in the uninterrupted run's bytes, after {kills.total()} kills: {dict(kills)}")
    assert kills.total() >= 40
    assert {"data", "training", "validation", "checkpoint"} <= kills.keys()
