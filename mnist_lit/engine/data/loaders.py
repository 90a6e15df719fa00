"""Data loaders: whole batches by one index, in an order that follows from seed and epoch alone."""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset, TensorDataset, default_collate

from mnist_lit.engine.errors import UserError


class BatchTensorDataset(TensorDataset):
    """A ``TensorDataset`` that takes a whole batch out of its tensors with one index, for loaders with ``collate``."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The hook through which PyTorch's loader asks for a batch: every tensor indexed once."""
        index = torch.tensor(indices)  # index_select is several times as fast as [indices]
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


def collate(samples: Any) -> Any:
    """PyTorch's ``default_collate``, which has nothing to do for the batches of a ``BatchTensorDataset``."""
    return samples if isinstance(samples, tuple) else default_collate(samples)


def augment(transform: Callable[..., Any], batch: Any, seed: int, trainer: Trainer) -> Any:
    """Transform a training batch, so that what is drawn at random follows from seed, epoch and batch alone.

    Then a resumed run draws the same, and so does one that takes several steps per execution; and the model's own
    random numbers are those of a run without a transform.

    Args:
        transform: takes the samples of one step, images or images and targets, and returns the same.
        batch: of one step or, with ``steps_per_execution``, of several: a tensor, or a tuple of tensors.
        seed: of the transform.
        trainer: that is about to train on the batch.

    Example:
        >>> def on_after_batch_transfer(self, batch, dataloader_idx):
        ...     images, target = batch
        ...     if self.trainer.training:
        ...         images = augment(self.transform, images, self.seed, self.trainer)
        ...     return images, target
    """
    loader: Any = trainer.train_dataloader
    steps = getattr(loader, "steps_per_execution", 1)
    first = trainer.fit_loop.epoch_loop.batch_progress.current.ready * steps
    tensors = (batch,) if isinstance(batch, Tensor) else tuple(batch)
    devices = [tensors[0].device] if tensors[0].is_cuda else []
    parts = []
    with torch.random.fork_rng(devices):
        for index, part in enumerate(zip(*(each.split(loader.batch_size // steps) for each in tensors), strict=True)):
            place = (seed, trainer.current_epoch, first + index, trainer.global_rank)
            torch.manual_seed(int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "big"))
            done = transform(*part)
            parts.append((done,) if isinstance(done, Tensor) else done)
    joined = tuple(map(torch.cat, zip(*parts, strict=True)))
    return joined[0] if isinstance(batch, Tensor) else joined


def train_dataloader(
    dataset: Dataset, batch_size: int, *, seed: int, trainer: Trainer | None = None, num_workers: int = 0
) -> DataLoader:
    """Shuffle in an order that follows from seed and epoch alone.

    Args:
        dataset: the training split, of any kind that has a length; a ``TensorDataset`` is fastest.
        batch_size: samples per step and device. With a model's ``steps_per_execution`` a batch holds that many steps.
        seed: of the order.
        trainer: whose processes share the epoch; without one there is one process.
        num_workers: of the loader.
    """
    # For one process, too: its order depends on seed and epoch alone, which Lightning sets.
    world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
    order: DistributedSampler = DistributedSampler(dataset, num_replicas=world_size, rank=rank, seed=seed)
    steps = getattr(trainer.lightning_module, "steps_per_execution", 1) if trainer else 1
    loader = DataLoader(_batched(dataset), sampler=order, **_options(batch_size * steps, trainer, num_workers))
    loader.steps_per_execution = steps  # for StepsPerExecution
    return loader


def eval_dataloader(
    dataset: Dataset, batch_size: int, *, trainer: Trainer | None = None, num_workers: int = 0
) -> DataLoader:
    """Go through the dataset once, in order. No process repeats samples, as Lightning's own sampler would do.

    Args:
        dataset: the split.
        batch_size: samples per step and device.
        trainer: whose processes share the split; without one there is one process.
        num_workers: of the loader.

    Raises:
        UserError: if there are fewer samples than processes.
    """
    dataset = _batched(dataset)
    order: Sampler | None = None
    if trainer and (world_size := trainer.world_size) > 1:
        n = len(dataset)  # type: ignore[arg-type]
        if n < world_size:
            raise UserError(f"{n} samples to evaluate are too few for {world_size} processes")
        dataset = Subset(dataset, range(trainer.global_rank, n, world_size))
        # The same number of batches in every process, because DDP waits for the others at each.
        smallest, largest = n // world_size, -(-n // world_size)
        while -(-smallest // batch_size) != -(-largest // batch_size):
            batch_size += 1
        order = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)  # which Lightning leaves alone
    return DataLoader(dataset, sampler=order, **_options(batch_size, trainer, num_workers))


def _batched(dataset: Dataset) -> Dataset:
    return BatchTensorDataset(*dataset.tensors) if type(dataset) is TensorDataset else dataset


def _options(batch_size: int, trainer: Trainer | None, num_workers: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "generator": torch.Generator(),  # otherwise every loader draws from the model's random numbers
        "collate_fn": collate,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": trainer is not None and trainer.strategy.root_device.type == "cuda",
    }
