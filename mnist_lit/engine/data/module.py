"""Arrays and folders of images as a ``LightningDataModule``."""

import hashlib
import math
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mnist_lit.engine.data.files import Pair, cached, make_arrays, read_dataset
from mnist_lit.engine.data.folders import open_folder
from mnist_lit.engine.data.loaders import BatchTensorDataset, augment, eval_dataloader, train_dataloader
from mnist_lit.engine.data.sources import Source, Task
from mnist_lit.engine.errors import UserError, explain_damage
from mnist_lit.engine.images import Fit, find_images, read_picture
from mnist_lit.engine.outputs import class_names
from mnist_lit.engine.threads import available_cpus


class ImageDataModule(LightningDataModule):
    """Images and their targets from arrays in a file, or from a folder of image files.

    The loaders give images (B, C, H, W) in their own dtype, uint8 where they are bytes, and targets; the model gets
    float32 images, bytes in 0..1. Subclass it for arrays of another kind, and override ``read``.

    Args:
        dataset: path of a dataset file (see ``read_dataset``), or of a folder with a folder of images for each class,
            or with ``train``, ``valid`` and ``test`` above them.
        data_dir: folder of the fast copies.
        batch_size: training images per step and device; evaluation takes twice as many.
        num_workers: processes that load batches; by default one per processor where images are read from files.
        image_size: height and width to which image files are scaled and cut, or one number for both.
        channels: 1 for grey, 3 for colour; by default that of the images.
        valid_fraction: of each class, for a folder without ``valid``.
        test_fraction: of each class, for a folder without ``train``, ``valid`` and ``test``.
        split_seed: of the choice of these images, and of the folds.
        folds: number of folds of the training and validation images for cross-validation.
        fold: the one to validate on, from 0; the others are trained on.
        memory_limit: GiB of decoded images; those of a larger folder are read from their files in every epoch.
        train_transform: training images float32 (B, C, H, W) on the device to images.
        mix: training images and one-hot classes (B, K) to the same, such as ``MixUp`` of torchvision.
        mean: of each channel, subtracted from the images; for training, prediction and export.
        std: of each channel, by which they are divided after that.
        pixel_range: lowest and highest value of float images, to which image files to predict are brought.
        task: what the targets are; by default as they are found.
        num_classes: number of outputs of the model; by default that of the classes, labels or values.
        class_names: names of the classes; by default those of the folders or the targets.
        images: what ``predict`` reads instead of the test split: image files, folders or patterns such as
            ``digits/*.png``. Files that cannot be read end up in ``broken``, with the reason.

    Example:
        >>> class LeafData(ImageDataModule):
        ...     def read(self, path: Path | str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        ...         leaves = scipy.io.loadmat(path)
        ...         return {"train": (leaves["images"], leaves["species"])}
    """

    # Options that a command takes from its checkpoint, unless they are given.
    from_checkpoint: tuple[str, ...] = (
        *("task", "num_classes", "class_names", "image_size", "channels", "mean", "std", "pixel_range"),
    )
    source: Source

    def __init__(
        self,
        dataset: str,
        data_dir: str = "data",
        batch_size: PositiveInt = 64,
        num_workers: NonNegativeInt | None = None,
        image_size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = None,
        channels: PositiveInt | None = None,
        valid_fraction: ClosedUnitInterval = 0.1,
        test_fraction: ClosedUnitInterval = 0.1,
        split_seed: int = 0,
        folds: PositiveInt = 1,
        fold: NonNegativeInt = 0,
        memory_limit: PositiveFloat = 2.0,
        train_transform: nn.Module | Callable[..., Any] | None = None,
        mix: nn.Module | Callable[..., Any] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        pixel_range: tuple[float, float] | None = None,
        task: Task | None = None,
        num_classes: PositiveInt | None = None,
        class_names: list[str] | None = None,
        images: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["images", "train_transform", "mix", *self.from_checkpoint])
        self.dataset, self.data_dir = dataset, Path(data_dir)
        # Plain numbers: jsonargparse's types would not load safely from a checkpoint.
        self.batch_size, self.num_workers = int(batch_size), num_workers and int(num_workers)
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.image_size = size and (int(size[0]), int(size[1]))
        self.held_out, self.memory_limit = (valid_fraction, test_fraction, split_seed), memory_limit
        self.folds, self.fold = int(folds), int(fold)
        self.train_transform, self.mix, self.mean, self.std = train_transform, mix, mean, std
        self.pixel_range, self.class_names = pixel_range, class_names
        self._task, self._num_classes = task, num_classes and int(num_classes)
        self._channels = channels and int(channels)
        self.images = [images] if isinstance(images, str) else images or []
        self.files: list[Path] = []  # that are predicted, in order
        self.warnings: list[str] = []  # of each of them, "" if there is none
        self.labels: list[int] = []  # of each of them, if their folders are named like the classes
        self.broken: dict[Path, str] = {}
        self.dataset_used = self.digest = ""
        self.seed = torch.initial_seed()

    def find(self) -> tuple[str, Path | str]:
        """Name the dataset and its file or folder; or a version of what ``read`` makes without a file."""
        return self.dataset, Path(self.dataset)

    def read(self, path: Path | str) -> Mapping[str, Pair]:
        """Read numpy arrays, images and targets of ``train`` and maybe ``valid`` and ``test``, from what ``find``
        names, in any form that ``engine/data/README.md`` lists.
        """
        return read_dataset(Path(path))

    def preprocess(self, images: Tensor) -> Tensor:
        """Images as the loader has them (B, C, H, W) to float32 on the device: bytes to 0..1, floats as they are."""
        return images / 255 if images.dtype == torch.uint8 else images.float()

    def fit_pictures(self) -> Fit | None:
        """What makes the model's image, and a warning or "", of a picture uint8 (C, H, W); by default it is scaled."""
        return None

    # ------------------------------------------------------------------------------------------- opening

    def prepare_data(self) -> None:
        """Once per node: whatever takes time, so that ``setup`` finds it on disk."""
        if not self.predicts_files:
            self._open()

    def setup(self, stage: str) -> None:
        """In every process: open the dataset that ``prepare_data`` left on disk, or read ``images``."""
        self._read_files() if self.predicts_files else self._open()

    def _open(self) -> None:
        if self.dataset_used:
            return
        name, place = self.find()
        source = self._numbered(self._found(name, place), name)
        if self.folds > 1:
            source = source.fold(self.fold, self.folds, self.held_out[2])
        images, _ = source.splits["train"]
        if isinstance(images, Tensor) and images.is_floating_point():
            low, high = images.min().item(), images.max().item()
            self.pixel_range = self.pixel_range or (low, high)
            rank_zero_info(f"{name}: float images from {low:.4g} to {high:.4g}; --data.mean and --data.std change that")
        self.source, self.dataset_used, self.digest = source, name, source.digest
        known = {option: getattr(self, option) for option in ("class_names", "mean", "std", "pixel_range")}
        channels, *size = source.shape
        self.save_hyperparameters({"dataset_used": name, "channels": channels, "image_size": size, **known})

    def _found(self, name: str, place: Path | str) -> Source:
        path = Path(os.path.realpath(place)) if isinstance(place, Path) else place
        key = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:8]
        copy = self.data_dir / "copies" / f"{Path(name).name}-{key}.pt"
        if isinstance(path, str):  # its content may differ by a rounding between machines
            return cached(copy, path, lambda: make_arrays(self.read(path)))._replace(digest=path)
        if path.is_dir():
            return open_folder(path, copy, self._channels, self.image_size, self.held_out, self.memory_limit)
        if not path.is_file():
            raise UserError(f"{path}: no such dataset; expected a file or a folder, and no device or pipe")
        status = path.stat()
        return cached(copy, f"{path} {status.st_size} {status.st_mtime_ns}", lambda: make_arrays(self.read(path)))

    def _numbered(self, source: Source, name: str) -> Source:
        """Number the classes as the model does, and refuse a dataset that it cannot take."""
        if self._task not in (None, source.task):
            raise UserError(f"{name} has targets for {source.task}, the model is for {self._task}")
        if self._channels not in (None, source.shape[0]):
            raise UserError(f"{name} has images of {source.shape[0]} channels, the model takes {self._channels}")
        found, wanted = source.num_classes, self._num_classes or len(self.class_names or ())
        if source.task == "multiclass":
            ours = set(source.class_names or map(str, range(found)))
            names = self.class_names or list(map(str, range(wanted)))
            if ours <= set(names):
                source = source.numbered(names)
            elif ours & set(names):
                unknown = min(ours - set(names))
                raise UserError(f"{name} has the class {unknown}, which is not one of {', '.join(names)}")
            self.class_names = self.class_names or source.class_names
            if max(found, wanted) < 2:
                raise UserError(f"{name} has one class, expected two at least")
        if wanted and found > wanted:
            raise UserError(f"{name} has {found} classes, but the model has {wanted} outputs")
        return source

    # What the model takes from the data on the command line. Each opens the dataset unless it was given.

    @property
    def num_classes(self) -> int:
        """Number of outputs: of classes, labels or values."""
        return self._num_classes or self._opened.num_classes

    @property
    def task(self) -> Task:
        """What the targets are."""
        return self._task or self._opened.task

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self._shape[0]

    @property
    def num_pixels(self) -> int:
        """C * H * W of the images."""
        return math.prod(self._shape)

    @property
    def class_weights(self) -> Tensor:
        """Weight of each class (K,), inversely proportional to its share of the training images."""
        _, targets = self.source.splits["train"]
        return len(targets) / (self.num_classes * targets.bincount(minlength=self.num_classes).clamp(min=1))

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self._channels or 1, *(self.image_size or (0, 0))) if self.images else self._opened.shape

    @property
    def _opened(self) -> Source:
        self.prepare_data()
        return self.source

    # ------------------------------------------------------------------------------------------- image files

    @property
    def predicts_files(self) -> bool:
        """Whether ``images`` are predicted, and no dataset is needed."""
        return bool(self.images) and self.trainer is not None and self.trainer.state.fn == "predict"

    def _read_files(self) -> None:
        paths, fit = find_images(self.images), self.fit_pictures()
        if fit is None and (self._channels not in (1, 3) or not self.image_size):
            raise UserError("--data.images: image files need a --ckpt_path of a model for grey or colour images")
        pictures, self.files, self.warnings, self.broken = [], [], [], {}
        for path in track(paths, "Reading images", disable=len(paths) < 100, transient=True):
            try:
                picture, warning = read_picture(path, self.channels, self.image_size, fit)
            except UserError as error:
                self.broken[path] = str(error).removeprefix(f"{path}: ")
                continue
            pictures.append(torch.from_numpy(picture))
            self.files.append(path)
            self.warnings.append(warning)
        if not pictures:
            path, reason = next(iter(self.broken.items()))
            raise UserError(f"none of {len(paths)} files can be predicted; {path}: {reason}")
        names, known = [path.parent.name for path in self.files], class_names(self, self._num_classes or 10)
        self.labels = [known.index(name) for name in names] if set(names) <= set(known) else []
        labels = torch.tensor(self.labels or [0] * len(pictures))
        self.pictures = BatchTensorDataset(torch.stack(pictures), labels)  # (n, C, H, W), (n,)

    # ------------------------------------------------------------------------------------------- loaders

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches."""
        data = self.source.datasets["train"]
        workers = self._workers(data)
        return train_dataloader(data, self.batch_size, seed=self.seed, trainer=self.trainer, num_workers=workers)

    def val_dataloader(self) -> DataLoader:
        """Validation batches."""
        return self._eval_dataloader("valid", self.trainer)

    def test_dataloader(self) -> DataLoader:
        """Test batches."""
        return self._eval_dataloader("test", self.trainer)

    def predict_dataloader(self) -> DataLoader:
        """``images``, or else the test split."""
        # Lightning shares the samples of a prediction, because it has to know their indices.
        return self._eval_dataloader("test", None)

    def _eval_dataloader(self, split: str, trainer: Any) -> DataLoader:
        data: Any = self.pictures if self.predicts_files else self.source.datasets[split]
        if not len(data):
            raise UserError(f"{self.dataset_used}: no {split} split, such as arrays x_{split} and y_{split}")
        # Twice the batch size, as in the tutorial: without gradients there is room for it.
        return eval_dataloader(data, 2 * self.batch_size, trainer=trainer, num_workers=self._workers(data))

    def _workers(self, data: Dataset) -> int:
        if self.num_workers is not None or isinstance(data, BatchTensorDataset):
            return self.num_workers or 0
        return available_cpus(self.trainer.num_devices if self.trainer else 1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Preprocess, augment and normalize on the device, so that bytes are copied there and not floats."""
        (images, target), pixel_range = batch, self.pixel_range if batch[0].dtype == torch.uint8 else None
        images = self.preprocess(images)
        if pixel_range:  # an image file, and a model that was trained on floats
            images = images * (pixel_range[1] - pixel_range[0]) + pixel_range[0]
        trainer = self.trainer if self.trainer is not None and self.trainer.training else None
        if trainer and self.train_transform is not None:
            images = augment(self.train_transform, images, self.seed, trainer)
        if trainer and self.mix is not None:
            one_hot = nn.functional.one_hot(target, self.num_classes).to(images.dtype)
            images, target = augment(self.mix, (images, one_hot), self.seed, trainer)
        if self.mean is not None:
            images = images - images.new_tensor(self.mean).view(-1, 1, 1)
        if self.std is not None:
            images = images / images.new_tensor(self.std).view(-1, 1, 1)
        # With precision=bf16-true and such, images have the model's dtype.
        return self.trainer.precision_plugin.convert_input((images, target)) if self.trainer else (images, target)

    # ------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Identify the order of the images."""
        return {"dataset": self.dataset_used, "digest": self.digest, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume in the checkpoint's order. Raises ``UserError`` if it was trained on another dataset."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return  # a model may be tested on another dataset than it was trained on
        with explain_damage(self.trainer.ckpt_path):
            dataset, digest = state_dict["dataset"], state_dict["digest"]
            self.seed = torch.Generator().manual_seed(operator.index(state_dict["seed"]) % 2**63).initial_seed()
        if digest != self.digest:
            raise UserError(
                f"the checkpoint was trained on {dataset}, this run has {self.dataset_used}; "
                f"resume with --data.dataset={dataset}, or start a new run without --ckpt_path"
            )
