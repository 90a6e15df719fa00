"""best.ckpt is the best, by a reading of the curves that knows nothing of how it is chosen."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from common import CONFIGS, RUN, Run, checkpoint, curves
from test_resume import interrupt

FIT = ("fit", "--config", CONFIGS / "logistic.yaml", "--model.lr=2", "--trainer.max_epochs=5")
FIT += ("--trainer.log_every_n_steps=4", "--dashboard.every_n_epochs=0")


def expected(run: Path, monitor: str, mode: str, k: int) -> list[int]:
    """The steps after which the metric was best, the best first; of equals the earlier."""
    sign = 1 if mode == "min" else -1
    ranked = sorted(curves(run)[monitor], key=lambda point: (sign * point[1], point[0]))
    return [step + 1 for step, _ in ranked][:k]


def kept(run: Path) -> dict[str, int]:
    """The checkpoints beside the last, with the step that each is of."""
    paths = [path for path in (run / "checkpoints").glob("*.ckpt") if path.name != "last.ckpt"]
    return {path.name: checkpoint(path)["global_step"] for path in paths}


@pytest.mark.parametrize(
    ("monitor", "mode", "k", "name", "how"),
    [
        pytest.param("val/acc", "auto", 1, None, "resumed", marks=pytest.mark.slow),
        *(
            pytest.param(monitor, mode, k, name, how, marks=[pytest.mark.slow, *also])
            for monitor, mode in (("val/acc", "auto"), ("val/acc", "max"), ("val/loss", "auto"), ("val/loss", "max"))
            for k, name in ((1, None), (3, None), (2, "{epoch}-{val/loss:.3f}"), (1, "my/{step}"))
            for how in ("whole", "resumed", "moved")
            for also in ([] if mode == "auto" and how == "moved" and k > 1 else [pytest.mark.matrix],)
        ),
    ],
)
def test_best_is_the_best(
    cli: Run, small: Path, tmp_path: Path, monitor: str, mode: str, k: int, name: str | None, how: str
) -> None:
    options = [f"--monitor={monitor}", f"--mode={mode}", f"--best_checkpoint.save_top_k={k}"]
    options += [f"--best_checkpoint.filename={name}"] if name else []
    root = tmp_path / "there"
    root.mkdir()
    command = (*FIT, "--data.dataset", small, *options)
    if how != "whole":
        cli(*command, f"--trainer.default_root_dir={root}", *interrupt("SIGKILL", "on_train_batch_end", 52), ok=False)
    if how == "moved":
        os.rename(root, tmp_path / "elsewhere")
        root = tmp_path / "elsewhere"
    done = cli(*command, f"--trainer.default_root_dir={root}", *(("--ckpt_path=last",) if how != "whole" else ()))

    run = root / RUN
    best = expected(run, monitor, {"auto": "max" if "acc" in monitor else "min"}.get(mode, mode), k)
    assert sorted(kept(run).values()) == sorted(best)
    assert not [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    if name is None:
        assert all(re.fullmatch(r"best(-epoch=\d-step=\d+)?\.ckpt", path) for path in kept(run))
    printed = re.search(r"--ckpt_path (\S+)", done.stdout)
    assert printed is not None
    assert checkpoint(tmp_path / printed[1])["global_step"] == best[0]
