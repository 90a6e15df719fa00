"""best.ckpt is the best, by a reading of the curves that knows nothing of how it is chosen."""

import os
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from common import CONFIGS, RUN, Run, checkpoint, curves
from interrupt import signal_at

from mnist_lit.engine import BestCheckpoint

FIT = ("fit", "--config", CONFIGS / "logistic.yaml", "--model.lr=2", "--trainer.max_epochs=5")
FIT += ("--trainer.log_every_n_steps=4", "--dashboard.every_n_epochs=0")
NAMES, HOW = ("{epoch}-{val/loss:.3f}", "my/{step}"), ("whole", "resumed", "moved")
MORE = product(("val/acc", "val/loss"), ("auto", "max"), (1, 3), NAMES, HOW)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("monitor", "mode", "k", "name", "how"),
    [
        ("val/acc", "auto", 1, None, "resumed"),
        ("val/acc", "auto", 3, None, "moved"),
        ("val/loss", "auto", 2, "{epoch}-{val/loss:.3f}", "moved"),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in MORE),
    ],
)
def test_best_is_the_best(
    cli: Run, small: Path, tmp_path: Path, monitor: str, mode: str, k: int, name: str | None, how: str
) -> None:
    options = [f"--monitor={monitor}", f"--mode={mode}", f"--best_checkpoint.save_top_k={k}"]
    options += [f"--best_checkpoint.filename={name}"] if name else []
    root = tmp_path / "there"
    command = (*FIT, "--data.dataset", small, *options)
    if how != "whole":
        cli(*command, f"--trainer.default_root_dir={root}", *signal_at("SIGKILL", "on_train_batch_end", 52), ok=False)
    if how == "moved":
        os.rename(root, tmp_path / "elsewhere")
        root = tmp_path / "elsewhere"
    done = cli(*command, f"--trainer.default_root_dir={root}", *(("--ckpt_path=last",) if how != "whole" else ()))

    sign = -1 if mode == "max" or (mode == "auto" and "acc" in monitor) else 1
    # The best first; of equals the earlier. A point is logged at the index of the last step.
    ranked = sorted(curves(root / RUN)[monitor], key=lambda point: (sign * point[1], point[0]))
    best = [step + 1 for step, _ in ranked][:k]
    paths = [path for path in (root / RUN / "checkpoints").iterdir() if path.name != "last.ckpt"]
    assert sorted(checkpoint(path)["global_step"] for path in paths) == sorted(best)
    if name is None:
        assert all(re.fullmatch(r"best(-epoch=\d-step=\d+)?\.ckpt", path.name) for path in paths)
    printed = re.search(r"--ckpt_path (\S+)", done.stdout)[1]
    assert checkpoint(tmp_path / printed)["global_step"] == best[0]


@pytest.mark.parametrize(("name", "kept"), [("best.ckpt", True), ("last.ckpt", False), ("mine.ckpt", False)])
def test_only_files_of_its_own_names_are_taken_from_a_checkpoint(tmp_path: Path, name: str, kept: bool) -> None:
    """Any other would be deleted with the next best."""
    path = tmp_path / name
    path.touch()
    named = {"best_model_path": str(path), "best_k_models": {str(path): torch.tensor(0.5)}}
    restored = BestCheckpoint(dirpath=str(tmp_path))
    restored.load_state_dict(BestCheckpoint(dirpath=str(tmp_path)).state_dict() | named)
    assert (restored.best_model_path == str(path)) == kept == bool(restored.best_k_models)
