"""Your data: MNIST as the tutorial has it, or a dataset of your own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from mnist_lit.datasets.digits import VERSION, make_digits
from mnist_lit.datasets.mnist import ARCHIVE, URLS, download_mnist, read_mnist
from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.datasets.pictures import find_digit_size, fit_pictures
from mnist_lit.engine import ImageDataModule, UserError, read_dataset

NOT_MNIST = """\
{reason}.

Instead of MNIST, this run uses the digits that come with mnist_lit: real handwriting, but only 1,797 originals. Its \
figures say nothing about MNIST. For MNIST, put the tutorial's file at {archive}, name a server that has it with \
--data.url=https://.../mnist.pkl.gz, or a file with --data.dataset=path/to/mnist.pkl.gz. If the digits are what you \
want, say so with --data.dataset=digits, and this notice goes away."""


class MNISTDataModule(ImageDataModule):
    """MNIST, the embedded digits, or data of your own.

    Args:
        dataset: ``mnist``; ``digits`` (embedded, needs no network); ``auto``: MNIST if it is on disk or can
            be downloaded, else the digits; or a path: of a pickle as the tutorial's, or as in ``ImageDataModule``.
        url: where to download the tutorial's archive of MNIST. Of a list the first that has it.
        digit_size: longer side of the digits in pixels, if the images are of single digits as MNIST's: pictures to
            predict are then brought into this form. 0 for other images; by default measured in the training images.
        options: as in ``ImageDataModule``.

    Example:
        >>> Trainer(max_epochs=2).fit(CNN(), datamodule=MNISTDataModule("digits", batch_size=128))
    """

    from_checkpoint = (*ImageDataModule.from_checkpoint, "digit_size")

    def __init__(
        self,
        dataset: str = "auto",
        url: str | list[str] = list(URLS),  # noqa: B006, jsonargparse shows it
        digit_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.urls, self.digit_size = [url] if isinstance(url, str) else url, digit_size
        self.archive = self.data_dir / "mnist" / ARCHIVE

    def prepare_data(self) -> None:
        """Once per node: download MNIST unless it is there; where that fails, ``auto`` falls back to the digits."""
        needed = self.dataset in ("auto", "mnist") and not self.predicts_files and not self.dataset_used
        if needed and (reason := download_mnist(self.urls, self.archive)):
            if self.dataset == "mnist":
                raise UserError(f"{reason}; put the file at {self.archive}, or name another server: --data.url")
            text = Text(NOT_MNIST.format(reason=reason, archive=self.archive))
            Console(stderr=True).print(Panel(text, title="NOT MNIST", style="bold yellow"))
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """In every process: open what is on disk, and find out whether the images are of single digits."""
        super().setup(stage)
        if self.dataset_used:
            if self.digit_size is None:
                self.digit_size = find_digit_size(self.source.splits["train"][0])
            self.save_hyperparameters({"digit_size": self.digit_size})

    def find(self) -> tuple[str, Path | str]:
        """Name the dataset and its file; the digits have a version instead."""
        if self.dataset == "digits" or (self.dataset == "auto" and not self.archive.exists()):
            return "digits", VERSION
        return ("mnist", self.archive) if self.dataset in ("auto", "mnist") else super().find()

    def read(self, path: Path | str) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Read the arrays of each split: MNIST, the digits, a pickle as the tutorial's, or what the engine reads."""
        if isinstance(path, str):
            return make_digits()
        return read_mnist(path) if self.find()[0] == "mnist" else read_dataset(path, read_pickle)

    def fit_pictures(self) -> Any:
        """What brings pictures of digits into the form of the training images; None if those are of something else."""
        return fit_pictures({"image_size": self.image_size, "digit_size": self.digit_size})

    def preprocess(self, images: Tensor) -> Tensor:
        """The tutorial's ``preprocess``: bytes (B, C, H, W) to float32, exactly its k/256; on the device."""
        return images / 256 if images.dtype == torch.uint8 else super().preprocess(images)
