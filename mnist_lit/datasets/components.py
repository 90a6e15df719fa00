"""Connected components of a mask, in NumPy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

POINTS = 300  # of a component's outline, enough to measure distances to a few percent


@dataclass(frozen=True)
class Components:
    """n components, numbered from 0.

    Attributes:
        labels: int32 (H, W), -1 where the mask is not set.
        boxes: int64 (n, 4): top, left, bottom, right; the last two lie behind the last pixel.
        areas: int64 (n,), pixels.
        contacts: int64 (n,), how many of the picture's outermost pixels belong to the component.
    """

    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    contacts: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """Heights and widths int64 (n, 2)."""
        return self.boxes[:, 2:] - self.boxes[:, :2]

    def mask(self, numbers: np.ndarray) -> np.ndarray:
        """The pixels of these components, bool (H, W)."""
        chosen = np.zeros(len(self.areas) + 1, bool)  # the last one is for label -1
        chosen[numbers] = True
        return chosen[self.labels]

    def outline(self, number: int) -> np.ndarray:
        """Rows and columns float32 (m, 2) of about ``POINTS`` pixels at the component's rim."""
        top, left, bottom, right = self.boxes[number]
        inside = np.pad(self.labels[top:bottom, left:right] == number, 1)
        core = inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        points = np.argwhere(inside[1:-1, 1:-1] & ~core)
        some = points[:: len(points) // POINTS + 1]
        return (some + np.array([top, left])).astype(np.float32)


def find_components(mask: np.ndarray) -> Components:
    """Components of a mask bool (H, W); pixels that touch at a corner belong together.

    A component is made of runs, which are unbroken pixels within a row. There are far fewer of them than pixels.
    """
    height, width = mask.shape
    # One unset column between the rows makes the runs of all rows those of one long line.
    line = np.zeros((height, width + 1), np.int8)
    line[:, :width] = mask
    steps = np.flatnonzero(np.diff(line.ravel(), prepend=np.int8(0)))
    starts, ends = steps[::2], steps[1::2]
    numbers, n = _joined(starts, ends, width + 1)

    labels = np.full(height * (width + 1), -1, np.int32)
    labels[line.ravel() > 0] = np.repeat(numbers, ends - starts)
    labels = labels.reshape(height, width + 1)[:, :width]
    rows = starts // (width + 1)
    boxes = np.empty((n, 4), np.int64)
    boxes[:, :2], boxes[:, 2:] = max(height, width), 0
    np.minimum.at(boxes[:, 0], numbers, rows)
    np.minimum.at(boxes[:, 1], numbers, starts - rows * (width + 1))
    np.maximum.at(boxes[:, 2], numbers, rows + 1)
    np.maximum.at(boxes[:, 3], numbers, ends - rows * (width + 1))
    edge = np.concatenate([labels[0], labels[-1], labels[1:-1, 0], labels[1:-1, -1]])
    return Components(
        labels,
        boxes,
        np.bincount(numbers, ends - starts, n).astype(np.int64),
        np.bincount(edge[edge >= 0], minlength=n),
    )


def _joined(starts: np.ndarray, ends: np.ndarray, row: int) -> tuple[np.ndarray, int]:
    """Which component each run (m,) belongs to, int64 (m,), and how many there are."""
    first = np.searchsorted(ends, starts + row)  # the runs of the next row that this one touches
    counts = np.maximum(np.searchsorted(starts, ends + row, "right") - first, 0)
    above = np.repeat(np.arange(len(starts)), counts)
    below = np.arange(len(above)) - np.repeat(np.cumsum(counts) - counts, counts) + first[above]
    parents = np.arange(len(starts))
    while True:
        one, other = parents[above], parents[below]
        if (one == other).all():
            break
        np.minimum.at(parents, np.maximum(one, other), np.minimum(one, other))
        while (parents != parents[parents]).any():  # every run points at the first of its component
            parents = parents[parents]
    roots, numbers = np.unique(parents, return_inverse=True)
    return numbers, len(roots)
