"""Your data: MNIST as the tutorial has it, or a dataset of your own."""

from __future__ import annotations

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
from mnist_lit.datasets.mnist import ARCHIVE, URLS, DownloadError, download_mnist, find_mnist, read_mnist
from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.datasets.pictures import find_digit_form, fit_pictures
from mnist_lit.engine import ImageDataModule, UserError, read_dataset

NOT_MNIST = """\
{reason}.

Instead of MNIST, this run uses the digits that come with mnist_lit: real handwriting, but only 1,797 \
originals. Its figures say nothing about MNIST. For MNIST, do one of these and run again:
  - put the tutorial's file at {archive}
  - name a server that has it: --data.url=https://.../mnist.pkl.gz
  - name a file that you have: --data.dataset=path/to/mnist.pkl.gz
If the digits are what you want, say so with --data.dataset=digits, and this notice goes away."""


class MNISTDataModule(ImageDataModule):
    """MNIST, the embedded digits, or data of your own.

    Args:
        dataset: ``mnist``; ``digits`` (embedded, needs no network); ``auto``: MNIST if it is on disk or can
            be downloaded, else the digits; or a path: of a pickle as the tutorial's, or as in ``ImageDataModule``.
        url: where to download MNIST: the tutorial's archive, or a folder of IDX files, which ends with a slash. Of a
            list the first that has it.
        digit_form: how single digits lie in the images, as in ``DigitForm``: those to predict are brought into this
            form. By default it is found out from the training images.
        options: as in ``ImageDataModule``.

    Example:
        >>> Trainer(max_epochs=2).fit(CNN(), datamodule=MNISTDataModule("digits", batch_size=128))
    """

    from_checkpoint = (*ImageDataModule.from_checkpoint, "digit_form")

    def __init__(
        self,
        dataset: str = "auto",
        url: str | list[str] = list(URLS),  # noqa: B006, jsonargparse shows it
        digit_form: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.urls, self.digit_form = [url] if isinstance(url, str) else url, digit_form
        self.folder = self.data_dir / "mnist"

    def prepare_data(self) -> None:
        """Once per node: download MNIST unless it is there; where that fails, ``auto`` falls back to the digits."""
        needed = self.dataset in ("auto", "mnist") and not self.predicts_files and not self.dataset_used
        if needed and not find_mnist(self.folder):
            archive = self.folder / ARCHIVE
            try:
                download_mnist(self.urls, self.folder)
            except DownloadError as error:
                if self.dataset == "mnist":
                    raise UserError(
                        f"{error}; put the file at {archive}, or name another server: --data.url"
                    ) from error
                text = Text(NOT_MNIST.format(reason=error, archive=archive))
                Console(stderr=True).print(Panel(text, title="NOT MNIST", style="bold yellow"))
        super().prepare_data()

    def setup(self, stage: str) -> None:
        """In every process: open what is on disk, and find out how single digits lie in the images."""
        super().setup(stage)
        if self.dataset_used:
            self.digit_form = self.digit_form or find_digit_form(self.source.splits["train"][0])
            self.save_hyperparameters({"digit_form": self.digit_form})

    def find(self) -> tuple[str, Path | str]:
        """Name the dataset and its file; the digits have a version instead."""
        archive = find_mnist(self.folder)
        if self.dataset == "digits" or (self.dataset == "auto" and not archive):
            return "digits", VERSION
        if self.dataset in ("auto", "mnist"):
            return "mnist", archive or self.folder / ARCHIVE
        return super().find()

    def read(self, path: Path | str) -> Mapping[str, tuple[np.ndarray, np.ndarray]]:
        """Read the arrays of each split: MNIST, the digits, a pickle as the tutorial's, or what the engine reads."""
        if isinstance(path, str):
            return make_digits()
        return read_dataset(path, read_pickle) if self.find()[0] != "mnist" else read_mnist(path)

    def fit_pictures(self) -> Any:
        """What brings pictures of digits into the form of the training images; None if those are of something else."""
        return fit_pictures({"image_size": self.form.size, "digit_form": self.digit_form})

    def preprocess(self, images: Tensor) -> Tensor:
        """The tutorial's ``preprocess``: bytes (B, C, H, W) to float32, exactly its k/256; on the device."""
        return images / 256 if images.dtype == torch.uint8 else super().preprocess(images)
