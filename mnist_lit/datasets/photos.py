"""The ink of a digit in a photo: without the light on the paper, and without what else is on the paper.

Lengths in the constants are shares of the picture's shorter side or of the digit, so that resolution does not matter.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from mnist_lit.datasets.components import Components, find_components

# Paper
STROKE = 0.25  # of the shorter side; what is darker and narrower than that is no shade on the paper
GRID = 128  # pixels, longer side of the small copy that tells dark ink from light
FAINTEST = 0.05  # contrast; fainter ink than that is not told from an empty paper's texture
STRONGEST = 0.001  # of the pixels have the ink's full contrast; the smallest digits have more, noise has less
SMALL = 64  # pixels, shorter side; smaller pictures are not photos
DARKNESS = 0.05  # of full brightness, added before dividing: a camera's black is noise

# Ruled lines
STEEPEST = 0.14  # rows a column, 8 degrees: nobody takes a photo more askew
FAINTEST_LINE = 0.12  # of the ink's contrast
COVERED = 0.8  # of the picture's width belongs to a line; a stroke or two may hide the rest
THICKEST_LINE = 0.05  # of the picture's side

# What belongs to the digit
INK = 0.45  # of the ink's contrast; half-covered rims of strokes have more, smudges and shades less
BLUR = 0.006  # of the picture's longer side, around what is taken away
RIM = 0.05  # of the digit's size, one of MNIST's pixels: the paler rims of its strokes
SMALLEST = 0.1  # of the picture's shorter side; what is smaller is a speck
SPECK = 0.17  # of the digit's size; parts that came off, as the bar of a 5, are larger
BACKGROUND = 0.85  # of half its box's outline touches the edge: a frame or a table, and no cropped digit
SIDES = 0.8  # of each of its sides a drawn box has
NEAR = 0.14  # of the digit's size: a gap in a broken stroke
SECOND = 0.35  # of the digit's size: what is larger and not near is another digit
SPAN = 0.65  # of the common height: two parts that stand side by side and are that high are two digits
WIDEST = 1.5  # width by height; no single digit is as wide

TWO = "holds more than one digit"
UNCLEAR = "paper and digit are hard to tell apart"


def find_digit(grey: np.ndarray, background: float | None = None) -> tuple[np.ndarray | None, str]:
    """Find the ink of the digit in a picture.

    Args:
        grey: brightness float32 (H, W) in 0..1.
        background: the paper's brightness if it is known to be the same everywhere.

    Returns:
        ink float32 (H, W), 0 paper and 1 full ink, or None if there is none, and a warning, "" if there is none.
    """
    if background is not None and _has_shade(grey - background):
        background = None
    contrast = _contrast(grey) if background is None else _flat_contrast(grey, background)
    return _digit(contrast)


# ---------------------------------------------------------------------------------------------------- the paper


def _flat_contrast(grey: np.ndarray, background: float) -> np.ndarray:
    """Ink float32 (H, W) in 0..1 over a paper of one brightness."""
    difference = grey - background
    if -difference.min() > difference.max():
        difference = -difference
    return np.maximum(difference, 0)


def _has_shade(difference: np.ndarray) -> bool:
    """Whether areas too wide for strokes differ from the background: a drawing of a shadow, or of a table."""
    if min(difference.shape) < SMALL:
        return False  # too few pixels to tell, and images of training sets are all digit
    small = _small(np.abs(difference))
    return bool((-_closed(-small)).max() > FAINTEST)


def _contrast(grey: np.ndarray) -> np.ndarray:
    """Share float32 (H, W) of the paper's light that the ink takes, around 0 where there is none.

    Light that falls on the paper multiplies, so that a stroke's share is the same in the sun and in the shade.
    """
    grey = _blurred(grey, 1)
    small = _small(grey)
    if _is_ink_dark(small):
        return _share_taken(grey)
    # A negative of a photo, or chalk on a board. The right one of both has ink of the same contrast everywhere.
    readings = _negative, _board
    return _share_taken(max(readings, key=lambda read: _evenness(_share_taken(read(small))))(grey))


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
    return taken - np.median(taken)  # the closing is the upper envelope of the paper's noise


def _closed(values: np.ndarray) -> np.ndarray:
    """Without what is smaller than the surroundings and narrow, float32 (H, W)."""
    reach = _reach(values)
    return -_maximum(-_maximum(values, reach), reach)


def _reach(values: np.ndarray) -> int:
    return max(1, round(STROKE * min(values.shape) / 2))


def _evenness(contrast: np.ndarray) -> float:
    """Otsu's criterion: the share of the variance that two classes explain."""
    counts, edges = np.histogram(contrast, 64, (0, 1))
    values, share = (edges[:-1] + edges[1:]) / 2, counts / counts.sum()
    below, mean = np.cumsum(share), np.cumsum(share * values)
    between = (mean[-1] * below - mean) ** 2 / np.maximum(below * (1 - below), 1e-9)
    return float(between[:-1].max() / max((share * (values - mean[-1]) ** 2).sum(), 1e-9))


