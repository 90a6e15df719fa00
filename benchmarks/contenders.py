"""What mnist_lit is compared with, each in a process of its own, and the clock that all of them carry.

``python -m benchmarks.contenders NAME MODEL DATA CLOCK`` trains one of them:

- ``tutorial``: the tutorial's script, from its archive to its last loop, as it stands there;
- ``stock``: Lightning as its documentation teaches it: loss and accuracy logged, progress bar,
  TensorBoard, checkpoints;
- ``barebones``: Lightning's loop with nothing around it;
- ``floor``: the leanest loop there is: whole batches by one index, nothing read back, nothing logged;
- ``recipe``: the network and schedule that are published as the fastest to 99 %.

mnist_lit itself runs through its own command line and configs, with ``Clock`` as one more callback.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from tests.tutorial.tutorial import WrappedDataLoader, cnn_layers

if TYPE_CHECKING:
    from lightning.pytorch import Callback

Pair = tuple[Tensor, Tensor]
LR, MOMENTUM = {"logistic": 0.5, "cnn": 0.1}, {"logistic": 0.0, "cnn": 0.9}


class Marks:
    """Moments of a run, in seconds since 1970, and the most memory that it took, in bytes."""

    def __init__(self, path: str) -> None:
        self.path, self.epochs = Path(path), list[float]()
        self.moments: dict[str, Any] = {"epochs": self.epochs}  # when each began, and when the last ended

    def __call__(self, name: str) -> None:
        self.moments.setdefault(name, time.time())

    def step(self) -> None:
        self("step")
        self.moments["last_step"] = time.time()

    def epoch(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.epochs.append(time.time())

    def save(self) -> None:
        # Not getrusage's figure: on Linux a process starts with that of the one that has started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        self.moments["peak_memory"] = int(peak) * 1024
        self.path.write_text(json.dumps(self.moments))


def read(path: str) -> tuple[Pair, ...]:
    """The tutorial's way from its archive to tensors."""
    with gzip.open(path, "rb") as f:
        splits = pickle.load(f, encoding="latin-1")
    return tuple((torch.tensor(x), torch.tensor(y)) for x, y in splits)


def network(name: str) -> nn.Module:
    """The tutorial's two models: rows (B, 784) or images (B, 1, 28, 28) to scores (B, 10)."""
    if name == "logistic":
        return nn.Linear(784, 10)
    return cnn_layers(nn.AdaptiveAvgPool2d(1))


def shape(name: str, x: Tensor) -> Tensor:
    """Rows (B, 784) as what the model takes."""
    return x if name == "logistic" else x.view(-1, 1, 28, 28)


# ------------------------------------------------------------------------------------------- tutorial


def tutorial(args: argparse.Namespace, mark: Marks) -> None:
    """``get_data``, ``get_model``, ``fit``; the device of its last section only where there is a GPU."""
    mark("imported")
    (x_train, y_train), (x_valid, y_valid), *_ = read(args.data)
    mark("data")
    dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_ds, valid_ds = TensorDataset(x_train, y_train), TensorDataset(x_valid, y_valid)
    train_dl: Any = DataLoader(train_ds, batch_size=args.batch_size, shuffle=True)
    valid_dl: Any = DataLoader(valid_ds, batch_size=args.batch_size * 2)
    if args.model == "cnn" or dev.type == "cuda":

        def preprocess(x: Tensor, y: Tensor) -> Pair:
            return shape(args.model, x).to(dev), y.to(dev)

        train_dl, valid_dl = (WrappedDataLoader(dl, preprocess) for dl in (train_dl, valid_dl))
    model = network(args.model).to(dev)
    opt = optim.SGD(model.parameters(), lr=LR[args.model], momentum=MOMENTUM[args.model])

    def loss_batch(xb: Tensor, yb: Tensor, opt: optim.Optimizer | None = None) -> tuple[float, int]:
        loss = F.cross_entropy(model(xb), yb)
        if opt is not None:
            loss.backward()
            opt.step()
            opt.zero_grad()
        return loss.item(), len(xb)

    for epoch in range(args.epochs):
        mark.epoch()
        model.train()
        for xb, yb in train_dl:
            loss_batch(xb, yb, opt)
            mark.step()
        model.eval()
        with torch.no_grad():
            losses, nums = zip(*[loss_batch(xb, yb) for xb, yb in valid_dl], strict=True)
        print(epoch, np.sum(np.multiply(losses, nums)) / np.sum(nums))
    mark.epoch()


# ---------------------------------------------------------------------------------------------- floor


def floor(args: argparse.Namespace, mark: Marks) -> None:
    """The same training; only what the result depends on is left."""
    dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    splits = ((shape(args.model, x).to(dev), y.to(dev)) for x, y in read(args.data))
    (x_train, y_train), (x_valid, y_valid), *_ = splits
    mark("data")
    model = network(args.model).to(dev)
    opt = optim.SGD(model.parameters(), lr=LR[args.model], momentum=MOMENTUM[args.model])
    for epoch in range(args.epochs):
        mark.epoch()
        for batch in torch.randperm(len(x_train), device=dev).split(args.batch_size):
            loss = F.cross_entropy(model(x_train[batch]), y_train[batch])
            loss.backward()
            opt.step()
            opt.zero_grad()
            mark.step()
        with torch.no_grad():
            pairs = zip(x_valid.split(2 * args.batch_size), y_valid.split(2 * args.batch_size), strict=True)
            total = torch.stack([F.cross_entropy(model(xb), yb, reduction="sum") for xb, yb in pairs]).sum()
        print(epoch, total.item() / len(x_valid))
    mark.epoch()


# ---------------------------------------------------------------------------------------------- stock


