"""Sweeps: killed and gone on with, shared, pruned, and what they leave."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from common import CONFIGS, ENVIRONMENT, Run, assert_one_message, checkpoint
from forks import start, wait
from interrupt import signal_at
from PIL import Image

from mnist_lit.engine.sweep import PLOTS

SPACE = """
model.init_args.lr: {low: 0.01, high: 1.0, log: true}
data.init_args.batch_size: {choices: [64, 128]}
trainer.max_epochs: {low: 1, high: 2}
"""
FINISHED = {"COMPLETE", "PRUNED"}


@pytest.fixture
def arguments(small: Path, tmp_path: Path) -> tuple:
    (tmp_path / "space.yaml").write_text(SPACE)
    config = ("--config", CONFIGS / "logistic.yaml", "--data.dataset", small)
    return ("sweep", *config, "--space=space.yaml", "--dashboard.every_n_epochs=0")


def trials(folder: Path, study: str = "sweep") -> list[optuna.trial.FrozenTrial]:
    storage = f"sqlite:///{folder}/lightning_logs/{study}/study.db"
    return optuna.load_study(study_name=study, storage=storage).get_trials()


@pytest.mark.slow
def test_killed_sweep_goes_on_and_leaves_runs_the_best_config_and_plots(
    cli: Run, arguments: tuple, tmp_path: Path
) -> None:
    killed = signal_at("SIGKILL", "on_train_batch_end", 8, run="sweep-1")
    assert cli(*arguments, "--trials=2", *killed, ok=False).returncode == -signal.SIGKILL
    assert (tmp_path / "lightning_logs" / "sweep-1" / "config.yaml").exists()
    for number in (2, 2, 3):  # the same command again makes the missing trials
        done = cli(*arguments, f"--trials={number}")
        states = Counter(trial.state.name for trial in trials(tmp_path))
        assert sum(states[name] for name in FINISHED) == number
        assert states["FAIL"] + states["RUNNING"] == 1  # the killed one, which fails once it was silent for a while

    finished = [trial for trial in trials(tmp_path) if trial.state.name in FINISHED]
    for trial in finished:
        config = yaml.safe_load((tmp_path / trial.user_attrs["run"] / "config.yaml").read_text())
        assert config["model"]["init_args"]["lr"] == trial.params["model.init_args.lr"]
        assert config["trainer"]["max_epochs"] == trial.params["trainer.max_epochs"]
    best = min(finished, key=lambda trial: trial.value)
    assert f"{best.value:.4g}" in done.stdout
    for name in PLOTS:
        with Image.open(tmp_path / "lightning_logs" / "sweep" / f"{name}.png") as plot:
            assert len(plot.convert("L").getcolors()) > 2

    cli("fit", "--config=lightning_logs/sweep/best.yaml", "--run_name=again")
    callbacks = checkpoint(tmp_path / "lightning_logs/again/checkpoints/best.ckpt")["callbacks"]
    (score,) = (state["best_model_score"] for key, state in callbacks.items() if "BestCheckpoint" in key)
    assert score.item() == best.value


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.matrix)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/shared.db"
        return
    pytest.importorskip("psycopg")
    if not shutil.which("initdb"):
        pytest.skip("no PostgreSQL")
    user: dict[str, Any] = {} if os.getuid() else {"user": "nobody"}  # it does not run as root
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to others
        if user:
            shutil.chown(folder, **user)
        start = ("pg_ctl", "start", "--wait", f"--options=-k {folder} -c listen_addresses=''", f"--log={folder}/log")
        for command in (("initdb", "--username=me"), start):
            subprocess.run([*command, f"--pgdata={folder}/data"], check=True, stdout=subprocess.DEVNULL, **user)
        yield f"postgresql+psycopg://me@/postgres?host={folder}"
        subprocess.run(["pg_ctl", "stop", "--mode=immediate", f"--pgdata={folder}/data"], check=True, **user)


@pytest.mark.slow
def test_processes_share_a_study_and_make_up_for_a_killed_one(arguments: tuple, storage: str, tmp_path: Path) -> None:
    """All three are in a trial when the first is killed: none of the grid's trials is lost or run twice."""
    values = [0.1, 0.2, 0.4], [0.0, 0.5]
    space = "model.init_args.lr: {choices: [1e-1, 2e-1, 0.4]}\nmodel.init_args.momentum: {choices: [0.0, 0.5]}\n"
    (tmp_path / "space.yaml").write_text(space)  # 1e-1 is a text in YAML
    shared = (*arguments, "--sampler=grid", f"--storage={storage}", "--study=ours", "--trainer.max_epochs=1")
    output, started = tmp_path / "output", {}
    for name, more in {"a": signal_at("SIGKILL", "on_train_batch_end", 8), "b": (), "c": ()}.items():
        waits = ("--trainer.callbacks+=interrupt.WaitFor", f"--trainer.callbacks.path={name}")
        started[name] = start(tmp_path, [*map(str, shared), *waits, *more], ENVIRONMENT, output, tmp_path / "errors")
    while not all((tmp_path / f"{name}.waits").exists() for name in started):
        assert all(process.is_alive() for process in started.values())
        time.sleep(0.1)
    (tmp_path / "a").touch()
    assert wait(started["a"]) == -signal.SIGKILL
    for name in "bc":
        (tmp_path / name).touch()
    assert [wait(started[name]) for name in "bc"] == [0, 0], (tmp_path / "errors").read_text()
    found = optuna.load_study(study_name="ours", storage=storage).get_trials()
    finished = [trial for trial in found if trial.state.name in FINISHED]
    assert sorted(tuple(trial.params.values()) for trial in finished) == list(product(*values))
    assert len({trial.user_attrs["run"] for trial in finished}) == 6
    assert output.read_text().count("Train with it again") == 2
    assert not list(tmp_path.glob("lightning_logs/version_*"))


@pytest.mark.slow
def test_hopeless_trial_is_pruned_after_an_epoch(cli: Run, arguments: tuple, tmp_path: Path) -> None:
    """After five trials that nobody can match."""
    folder = tmp_path / "lightning_logs" / "sweep"
    folder.mkdir(parents=True)
    study = optuna.create_study(storage=f"sqlite:///{folder}/study.db", study_name="sweep")
    lr, old = "model.init_args.lr", {"run": "lightning_logs/old", "config": "model: Logistic\n"}
    tried = {"params": {lr: 0.5}, "distributions": {lr: optuna.distributions.FloatDistribution(0.1, 1.0)}}
    for _ in range(5):
        values = {"value": 1e-6, "intermediate_values": {0: 1e-6, 1: 1e-6}}
        study.add_trial(optuna.create_trial(**values, **tried, user_attrs=old))
    (tmp_path / "space.yaml").write_text("model.init_args.lr: {low: 0.1, high: 1.0}")
    cli(*arguments, "--trials=6")
    assert [trial.state.name for trial in trials(tmp_path)] == ["COMPLETE"] * 5 + ["PRUNED"]
    last = checkpoint(tmp_path / "lightning_logs" / "sweep-5" / "checkpoints" / "last.ckpt")
    assert last["epoch"] == 0
    assert (folder / "best.yaml").read_text() == "model: Logistic\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [("lrr", "'lrr' is not accepted"), pytest.param("lr", "no trial came to an end", marks=pytest.mark.slow)],
)
def test_wrong_sweep_is_one_message(cli: Run, arguments: tuple, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "space.yaml").write_text(f"model.init_args.{name}: {{choices: [1.0e+38]}}")
    assert_one_message(refused := cli(*arguments, "--trials=1", ok=False))
    assert message in refused.stderr
