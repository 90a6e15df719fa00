"""Ruled and squared paper: straight lines from edge to edge."""

from __future__ import annotations

import math

import numpy as np

SAMPLED_COLUMNS = 50  # enough to see whether a row is covered
STEEPEST = 0.14  # rows a column, 8 degrees: nobody takes a photo more askew
COVERED = 0.8  # of the picture's width belongs to a line; a stroke or two may hide the rest
DARKER = 1.5  # times the line's contrast is a stroke's
THICKEST_LINE = 0.05  # of the picture's side


def without_lines(contrast: np.ndarray, faintest: float) -> np.ndarray:
    """The ink float32 (H, W) without lines from edge to edge. Where strokes cross a line, they stay whole."""
    for transpose in (False, True):
        ink = contrast.T if transpose else contrast
        slope, rows = _find_lines(ink > faintest)
        if len(rows):
            ink = ink.copy()
            for first, last in rows:
                _erase(ink, first, last, slope)
            contrast = ink.T if transpose else ink
    return contrast


def _find_lines(mask: np.ndarray) -> tuple[float, np.ndarray]:
    """Slope of the lines across a mask (H, W), and the rows int64 (n, 2), first and last, in its middle column."""
    height, width = mask.shape
    columns = np.arange(0, width, max(1, width // SAMPLED_COLUMNS))
    sampled = mask[:, columns]
    y, x = np.nonzero(sampled)
    columns = columns - width / 2
    offset = columns[x]
    steepest = round(STEEPEST * width / 2)
    best = 0.0, 0.0, np.zeros(height)
    for step in range(-steepest, steepest + 1):  # a pixel at the picture's edge from one slope to the next
        slope = 2 * step / width
        rows = (y - slope * offset + 0.5).astype(np.int64)
        inside = (rows >= 0) & (rows < height)
        covered = np.bincount(rows[inside], minlength=height) / sampled.shape[1]
        score = float((covered[covered > COVERED / 2] ** 4).sum())
        if score > best[0]:
            best = score, slope, covered
    _, slope, covered = best
    # Where the picture cuts a line short, what is left of it counts.
    reach = math.ceil(abs(slope) * width / 2)
    places = np.arange(-reach, height + reach)[:, None] + slope * columns  # (rows, columns)
    seen = ((places > -0.5) & (places < height - 0.5)).sum(1)
    counts = np.bincount((y - slope * offset + 0.5 + reach).astype(np.int64), minlength=len(seen))[: len(seen)]
    covered = counts / np.maximum(seen, len(columns) / 4)
    runs = np.flatnonzero(np.diff(np.pad(covered > COVERED / 2, 1).astype(np.int8))).reshape(-1, 2)
    thickest = max(3, THICKEST_LINE * height)
    lines = [(a - reach, b - reach) for a, b in runs if covered[a:b].max() > COVERED and b - a <= thickest]
    return slope, np.array(lines, np.int64).reshape(-1, 2)


def _erase(ink: np.ndarray, first: int, last: int, slope: float) -> None:
    """Bridge the rows first..last, in place, from the pixels above to those below."""
    height, width = ink.shape
    columns = np.arange(width)
    shift = np.round(slope * (columns - width / 2)).astype(np.int64)
    above, below = (np.clip(row + shift, 0, height - 1) for row in (first - 2, last + 1))
    start, end = ink[above, columns].copy(), ink[below, columns].copy()
    middle = np.clip((first + last) // 2 + shift, 0, height - 1)
    darker = DARKER * float(np.median(ink[middle, columns]))  # than the line: a stroke that runs along it
    span = last - first + 3
    for step in range(1, span):
        rows = first - 2 + step + shift
        inside = (rows >= 0) & (rows < height)
        now, bridged = ink[rows[inside], columns[inside]], (start + (end - start) * (step / span))[inside]
        ink[rows[inside], columns[inside]] = np.where(now > darker, now, np.minimum(now, bridged))
