"""What made a run, with a plain ``Trainer``; through the command line it is in test_options.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from common import ENVIRONMENT, ROOT
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from mnist_lit.engine import Provenance
from mnist_lit.engine.provenance import engine_version

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Failing(BoringModel):
    def on_train_epoch_end(self) -> None:
        raise ValueError("one\ntwo")


def fit(model: BoringModel, folder: Path) -> None:
    Trainer(max_steps=2, default_root_dir=folder, callbacks=[Provenance()], **QUIET).fit(model)


def test_every_start_is_on_record_with_the_engine(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text("damaged")
    fit(BoringModel(), tmp_path)
    with pytest.raises(ValueError, match="one"):
        fit(Failing(), tmp_path)
    finished, failed = json.loads((tmp_path / "provenance.json").read_text())
    assert (finished["exit"], failed["exit"]) == ("finished", "ValueError: one")
    assert finished["step"] == 2
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished["engine"]["commit"] == (commit.stdout.strip() or None)
    assert commit.stdout[:7] in engine_version()


def test_run_goes_on_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").mkdir()
    with pytest.warns(UserWarning, match=r"provenance\.json and metrics\.json are not written"):
        fit(BoringModel(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"url": "https://host/engine", "vcs_info": {"vcs": "git", "commit_id": "0a1b2c3d"}}, "9.1 (0a1b2c3)"),
        ({"url": "file:///wheel"}, "9.1"),
        (None, "9.1"),
    ],
)
def test_installed_engine_knows_its_commit(tmp_path: Path, origin: dict | None, expected: str) -> None:
    """Also in an environment that is inside of a repository."""
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    shutil.copytree(ROOT / "mnist_lit", tmp_path / "mnist_lit", ignore=shutil.ignore_patterns("__pycache__"))
    metadata = tmp_path / "mnist_lit-9.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mnist_lit\nVersion: 9.1\n")
    if origin is not None:
        (metadata / "direct_url.json").write_text(json.dumps(origin))
    code = "from mnist_lit.engine.provenance import engine_version; print(engine_version())"
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"mnist_lit {expected}\n"