def _maximum(values: np.ndarray, reach: int) -> np.ndarray:
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


# ---------------------------------------------------------------------------------------------------- ruled lines


def _without_lines(contrast: np.ndarray, faintest: float) -> np.ndarray:
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
    sampled = mask[:, ::4]
    y, x = np.nonzero(sampled)
    offset = 4 * x - width / 2
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
    runs = np.flatnonzero(np.diff(np.pad(covered > COVERED / 2, 1).astype(np.int8))).reshape(-1, 2)
    thickest = max(3, THICKEST_LINE * height)
    lines = [(a, b) for a, b in runs if covered[a:b].max() > COVERED and b - a <= thickest]
    return slope, np.array(lines, np.int64).reshape(-1, 2)


def _erase(ink: np.ndarray, first: int, last: int, slope: float) -> None:
    """Bridge the rows first..last, in place, from the pixels above to those below."""
    height, width = ink.shape
    columns = np.arange(width)
    shift = np.round(slope * (columns - width / 2)).astype(np.int64)
    above, below = (np.clip(row + shift, 0, height - 1) for row in (first - 2, last + 1))
    start, end = ink[above, columns].copy(), ink[below, columns].copy()
    span = last - first + 3
    for step in range(1, span):
        rows = first - 2 + step + shift
        inside = (rows >= 0) & (rows < height)
        bridged = start + (end - start) * (step / span)
        ink[rows[inside], columns[inside]] = np.minimum(ink[rows[inside], columns[inside]], bridged[inside])


# ---------------------------------------------------------------------------------------------------- the digit


