"""Modules as people write them who do not know this project: with loaders, layers and names of their own."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Own(LightningModule):
    """Loads its own data, logs ``val_loss`` and has no ``predict_step``."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.make()

    def make(self) -> None:
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, self.hparams["num_classes"]))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(64, 3, 8, 8, generator=generator)
        return DataLoader(TensorDataset(images, torch.arange(64) % 3), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataloader().dataset, batch_size=8)

    test_dataloader = val_dataloader


class InConfigureModel(Own):
    def make(self) -> None:
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            Own.make(self)


class InSetup(Own):
    """Draws its training data where it makes the loader, from the generator of all."""

    def make(self) -> None:
        pass

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            super().make()

    def train_dataloader(self) -> DataLoader:
        data = TensorDataset(torch.rand(64, 3, 8, 8), torch.arange(64) % 3)
        return DataLoader(data, batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Own.train_dataloader(self).dataset, batch_size=8)

    test_dataloader = val_dataloader


class Scaled(InConfigureModel):
    """Changes the batch where the data module usually does, otherwise in training, and has a buffer of infinities."""

    def make(self) -> None:
        super().make()
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images = batch[0].flip(-1) if self.trainer.training else batch[0]
        return images * 2 - 1, batch[1]


class TwoOptimizers(Own):
    """Makes two optimizer steps with every batch."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            preds = self(batch[0])
            loss = F.cross_entropy(preds, batch[1])
            self.manual_backward(loss)
            optimizer.step()
        self.log("own", loss)
        return {"loss": loss.detach(), "preds": preds.detach(), "target": batch[1]}

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([weight], 0.1) for weight in self.parameters()]


class Returns(Own):
    """Batches of other kinds, and steps that return what the engine does not expect.

    Args:
        num_classes: of which its own data have three.
        returned: what validation and prediction return: scalar, values, maps or functions.
        batches: pairs, triples or dicts.
        monitored: the name by which it logs the loss.
    """

    def __init__(
        self, num_classes: int = 3, returned: str = "scalar", batches: str = "pairs", monitored: str = "val/loss"
    ) -> None:
        super().__init__(num_classes)
        self.returned, self.batches, self.monitored = returned, batches, monitored

    def pair(self, batch: Any) -> Any:
        return tuple(batch.values()) if isinstance(batch, dict) else batch[-2:]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(self.pair(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        images, target = self.pair(batch)
        self.log(self.monitored, F.cross_entropy(self(images), target), batch_size=len(target))
        return self.predict_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, _ = self.pair(batch)
        values = self(images)[:, 0]  # (B,)
        kinds = {"scalar": values.mean(), "values": values, "maps": images, "functions": lambda: values}
        return kinds[self.returned]  # maps (B, C, H, W)

    def train_dataloader(self) -> DataLoader:
        images, target = super().train_dataloader().dataset.tensors
        rows: Any = TensorDataset(*([torch.arange(64)] * (self.batches == "triples")), images, target)
        if self.batches == "dicts":
            rows = [{"image": image, "label": label} for image, label in zip(images, target, strict=True)]
        return DataLoader(rows, batch_size=8)

    predict_dataloader = train_dataloader
