"""Your data: the ``LightningDataModule``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.panel import Panel
from rich.progress import track
from rich.text import Text
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mnist_lit.datasets.finding import find_pictures
from mnist_lit.datasets.mnist import ARCHIVE, URLS, download_mnist, find_mnist
from mnist_lit.datasets.pictures import PictureReader, find_digit_form
from mnist_lit.datasets.sources import FolderOptions, Source, open_dataset
from mnist_lit.engine.errors import DatasetError, DownloadError
from mnist_lit.engine.images import ImageError
from mnist_lit.engine.loaders import (
    BatchTensorDataset,
    augment,
    eval_dataloader,
    train_dataloader,
)
from mnist_lit.engine.outputs import class_names
from mnist_lit.engine.storage import printable
from mnist_lit.engine.threads import available_cpus

Batch = tuple[Tensor, Tensor]
OTHER_DTYPES = "bf16-true", "16-true", "64-true"  # Lightning's precisions of a model that is not in float32

NOT_MNIST = """\
{reason}.

Instead of MNIST, this run uses the digits that come with mnist_lit: real handwriting, but only 1,797 \
originals. Its figures say nothing about MNIST. For MNIST, do one of these and run again:
  - put the tutorial's file at {archive}
  - name a server that has it: --data.url=https://.../mnist.pkl.gz
  - name a file that you have: --data.dataset=path/to/mnist.pkl.gz
