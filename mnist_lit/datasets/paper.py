"""What a picture's paper is like, and how much of its light the ink takes."""

from __future__ import annotations

import numpy as np
from PIL import Image

STROKE = 0.25  # of the shorter side; what is darker and narrower than that is no shade on the paper
GRID = 128  # pixels, longer side of the small copy that tells dark ink from light
NOISE_BY_STEP = 2.0  # standard deviation of blurred noise, by the median step from a pixel to the next
SAMPLED = 3  # one pixel in three is enough for medians and shares
STRONGEST = 0.001  # of the pixels have the ink's full contrast; the smallest digits have more, noise has less
DARKNESS = 0.05  # of full brightness, added before dividing: a camera's black is noise


def edge_of(grey: np.ndarray) -> np.ndarray:
    """The outermost pixels float32 (n,), once around a picture (H, W)."""
    return np.concatenate([grey[0], grey[1:, -1], grey[-1, -2::-1], grey[-2:0:-1, 0]])


def contrast_to_edge(grey: np.ndarray) -> np.ndarray:
    """Ink float32 (H, W) in 0..1 over a paper of one brightness, that of most of the edge."""
    difference = grey - np.median(edge_of(grey))
    if -difference.min() > difference.max():
        difference = -difference
    return np.maximum(difference, 0)


def contrast_to_paper(grey: np.ndarray) -> np.ndarray:
    """Share float32 (H, W) of the paper's light that the ink takes, around 0 where there is none.

    Light that falls on the paper multiplies, so that a stroke's share is the same in the sun and in the shade.
    """
    grey = _blurred(grey, 1)
    small = _small(grey)
    if _is_ink_dark(small):
        return _share_taken(grey)
    # A negative of a photo, or chalk on a board. The right one of both has ink of the same contrast everywhere.
    readings = _negative, _board
    return _share_taken(max(readings, key=lambda read: evenness(_share_taken(read(small))))(grey))


def _small(grey: np.ndarray) -> np.ndarray:
    height, width = grey.shape
    scale = min(1.0, GRID / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))


def _negative(grey: np.ndarray) -> np.ndarray:
    return 1 - grey


def _board(grey: np.ndarray) -> np.ndarray:
    """Inverse brightness, so that light still multiplies."""
    return (1 + DARKNESS) * DARKNESS / (grey + DARKNESS) - DARKNESS


def _is_ink_dark(grey: np.ndarray) -> bool:
    """Whether the picture is simpler as a paper with dark ink than as one with light ink.

    With the wrong one of both, the strokes count as paper, which then has edges, and what they enclose as ink.
    """
    costs = []
    for values in (np.log(grey + DARKNESS), -np.log(grey + DARKNESS)):
        paper = _closed(values)
        edges = sum(np.abs(np.diff(paper, axis=axis)).mean() for axis in (0, 1))
        costs.append((paper - values).mean() + edges * _reach(grey))
    return bool(costs[0] <= costs[1])


def _share_taken(grey: np.ndarray) -> np.ndarray:
    taken = 1 - (grey + DARKNESS) / (_closed(grey) + DARKNESS)
    return taken - np.median(taken.ravel()[::SAMPLED])  # the closing is the upper envelope of the paper's noise


def _closed(values: np.ndarray) -> np.ndarray:
    """Without what is smaller than the surroundings and narrow, float32 (H, W)."""
    reach = _reach(values)
    return -maximum(-maximum(values, reach), reach)


def _reach(values: np.ndarray) -> int:
    return max(1, round(STROKE * min(values.shape) / 2))


def evenness(contrast: np.ndarray) -> float:
    """Otsu's criterion: the share of the variance that two classes explain."""
    counts, edges = np.histogram(contrast, 64, (0, 1))
    values, share = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    below, mean = np.cumsum(share), np.cumsum(share * values)
    between = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-9)
    return float(between[:-1].max() / max((share * (values - mean[-1]) ** 2).sum(), 1e-9))


def maximum(values: np.ndarray, reach: int) -> np.ndarray:
    """Largest of the pixels at most ``reach`` rows and columns away, float32 (H, W)."""
    for axis in (0, 1):
        length, window = values.shape[axis], 1
        pads = [(0, 0), (0, 0)]
        pads[axis] = (reach, reach)
        values = np.moveaxis(np.pad(values, pads, constant_values=-np.inf), axis, 0)
        while window < 2 * reach + 1:  # maxima of windows of 1, 2, 4, ... and finally all pixels
            step = min(window, 2 * reach + 1 - window)
            values = np.maximum(values[:-step], values[step:])
            window += step
        values = np.moveaxis(values[:length], 0, axis)
    return values


def _blurred(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the pixels at most ``reach`` rows and columns away, float32 (H, W)."""
    for axis in (0, 1):
        pads = [(0, 0), (0, 0)]
        pads[axis] = (reach, reach)
        padded, length = np.moveaxis(np.pad(values, pads, "edge"), axis, 0), values.shape[axis]
        total = padded[:length].copy()
        for step in range(1, 2 * reach + 1):
            total += padded[step : step + length]
        values = np.moveaxis(total / (2 * reach + 1), 0, axis)
    return values


def full_contrast(contrast: np.ndarray) -> float:
    """Contrast of full ink."""
    values = contrast.ravel()[::SAMPLED]
    place = len(values) - 1 - round(STRONGEST * len(values))
    return float(np.partition(values, place)[place])


def noise_of(contrast: np.ndarray) -> float:
    """Standard deviation of the contrast (H, W) on bare paper."""
    return NOISE_BY_STEP * float(np.median(np.abs(np.diff(contrast)).ravel()[::SAMPLED]))
