"""Your data: the ``LightningDataModule``."""

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
from torch.utils.data import DataLoader

from mnist_lit.datasets import digits
from mnist_lit.datasets.files import Splits, cached, file_fingerprint, read_dataset
from mnist_lit.datasets.mnist import URL, download_mnist, read_mnist
from mnist_lit.datasets.pictures import SIDE, PictureError, find_pictures, read_picture
from mnist_lit.engine.errors import DatasetError, DownloadError
from mnist_lit.engine.loaders import BatchTensorDataset, eval_dataloader, train_dataloader

Batch = tuple[Tensor, Tensor]

NOT_MNIST = """\
{reason}.

Instead of MNIST, this run uses the digits that come with mnist_lit: real handwriting, but only 1,797 \
originals. Its figures say nothing about MNIST. For MNIST, do one of these and run again:
  - put the tutorial's file at {archive}
  - name a server that has it: --data.url=https://.../mnist.pkl.gz
  - name a file that you have: --data.dataset=path/to/mnist.pkl.gz
If the digits are what you want, say so with --data.dataset=digits, and this notice goes away."""


class MNISTDataModule(LightningDataModule):
    """MNIST, the embedded digits, or a dataset file.

    Batches leave the loaders as uint8 images (B, H, W) and targets (B,), and reach the model as float32
    images (B, 1, H, W) in 0..1 and the same targets: classes int64, or values float32.

    Args:
        dataset: ``mnist``; ``digits`` (embedded, needs no network); ``auto``: MNIST if it is on disk or can
            be downloaded, else the digits; or the path of a ``.pkl.gz`` in the tutorial's layout or an
            ``.npz`` with ``x_train, y_train, x_valid, y_valid`` and optionally ``x_test, y_test``.
        data_dir: folder of the archive, ``mnist/mnist.pkl.gz`` in it, and of the fast copies.
        url: where to download MNIST's archive.
        timeout: seconds after which a silent server counts as failed.
        batch_size: training images per step and device; evaluation takes twice as many.
        num_workers: processes that load batches; 0 is fastest for data in memory.
        num_classes: number of classes of the model; by default that of the dataset, 1 for values.
        class_names: names of the classes; by default 0, 1, ...
        images: what ``predict`` reads instead of the test split: image files, folders or patterns such as
            ``digits/*.png``. Files that cannot be read end up in ``broken``, with the reason.

    Example:
        >>> Trainer(max_epochs=2).fit(CNN(), datamodule=MNISTDataModule("digits", batch_size=128))
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
        class_names: list[str] | None = None,
        images: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images", "num_classes", "class_names"])
        self.dataset, self.data_dir, self.url, self.timeout = dataset, Path(data_dir), url, timeout
        # Plain numbers: jsonargparse's types would not load safely from a checkpoint.
        self.batch_size, self.num_workers = int(batch_size), int(num_workers)
        self._num_classes, self.class_names = num_classes and int(num_classes), class_names
        self.images = [images] if isinstance(images, str) else images or []
        self.files: list[Path] = []  # that are predicted, in order
        self.broken: dict[Path, str] = {}
        self.dataset_used = self.digest = ""
        self.seed = torch.initial_seed()

    def prepare_data(self) -> None:
        """Once per node: whatever takes time or the network, so that ``setup`` finds it on disk."""
        if self._predicts_files or self.dataset_used:
            return
        if self.dataset in ("auto", "mnist") and not self._archive.exists():
            try:
                download_mnist(self.url, self._archive, self.timeout)
            except DownloadError as error:
                if self.dataset == "mnist":
                    raise DatasetError(
                        f"{error}; put the file at {self._archive}, or name another server with --data.url"
                    ) from error
                text = NOT_MNIST.format(reason=error, archive=self._archive)
                Console(stderr=True).print(Panel(Text(text), title="NOT MNIST", style="bold yellow"))
        self._open()

    def setup(self, stage: str) -> None:
        """In every process: open the dataset that ``prepare_data`` left on disk, or read ``images``."""
        if self._predicts_files:
            self._read_files()
        elif not self.dataset_used:
            self._open()

    @property
    def num_classes(self) -> int:
        """For the model on the command line. Opens the dataset unless the number was given."""
        if self._num_classes is None:
            self.prepare_data()
            self._num_classes = self._labelled_classes()
        return self._num_classes

    @property
    def num_pixels(self) -> int:
        """H * W of the images, for the model on the command line. Opens the dataset, or ``images``."""
        if self.images:
            return SIDE * SIDE
        self.prepare_data()
        return self.splits.train[0][0].numel()

    def _labelled_classes(self) -> int:
        if self.splits.train[1].is_floating_point():
            return 1  # one value to regress on
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
            raise DatasetError(f"none of {len(paths)} files can be predicted; {path}: {reason}")
        images = torch.stack(pictures)  # (n, 28, 28)
        self.pictures = images, torch.zeros(len(images), dtype=torch.int64)  # not known

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
                self._archive.with_name("mnist.pt"),
                file_fingerprint(self._archive),
                lambda: read_mnist(self._archive),
            )
        else:
            path = Path(dataset).resolve()
            name = f"{path.name}-{hashlib.sha256(bytes(path)).hexdigest()[:8]}.pt"
            self.splits, self.digest = cached(
                data_dir / "copies" / name, file_fingerprint(path), lambda: read_dataset(path)
            )
        if self._num_classes is not None and self._labelled_classes() > self._num_classes:
            raise DatasetError(
                f"{dataset} has labels up to {self._labelled_classes() - 1}, the model tells "
                f"{self._num_classes} classes apart"
            )
        self.dataset_used = dataset
        self.save_hyperparameters({"dataset_used": dataset})

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        dataset = BatchTensorDataset(*self.splits.train)
        return train_dataloader(
            dataset, self.batch_size, seed=self.seed, trainer=self.trainer, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader:
        """Validation batches."""
        return self._eval_dataloader(self.splits.valid)

    def test_dataloader(self) -> DataLoader:
        """Test batches."""
        return self._eval_dataloader(self._test_split)

    def predict_dataloader(self) -> DataLoader:
        """``images``, or else the test split."""
        split = self.pictures if self._predicts_files else self._test_split
        # Lightning shares the samples of a prediction, because it has to know their indices.
        return eval_dataloader(BatchTensorDataset(*split), 2 * self.batch_size, num_workers=self.num_workers)

    def _eval_dataloader(self, split: Batch) -> DataLoader:
        # Twice the batch size, as in the tutorial: without gradients there is room for it.
        batch_size, dataset = 2 * self.batch_size, BatchTensorDataset(*split)
        return eval_dataloader(dataset, batch_size, trainer=self.trainer, num_workers=self.num_workers)

    @property
    def _test_split(self) -> Batch:
        if not len(self.splits.test[0]):
            raise DatasetError(f"{self.dataset_used}: no test split, expected arrays x_test and y_test")
        return self.splits.test

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The tutorial's ``preprocess``, on the device, so that bytes are copied there and not floats.

        Args:
            batch: images uint8 (B, H, W), targets (B,).
            dataloader_idx: not used.

        Returns:
            images float32 (B, 1, H, W) in 0..1, exactly the tutorial's k/256, and the targets.
        """
        images, target = batch
        return images[:, None] / 256, target  # (B, 1, H, W)

    def state_dict(self) -> dict[str, Any]:
        """Dataset and seed, which identify the order of the images."""
        return {"dataset": self.dataset_used, "digest": self.digest, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume in the checkpoint's order.

        Raises:
            DatasetError: if the checkpoint was trained on another dataset.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return  # a model may be tested on another dataset than it was trained on
        if state_dict["digest"] != self.digest:
            raise DatasetError(
                f"the checkpoint was trained on {state_dict['dataset']}, this run has {self.dataset_used}; "
                f"resume with --data.dataset={state_dict['dataset']}, or start a new run without --ckpt_path"
            )
        self.seed = state_dict["seed"]
