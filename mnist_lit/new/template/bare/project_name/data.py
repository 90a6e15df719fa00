"""Your data: replace the images made up here with your own."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from mnist_lit.engine import eval_dataloader, train_dataloader
from torch.utils.data import DataLoader, TensorDataset


class DataModule(LightningDataModule):
    """Images (B, 1, 12, 16) of noise, with a bar on the left, in the middle or on the right.

    Args:
        batch_size: training images per step and device; evaluation takes twice as many.
    """

    class_names = ("left", "middle", "right")  # in tables and dashboards
    num_classes, channels = 3, 1  # for the model

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size, self.seed = batch_size, torch.initial_seed()

    def setup(self, stage: str) -> None:
        """Replace this: images (n, C, H, W) and classes (n,) of each split, or any other ``Dataset``."""
        generator = torch.Generator().manual_seed(0)
        target = torch.arange(2400) % self.num_classes
        images = torch.rand(2400, 1, 12, 16, generator=generator)
        images.view(2400, 12, 4, 4)[torch.arange(2400), :, target] += 0.3  # four columns are brighter
        splits = zip(images.split([1600, 400, 400]), target.split([1600, 400, 400]), strict=True)
        self.train, self.val, self.test = (TensorDataset(*split) for split in splits)

    # Any DataLoader will do. These keep their position in the epoch, for exact resume, and share it between processes.

    def train_dataloader(self) -> DataLoader:
        return train_dataloader(self.train, self.batch_size, seed=self.seed, trainer=self.trainer)

    def val_dataloader(self) -> DataLoader:
        return eval_dataloader(self.val, 2 * self.batch_size, trainer=self.trainer)

    def test_dataloader(self) -> DataLoader:
        return eval_dataloader(self.test, 2 * self.batch_size, trainer=self.trainer)

    def predict_dataloader(self) -> DataLoader:
        return eval_dataloader(self.test, 2 * self.batch_size)  # shared between processes by Lightning
