"""What ``predict`` leaves in the run's folder: a table, and a sheet of images."""

import csv
from collections.abc import Mapping, Sequence
from pickle import PicklingError
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from mnist_lit.engine.outputs import are_probabilities, class_names, display, find_images
from mnist_lit.engine.run import Run, relative
from mnist_lit.engine.sheets import contact_sheet
from mnist_lit.engine.storage import atomic_save, atomic_write, printable

ROWS = 20  # to print
PICTURES = 200


class PredictionsFile(BasePredictionWriter):
    """Write ``predictions.csv`` and ``predictions.png``, and print the first rows.

    For probabilities (B, num_classes) a row has the sample's file (or its index), the predicted class, the confidence
    and the probability of each class. For values (B,) or (B, K) a row has the values. Anything else is saved as it is
    in ``predictions.pt``. The sheet shows the first 200 images. Each process of several writes its share, to
    ``predictions-rank1.csv`` and so on.

    A data module that predicts files lists them in ``files``, in order, and may list for each a warning in
    ``warnings`` ("" for none) and its class in ``labels``, from which the accuracy is printed.

    Example:
        >>> Trainer(callbacks=[PredictionsFile()]).predict(model, datamodule=datamodule)
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self._images: list[Tensor] = []  # each (C, H, W)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if len(self._images) < PICTURES and (images := find_images(batch)) is not None:
            self._images += images[: PICTURES - len(self._images)].cpu().clone()

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        images, self._images = self._images, []
        run = Run.of(trainer)
        if not run.exists:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        stem = run.folder / (f"predictions-rank{trainer.global_rank}" if trainer.global_rank else "predictions")
        values = [value for batch in predictions if (value := _values(batch)) is not None]
        if len(values) < max(len(predictions), 1) or len({value.shape[1:] for value in values}) > 1:
            reason = "no predictions.csv: predict_step does not return (B, num_classes) or (B,)"
            try:
                atomic_save(list(predictions), stem.with_suffix(".pt"))
                rank_zero_warn(f"{reason}; {relative(stem)}.pt has its outputs, for torch.load")
            except (AttributeError, TypeError, PicklingError) as error:  # such as objects of a local class
                rank_zero_warn(f"{reason}, nor anything that can be saved ({error})")
            return
        predicted = torch.cat(values).float().cpu()
        indices = [index for batches in batch_indices for batch in batches for index in batch]
        if len(indices) != len(predicted):  # a loader that has no indices
            indices = list(range(len(predicted)))
        table = _table(trainer, predicted, indices)
        written = [stem.with_suffix(".csv")]
        with atomic_write(written[0]) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
        if images and len({image.shape for image in images}) == 1:
            written.append(stem.with_suffix(".png"))
            captions = [f"{'! ' * bool(row.get('warning'))}{'  '.join([*row.values()][1:3])}" for row in table]
            with atomic_write(written[1]) as part:
                contact_sheet(display(torch.stack(images)), captions[: len(images)]).save(part)
        if trainer.is_global_zero:
            columns = [name for name in table[0] if not name.startswith("p_")][:8]
            shown = Table(*map(escape, columns), title=f"{len(table):,} predictions")
            for row in table[:ROWS]:
                shown.add_row(*(escape(row[name]) for name in columns))
            Console(highlight=False).print(shown)
            if (labels := _listed(trainer, "labels", indices)) and "confidence" in table[0]:
                right = (predicted.argmax(1) == torch.tensor(labels)).sum().item()
                print(f"Right: {right:,} of {len(table):,}, an accuracy of {right / len(table):.4f}")
            print(f"Wrote {' and '.join(map(relative, written))}")


def _values(outputs: Any) -> Tensor | None:
    """Predictions (B,) or (B, K) out of what predict_step returns, or else None."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("preds")
    return outputs if isinstance(outputs, Tensor) and outputs.ndim in (1, 2) and outputs.numel() else None


def _listed(trainer: Trainer, name: str, indices: Sequence[int]) -> list[Any]:
    """What the data module lists by that name for each file that is predicted; nothing if it has no such list."""
    listed = getattr(getattr(trainer, "datamodule", None), name, None)
    return [listed[index] for index in indices] if isinstance(listed, list) and listed else []


def _table(trainer: Trainer, values: Tensor, indices: Sequence[int]) -> list[dict[str, str]]:
    """A row for each of the predictions (n, K) or (n,)."""
    files, warnings = _listed(trainer, "files", indices), _listed(trainer, "warnings", indices)
    rows = [{"file": printable(file)} for file in files] or [{"index": str(index)} for index in indices]
    columns = values.reshape(len(values), -1)
    names = ["prediction"] if columns.shape[1] == 1 else [f"prediction_{index}" for index in range(columns.shape[1])]
    if are_probabilities(values):
        classes = class_names(trainer, values.shape[1])
        names = [f"p_{name}" for name in classes]
        for place, (confidence, index) in enumerate(zip(*(part.tolist() for part in values.max(1)), strict=True)):
            rows[place] |= {"class": classes[index], "confidence": f"{confidence:.6f}"}
            rows[place] |= {"warning": warnings[place]} if warnings else {}
    for row, numbers in zip(rows, columns.tolist(), strict=True):
        row |= {name: f"{number:.6f}" for name, number in zip(names, numbers, strict=True)}
    return rows
