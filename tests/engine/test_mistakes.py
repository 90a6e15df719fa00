"""The mistakes that people make: each ends in one message that names the thing, and the way out; before training, where
it can be known before.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_one_message
from interrupt import signal_at

CNN = f"--config={CONFIGS / 'cnn.yaml'}"
LAST, BEST = (f"--ckpt_path={RUN}/checkpoints/{name}.ckpt" for name in ("last", "best"))
SGD = "--optimizer=SGD --optimizer.lr=0.1"
COSINE = '[{"class_path":"CosineAnnealingLR","init_args":{"T_max":-1}}]'  # as long as the run
SCHEDULE = f"{SGD} --lr_scheduler=Schedule --lr_scheduler.schedulers={COSINE}"
PLATEAU = f"{SGD} --lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau"

# What is typed, and parts of the message. {run} is a folder with a run of cnn.yaml that was stopped, {port} is taken.
MISTAKES: dict[str, list[tuple[str, ...]]] = {
    "misspelt option": [
        ("fitt", "no command 'fitt' (did you mean fit?); the commands are fit, validate"),
        ("Fit", "did you mean fit?"),
        (f"fit {CNN} --trainer.max_epoch=3", "--trainer.max_epoch=3", "Did you mean max_epochs, not max_epoch?"),
        (f"fit {CNN} --trainr.max_epochs=3", "Did you mean trainer, not trainr?"),
        (f"fit {CNN} --dta.dataset=digits", "Did you mean data, not dta?"),
        ("fit --modle=CNN", "Did you mean model, not modle?"),
        (f"fit {CNN} --model.lrr=3", "'lrr' is not accepted", "Did you mean lr, not lrr?"),
        (f"fit {CNN} --best_checkpoint.save_topk=3", "Did you mean save_top_k, not save_topk?"),
        (f"fit {CNN} stray --trainer.max_epoch=3", "Did you mean max_epochs, not max_epoch?"),
        ("fit --config=key.yaml", "trainer.max_epoch"),
        ("fit --config=top.yaml", "modle"),
        ("fit --config=list.yaml", "'dration' is not accepted"),
        (f"fit {CNN} --trainer.max_epochs=many", "trainer.max_epochs", "many"),
        (f"fit {CNN} --data.batch_size=-1", "batch_size", "-1"),
        (f"fit {CNN} --lr_scheduler=StepLR --lr_scheduler.step_size=1", "without --optimizer: give both"),
    ],
    "misspelt class": [
        ("fit --model=CNNN", "Did you mean CNN, not CNNN?"),
        ("fit --model=cnn", "Did you mean CNN, not cnn?"),
        (f"fit {CNN} --optimizer=SDG", "Did you mean SGD, not SDG?"),
        (f"fit {CNN} --optimizer=adamw", "Did you mean AdamW, not adamw?"),
        (f"fit {CNN} --trainer.callbacks+=EarlyStoping", "Did you mean EarlyStopping, not EarlyStoping?"),
        (f"fit {CNN} --trainer.logger=CVSLogger", "Did you mean CSVLogger, not CVSLogger?"),
    ],
    "schedule that does not fit": [
        (
            f"fit {CNN} {{small}} {SCHEDULE} --trainer.max_epochs=-1",
            "needs a run with an end",
        ),
        (
            f"fit {CNN} {{small}} {SCHEDULE} --lr_scheduler.milestones=[3]",
            "every scheduler but the first needs a milestone",
        ),
        (
            f"fit --config={CONFIGS / 'fast.yaml'} {{small}} --trainer.max_epochs=-1",
            "one-cycle",
            "--trainer.max_epochs",
        ),
    ],
    "missing file": [
        ("fit --config=nowhere.yaml", "nowhere.yaml"),
        ("fit --config", "--config: expected one argument"),
        (f"fit {CNN} --ckpt_path=nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("test --ckpt_path=nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        (f"fit {CNN} --init_from=nowhere.ckpt", "--init_from=nowhere.ckpt: no such checkpoint"),
        (f"fit {CNN} --data.dataset=nowhere.npz", "nowhere.npz"),
        (f"test {CNN} --ckpt_path=best", "test needs the path of a checkpoint"),
        (f"export {CNN}", "export needs the path of a checkpoint"),
        ("predict --ckpt_path=foreign.ckpt", "is not in a run's folder", "--config=FILE"),
        (f"fit {CNN} --ckpt_path=foreign.ckpt", "foreign.ckpt holds pathlib", "--weights_only=false"),
        (f"sweep {CNN} --space=nowhere.yaml", "nowhere.yaml"),
    ],
    "no network": [(f"fit {CNN} --data.dataset=mnist --data.url=http://127.0.0.1:9/", "no connection")],
    "missing extra": [
        ("without optuna sweep", "optuna not installed: pip install 'mnist_lit[sweep]'"),
        ("without onnxruntime export {best}", "pip install 'mnist_lit[export]'"),
        (f"without wandb fit {CNN} --config={OVERLAYS / 'wandb.yaml'}", "pip install 'mnist_lit[trackers]'"),
    ],
    "diverged": [(f"fit {CNN} {{small}} --model.lr=1e30", "the loss is", "the learning rate 1e+30", "lower learning")],
    "monitor that nothing logs": [
        (f"fit {CNN} {{small}} --monitor=val/los", "--monitor=val/los: is lower or higher better?"),
        (f"fit {CNN} {{small}} --monitor=val/los --mode=min", "no such metric; the model logs val/acc, val/loss"),
        (
            f"fit {CNN} {{small}} --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/los",
            "monitor=val/los: there is no such metric",
        ),
        (f"fit {CNN} {{small}} {PLATEAU} --lr_scheduler.monitor=val/los", "monitor=val/los: there is no such metric"),
    ],
    "resumed with other options": [
        (f"fit {CNN} {{small}} {{last}} --model.lr=0.01", "--model.lr=0.01 (0.1 in the checkpoint)", "--init_from="),
        (f"fit {CNN} {{small}} {{last}} --seed_everything=99", "--seed_everything=99"),
        (f"fit {CNN} {{small}} {{last}} --monitor=val/acc", "--monitor=val/acc (val/loss in the checkpoint)"),
        (f"fit {CNN} {{small}} {{last}} --best_checkpoint.save_top_k=3", "--best_checkpoint.save_top_k=3 (1"),
        (f"fit {CNN} {{small}} {{last}} --optimizer=Adam", "--optimizer="),
        (f"fit {CNN} {{small}} {{last}} --data.batch_size=32", "batch size of 64, not 32"),
        (f"fit {CNN} {{small}} {{last}} --trainer.fast_dev_run=3", "leave out --ckpt_path"),
    ],
    "checkpoint of another model": [
        (f"test --config={CONFIGS / 'fast.yaml'} {{small}} {{best}}", "is not of this model", "config.yaml"),
        (
            f"fit --config={CONFIGS / 'fast.yaml'} {{small}} --init_from={RUN}/checkpoints/last.ckpt",
            "none of its weights fits",
        ),
    ],
    "two writers of one checkpoint": [
        (
            f"fit {CNN} {{small}} --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename=best",
            "ModelCheckpoint of trainer.callbacks writes best.ckpt or last.ckpt",
        ),
    ],
    "busy port": [("serve {best} --port={port}", "{port}")],
    "image that cannot be read": [("predict {best} --data.images=key.yaml", "key.yaml")],
}
FILES = {
    "key.yaml": "trainer: {max_epoch: 3}",
    "top.yaml": "modle: CNN",
    "list.yaml": "{model: CNN, trainer: {callbacks: [{class_path: Timer, init_args: {dration: 3}}]}}",
    "without.py": "import sys\nsys.modules[sys.argv.pop(1)] = None\nfrom mnist_lit.__main__ import main\nmain()\n",
}


@pytest.fixture(scope="module")
def folder(cli_in: Run, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of cnn.yaml that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    torch.save({"state_dict": {}, "extra": folder}, folder / "foreign.ckpt")
    stop = signal_at("SIGTERM", "on_train_batch_end", 20)
    cli_in(folder, "fit", CNN, "--data.dataset", small, *stop, ok=False)
    return folder


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


ROWS = [
    # Of each kind the first, and the rest in the slow suite.
    pytest.param(*row, id=f"{kind} {number}", marks=[pytest.mark.slow] * (number > 0))
    for kind, rows in MISTAKES.items()
    for number, row in enumerate((command, parts) for command, *parts in rows)
]


@pytest.mark.parametrize(("command", "parts"), ROWS)
def test_mistake_is_one_message(
    cli_in: Run, folder: Path, small: Path, port: int, command: str, parts: list[str]
) -> None:
    places = {"{small}": f"--data.dataset={small}", "{last}": LAST, "{best}": BEST, "{port}": str(port)}
    typed = [places.get(word, word).replace("{port}", str(port)) for word in command.split()]
    before = set(folder.rglob("*.ckpt"))
    if typed[0] == "without":
        line = [sys.executable, "without.py", *typed[1:]]
        refused = subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    else:
        refused = cli_in(folder, *typed, ok=False)
    assert_one_message(refused)
    for part in parts:
        assert part.format(port=port) in refused.stderr
    assert set(folder.rglob("*.ckpt")) == before
