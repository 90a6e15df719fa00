"""Your data: MNIST as the tutorial has it, or a dataset of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor

from mnist_lit.datasets.digits import VERSION, make_digits
from mnist_lit.datasets.mnist import ARCHIVE, URLS, DownloadError, download_mnist, find_mnist, read_mnist
from mnist_lit.datasets.pickles import read_pickle
from mnist_lit.datasets.pictures import PictureReader, find_digit_form
from mnist_lit.engine import (
    Arrays,
    ImageDataModule,
    Source,
    UserError,
    file_fingerprint,
    open_arrays,
    open_dataset,
    read_dataset,
)

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
        opens = not self.predicts_files and not self.dataset_used
        if opens and self.dataset in ("auto", "mnist") and not find_mnist(self.folder):
            try:
                download_mnist(self.urls, self.folder)
            except DownloadError as error:
                archive = self.folder / ARCHIVE
                if self.dataset == "mnist":
                    raise UserError(
                        f"{error}; put the file at {archive}, or name another server with --data.url"
                    ) from error
                text = NOT_MNIST.format(reason=error, archive=archive)
                Console(stderr=True).print(Panel(Text(text), title="NOT MNIST", style="bold yellow"))
        super().prepare_data()

    def open(self) -> Source:
        """Open MNIST, the digits, or a path; and find out how single digits lie in the images."""
        archive = find_mnist(self.folder)
        name = self.dataset if self.dataset != "auto" else "mnist" if archive else "digits"
        if name == "digits":
            source = open_arrays(name, self.data_dir / "digits" / "digits.pt", VERSION, lambda: Arrays(make_digits()))
            source = source._replace(digest=VERSION)  # pixels may differ by a rounding from machine to machine
        elif name != "mnist":
            source = open_dataset(name, self.data_dir, self.form, self.held_out, self.memory_limit, _read)
        elif archive is None:
            raise UserError(f"there is no MNIST in {self.folder}")
        else:
            copy = self.folder / "mnist.pt"
            source = open_arrays(name, copy, file_fingerprint(archive), lambda: read_mnist(archive))
        self.digit_form = self.digit_form or find_digit_form(source.datasets["train"])
        self.save_hyperparameters({"digit_form": self.digit_form})
        return source

    def reader(self) -> PictureReader:
        """Reads pictures to predict, and brings single digits into the form of the training images."""
        channels, size = self.form
        return PictureReader({"channels": channels, "image_size": size, "digit_form": self.digit_form})

    def preprocess(self, images: Tensor) -> Tensor:
        """The tutorial's ``preprocess``: bytes (B, C, H, W) to float32, exactly its k/256; on the device."""
        return images / 256 if images.dtype == torch.uint8 else super().preprocess(images)


def _read(path: Path) -> Arrays:
    return read_dataset(path, read_pickle)
