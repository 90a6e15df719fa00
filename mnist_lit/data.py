"""Tensors to batches: the ``LightningDataModule``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.text import Text
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from mnist_lit import digits
from mnist_lit.archive import (
    ArchiveError,
    DownloadError,
    Splits,
    cached,
    decode,
    download_mnist,
    read_mnist,
    stamp,
)
from mnist_lit.pictures import SIDE, PictureError, find_pictures, read_picture

Batch = tuple[Tensor, Tensor]

URL = "https://github.com/pytorch/tutorials/raw/master/_static/mnist.pkl.gz"

NOT_MNIST = """\
{reason}.

Instead of MNIST, this run uses the digits that come with mnist_lit: real handwriting, but only 1,797 \
originals. Its figures say nothing about MNIST. For MNIST, do one of these and run again:
  - put the tutorial's file at {archive}
  - name a server that has it: --data.url=https://.../mnist.pkl.gz
  - name a file that you have: --data.dataset=path/to/mnist.pkl.gz
If the digits are what you want, say so with --data.dataset=digits, and this notice goes away."""


class Images(Dataset[Batch]):
    """Images and labels that are taken out a whole batch at a time.

    Args:
        images: uint8 (n, H, W).
        labels: int64 (n,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """One indexing operation for the whole batch: images (B, H, W), labels (B,)."""
        index = torch.tensor(indices)  # index_select is several times as fast as [indices]
        return self.images.index_select(0, index), self.labels.index_select(0, index)


def as_it_is(batch: Batch) -> Batch:
    """The ``collate_fn``: ``Images.__getitems__`` hands out whole batches, nothing is left to collate."""
    return batch


class MNISTDataModule(LightningDataModule):
    """MNIST, the embedded digits, or a dataset file of one's own.

    Batches leave the loaders as uint8 images (B, H, W) and int64 labels (B,), and reach the model as
    float32 images (B, 1, H, W) in 0..1 and the same labels.

    Args:
        dataset: ``mnist``; ``digits`` (embedded, needs no network); ``auto``: MNIST if it is on disk or
            can be downloaded, else the digits; or the path of a ``.pkl.gz`` in the tutorial's layout or an
            ``.npz`` with ``x_train, y_train, x_valid, y_valid`` and perhaps ``x_test, y_test``.
        data_dir: the folder of the archive, ``mnist/mnist.pkl.gz`` in it, and of the fast copies.
        url: where to download MNIST's archive.
        timeout: seconds after which a silent server counts as failed.
        batch_size: training images per step and device; evaluation takes twice as many.
        num_workers: processes that load batches; 0 is fastest for data in memory.
        num_classes: how many classes the model is to tell apart; by default as many as the dataset has.
        images: what ``predict`` reads instead of the test split: image files, folders or patterns such as
            ``digits/*.png``. Files that cannot be read end up in ``broken``, with the reason.
    """

    splits: Splits

    def __init__(
        self,
        dataset: str = "auto",
        data_dir: str = "data",
        url: str = URL,
        timeout: PositiveFloat = 10.0,
        batch_size: PositiveInt = 64,
        num_workers: NonNegativeInt = 0,
        num_classes: PositiveInt | None = None,
        images: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images", "num_classes"])
        self.dataset, self.data_dir, self.url, self.timeout = dataset, Path(data_dir), url, timeout
        # Plain numbers: what is of jsonargparse's types does not load from a checkpoint without trust.
        self.batch_size, self.num_workers = int(batch_size), int(num_workers)
        self._num_classes = num_classes and int(num_classes)
        self.images = [images] if isinstance(images, str) else images or []
        self.files: list[Path] = []  # one for each image that is predicted
        self.broken: dict[Path, str] = {}
        self.dataset_used = self.digest = ""
        self.seed = torch.initial_seed()

    def prepare_data(self) -> None:
        """Once per node: everything that takes time or the network, so that ``setup`` finds it on disk."""
        if self._predicts_files or self.dataset_used:
            return
        if self.dataset in ("auto", "mnist") and not self._archive.exists():
            try:
                download_mnist(self.url, self._archive, self.timeout)
            except DownloadError as error:
                if self.dataset == "mnist":
                    raise ArchiveError(
                        f"{error}; put the file at {self._archive}, or name another server with --data.url"
                    ) from error
                text = NOT_MNIST.format(reason=error, archive=self._archive)
                Console(stderr=True).print(Panel(Text(text), title="NOT MNIST", style="bold yellow"))
        self._open()

    def setup(self, stage: str) -> None:
        """On every process: opens the dataset that ``prepare_data`` left on disk, or reads ``images``."""
        if self._predicts_files:
            self._read_files()
        elif not self.dataset_used:
            self._open()

    @property
    def num_classes(self) -> int:
        """What the command line builds the model for; opens the dataset where it was not given."""
        if self._num_classes is None:
            self.prepare_data()
            self._num_classes = self._labelled_classes()
        return self._num_classes

    @property
    def num_pixels(self) -> int:
        """H * W of the images; opens the dataset, unless ``images`` take its place."""
        if self.images:
            return SIDE * SIDE
        self.prepare_data()
        return self.splits.train[0][0].numel()

    def _labelled_classes(self) -> int:
        return max(int(labels.max()) + 1 for _, labels in self.splits if len(labels))

    @property
    def _predicts_files(self) -> bool:
        return bool(self.images) and self.trainer is not None and self.trainer.state.fn == "predict"

    def _read_files(self) -> None:
        paths, pictures = find_pictures(self.images), []
        self.files, self.broken = [], {}
        for path in track(paths, "Reading images", disable=len(paths) < 100, transient=True):
            try:
                pictures.append(read_picture(path))
                self.files.append(path)
            except PictureError as error:
                self.broken[path] = str(error)
        if not pictures:
            path, reason = next(iter(self.broken.items()))
            raise ArchiveError(f"none of {len(paths)} files can be predicted; {path}: {reason}")
        images = torch.stack(pictures)  # (n, 28, 28)
        self.pictures = images, torch.zeros(len(images), dtype=torch.int64)  # nobody knows the labels

    @property
    def _archive(self) -> Path:
        return self.data_dir / "mnist" / "mnist.pkl.gz"

    def _open(self) -> None:
        dataset, data_dir = self.dataset, self.data_dir
        if dataset == "auto":
            dataset = "mnist" if self._archive.exists() else "digits"
        if dataset == "digits":
            self.splits, _ = cached(data_dir / "digits" / "digits.pt", digits.VERSION, digits.make_digits)
            self.digest = digits.VERSION  # pixels may differ by a rounding from machine to machine
        elif dataset == "mnist":
            self.splits, self.digest = cached(
                self._archive.with_name("mnist.pt"), stamp(self._archive), lambda: read_mnist(self._archive)
            )
        else:
            path = Path(dataset).resolve()
            name = f"{path.name}-{hashlib.sha256(bytes(path)).hexdigest()[:8]}.pt"
            self.splits, self.digest = cached(data_dir / "copies" / name, stamp(path), lambda: decode(path))
        if self._num_classes is not None and self._labelled_classes() > self._num_classes:
            raise ArchiveError(
                f"{dataset} has labels up to {self._labelled_classes() - 1}, the model tells "
                f"{self._num_classes} classes apart"
            )
        self.dataset_used = dataset
        self.save_hyperparameters({"dataset_used": dataset})

    def train_dataloader(self) -> StatefulDataLoader:
        """Shuffled training batches; the loader's place in the epoch travels in the checkpoint."""
        # For one process, too: its order depends on seed and epoch alone, which Lightning sets.
        order = StatefulDistributedSampler(
            Images(*self.splits.train),
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
            seed=self.seed,
        )
        if self.trainer:
            order.set_epoch(self.trainer.current_epoch)  # workers fetch ahead before Lightning does so
        # A model that takes several steps in one takes the batches of all of them in one.
        model = self.trainer.lightning_module if self.trainer else None
        steps = getattr(model, "steps_per_execution", 1)
        return self._loader(self.splits.train, self.batch_size * steps, order)

    def val_dataloader(self) -> StatefulDataLoader:
        """Validation batches, of twice the size: without gradients there is room for them."""
        return self._evaluation_loader(self.splits.valid)

    def test_dataloader(self) -> StatefulDataLoader:
        """Test batches.

        Raises:
            ArchiveError: when the dataset has no test split.
        """
        self._require_test_split()
        return self._evaluation_loader(self.splits.test)

    def predict_dataloader(self) -> StatefulDataLoader:
        """``images``, or else the test split."""
        if self._predicts_files:
            return self._loader(self.pictures, 2 * self.batch_size)
        self._require_test_split()
        return self._loader(self.splits.test, 2 * self.batch_size)

    def _require_test_split(self) -> None:
        if not len(self.splits.test[0]):
            raise ArchiveError(f"{self.dataset_used}: no test split, expected arrays x_test and y_test")

    def _evaluation_loader(self, split: Batch) -> StatefulDataLoader:
        """Of several processes each gets its share, without the copies of images that Lightning's sampler
        would add to make the shares equal.
        """
        batch_size, order = 2 * self.batch_size, None
        if self.trainer and (world_size := self.trainer.world_size) > 1:
            images, labels = split
            if len(images) < world_size:
                raise ArchiveError(
                    f"{self.dataset_used}: {len(images)} images to evaluate on are too few for {world_size} "
                    "processes"
                )
            share = slice(self.trainer.global_rank, None, world_size)
            split = images[share], labels[share]
            # As many batches in every process, for in validation DDP waits for the others at each.
            smallest, largest = len(images) // world_size, -(-len(images) // world_size)
            while -(-smallest // batch_size) != -(-largest // batch_size):
                batch_size += 1
            order = StatefulDistributedSampler(Images(*split), num_replicas=1, rank=0, shuffle=False)
        return self._loader(split, batch_size, order)

    def _loader(
        self, split: Batch, batch_size: int, order: StatefulDistributedSampler | None = None
    ) -> StatefulDataLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return StatefulDataLoader(
            Images(*split),
            batch_size=batch_size,
            sampler=order,
            generator=torch.Generator(),  # without one, every loader takes from the model's numbers
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=on_gpu,
        )

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The tutorial's ``preprocess``, on the device, so that bytes travel there and not floats.

        Args:
            batch: images uint8 (B, H, W), labels int64 (B,).
            dataloader_idx: not used.

        Returns:
            images float32 (B, 1, H, W) in 0..1, exactly the tutorial's k/256, and the labels.
        """
        images, labels = batch
        return images[:, None] / 256, labels  # (B, 1, H, W)

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint says of the dataset and of the order of its images."""
        return {"dataset": self.dataset_used, "digest": self.digest, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with the checkpoint's order, and refuses to with another dataset.

        Raises:
            ArchiveError: naming both.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return  # what one dataset has taught may be tested on another
        if state_dict["digest"] != self.digest:
            raise ArchiveError(
                f"the checkpoint was trained on {state_dict['dataset']}, this run has {self.dataset_used}; "
                f"resume with --data.dataset={state_dict['dataset']}, or start a new run without --ckpt_path"
            )
        self.seed = state_dict["seed"]