If the digits are what you want, say so with --data.dataset=digits, and this notice goes away."""


class MNISTDataModule(LightningDataModule):
    """MNIST, the embedded digits, a dataset file, or a folder of images.

    Batches leave the loaders as uint8 images (B, C, H, W), C 1 or 3, and targets (B,). They reach the model as
    float32 images in 0..1 and the same targets: classes int64, or values float32.

    Args:
        dataset: ``mnist``; ``digits`` (embedded, needs no network); ``auto``: MNIST if it is on disk or can
            be downloaded, else the digits; or a path: of a dataset file or of IDX files (see ``read_dataset``), or of
            a folder with a folder of images for each class, or with ``train``, ``valid`` and ``test`` above them.
        data_dir: folder of MNIST, in ``mnist`` in it, and of the fast copies.
        url: where to download MNIST: the tutorial's archive, or a folder of IDX files, which ends with a slash. Of a
            list the first that has it.
        timeout: seconds after which a silent server counts as failed.
        batch_size: training images per step and device; evaluation takes twice as many.
        num_workers: processes that load batches; by default none for data in memory, which is fastest, and one for
            each processor for images that are read from files.
        image_size: height and width to which image files are scaled and cut, or one number for both.
        channels: 1 for grey, 3 for colour; by default that of the images.
        valid_fraction: of each class, for a folder without ``valid``.
        test_fraction: of each class, for a folder without ``train``, ``valid`` and ``test``.
        split_seed: of the choice of these images.
        memory_limit: GiB of decoded images; those of a larger folder are read from their files in every epoch.
        train_transform: images float32 (B, C, H, W) on the device to images, for training only. What it draws at
            random from torch follows from seed, epoch and batch alone.
        mean: of each channel, subtracted from images in 0..1; for training, prediction and export.
        std: of each channel, by which they are divided after that.
        num_classes: number of classes of the model; by default that of the dataset, 1 for values.
        class_names: names of the classes; by default those of the folders, or 0, 1, ...
        images: what ``predict`` reads instead of the test split: image files, folders or patterns such as
            ``digits/*.png``. Files that cannot be read end up in ``broken``, with the reason.
        digit_form: how single digits lie in the images, as in ``DigitForm``: those to predict are brought into this
            form. By default it is found out from the training images.

    Example:
        >>> Trainer(max_epochs=2).fit(CNN(), datamodule=MNISTDataModule("digits", batch_size=128))
    """

    # Options that a command takes from its checkpoint, unless they are given.
    from_checkpoint = ("num_classes", "class_names", "image_size", "channels", "mean", "std", "digit_form")

    source: Source

    def __init__(
        self,
        dataset: str = "auto",
        data_dir: str = "data",
        url: str | list[str] = list(URLS),  # noqa: B006, jsonargparse shows it
        timeout: PositiveFloat = 10.0,
        batch_size: PositiveInt = 64,
        num_workers: NonNegativeInt | None = None,
        image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
        channels: Literal[1, 3] | None = None,
        valid_fraction: ClosedUnitInterval = 0.1,
        test_fraction: ClosedUnitInterval = 0.1,
        split_seed: int = 0,
        memory_limit: PositiveFloat = 2.0,
        train_transform: nn.Module | Callable[..., Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        num_classes: PositiveInt | None = None,
        class_names: list[str] | None = None,
        images: str | list[str] | None = None,
        digit_form: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images", "train_transform", *self.from_checkpoint])
        self.dataset, self.data_dir, self.timeout = dataset, Path(data_dir), timeout
        self.urls = [url] if isinstance(url, str) else url
        # Plain numbers: jsonargparse's types would not load safely from a checkpoint.
        self.batch_size, self.num_workers = int(batch_size), num_workers and int(num_workers)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self._image_size = size and (int(size[0]), int(size[1]))
        self._channels, self._num_classes = channels, num_classes and int(num_classes)
        self._folder_options = FolderOptions(
            channels, self._image_size, valid_fraction, test_fraction, split_seed, memory_limit
        )
        self.train_transform, self.mean, self.std = train_transform, mean, std
        self.class_names, self.digit_form = class_names, digit_form
        self.images = [images] if isinstance(images, str) else images or []
        self.files: list[Path] = []  # that are predicted, in order
        self.warnings: list[str] = []  # of each of them, "" if there is none
        self.labels: list[int] = []  # of each of them, if their folders are named like the classes
        self.broken: dict[Path, str] = {}
        self.dataset_used = self.digest = ""
        self.seed = torch.initial_seed()

    def prepare_data(self) -> None:
        """Once per node: whatever takes time or the network, so that ``setup`` finds it on disk."""
        if self._predicts_files or self.dataset_used:
            return
        if self.dataset in ("auto", "mnist") and not find_mnist(self._mnist_dir):
            try:
                download_mnist(self.urls, self._mnist_dir, self.timeout)
            except DownloadError as error:
                archive = self._mnist_dir / ARCHIVE
                if self.dataset == "mnist":
                    raise DatasetError(
                        f"{error}; put the file at {archive}, or name another server with --data.url"
                    ) from error
                text = NOT_MNIST.format(reason=error, archive=archive)
                Console(stderr=True).print(Panel(Text(text), title="NOT MNIST", style="bold yellow"))
        self._open()

    def setup(self, stage: str) -> None:
        """In every process: open the dataset that ``prepare_data`` left on disk, or read ``images``."""
        if self._predicts_files:
            self._read_files()
        elif not self.dataset_used:
            self._open()

    def _open(self) -> None:
        name = self.dataset
        if name == "auto":
            name = "mnist" if find_mnist(self._mnist_dir) else "digits"
        source = open_dataset(name, self.data_dir, self._folder_options)
        self.source, self.dataset_used, self.digest = source, name, source.digest
        classes = self._classes_of_source()
        if self.class_names and len(self.class_names) < classes:
            raise DatasetError(f"{name} has {classes} classes, --data.class_names has {len(self.class_names)} names")
        self.class_names = self.class_names or source.class_names
        if self._num_classes is not None and classes > self._num_classes:
            raise DatasetError(
                f"{name} has labels up to {classes - 1}, the model tells {self._num_classes} classes apart"
            )
        if self._channels not in (None, source.channels):
            raise DatasetError(f"{name} has images of {source.channels} channels, the model takes {self._channels}")
        for values in (self.mean, self.std):
            if values is not None and len(values) not in (1, source.channels):
                raise DatasetError(
                    f"{name} has images of {source.channels} channels; --data.mean and --data.std "
                    f"need a number for each, or one for all, not {values}"
                )
        if self.digit_form is None:
            self.digit_form = find_digit_form(source.datasets["train"])
        self.save_hyperparameters(
            {
                "dataset_used": name,
                "class_names": self.class_names,
                "channels": source.channels,
                "image_size": list(source.image_size),
                "mean": self.mean,
                "std": self.std,
                "digit_form": self.digit_form,
            }
        )

    def _classes_of_source(self) -> int:
        targets = self.source.targets
        if targets["train"].is_floating_point():
            return 1  # one value to regress on
        return max(len(self.source.class_names or ()), *(int(t.max()) + 1 for t in targets.values() if len(t)))

    # What the model takes from the data on the command line. Each opens the dataset unless it was given.

    @property
    def num_classes(self) -> int:
        """Number of classes, or 1 for values."""
        if self._num_classes is None:
            self.prepare_data()
            self._num_classes = self._classes_of_source()
        return self._num_classes

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self._shape[0]

    @property
    def num_pixels(self) -> int:
        """C * H * W of the images."""
        return math.prod(self._shape)

    @property
    def _shape(self) -> tuple[int, int, int]:
        if self.images:
            return (self._reader().channels, *self._reader().size)
        self.prepare_data()
        return (self.source.channels, *self.source.image_size)

    def _reader(self) -> PictureReader:
        options = {"channels": self._channels, "image_size": self._image_size, "digit_form": self.digit_form}
        return PictureReader(options)

    @property
    def _predicts_files(self) -> bool:
        return bool(self.images) and self.trainer is not None and self.trainer.state.fn == "predict"

    def _read_files(self) -> None:
        paths, passed_over = find_pictures(self.images)
        if passed_over:
            rank_zero_warn(f"passed over, by their names no images: {', '.join(map(printable, passed_over))}")
        reader = self._reader()
        pictures, self.files, self.warnings, self.broken = [], [], [], {}
        for path in track(paths, "Reading images", disable=len(paths) < 100, transient=True):
            try:
                picture, warning = reader(path)
            except ImageError as error:
                self.broken[path] = str(error)
                continue
            pictures.append(torch.from_numpy(picture))
            self.files.append(path)
            self.warnings.append(warning)
        if not pictures:
            path, reason = next(iter(self.broken.items()))
            raise DatasetError(f"none of {len(paths)} files can be predicted; {path}: {reason}")
        names = [path.parent.name for path in self.files]
        known = {name: label for label, name in enumerate(class_names(self, self._num_classes or 10))}
        self.labels = [known[name] for name in names] if known.keys() >= set(names) else []
        self.pictures = torch.stack(pictures)  # (n, C, H, W)

    @property
    def _mnist_dir(self) -> Path:
        return self.data_dir / "mnist"

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        dataset = self.source.datasets["train"]
        return train_dataloader(
            dataset, self.batch_size, seed=self.seed, trainer=self.trainer, num_workers=self._workers(dataset)
        )

    def val_dataloader(self) -> DataLoader:
        """Validation batches."""
        return self._eval_dataloader(self._split("valid"))

    def test_dataloader(self) -> DataLoader:
        """Test batches."""
        return self._eval_dataloader(self._split("test"))

    def predict_dataloader(self) -> DataLoader:
        """``images``, or else the test split."""
        if self._predicts_files:
            labels = torch.tensor(self.labels or [0] * len(self.pictures))
            dataset: Dataset = BatchTensorDataset(self.pictures, labels)
        else:
            dataset = self._split("test")
        # Lightning shares the samples of a prediction, because it has to know their indices.
        return eval_dataloader(dataset, 2 * self.batch_size, num_workers=self._workers(dataset))

    def _eval_dataloader(self, dataset: Dataset) -> DataLoader:
        # Twice the batch size, as in the tutorial: without gradients there is room for it.
        return eval_dataloader(dataset, 2 * self.batch_size, trainer=self.trainer, num_workers=self._workers(dataset))

    def _workers(self, dataset: Dataset) -> int:
        if self.num_workers is not None:
            return self.num_workers
        processes = self.trainer.num_devices if self.trainer else 1
        return 0 if isinstance(dataset, BatchTensorDataset) else available_cpus(processes)

    def _split(self, name: str) -> Dataset:
        if not len(self.source.targets[name]):
            raise DatasetError(
                f"{self.dataset_used}: no {name} split, expected arrays x_{name} and y_{name}, or a folder {name}"
            )
        return self.source.datasets[name]

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """The tutorial's ``preprocess``, on the device, so that bytes are copied there and not floats.

        Args:
            batch: images uint8 (B, C, H, W), targets (B,).
            dataloader_idx: not used.

        Returns:
            images float32 (B, C, H, W), in 0..1 exactly the tutorial's k/256, and the targets; with
            ``trainer.precision=bf16-true`` and the like in the model's dtype.
        """
        images, target = batch
        images = images / 256
        if self.train_transform is not None and self.trainer is not None and self.trainer.training:
            images = augment(self.train_transform, images, self.seed, self.trainer)
        if self.mean is not None:
            images = images - images.new_tensor(self.mean).view(-1, 1, 1)
        if self.std is not None:
            images = images / images.new_tensor(self.std).view(-1, 1, 1)
        if self.trainer is not None and self.trainer.precision in OTHER_DTYPES:
            images, target = self.trainer.precision_plugin.convert_input((images, target))
        return images, target

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
