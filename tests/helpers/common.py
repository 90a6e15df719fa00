"""What tests share: places, and comparisons of what runs leave.

Torch is imported where it is needed: the process that only hands out tests starts without it.
"""

import csv
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
OVERLAYS = CONFIGS / "overlays"
RUN = Path("lightning_logs/version_0")
BEST, LAST = (RUN / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
ARCHIVE = os.environ.get("MNIST_LIT_ARCHIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time, each on one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'helpers'}:{ROOT / 'tests' / 'tutorial'}",
    "COLUMNS": "200",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


def checkpoint(path: Path) -> dict:
    import torch

    return torch.load(path, weights_only=True)


def predictions(run: Path) -> list[dict[str, str]]:
    """The rows of what ``predict`` wrote."""
    with (run / "predictions.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: per tag the steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same(one: object, other: object, where: str = "") -> None:
    """The same numbers, bit for bit, in any nest of containers."""
    import torch
    from lightning_utilities.core.apply_func import apply_to_collection

    def bits(tensor: torch.Tensor) -> tuple[object, ...]:
        return tensor.dtype, tensor.shape, tensor.cpu().flatten().view(torch.uint8).numpy().tobytes()

    ours, theirs = (apply_to_collection(tree, torch.Tensor, bits) for tree in (one, other))
    assert ours == theirs, where


def assert_same_last(run: Path, other: Path, *keys: str) -> None:
    """The same in the last checkpoints of two runs."""
    ours, theirs = (checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, other))
    for key in keys:
        assert_same(ours[key], theirs[key], key)


def assert_one_message(done: subprocess.CompletedProcess[str], *parts: str) -> str:
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stdout + done.stderr
    (message,) = (line for line in done.stderr.splitlines() if "error:" in line)
    for part in parts:
        assert part in message
    return message
