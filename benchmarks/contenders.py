"""What mnist_lit is compared with, each in a process of its own, and the clock that all of them carry.

``python -m benchmarks.contenders NAME MODEL DATA CLOCK`` trains one of them:

- ``tutorial``: the tutorial's script, from its archive to its last loop, as it stands there;
- ``stock``: Lightning as its documentation teaches it: loss and accuracy logged, progress bar,
  TensorBoard, checkpoints;
- ``recipe``: the network and schedule that are published as the fastest to 99 %.

mnist_lit itself runs through its own command line and configs, with ``Clock`` as one more callback.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

from tests.tutorial.tutorial import WrappedDataLoader, cnn_layers, fit

if TYPE_CHECKING:
    from lightning.pytorch import Callback

Pair = tuple[Tensor, Tensor]


class Marks:
    """Moments of a run, in seconds since 1970, and the most memory that it took, in bytes."""

    def __init__(self, path: str) -> None:
        self.path, self.epochs = Path(path), list[float]()
        self.moments: dict[str, Any] = {"epochs": self.epochs}  # when each began, and when the last ended

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


class Timed:
    """Batches of one epoch after the other, which mark its beginning."""

    def __init__(self, batches: Iterable[Pair], mark: Marks) -> None:
        self.batches, self.mark = batches, mark

    def __iter__(self) -> Iterator[Pair]:
        self.mark.epoch()
        return iter(self.batches)


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


def optimizer(args: argparse.Namespace, model: nn.Module) -> optim.Optimizer:
    """The tutorial's."""
    lr, momentum = {"logistic": (0.5, 0.0), "cnn": (0.1, 0.9)}[args.model]
    return optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def shape(name: str, x: Tensor) -> Tensor:
    """Rows (B, 784) as what the model takes."""
    return x if name == "logistic" else x.view(-1, 1, 28, 28)


# ------------------------------------------------------------------------------------------- tutorial


def tutorial(args: argparse.Namespace, mark: Marks) -> None:
    """``get_data``, ``get_model``, ``fit``; the device of its last section only where there is a GPU."""
    train, valid, *_ = read(args.data)
    dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_dl: Any = DataLoader(TensorDataset(*train), batch_size=args.batch_size, shuffle=True)
    valid_dl: Any = DataLoader(TensorDataset(*valid), batch_size=args.batch_size * 2)
    if args.model == "cnn" or dev.type == "cuda":

        def preprocess(x: Tensor, y: Tensor) -> Pair:
            return shape(args.model, x).to(dev), y.to(dev)

        train_dl, valid_dl = (WrappedDataLoader(dl, preprocess) for dl in (train_dl, valid_dl))
    model = network(args.model).to(dev)
    outcome = fit(args.epochs, model, F.cross_entropy, optimizer(args, model), Timed(train_dl, mark), valid_dl)
    mark.epoch()
    print(outcome.valid_losses)


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
            return optimizer(args, self)

    train, valid, *_ = read(args.data)
    trainer = L.Trainer(max_epochs=args.epochs, logger=TensorBoardLogger("."), callbacks=[clock(args.clock, mark)])
    trainer.fit(
        LitModel(),
        DataLoader(TensorDataset(*train), batch_size=args.batch_size, shuffle=True),
        DataLoader(TensorDataset(*valid), batch_size=args.batch_size * 2),
    )


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
    dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, _, test = ((x.view(-1, 1, 28, 28).to(dev), y.to(dev)) for x, y in read(args.data))
    (x_train, y_train), (x_test, y_test) = train, test
    model = recipe_network().to(dev)
    # Adam with a one-cycle learning rate over all epochs.
    adam = optim.Adam(model.parameters(), lr=1e-2, betas=(0.7, 0.9))
    steps = args.epochs * -(-len(x_train) // args.batch_size)
    schedule = optim.lr_scheduler.OneCycleLR(adam, max_lr=1e-2, total_steps=steps, cycle_momentum=False)
    batches = Timed(list(zip(x_train.split(args.batch_size), y_train.split(args.batch_size), strict=True)), mark)
    for _ in range(args.epochs):
        for xb, yb in batches:
            adam.zero_grad()
            F.cross_entropy(model(xb), yb).backward()
            adam.step()
            schedule.step()
    mark.epoch()
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(xb).argmax(1) for xb in x_test.split(2000)])
    mark.moments["accuracy"] = (predicted == y_test).float().mean().item()
    print(mark.moments["accuracy"])


def clock(path: str, mark: Marks | None = None) -> Callback:
    """A callback that takes the marks of a run of Lightning's; configs can name it."""
    from lightning.pytorch.callbacks import LambdaCallback

    marks = mark or Marks(path)

    def end(trainer: Any, _: Any) -> None:
        marks.epoch()
        marks.save()

    def test(trainer: Any, _: Any) -> None:
        marks.moments["accuracy"] = float(trainer.callback_metrics["test/acc"])
        marks.save()

    return LambdaCallback(on_train_epoch_start=lambda *_: marks.epoch(), on_train_end=end, on_test_end=test)


if __name__ == "__main__":
    contenders = {"tutorial": tutorial, "stock": stock, "recipe": recipe}
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=contenders)
    parser.add_argument("model", choices=["logistic", "cnn"], help="of the tutorial")
    parser.add_argument("data")
    parser.add_argument("clock")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    marks = Marks(arguments.clock)
    contenders[arguments.name](arguments, marks)
    marks.save()
