"""What ``predict`` leaves in the run's folder: a table, and a sheet of images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import Tensor

from mnist_lit.engine.outputs import are_probabilities, class_names, display, find_images
from mnist_lit.engine.run import Run, relative
from mnist_lit.engine.sheets import contact_sheet
from mnist_lit.engine.storage import atomic_save, atomic_write, printable

ROWS = 20  # to print
PICTURES = 200


class PredictionsFile(BasePredictionWriter):
    """Write ``predictions.csv`` and ``predictions.png``, and print the first rows.

    Of probabilities (B, num_classes) a row has the sample's file (or its index), the predicted class, the confidence
    and the probability of each class; the sheet shows the images of least confidence. Of values (B,) or (B, K) a row
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
        if are_probabilities(values):
            confidence, predicted = values.float().max(1)
            names = class_names(trainer, values.shape[1])
            captions = [
                f"{names[index]}  {sure:.0%}"
                for index, sure in zip(predicted.tolist(), confidence.tolist(), strict=True)
            ]
            warned = _of_files(trainer, "warnings", trainer.predict_loop.current_batch_indices)
            captions = [f"! {text}" if warning else text for text, warning in zip_longest(captions, warned)]
            order = confidence.argsort()[:PICTURES].tolist()
        else:
            confidence = torch.zeros(len(values))
            captions = [f"{row[0]:.4g}" for row in values.reshape(len(values), -1).tolist()]
            order = list(range(min(len(values), PICTURES)))
        enough = self._least[-1][0] if len(self._least) == PICTURES else float("inf")
        for place in order:
            if (sure := confidence[place].item()) < enough:
                self._least.append((sure, images[place].detach().cpu().clone(), captions[place]))
        self._least = sorted(self._least, key=lambda row: row[0])[:PICTURES]  # stable: values keep their order

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        least, self._least = self._least, []
        run = Run.of(trainer)
        if not run.exists:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        stem = f"predictions-rank{trainer.global_rank}" if trainer.global_rank else "predictions"
        console = Console()
        batches = list(_flattened(predictions))
        values = [_values(batch) for batch in batches]
        if not values or any(v is None or v.shape[1:] != values[0].shape[1:] for v in values):  # type: ignore
            path = run.folder / f"{stem}.pt"
            atomic_save(batches, path)
            kinds = ", ".join(sorted({_kind(batch) for batch in batches})) or "nothing"
            rank_zero_warn(
                f"no predictions.csv: predict_step returns {kinds} and not (B, num_classes) or (B,); "
                f"{relative(path)} has its outputs, for torch.load"
            )
            return
        predicted = torch.cat([v.float().cpu() for v in values if v is not None])
        indices = [index for batches in batch_indices for batch in batches for index in batch]
        if len(indices) != len(predicted):  # a loader that has no indices
            indices = list(range(len(predicted)))
        header, rows = _rows(trainer, predicted, indices)
        path = run.folder / f"{stem}.csv"
        with atomic_write(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(header)
            table.writerows([cell if isinstance(cell, str) else f"{cell:.6f}" for cell in row] for row in rows)
        wrote = [path]
        if least and (sheet := _sheet(least)) is not None:
            wrote.append(run.folder / f"{stem}.png")
            with atomic_write(wrote[-1]) as part:
                sheet.save(part)
        if trainer.is_global_zero:
            _print(console, header, rows)
            _print_accuracy(console, trainer, header, rows, indices)
            console.print(f"Wrote {' and '.join(map(relative, wrote))}", soft_wrap=True, highlight=False, markup=False)


def _values(outputs: Any) -> Tensor | None:
    """Predictions (B,) or (B, K) out of what predict_step returns, or else None."""
    if isinstance(outputs, Mapping):
        outputs = outputs.get("preds")
    if not isinstance(outputs, Tensor) or outputs.ndim not in (1, 2) or not outputs.numel():
        return None
    return outputs.detach()


def _of_files(trainer: Trainer, name: str, indices: Sequence[int]) -> list[Any]:
    """What the data module lists by that name for each file that is predicted; nothing if it has no such list."""
    listed = getattr(getattr(trainer, "datamodule", None), name, None)
    if not isinstance(listed, list) or not indices or len(listed) <= max(indices):
        return []
    return [listed[index] for index in indices]


def _kind(outputs: Any) -> str:
    return f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"


def _flattened(predictions: Sequence[Any]) -> Sequence[Any]:
    """The batches of all dataloaders; Lightning has a list for each where there are several."""
    if predictions and isinstance(predictions[0], list):
        return [batch for batches in predictions for batch in batches]
    return predictions


def _rows(trainer: Trainer, values: Tensor, indices: Sequence[int]) -> tuple[list[str], list[list[str | float]]]:
    files = _of_files(trainer, "files", indices)
    samples = [printable(file) for file in files] or [str(index) for index in indices]
    header = ["file" if files else "index"]
    if are_probabilities(values):
        names = class_names(trainer, values.shape[1])
        confidence, predicted = values.max(1)
        warned = [[text] for text in _of_files(trainer, "warnings", indices)]
        header += ["class", "confidence", *(["warning"] if warned else []), *(f"p_{name}" for name in names)]
        columns = zip(
            samples,
            predicted.tolist(),
            confidence.tolist(),
            warned or [[]] * len(samples),
            values.tolist(),
            strict=True,
        )
        return header, [[sample, names[index], sure, *warning, *each] for sample, index, sure, warning, each in columns]
    if values.ndim == 1 or values.shape[1] == 1:
        header.append("prediction")
    else:
        header += [f"prediction_{index}" for index in range(values.shape[1])]
    each_row = zip(samples, values.reshape(len(values), -1).tolist(), strict=True)
    return header, [[sample, *each] for sample, each in each_row]


def _sheet(least: list[tuple[float, Tensor, str]]) -> Any:
    if len({image.shape for _, image, _ in least}) > 1:
        rank_zero_warn("no predictions.png: the images have several sizes")
        return None
    return contact_sheet(display(torch.stack([image for _, image, _ in least])), [row[2] for row in least])


def _print_accuracy(
    console: Console, trainer: Trainer, header: list[str], rows: list[list[str | float]], indices: Sequence[int]
) -> None:
    """If the data module knows the class of every file: of those that this process has predicted."""
    labels = _of_files(trainer, "labels", indices)
    if labels and "confidence" in header:
        names = [name.removeprefix("p_") for name in header if name.startswith("p_")]
        right = sum(row[1] == names[label] for row, label in zip(rows, labels, strict=True))
        console.print(f"Right: {right:,} of {len(rows):,}, an accuracy of {right / len(rows):.4f}")


def _print(console: Console, header: list[str], rows: list[list[str | float]]) -> None:
    shares = "confidence" in header
    warned = sum(bool(row[3]) for row in rows) if "warning" in header else 0
    shown = header[: 4 if warned else 3] if shares else header[:8]
    table = Table(*(Column(escape(name), justify="left" if name in header[:1] else "right") for name in shown))
    for row in rows[:ROWS]:
        cells = [cell if isinstance(cell, str) else f"{cell:.1%}" if shares else f"{cell:.4g}" for cell in row]
        table.add_row(*(escape(cell) for cell in cells[: len(shown)]))
    console.print(table)
    if len(rows) > ROWS:
        console.print(f"... and {len(rows) - ROWS:,} more")
    if warned:
        console.print(f"With a warning: {warned:,} of {len(rows):,}")