def stock(args: argparse.Namespace, mark: Marks) -> None:
    """After https://lightning.ai/docs/pytorch/stable/starter/introduction.html and torchmetrics' page on
    Lightning, https://lightning.ai/docs/torchmetrics/stable/pages/lightning.html.
    """
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger
    from torchmetrics.classification import MulticlassAccuracy

    class LitModel(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(args.model)
            self.train_acc, self.val_acc = MulticlassAccuracy(10), MulticlassAccuracy(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(shape(args.model, x))

        def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
            x, y = batch
            scores = self(x)
            loss = F.cross_entropy(scores, y)
            self.train_acc(scores, y)
            self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
            self.log("train_acc", self.train_acc, on_step=True, on_epoch=True, prog_bar=True)
            return loss

        def validation_step(self, batch: Pair, batch_idx: int) -> None:
            x, y = batch
            scores = self(x)
            self.val_acc(scores, y)
            self.log("val_loss", F.cross_entropy(scores, y), prog_bar=True)
            self.log("val_acc", self.val_acc, prog_bar=True)

        def configure_optimizers(self) -> optim.Optimizer:
            return optim.SGD(self.parameters(), lr=LR[args.model], momentum=MOMENTUM[args.model])

    train, valid, *_ = read(args.data)
    mark("data")
    trainer = L.Trainer(max_epochs=args.epochs, logger=TensorBoardLogger("."), callbacks=[clock(args.clock, mark)])
    trainer.fit(
        LitModel(),
        DataLoader(TensorDataset(*train), batch_size=args.batch_size, shuffle=True),
        DataLoader(TensorDataset(*valid), batch_size=args.batch_size * 2),
    )


# ------------------------------------------------------------------------------------------ barebones


def barebones(args: argparse.Namespace, mark: Marks) -> None:
    """Lightning's loop alone: no logging, no metric, no callback, and batches as cheap as mnist_lit's."""
    import lightning as L

    from mnist_lit.engine.data.loaders import BatchTensorDataset, collate

    class LitModel(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(args.model)

        def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.net(shape(args.model, x)), y)

        def on_train_epoch_start(self) -> None:
            mark.epoch()

        def on_train_batch_end(self, *_: Any) -> None:
            mark.step()

        def validation_step(self, batch: Pair, batch_idx: int) -> None:
            x, y = batch
            F.cross_entropy(self.net(shape(args.model, x)), y)

        def configure_optimizers(self) -> optim.Optimizer:
            return optim.SGD(self.parameters(), lr=LR[args.model], momentum=MOMENTUM[args.model])

    train, valid, *_ = (BatchTensorDataset(*pair) for pair in read(args.data))
    mark("data")
    trainer = L.Trainer(max_epochs=args.epochs, barebones=True)
    trainer.fit(
        LitModel(),
        DataLoader(train, batch_size=args.batch_size, shuffle=True, collate_fn=collate),
        DataLoader(valid, batch_size=args.batch_size * 2, collate_fn=collate),
    )
    mark.epoch()


# --------------------------------------------------------------------------------- the recipe for 99 percent


def recipe_network() -> nn.Module:
    """Images (B, 1, 28, 28) to scores (B, 10), after https://github.com/tuomaso/train_mnist_fast."""
    return nn.Sequential(
        nn.Conv2d(1, 24, 5),  # (B, 24, 24, 24)
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3),  # (B, 32, 10, 10)
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),  # (B, 800)
        nn.Linear(800, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def recipe(args: argparse.Namespace, mark: Marks) -> None:
    """Batches in the order of the archive, nothing looked at before the test, as published."""
    torch.manual_seed(args.seed)
    dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, _, test = ((x.view(-1, 1, 28, 28).to(dev), y.to(dev)) for x, y in read(args.data))
    (x_train, y_train), (x_test, y_test) = train, test
    mark("data")
    model = recipe_network().to(dev)
    # Adam with a one-cycle learning rate over all epochs.
    optimizer = optim.Adam(model.parameters(), lr=1e-2, betas=(0.7, 0.9))
    steps = args.epochs * -(-len(x_train) // args.batch_size)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps, cycle_momentum=False)
    for _ in range(args.epochs):
        mark.epoch()
        for xb, yb in zip(x_train.split(args.batch_size), y_train.split(args.batch_size), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(xb), yb).backward()
            optimizer.step()
            schedule.step()
            mark.step()
    mark.epoch()
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(xb).argmax(1) for xb in x_test.split(2000)])
    mark.moments["accuracy"] = (predicted == y_test).float().mean().item()
    print(mark.moments["accuracy"])


def clock(path: str, mark: Marks | None = None) -> Callback:
    """A callback that takes the marks of a run of Lightning's; configs can name it."""
    from lightning.pytorch import Callback

    mark = mark or Marks(path)

    class Clock(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            mark("data")

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            mark.epoch()

        def on_train_batch_end(self, *_: Any) -> None:
            mark.step()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            mark.epoch()
            if trainer.is_global_zero:
                mark.save()

        def on_test_end(self, trainer: Any, pl_module: Any) -> None:
            accuracies = [value for name, value in trainer.callback_metrics.items() if name in ("test/acc", "test_acc")]
            mark.moments["accuracy"] = float(accuracies[0])
            mark.save()

    return Clock()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    contenders = {
        "tutorial": tutorial,
        "stock": stock,
        "barebones": barebones,
        "floor": floor,
        "recipe": recipe,
    }
    parser.add_argument("name", choices=contenders)
    parser.add_argument("model", choices=["logistic", "cnn"], help="of the tutorial")
    parser.add_argument("data")
    parser.add_argument("clock")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    marks = Marks(arguments.clock)
    contenders[arguments.name](arguments, marks)
    marks.save()
