"""What a run leaves behind, beside Lightning's own logs and checkpoints."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


class PredictionsFile(BasePredictionWriter):
    """Writes ``predictions.csv`` into the run's folder: a row per image with its index in the split, the
    predicted digit, the confidence and the probability of every class. Each process of several writes
    its own share, to ``predictions-rank1.csv`` and so on.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        probabilities: list[Tensor] = list(predictions)  # each (B, num_classes)
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        rank = f"-rank{trainer.global_rank}" if trainer.global_rank else ""
        path = folder / f"predictions{rank}.csv"
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            classes = range(probabilities[0].shape[1])
            rows.writerow(["index", "digit", "confidence", *(f"p{c}" for c in classes)])
            for indices, batch in zip(batch_indices[0], probabilities, strict=True):
                confidence, digit = batch.max(1)
                for row in zip(indices, digit.tolist(), confidence.tolist(), batch.tolist(), strict=True):
                    index, predicted, sure, each = row
                    rows.writerow([index, predicted, f"{sure:.6f}", *(f"{p:.6f}" for p in each)])
        rank_zero_info(f"Wrote {path}")
