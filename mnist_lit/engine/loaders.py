"""Data loaders: whole batches by one index, in an order that follows from seed and epoch alone."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from mnist_lit.engine.errors import DatasetError


class BatchTensorDataset(TensorDataset):
    """A ``TensorDataset`` that takes a whole batch out of its tensors with one index.

    Example:
        >>> dataset = BatchTensorDataset(images, labels)  # (n, H, W), (n,)
        >>> dataset.__getitems__([3, 1])  # images (2, H, W), labels (2,)
    """

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """The hook through which PyTorch's loader asks for a batch: every tensor indexed once."""
        index = torch.tensor(indices)  # index_select is several times as fast as [indices]
        return tuple(tensor.index_select(0, index) for tensor in self.tensors)


def identity_collate(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The ``collate_fn`` for ``BatchTensorDataset``, which returns batches and not single samples."""
    return batch


def train_dataloader(
    dataset: BatchTensorDataset,
    batch_size: int,
    *,
    seed: int,
    trainer: Trainer | None = None,
    num_workers: int = 0,
) -> StatefulDataLoader:
    """Shuffle by seed and epoch. The position in the epoch is part of the checkpoint.

    Args:
        dataset: the training split.
        batch_size: samples per step and device.
        seed: of the order.
        trainer: whose processes share the epoch; without one there is one process.
        num_workers: of the loader.

    Returns:
        a loader of batches. For a model with ``steps_per_execution`` each holds the batches of that many
        steps.
    """
    # For one process, too: its order depends on seed and epoch alone, which Lightning sets.
    order = StatefulDistributedSampler(
        dataset,
        num_replicas=trainer.world_size if trainer else 1,
        rank=trainer.global_rank if trainer else 0,
        seed=seed,
    )
    if trainer:
        order.set_epoch(trainer.current_epoch)  # workers prefetch before Lightning sets it
    steps = getattr(trainer.lightning_module, "steps_per_execution", 1) if trainer else 1
    loader = _loader(dataset, batch_size * steps, trainer, num_workers, order)
    loader.steps_per_execution = steps  # for StepsPerExecution, which needs such batches
    return loader


def eval_dataloader(
    dataset: BatchTensorDataset, batch_size: int, *, trainer: Trainer | None = None, num_workers: int = 0
) -> StatefulDataLoader:
    """Go through the dataset once, in order. Every process gets its share, and no sample is evaluated twice.

    Lightning's own sampler would repeat samples to make the shares equal.

    Args:
        dataset: the split.
        batch_size: samples per step and device.
        trainer: whose processes share the split; without one there is one process.
        num_workers: of the loader.

    Raises:
        DatasetError: if there are fewer samples than processes.
    """
    order = None
    if trainer and (world_size := trainer.world_size) > 1:
        n = len(dataset)
        if n < world_size:
            raise DatasetError(f"{n} samples to evaluate are too few for {world_size} processes")
        dataset = BatchTensorDataset(*(t[trainer.global_rank :: world_size] for t in dataset.tensors))
        # The same number of batches in every process, because DDP waits for the others at each.
        smallest, largest = n // world_size, -(-n // world_size)
        while -(-smallest // batch_size) != -(-largest // batch_size):
            batch_size += 1
        order = StatefulDistributedSampler(dataset, num_replicas=1, rank=0, shuffle=False)
    return _loader(dataset, batch_size, trainer, num_workers, order)


def _loader(
    dataset: BatchTensorDataset, batch_size: int, trainer: Trainer | None, num_workers: int, order: Any
) -> StatefulDataLoader:
    return StatefulDataLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        generator=torch.Generator(),  # otherwise every loader draws from the model's random numbers
        collate_fn=identity_collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
    )
