"""What ``predict`` leaves in the run's folder: a table, and a sheet of images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
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
    and the probability of each class; the sheet shows the images of least confidence. For values (B,) or (B, K) a row
    has the values. Anything else is saved as it is in ``predictions.pt``. Each process of several writes its share, to
    ``predictions-rank1.csv`` and so on.

    A data module that predicts files lists them in ``files``, in order, and may list for each a warning in
    ``warnings`` ("" for none) and its class in ``labels``, from which the accuracy is printed.

    Example:
        >>> Trainer(callbacks=[PredictionsFile()]).predict(model, datamodule=datamodule)
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        # Confidence, image (C, H, W) and caption of the least confident so far.
        self._least: list[tuple[float, Tensor, str]] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        values, images = _values(outputs), find_images(batch)
        if values is None or images is None or len(images) != len(values):
            return
        confidence = torch.zeros(len(values))
        captions = [f"{row[0]:.4g}" for row in values.reshape(len(values), -1).tolist()]
        if are_probabilities(values):
            confidence, predicted = values.float().cpu().max(1)
            names = class_names(trainer, values.shape[1])
            rows = zip(predicted.tolist(), confidence.tolist(), strict=True)
            captions = [f"{names[index]}  {sure:.0%}" for index, sure in rows]
        if warned := _listed(trainer, "warnings", trainer.predict_loop.current_batch_indices):
            captions = [f"! {each}" if warning else each for each, warning in zip(captions, warned, strict=True)]
        order = confidence.argsort(stable=True)[:PICTURES].tolist()
        least = [(confidence[place].item(), images[place].detach().cpu().clone(), captions[place]) for place in order]
        self._least = sorted([*self._least, *least], key=lambda row: row[0])[:PICTURES]

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        least, self._least = self._least, []
        run = Run.of(trainer)
        if not run.exists:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        stem = run.folder / (f"predictions-rank{trainer.global_rank}" if trainer.global_rank else "predictions")
        if predictions and isinstance(predictions[0], list):  # several dataloaders
            predictions = [batch for batches in predictions for batch in batches]
        values = [value for batch in predictions if (value := _values(batch)) is not None]
        if len(values) < max(len(predictions), 1) or len({value.shape[1:] for value in values}) > 1:
            atomic_save(list(predictions), stem.with_suffix(".pt"))
            rank_zero_warn(
                "no predictions.csv: predict_step does not return (B, num_classes) or (B,); "
                f"{relative(stem)}.pt has its outputs, for torch.load"
            )
            return
        predicted = torch.cat(values).float().cpu()
        indices = [index for batches in batch_indices for batch in batches for index in batch]
        if len(indices) != len(predicted):  # a loader that has no indices
            indices = list(range(len(predicted)))
        header, rows = _table(trainer, predicted, indices)
        written = [stem.with_suffix(".csv")]
        with atomic_write(written[0]) as part, part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        if least and len({image.shape for _, image, _ in least}) == 1:
            written.append(stem.with_suffix(".png"))
            with atomic_write(written[1]) as part:
                images = torch.stack([image for _, image, _ in least])
                contact_sheet(display(images), [caption for *_, caption in least]).save(part)
        if trainer.is_global_zero:
            console = Console(highlight=False)
            columns = 8 if "confidence" not in header else 4 if "warning" in header else 3
            table = Table(*map(escape, header[:columns]), title=f"{len(rows):,} predictions")
            for row in rows[:ROWS]:
                table.add_row(*map(escape, row[:columns]))
            console.print(table)
            if (labels := _listed(trainer, "labels", indices)) and "confidence" in header:
                right = (predicted.argmax(1) == torch.tensor(labels)).sum().item()
                console.print(f"Right: {right:,} of {len(rows):,}, an accuracy of {right / len(rows):.4f}")
            if warned := sum(map(bool, _listed(trainer, "warnings", indices))):
                console.print(f"With a warning: {warned:,} of {len(rows):,}")
            console.print(f"Wrote {' and '.join(map(relative, written))}", soft_wrap=True, markup=False)


def _values(outputs: Any) -> Tensor | None:
    """Predictions (B,) or (B, K) out of what predict_step returns, or else None."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("preds")
    return outputs if isinstance(outputs, Tensor) and outputs.ndim in (1, 2) and outputs.numel() else None


def _listed(trainer: Trainer, name: str, indices: Sequence[int]) -> list[Any]:
    """What the data module lists by that name for each file that is predicted; nothing if it has no such list."""
    listed = getattr(getattr(trainer, "datamodule", None), name, None)
    return [listed[index] for index in indices] if isinstance(listed, list) and listed else []


def _table(trainer: Trainer, values: Tensor, indices: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """The table's header, and a row for each of the predictions (n, K) or (n,)."""
    files, warnings = _listed(trainer, "files", indices), _listed(trainer, "warnings", indices)
    kind, first = ("file", [*map(printable, files)]) if files else ("index", [*map(str, indices)])
    numbers = [[f"{value:.6f}" for value in row] for row in values.reshape(len(values), -1).tolist()]
    if not are_probabilities(values):
        width = len(numbers[0])
        names = ["prediction"] if width == 1 else [f"prediction_{index}" for index in range(width)]
        return [kind, *names], [[name, *row] for name, row in zip(first, numbers, strict=True)]
    names = class_names(trainer, values.shape[1])
    rows = [
        [first[place], names[index], numbers[place][index], *warnings[place : place + 1], *numbers[place]]
        for place, index in enumerate(values.argmax(1).tolist())
    ]
    return [kind, "class", "confidence", *["warning"][: len(warnings)], *(f"p_{name}" for name in names)], rows
