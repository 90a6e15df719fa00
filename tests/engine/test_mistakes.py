"""The mistakes that people make: each ends in one message that names the thing, and the way out; before training, where
it can be known before.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from common import CONFIGS, ENVIRONMENT, OVERLAYS, RUN, Run, assert_one_message
from interrupt import signal_at

CNN, FAST = (f"--config={CONFIGS / name}.yaml" for name in ("cnn", "fast"))
LAST, BEST = (f"--ckpt_path={RUN}/checkpoints/{name}.ckpt" for name in ("last", "best"))
COSINE = '[{"class_path":"CosineAnnealingLR","init_args":{"T_max":-1}}]'  # as long as the run
SCHEDULE = f"--optimizer=SGD --optimizer.lr=0.1 --lr_scheduler=Schedule --lr_scheduler.schedulers={COSINE}"
PLATEAU = "--optimizer=SGD --optimizer.lr=0.1 --lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau"

# What is typed, and parts of the message; what begins with an option is a fit of cnn.yaml. {small} is a dataset, {last}
# and {best} are checkpoints of a run of cnn.yaml that was stopped, {port} is taken.
MISTAKES: dict[str, list[tuple[str, ...]]] = {
    "misspelt option": [
        ("fitt", "no command 'fitt' (did you mean fit?); the commands are fit, validate"),
        ("--trainer.max_epoch=3", "--trainer.max_epoch=3", "Did you mean max_epochs, not max_epoch?"),
        ("--trainr.max_epochs=3", "Did you mean trainer, not trainr?"),
        ("fit --modle=CNN", "Did you mean model, not modle?"),
        ("--model.lrr=3", "'lrr' is not accepted", "Did you mean lr, not lrr?"),
        ("--best_checkpoint.save_topk=3", "Did you mean save_top_k, not save_topk?"),
        ("fit --config=key.yaml", "trainer.max_epoch"),
        ("fit --config=list.yaml", "'dration' is not accepted"),
        ("--trainer.max_epochs=many", "trainer.max_epochs", "many"),
        ("--data.batch_size=-1", "batch_size", "-1"),
        ("--lr_scheduler=StepLR --lr_scheduler.step_size=1", "without --optimizer: give both"),
    ],
    "misspelt class": [
        ("fit --model=CNNN", "Did you mean CNN, not CNNN?"),
        ("fit --model=cnn", "Did you mean CNN, not cnn?"),
        ("--optimizer=SDG", "Did you mean SGD, not SDG?"),
        ("--trainer.callbacks+=EarlyStoping", "Did you mean EarlyStopping, not EarlyStoping?"),
        ("--trainer.logger=CVSLogger", "Did you mean CSVLogger, not CVSLogger?"),
        ("fit --model=other.Model", "not those of lightning.pytorch: import lightning.pytorch instead"),
    ],
    "place that is no folder": [
        ("--trainer.default_root_dir=s3://bucket/x", "default_root_dir=s3://bucket/x: runs are written to folders"),
        ("--best_checkpoint.dirpath=memory://x", "--best_checkpoint.dirpath=memory://x: runs are written to folders"),
    ],
    "schedule that does not fit": [
        (f"{{small}} {SCHEDULE} --trainer.max_epochs=-1", "needs a run with an end"),
        (f"{{small}} {SCHEDULE} --lr_scheduler.milestones=[3]", "every scheduler but the first needs a milestone"),
    ],
    "missing file": [
        ("fit --config=nowhere.yaml", "nowhere.yaml"),
        ("fit --config", "--config: expected one argument"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("--ckpt_path=memory://nowhere.ckpt", "memory://nowhere.ckpt cannot be used as a checkpoint"),
        ("--init_from=nowhere.ckpt", "--init_from=nowhere.ckpt: no such checkpoint"),
        ("--data.dataset=nowhere.npz", "nowhere.npz"),
        ("--data.dataset=loop", "loop: no such dataset"),
        (f"export {CNN}", "export needs the path of a checkpoint"),
        ("predict --ckpt_path=foreign.ckpt", "is not in a run's folder", "--config=FILE"),
        ("--ckpt_path=foreign.ckpt", "foreign.ckpt holds pathlib", "--weights_only=false"),
        (f"sweep {CNN} --space=nowhere.yaml", "nowhere.yaml"),
        ("{small} --trainer.default_root_dir=key.yaml", "cannot write in", "--trainer.default_root_dir"),
    ],
    "pipe instead of a file": [
        (command, "pipe")
        for command in (
            *("fit --config=pipe", "--ckpt_path=pipe", "--init_from=pipe", "--init_from=pipe.safetensors"),
            *("--data.dataset=pipe", "predict {best} --data.images=pipe", "serve --ckpt_path=pipe.onnx"),
            f"sweep {CNN} --space=pipe",
        )
    ],
    "wrong class counts": [
        ("{small} --model.num_classes=3", "--model.num_classes=3: the data say 10"),
        ("{small} --model.task=multilabel", "--model.task=multilabel: the data say multiclass"),
    ],
    "no network": [("--data.dataset=mnist --data.url=http://127.0.0.1:9/", "no connection")],
    "missing extra": [
        ("without optuna sweep", "optuna not installed: pip install 'mnist_lit[sweep]'"),
        ("without onnxruntime export {best}", "pip install 'mnist_lit[export]'"),
        (f"without wandb fit {CNN} --config={OVERLAYS / 'wandb.yaml'}", "pip install 'mnist_lit[trackers]'"),
        (f"without omegaconf fit {CNN} --config=env.yaml", "pip install 'mnist_lit[omegaconf]'"),
    ],
    "tracker that does not start": [
        (f"{{small}} --config={OVERLAYS / 'wandb.yaml'}", "WandbLogger cannot start a run"),
        (
            "{small} --trainer.logger=MLFlowLogger --trainer.logger.tracking_uri=http://127.0.0.1:{port}",
            *("MLFlowLogger waits for its server", "MLFlowLogger cannot start a run", "{port}"),
        ),
    ],
    "diverged": [("{small} --model.lr=1e30", "the loss is", "the learning rate 1e+30", "lower learning")],
    "monitor that nothing logs": [
        ("{small} --monitor=val/los", "--monitor=val/los: is lower or higher better?"),
        ("{small} --monitor=val/los --mode=min", "no such metric; the model logs val/acc, val/loss"),
        (
            "{small} --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/los",
            "monitor=val/los: there is no such metric",
        ),
        (f"{{small}} {PLATEAU} --lr_scheduler.monitor=val/los", "monitor=val/los: there is no such metric"),
    ],
    "resumed with other options": [
        ("{small} {last} --model.lr=0.01", "--model.lr=0.01 (0.1 in the checkpoint)", "--init_from="),
        ("{small} {last} --seed_everything=99", "--seed_everything=99"),
        ("{small} {last} --monitor=val/acc", "--monitor=val/acc (val/loss in the checkpoint)"),
        ("{small} {last} --best_checkpoint.save_top_k=3", "--best_checkpoint.save_top_k=3 (1"),
        ("{small} {last} --optimizer=Adam", "--optimizer="),
        ("{small} {last} --data.batch_size=32", "batch size of 64, not 32"),
    ],
    "checkpoint of another model": [
        (f"test {FAST} {{small}} {{best}}", "is not of this model", "config.yaml"),
        (f"fit {FAST} {{small}} --init_from={RUN}/checkpoints/last.ckpt", "last.ckpt does not fit FastCNN: "),
    ],
    "two writers of one run or checkpoint": [
        ("{small} --run_name=version_0", "there is such a run already"),
        (
            "{small} --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.filename=best",
            "ModelCheckpoint of trainer.callbacks writes best.ckpt or last.ckpt",
        ),
    ],
    "no GPU": [(f"--config={OVERLAYS / name}.yaml", "No supported gpu backend") for name in ("gpu", "fsdp")],
    "busy port": [("serve {best} --port={port}", "{port}")],
    "image that cannot be read": [("predict {best} --data.images=key.yaml", "key.yaml")],
}
TRACKERS = {"WANDB_API_KEY": "", "MLFLOW_HTTP_REQUEST_TIMEOUT": "7", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
FILES = {
    "key.yaml": "trainer: {max_epoch: 3}",
    "list.yaml": "{model: CNN, trainer: {callbacks: [{class_path: Timer, init_args: {dration: 3}}]}}",
    "env.yaml": "data: {init_args: {dataset: '${oc.env:DATA}'}}",
    "other.py": "from pytorch_lightning import LightningModule\nclass Model(LightningModule):\n    pass\n",
    "without.py": "import sys\nsys.modules[sys.argv.pop(1)] = None\nfrom mnist_lit.__main__ import main\nmain()\n",
}


@pytest.fixture(scope="module")
def folder(cli_in: Run, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run of cnn.yaml that was stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    torch.save({"state_dict": {}, "extra": folder}, folder / "foreign.ckpt")
    for suffix in ("", ".onnx", ".safetensors"):
        os.mkfifo(folder / f"pipe{suffix}")
    (folder / "loop").symlink_to("loop")
    stop = signal_at("SIGTERM", "on_train_batch_end", 20)
    cli_in(folder, "fit", CNN, "--data.dataset", small, *stop, ok=False)
    return folder


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


SLOW = "diverged", "missing extra", "no GPU", "tracker that does not start"


def checkpoints(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.ckpt")}


ROWS = [
    # Of most kinds the first, and the rest in the slow suite.
    pytest.param(*row, id=f"{kind} {number}", marks=[pytest.mark.slow] * (number > 0 or kind in SLOW))
    for kind, rows in MISTAKES.items()
    for number, row in enumerate((command, parts) for command, *parts in rows)
]


@pytest.mark.parametrize(("command", "parts"), ROWS)
def test_mistake_is_one_message(
    cli_in: Run, folder: Path, small: Path, port: int, command: str, parts: list[str]
) -> None:
    if "gpu" in parts[0] and torch.cuda.is_available():
        pytest.skip("there is one")
    if "Logger" in parts[0]:
        pytest.importorskip("wandb" if "Wandb" in parts[0] else "mlflow", reason="needs the extra [trackers]")
    if command.startswith(("--", "{")):
        command = f"fit {CNN} {command}"
    for place, text in {"{small}": f"--data.dataset={small}", "{last}": LAST, "{best}": BEST}.items():
        command = command.replace(place, text)
    before, typed = checkpoints(folder), command.replace("{port}", str(port)).split()
    if typed[0] == "without":
        line = [sys.executable, "without.py", *typed[1:]]
        refused = subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    else:
        refused = cli_in(folder, *typed, ok=False, env=TRACKERS)
    assert_one_message(refused)
    for part in parts:
        assert part.replace("{port}", str(port)) in refused.stderr
    assert checkpoints(folder) == before
