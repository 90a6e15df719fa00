"""Exact resume with loaders, modules and data of anybody's, in a plain ``Trainer``."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from common import assert_same
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torchmetrics import MaxMetric, MeanMetric, Metric

from mnist_lit.engine import default_callbacks, train_dataloader

pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("Checkpoint directory", "no best.ckpt")]
N, BATCH = 40, 4  # ten steps per epoch


class Numbered(Dataset):
    """Samples that know their number, made at random when they are loaded."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3,), index / N) + 0.01 * torch.randn(3) + 0.01 * random.random(), index


class Average(Metric):
    """Weighs its state by the number of updates."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("value", torch.zeros(()), "mean")

    def update(self, value: Tensor) -> None:
        self.value = value

    def compute(self) -> Tensor:
        return self.value


class Model(LightningModule):
    """Draws random numbers, logs means of its own, keeps the largest, and has a schedule as long as the run.

    Args:
        loader: makes its training loader.
    """

    def __init__(self, loader: Callable[["Model"], Any]) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1))
        self.mean, self.average, self.best, self.loader = MeanMetric(), Average(), MaxMetric(), loader
        self.seen: list[list[int]] = []
        self.generator = torch.Generator().manual_seed(3)

    def train_dataloader(self) -> Any:
        return self.loader(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        several = list(batch.values()) if isinstance(batch, dict) else batch
        parts = [part for part in (several if isinstance(several[0], list | tuple) else [batch]) if part]
        self.seen.append([int(number) for _, numbers in parts for number in numbers])
        loss = sum((F.mse_loss(self.net(x)[:, 0], x.sum(1)) for x, _ in parts), torch.zeros(()))
        self.mean(loss.detach())
        self.average(loss.detach())
        self.log_dict({"mean": loss, "size": float(len(parts[0][0]))}, on_step=False, on_epoch=True, batch_size=BATCH)
        self.log("largest", loss, on_step=False, on_epoch=True, reduce_fx="max", batch_size=BATCH)
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        self.log("average", self.average, on_step=False, on_epoch=True)
        return loss

    def on_train_start(self) -> None:
        self.best.reset()

    def on_train_epoch_end(self) -> None:
        self.best(self.mean.compute())
        self.log("best", self.best.compute())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1, 0.9)
        if (steps := self.trainer.estimated_stepping_batches) in (-1, float("inf")):
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(Callback):
    """Looks at the metrics before other callbacks do, keeps those of whole epochs, and asks the run to stop in a step.

    Args:
        step: to stop in.
    """

    def __init__(self, step: int) -> None:
        self.step, self.means = step, {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        assert trainer.callback_metrics

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.callback_metrics:
            self.means[trainer.current_epoch] = {name: x.item() for name, x in trainer.callback_metrics.items()}

    on_train_end = on_train_epoch_start


def fit(
    folder: Path, make: Callable[["Model"], Any], *stops: int, **options: Any
) -> tuple[Model, list[list[int]], Any]:
    """Train, stopped in some steps and resumed; the module, the numbers that it has seen, and each epoch's means."""
    seen, means = [], {}
    for index, stop in enumerate([*stops, -1]):
        seed_everything(1, verbose=False)
        model = Model(make)
        watch, quiet = Watch(stop), {"enable_model_summary": False, "accelerator": "cpu", "logger": False}
        callbacks = default_callbacks(watch)
        trainer = Trainer(max_epochs=3, callbacks=callbacks, default_root_dir=folder, **quiet, **options)
        last = folder / "checkpoints" / "last.ckpt"
        with pytest.raises(SystemExit, match="143") if stop >= 0 else nullcontext():
            trainer.fit(model, ckpt_path=last if index else None, weights_only=True)
        seen += model.seen
        means |= watch.means
    return model, seen, means


class Stateful(DataLoader):
    """Keeps its position by itself."""

    position = 0

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(super().__iter__()):
            if index >= self.position:
                self.position = index + 1
                yield batch
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"] % (N // BATCH)


def loader(**options: Any) -> Callable[[Model], DataLoader]:
    return lambda model: DataLoader(Numbered(), **{"batch_size": BATCH, **options})


TENSORS = TensorDataset(torch.arange(3.0 * N).reshape(N, 3) / N, torch.arange(N))
BATCHES = TensorDataset(*(tensor.unflatten(0, (-1, BATCH)) for tensor in TENSORS.tensors))  # whole ones, by one index
LOADERS: dict[str, Callable[["Model"], Any]] = {
    "shuffle": loader(shuffle=True),
    "own generator": lambda model: loader(shuffle=True, generator=model.generator)(model),
    "weighted": loader(sampler=WeightedRandomSampler(torch.arange(N).float(), N)),
    "batch sampler": loader(batch_size=1, batch_sampler=BatchSampler(RandomSampler(range(N)), BATCH, True)),
    "whole batches": lambda model: DataLoader(BATCHES, batch_size=None, shuffle=True),
    "of the engine": lambda model: train_dataloader(TENSORS, BATCH, seed=5),
    "two": lambda model: [loader(shuffle=True)(model), loader(shuffle=True, generator=model.generator)(model)],
    "two of other lengths": lambda model: CombinedLoader(
        {"a": loader(shuffle=True)(model), "b": DataLoader(Numbered(), 16, shuffle=True)}, "max_size_cycle"
    ),
    "with a state": lambda model: Stateful(TENSORS, BATCH),
    "workers": loader(shuffle=True, num_workers=2),
    "persistent workers": loader(shuffle=True, num_workers=2, persistent_workers=True),
}
EPOCHS: tuple[dict[str, Any], ...] = {"limit_train_batches": 7}, {"accumulate_grad_batches": 2}
# Twice within one epoch, the second time in the first step after a resume; and before an epoch's last step.
CASES = [*((name, {}, (12, 13, 18)) for name in LOADERS), *(("own generator", epoch, (4, 9)) for epoch in EPOCHS)]
CASES += [("shuffle", {}, (9, 12))]  # between epochs
QUICK = "shuffle", "batch sampler", "two of other lengths", "with a state", "workers"
MARKED = [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] not in QUICK)) for case in CASES]


@pytest.mark.parametrize(("name", "options", "stops"), MARKED, ids=str)
def test_any_loader_resumes_bit_for_bit(tmp_path: Path, name: str, options: dict, stops: tuple[int, ...]) -> None:
    whole, seen, means = fit(tmp_path / "whole", LOADERS[name], **options)
    resumed, seen_too, means_too = fit(tmp_path / "stopped", LOADERS[name], *stops, **options)
    assert seen_too == seen
    if "workers" in name:
        return  # which draw other random numbers
    assert means_too == means
    assert len(means) == 3
    assert_same(whole.state_dict(), resumed.state_dict())


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(torch.full((3,), index / N), index) for index in range(N)])


def test_stream_without_state_starts_again_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="resumes with its weights, and with the loader's first batches"):
        _, seen, _ = fit(tmp_path, lambda model: DataLoader(Stream(), BATCH), 12)
    assert seen[13] == [0, 1, 2, 3]
