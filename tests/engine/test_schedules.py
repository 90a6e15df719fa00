"""Every config and every kind of schedule, stopped anywhere, ends in the bytes of the uninterrupted run."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from common import CONFIGS, OVERLAYS, RUN, Run
from interrupt import signal_at
from test_execution import assert_same_training
from test_resume import TWO_PROCESSES, assert_same_run

pytestmark = pytest.mark.slow

COMMON = (  # 16 steps to an epoch; saved every 5, logged every 4
    *("--trainer.max_epochs=3", "--trainer.log_every_n_steps=4", "--trainer.enable_progress_bar=false"),
    *("--last_checkpoint.every_n_train_steps=5", "--data.batch_size=64", "--dashboard.confusion_matrix=false"),
    *("--dashboard.mistakes=0", "--dashboard.samples=0"),
)
MODELS = {
    **{path.stem: ("--config", path) for path in CONFIGS.glob("*.yaml") if path.stem != "sweep"},
    **{
        overlay: ("--config", CONFIGS / "cnn.yaml", "--config", OVERLAYS / f"{overlay}.yaml")
        for overlay in ("warmup", "ema")
    },
    "finetune": ("--config", CONFIGS / "fast.yaml", "--config", OVERLAYS / "finetune.yaml"),  # unfreezes at step 16
    **{
        schedule: ("--model=schedules.Scheduled", f"--model.schedule={schedule}")
        for schedule in ("one_cycle", "cosine", "cyclic", "plateau", "warmup_cosine")
    },
}
# Over an epoch, and on both sides of its borders.
POINTS = [
    ("on_train_batch_start", 0),
    ("on_train_batch_end", 5),
    ("on_train_batch_start", 9),
    ("on_train_batch_end", 15),
    ("on_validation_batch_start", 16),
    ("on_train_epoch_end", 16),
    ("on_train_epoch_start", 16),
    ("on_train_batch_end", 17),
    ("on_train_batch_start", 40),
    ("on_train_batch_end", 47),
]
SETTINGS = {
    "workers": ("--data.num_workers=2",),
    "accumulation": ("--trainer.accumulate_grad_batches=3",),
    "two processes": TWO_PROCESSES,
}


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


def fit(cli_in: Run, folder: Path, small: Path, *settings: object, ok: bool = True):
    ddp = "--trainer.strategy=ddp" in settings  # each of its processes, with a command of its own
    return cli_in(folder, "fit", *settings, *COMMON, "--data.dataset", small, ok=ok, fork=not ddp)


def assert_resumes(cli_in: Run, folder: Path, small: Path, whole, stop: tuple, *settings: object) -> None:
    stopped = fit(cli_in, folder, small, *settings, *signal_at(*stop), ok=False)
    assert stopped.returncode == {"SIGKILL": -9, "SIGTERM": 143}[stop[0]]
    fit(cli_in, folder, small, *settings, "--ckpt_path=last")
    assert_same_run(sorted((folder / "lightning_logs").iterdir())[-1], whole(*settings))


def every(n: int, cases: list[tuple]) -> list:
    """All of them; but for every n-th they are in the full matrix alone."""
    return [
        case if index % n == 0 else pytest.param(*case, marks=pytest.mark.matrix) for index, case in enumerate(cases)
    ]


@pytest.mark.parametrize(
    ("model", "point", "signum"), every(13, list(product(MODELS, POINTS, ("SIGKILL", "SIGTERM")))), ids=str
)
def test_stopped_anywhere(
    cli_in: Run, small: Path, tmp_path: Path, whole, model: str, point: tuple[str, int], signum: str
) -> None:
    if (signum, point[1]) == ("SIGTERM", 47):
        point = ("on_train_batch_end", 46)  # after the last step there is nothing left to stop
    assert_resumes(cli_in, tmp_path, small, whole, (signum, *point), *MODELS[model])


@pytest.mark.parametrize(("model", "setting"), every(9, list(product(sorted(MODELS.keys() - {"finetune"}), SETTINGS))))
def test_in_other_settings(cli_in: Run, small: Path, tmp_path: Path, whole, model: str, setting: str) -> None:
    step = 3 if setting != "workers" else 21  # of 6 or 8 to an epoch
    stop = ("SIGKILL" if setting == "workers" else "SIGTERM", "on_train_batch_end", step)
    assert_resumes(cli_in, tmp_path, small, whole, stop, *MODELS[model], *SETTINGS[setting])


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (1, 2)], ids=str)
def test_another_number_of_workers(cli_in: Run, small: Path, tmp_path: Path, whole, workers: tuple[int, int]) -> None:
    model = MODELS["one_cycle"]
    stop = signal_at("SIGTERM", "on_train_batch_end", 21)
    fit(cli_in, tmp_path, small, *model, f"--data.num_workers={workers[0]}", *stop, ok=False)
    fit(cli_in, tmp_path, small, *model, f"--data.num_workers={workers[1]}", "--ckpt_path=last")
    assert_same_training(tmp_path / RUN, whole(*model))


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.matrix)])
def test_workers_that_are_no_forks(cli_in: Run, small: Path, tmp_path: Path, whole, method: str) -> None:
    """As macOS and Windows start them."""
    options = (f"--trainer.callbacks.method={method}", "--data.num_workers=2")
    fit(cli_in, tmp_path, small, *MODELS["cnn"], "--trainer.callbacks+=start_method.StartMethod", *options)
    assert_same_training(tmp_path / RUN, whole(*MODELS["cnn"]))
