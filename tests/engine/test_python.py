"""The engine from Python: a plain ``Trainer`` with ``default_callbacks``, in a script and in a notebook."""

import subprocess
import sys
from pathlib import Path

import pytest
from common import ENVIRONMENT, RUN, assert_same_last, checkpoint

TABLE = ("Classifier on", "best: epoch", "val/acc")
SCRIPT = """
import sys
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from interrupt import SignalAt
from mnist_lit import Classifier, MNISTDataModule
from mnist_lit.engine import BestCheckpoint, default_callbacks
from mnist_lit.models import cnn

dataset, signum, *ckpt_path = sys.argv[1:]
seed_everything(1)
own = [BestCheckpoint(monitor="val/acc"), *([SignalAt(signum, "on_train_batch_end", 20)] if signum else [])]
callbacks, shown = default_callbacks(*own, without=ProgressBar if ckpt_path else ()), not ckpt_path
trainer = Trainer(
    max_epochs=2, log_every_n_steps=4, accelerator="cpu", callbacks=callbacks, enable_progress_bar=shown
)
trainer.fit(Classifier(cnn(10)), datamodule=MNISTDataModule(dataset), ckpt_path=ckpt_path[0] if ckpt_path else None)
"""


@pytest.mark.slow
def test_script_has_what_the_command_line_has(small: Path, tmp_path: Path) -> None:
    """Bar, curves, table, best and last; Ctrl-C saves, and the resumed run ends in the uninterrupted one's weights."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*args: object, ends_with: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "script.py", str(small), *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode == ends_with, done.stderr
        return done

    whole = run("")
    assert all(shown in whole.stdout for shown in ("Epoch 2/2", *TABLE, "tensorboard --logdir lightning_logs"))
    assert "python -m" not in whole.stdout  # no command line started it
    assert {path.name for path in (tmp_path / RUN / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (tmp_path / RUN / "provenance.json").is_file()

    stopped = "lightning_logs/version_1/checkpoints/last.ckpt"
    assert f"ckpt_path='{stopped}'" in run("SIGINT", ends_with=130).stderr
    assert checkpoint(tmp_path / stopped)["global_step"] == 20
    assert "Epoch" not in run("", stopped).stdout
    ours, theirs = (tmp_path / f"lightning_logs/version_{number}" for number in (2, 0))
    assert_same_last(ours, theirs, "state_dict", "optimizer_states", "global_step")


@pytest.mark.slow
def test_script_of_two_processes_in_threads(small: Path, tmp_path: Path) -> None:
    """As Ray starts them: not all is for the first process, and Python handles no signals in a thread."""
    script = "from concurrent.futures import ThreadPoolExecutor as Pool\n" + SCRIPT.rstrip() + ".result()\n"
    script = script.replace("trainer.fit(", "Pool().submit(trainer.fit, ")
    script = script.replace('accelerator="cpu"', 'accelerator="cpu", devices=2, strategy="ddp"')
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "script.py", str(small), ""]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(shown in done.stdout for shown in (*TABLE, "The run is in lightning_logs/version_0"))
    assert checkpoint(tmp_path / RUN / "checkpoints" / "last.ckpt")["global_step"] == 16


@pytest.mark.slow
def test_notebook_has_what_the_command_line_has(small: Path, tmp_path: Path) -> None:
    """The same in cells: an interrupted one ends with an error, and the next one resumes."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    starts = [str(small), "SIGINT"], [str(small), "", f"{RUN}/checkpoints/last.ckpt"]
    cells = [nbformat.v4.new_code_cell(SCRIPT.replace("= sys.argv[1:]", f"= {start!r}")) for start in starts]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=600, allow_errors=True, resources=resources).execute(env=ENVIRONMENT)
    stopped, resumed = ("".join(map(str, cell.outputs)) for cell in notebook.cells)
    assert "Stopped at step 20 by SIGINT" in stopped
    assert all(shown in resumed for shown in TABLE)
    assert checkpoint(tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt")["global_step"] == 32
