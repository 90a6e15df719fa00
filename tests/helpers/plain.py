"""A module and its data as anybody writes them, for callbacks in a plain ``Trainer``."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    """Images (B, 1, 8, 8) of three classes, SGD with momentum; steps return what ``outputs`` makes of a batch."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def outputs(self, batch: list[Tensor]) -> dict[str, Tensor]:
        preds = self(batch[0])
        return {"loss": F.cross_entropy(preds, batch[1]), "preds": preds, "target": batch[1]}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.outputs(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return self.outputs(batch)

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(1)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, 0.9)


def noise(number: int = 40, batch_size: int = 10) -> DataLoader:
    """Noise with labels, in order."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(number, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(number) % 3), batch_size)


class Weights(Callback):
    """Keeps the weights after every step, by epoch."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, Tensor]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.steps.append((trainer.current_epoch, state))


def fit(model: LightningModule, folder: Path, *callbacks: Callback, data: Any = None, **options: Any) -> Trainer:
    """Train two epochs of four steps in a folder, with nothing but these callbacks."""
    off = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    chosen: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 2, "accelerator": "cpu", "callbacks": [*callbacks]}
    chosen |= dict.fromkeys(off, False) | options
    trainer = Trainer(default_root_dir=folder, **chosen)
    trainer.fit(model, data or noise(), None if data else noise())
    return trainer
