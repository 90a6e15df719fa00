"""What made a run, and how it ended."""

from __future__ import annotations

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from common import CONFIGS, RUN, Run
from interrupt import signal_at
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from mnist_lit.engine import Provenance


@pytest.mark.slow
def test_run_tells_what_made_it_and_how_it_ended(cli: Run, small: Path, tmp_path: Path) -> None:
    """In a repository with changes; the test after the fit ends in the numbers of a test of its own."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "notes.txt").write_text("one\n")
    git("add", "notes.txt")
    git("commit", "--quiet", "-m", "One")
    (tmp_path / "notes.txt").write_text("two\n")
    fit = ("fit", "--config", CONFIGS / "cnn.yaml", "--trainer.log_every_n_steps=4", "--data.dataset", small)
    cli(*fit, *signal_at("SIGTERM", "on_train_batch_end", 20), ok=False)
    done = cli(*fit, "--ckpt_path=last", "--test_after_fit=true")

    first, second = json.loads((tmp_path / RUN / "provenance.json").read_text())
    assert (first["exit"], first["step"]) == ("SIGTERM", 20)
    assert (second["exit"], second["step"]) == ("finished", 32)
    assert "--ckpt_path=last" in second["command"]
    assert first["versions"]["torch"] == version("torch")
    assert first["start"] < first["end"] < second["start"] < second["end"]
    assert first["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": True}
    assert "-one\n+two\n" in (tmp_path / RUN / "git.diff").read_text()

    metrics = json.loads((tmp_path / RUN / "metrics.json").read_text())
    assert metrics["best"]["checkpoint"] == "best.ckpt"
    tested = cli("test", "--ckpt_path", RUN / "checkpoints" / "best.ckpt")
    table = json.loads((tmp_path / "lightning_logs" / "version_1" / "metrics.json").read_text())
    for name in ("test/loss", "test/acc"):
        assert name in done.stdout
        assert str(metrics[name])[:6] in tested.stdout
        assert metrics[name] == table[name]


@pytest.mark.parametrize("damaged", [True, False])
def test_file_of_another_kind_does_not_end_the_run(tmp_path: Path, damaged: bool) -> None:
    """Nor does one that cannot be written. With a plain ``Trainer``."""
    file = tmp_path / "provenance.json"
    file.write_text("damaged") if damaged else file.mkdir()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = Trainer(max_steps=2, default_root_dir=tmp_path, callbacks=[Provenance()], **dict.fromkeys(quiet, False))
    if damaged:
        trainer.fit(BoringModel())
        (start,) = json.loads(file.read_text())
        assert (start["exit"], start["step"]) == ("finished", 2)
    else:
        with pytest.warns(UserWarning, match=r"provenance\.json is not written"):
            trainer.fit(BoringModel())
