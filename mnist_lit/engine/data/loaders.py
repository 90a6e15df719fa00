"""Data loaders: whole batches by one index, in an order that follows from seed and epoch alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset, TensorDataset, default_collate

from mnist_lit.engine.errors import UserError


class Samples(Sequence[tuple[Tensor, ...]]):
    """Samples that are cut out of tensors at once, for whoever asks for them one by one.

    Args:
        tensors: each with a row for each sample.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: Any) -> Any:
        return tuple(tensor[index] for tensor in self.tensors)


class BatchTensorDataset(TensorDataset):
    """A ``TensorDataset`` that takes a whole batch out of its tensors with one index, also below a ``Subset``.

    Example:
        >>> dataset = BatchTensorDataset(images, labels)  # (n, H, W), (n,)
        >>> collate(dataset.__getitems__([3, 1]))  # images (2, H, W), labels (2,)
    """

    def __getitems__(self, indices: list[int]) -> Samples:
        """The hook through which PyTorch's loader asks for a batch: every tensor indexed once."""
        index = torch.tensor(indices)  # index_select is several times as fast as [indices]
        return Samples(*(tensor.index_select(0, index) for tensor in self.tensors))


def collate(samples: Any) -> Any:
    """PyTorch's ``default_collate``, which has nothing to do for ``Samples``."""
    return samples.tensors if isinstance(samples, Samples) else default_collate(samples)


class ResumableSampler(DistributedSampler):
    """A ``DistributedSampler`` that leaves out the first samples of an epoch."""

    skip = 0

    def __iter__(self) -> Iterator[int]:
        return islice(super().__iter__(), self.skip, None)


class ResumableLoader(DataLoader):
    """A ``DataLoader`` whose position in the epoch is part of the checkpoint.

    The order follows from seed and epoch, so the position is the number of samples taken, whatever workers
    have prefetched. A run may be resumed with another number of workers.

    Args:
        args: as in ``DataLoader``. Without a ``ResumableSampler`` every epoch starts at its beginning.
        kwargs: as in ``DataLoader``.

    Raises:
        UserError: when resumed within an epoch with another batch size or number of processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # of which Lightning makes others, such as to overfit
        super().__init__(*args, **kwargs)
        self._order = self.sampler if isinstance(self.sampler, ResumableSampler) else None
        self._taken = 0  # samples of this epoch
        self._resumed: dict[str, int] = {}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if order := self._order:
            order.skip = self._taken = self._position(order)
            if self.generator is not None:  # what workers draw at random follows from seed and epoch, too
                self.generator.manual_seed(order.seed + order.epoch)
        for batch in super().__iter__():
            self._taken += self.batch_size or 0
            yield batch

    def _position(self, order: ResumableSampler) -> int:
        resumed, self._resumed = self._resumed, {}
        if not resumed or resumed["epoch"] != order.epoch:
            return 0
        for name, ours in self._shares(order).items():
            if resumed[name] != ours:
                raise UserError(
                    f"the checkpoint is of the middle of an epoch with a {name} of {resumed[name]}, not {ours}, and "
                    f"batches are counted; resume with {resumed[name]}, or start a new run from its weights with "
                    "--init_from"
                )
        return resumed["samples"]

    def _shares(self, order: ResumableSampler) -> dict[str, int]:
        return {"batch size": self.batch_size or 0, "number of processes": order.num_replicas}

    def state_dict(self) -> dict[str, int]:
        """Epoch, samples taken of it, and what batches consist of."""
        order = self._order
        return {"epoch": order.epoch, "samples": self._taken, **self._shares(order)} if order else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Resume in the checkpoint's epoch after the samples taken.

        Raises:
            UserError: if the position is that of another kind of loader.
        """
        if self._order and state_dict.keys() != self.state_dict().keys():
            raise UserError(
                "the checkpoint's position in the epoch is that of another kind of data loader; start a new run from "
                "its weights with --init_from"
            )
        self._resumed = state_dict


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
    dataset: Dataset,
    batch_size: int,
    *,
    seed: int,
    trainer: Trainer | None = None,
    num_workers: int = 0,
) -> ResumableLoader:
    """Shuffle by seed and epoch. The position in the epoch is part of the checkpoint.

    Args:
        dataset: the training split, of any kind that has a length.
        batch_size: samples per step and device.
        seed: of the order.
        trainer: whose processes share the epoch; without one there is one process.
        num_workers: of the loader.

    Returns:
        a loader of batches. For a model with ``steps_per_execution`` each holds the batches of that many
        steps.
    """
    # For one process, too: its order depends on seed and epoch alone, which Lightning sets.
    order = ResumableSampler(
        dataset,
        num_replicas=trainer.world_size if trainer else 1,
        rank=trainer.global_rank if trainer else 0,
        seed=seed,
    )
    if trainer:
        order.set_epoch(trainer.current_epoch)  # workers prefetch before Lightning sets it
    steps = getattr(trainer.lightning_module, "steps_per_execution", 1) if trainer else 1
    loader = ResumableLoader(dataset, sampler=order, **_options(batch_size * steps, trainer, num_workers))
    loader.steps_per_execution = steps  # for StepsPerExecution, which needs such batches
    return loader


def eval_dataloader(
    dataset: Dataset, batch_size: int, *, trainer: Trainer | None = None, num_workers: int = 0
) -> DataLoader:
    """Go through the dataset once, in order. Every process gets its share, and no sample is evaluated twice.

    Lightning's own sampler would repeat samples to make the shares equal.

    Args:
        dataset: the split.
        batch_size: samples per step and device.
        trainer: whose processes share the split; without one there is one process.
        num_workers: of the loader.

    Raises:
        UserError: if there are fewer samples than processes.
    """
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


def _options(batch_size: int, trainer: Trainer | None, num_workers: int) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "generator": torch.Generator(),  # otherwise every loader draws from the model's random numbers
        "collate_fn": collate,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": trainer is not None and trainer.strategy.root_device.type == "cuda",
    }
