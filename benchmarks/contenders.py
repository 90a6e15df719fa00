"""What mnist_lit is compared with, each in a process of its own, and the clock that all of them carry.

``python -m benchmarks.contenders NAME MODEL DATA SEED`` trains one of them and leaves its clock in ``clock.json``:

- ``tutorial``: the tutorial's script, from its archive to its last loop, as it stands there, with one thread;
- ``stock``: Lightning as its documentation teaches it: loss and accuracy logged, progress bar,
  TensorBoard, checkpoints;
- ``recipe``: the network and schedule that are published as the fastest to 99 %.

mnist_lit itself runs through its own command line and configs, with ``Clock`` as one more callback.
"""

import gzip
import json
import pickle
import sys
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
EPOCHS, BATCH = 2, 64  # of the tutorial's models
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Marks:
    """Moments of a run, in seconds since 1970, and the most memory that it took, in bytes."""

    def __init__(self, path: str = "clock.json") -> None:
        self.path, self.epochs = Path(path), list[float]()  # when each epoch began, and when the last ended
        self.moments: dict[str, Any] = {"epochs": self.epochs}

    def epoch(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.epochs.append(time.time())

    def save(self) -> None:
        # Not getrusage's figure: on Linux a process starts with that of the one that has started it.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
        self.moments["peak_memory"] = int(peak) * 1024
        self.path.write_text(json.dumps(self.moments), encoding="utf-8")


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


def network(name: str) -> tuple[nn.Module, optim.Optimizer]:
    """The tutorial's two models, rows (B, 784) or images (B, 1, 28, 28) to scores (B, 10), and their optimizers."""
    model = (nn.Linear(784, 10) if name == "logistic" else cnn_layers(nn.AdaptiveAvgPool2d(1))).to(DEVICE)
    lr, momentum = (0.5, 0.0) if name == "logistic" else (0.1, 0.9)
    return model, optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def shape(name: str, x: Tensor) -> Tensor:
    """Rows (B, 784) as what the model takes."""
    return x if name == "logistic" else x.view(-1, 1, 28, 28)


def loaders(path: str) -> list[Any]:
    """Those of training and validation, as the tutorial makes them."""
    train, valid, *_ = (TensorDataset(*pair) for pair in read(path))
    return [DataLoader(train, batch_size=BATCH, shuffle=True), DataLoader(valid, batch_size=BATCH * 2)]


# ------------------------------------------------------------------------------------------- tutorial


def tutorial(name: str, data: str, mark: Marks) -> None:
    """``get_data``, ``get_model``, ``fit``; the device of its last section only where there is a GPU."""
    torch.set_num_threads(1)
    train_dl, valid_dl = loaders(data)
    if name == "cnn" or DEVICE.type == "cuda":

        def preprocess(x: Tensor, y: Tensor) -> Pair:
            return shape(name, x).to(DEVICE), y.to(DEVICE)

        train_dl, valid_dl = (WrappedDataLoader(dl, preprocess) for dl in (train_dl, valid_dl))
    model, opt = network(name)
    outcome = fit(EPOCHS, model, F.cross_entropy, opt, Timed(train_dl, mark), valid_dl)
    mark.epoch()
    print(outcome.valid_losses)


# ---------------------------------------------------------------------------------------------- stock


def stock(name: str, data: str, mark: Marks) -> None:
    """After https://lightning.ai/docs/pytorch/stable/starter/introduction.html and torchmetrics' page on
    Lightning, https://lightning.ai/docs/torchmetrics/stable/pages/lightning.html.
    """
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger
    from torchmetrics.classification import MulticlassAccuracy

    class LitModel(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.opt = network(name)
            self.train_acc, self.val_acc = MulticlassAccuracy(10), MulticlassAccuracy(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(shape(name, x))

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
            return self.opt

    trainer = L.Trainer(max_epochs=EPOCHS, logger=TensorBoardLogger("."), callbacks=[clock("clock.json", mark)])
    trainer.fit(LitModel(), *loaders(data))


# --------------------------------------------------------------------------------- the recipe for 99 percent


def recipe(_: str, data: str, mark: Marks) -> None:
    """The one epoch of https://github.com/tuomaso/train_mnist_fast: batches of 256 in the order of the archive, nothing
    looked at before the test.
    """
    (x_train, y_train), _, (x_test, y_test) = ((x.view(-1, 1, 28, 28).to(DEVICE), y.to(DEVICE)) for x, y in read(data))
    model = nn.Sequential(
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
    ).to(DEVICE)
    batches = list(zip(x_train.split(256), y_train.split(256), strict=True))
    adam = optim.Adam(model.parameters(), lr=1e-2, betas=(0.7, 0.9))
    schedule = optim.lr_scheduler.OneCycleLR(adam, max_lr=1e-2, total_steps=len(batches), cycle_momentum=False)
    for xb, yb in Timed(batches, mark):
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


def clock(path: str, mark: Marks | None = None) -> "Callback":
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
    contender, model, data, seed = sys.argv[1:]
    torch.manual_seed(int(seed))
    marks = Marks()
    {"tutorial": tutorial, "stock": stock, "recipe": recipe}[contender](model, data, marks)
    marks.save()