def _digit(contrast: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Ink of the digit and a warning, as in ``find_digit``, out of the contrast float32 (H, W)."""
    full = _full(contrast)
    if full < FAINTEST:
        return None, ""
    noise = -float(np.quantile(contrast, 0.16))  # a standard deviation
    contrast = np.maximum(contrast, 0)
    faintest = max(FAINTEST_LINE * full, 3 * noise)
    if min(contrast.shape) >= SMALL:
        contrast = _without_lines(contrast, faintest)
    faint = find_components(contrast > faintest)
    boxes = [number for number in range(len(faint.areas)) if _is_box(faint, number)]
    if boxes:
        contrast = np.where(_grown(faint.mask(np.array(boxes)), BLUR * max(contrast.shape)), 0, contrast)
    for _ in range(3):
        full = _full(contrast)
        if full < FAINTEST:
            return None, ""
        parts = find_components(contrast > (INK * full if min(contrast.shape) >= SMALL else FAINTEST))
        others = _background(parts)
        if not len(others):
            break
        # What is left may be fainter than a frame or a table.
        contrast = np.where(_grown(parts.mask(others), BLUR * max(contrast.shape)), 0, contrast)
    groups = _groups(parts)
    if not groups:
        return None, ""
    chosen = np.concatenate(groups)
    warning = TWO if len(groups) > 1 or _are_two(parts, chosen) else ""
    ink = np.minimum(contrast / full, 1)
    return np.where(_grown(parts.mask(chosen), RIM * _size(parts, chosen)), ink, 0), warning


def _full(contrast: np.ndarray) -> float:
    """Contrast of full ink."""
    values = contrast.ravel()
    place = max(0, len(values) - 1 - round(STRONGEST * len(values)))
    return float(np.partition(values, place)[place])


def _grown(mask: np.ndarray, reach: float) -> np.ndarray:
    """The mask bool (H, W) and the blurred rims of its strokes."""
    return _maximum(mask.astype(np.float32), max(1, math.ceil(reach))) > 0


def _background(parts: Components) -> np.ndarray:
    """Numbers int64 (n,) of the frames, table edges and drawn boxes."""
    outline = parts.sizes.sum(1)
    frames = parts.contacts >= BACKGROUND * outline
    boxes = np.array([_is_box(parts, number) for number in range(len(parts.areas))], bool)
    # What is cut off by the edge does not belong to the digit, unless it is most of what there is.
    inner, longest = parts.contacts == 0, parts.sizes.max(1)
    cut_off = ~inner & ~frames & ~boxes
    enough = max(SMALLEST * min(parts.labels.shape), SECOND * longest[cut_off].max(initial=0))
    if (inner & ~boxes & (longest >= enough)).any():
        frames |= cut_off
    return np.flatnonzero(frames | boxes)


def _is_box(parts: Components, number: int) -> bool:
    """Four straight sides, and nothing of the component within them."""
    height, width = parts.sizes[number]
    if min(height, width) < 0.3 * min(parts.labels.shape):
        return False
    top, left, bottom, right = parts.boxes[number]
    inside = parts.labels[top:bottom, left:right] == number
    deep = max(2, height // 8), max(2, width // 8)
    sides = (
        inside[: deep[0]].any(0),
        inside[-deep[0] :].any(0),
        inside[:, : deep[1]].any(1),
        inside[:, -deep[1] :].any(1),
    )
    return all(side.mean() >= SIDES for side in sides) and not inside[deep[0] : -deep[0], deep[1] : -deep[1]].any()


def _groups(parts: Components) -> list[np.ndarray]:
    """Numbers of the components of each digit, the largest digit first."""
    longest = parts.sizes.max(1)
    if not len(longest) or longest.max() < SMALLEST * min(parts.labels.shape):
        return []
    size = longest[np.argmax(parts.areas * (longest >= SMALLEST * min(parts.labels.shape)))]
    left = [int(number) for number in np.argsort(-parts.areas) if longest[number] >= SPECK * size]
    outlines = {number: parts.outline(number) for number in left}
    groups: list[np.ndarray] = []
    while left:
        group = [left.pop(0)]
        for member in group:  # grows meanwhile
            for other in left.copy():
                if _distance(outlines[member], outlines[other]) <= NEAR * size:
                    group.append(other)
                    left.remove(other)
        groups.append(np.array(group))
    return [group for group in groups if _size(parts, group) >= SECOND * size]


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(((one[:, None] - other[None]) ** 2).sum(2).min()) ** 0.5


def _size(parts: Components, group: np.ndarray) -> int:
    """Longer side of the box around components."""
    return int((parts.boxes[group, 2:].max(0) - parts.boxes[group, :2].min(0)).max())


def _are_two(parts: Components, group: np.ndarray) -> bool:
    """Whether components that are near to each other, or one alone, look like two digits."""
    boxes = parts.boxes[group]
    height, width = boxes[:, 2:].max(0) - boxes[:, :2].min(0)
    return bool(width > WIDEST * height)
