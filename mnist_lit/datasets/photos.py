"""The ink of a digit in a photo: without the light on the paper, and without what else is on the paper.

Lengths in the constants are shares of the picture's shorter side or of the digit, so that resolution does not matter.
"""

from __future__ import annotations

import math

import numpy as np

from mnist_lit.datasets.components import Components, find_components
from mnist_lit.datasets.lines import without_lines
from mnist_lit.datasets.paper import (
    contrast_to_edge,
    contrast_to_paper,
    edge_of,
    evenness,
    full_contrast,
    maximum,
    noise_of,
)

# Pictures
FAINTEST = 0.05  # contrast; fainter ink than that is not told from an empty paper's texture
FAINTEST_LINE = 0.12  # of the ink's contrast
LOUDER = 7  # than the noise is ink; where the light is low there is more noise than on average
SMALL = 64  # pixels, shorter side; smaller pictures are not photos

# What belongs to the digit
INK = 0.45  # of the ink's contrast; half-covered rims of strokes have more, smudges and shades less
BLUR = 0.012  # of the picture's longer side, around what is taken away
RIM = 0.05  # of the digit's size, one of MNIST's pixels: the paler rims of its strokes
SMALLEST = 0.1  # of the picture's shorter side; what is smaller is a speck
SPECK = 0.17  # of the digit's size; parts that came off, as the bar of a 5, are larger
BACKGROUND = 0.5  # of half its box's outline touches the edge: a frame or a table, and no cropped digit
BAND = 0.15  # of the picture's shorter side: frames and tables lie this near to the edge, or are paper
TWO_TONES = 0.94  # of the variance is between paper and ink: light falls evenly. Of crops it is 0.955 or more
MOST = 0.8  # of the ink is one stroke
THICKEST = 0.35  # of the longer side: a digit's strokes are thinner, a shadow is not
MARGIN = 0.2  # of a picture's sides, at most, is around a digit that was cut out along its box
RIMS = 6  # a side is looked for within this part of the height or width
SIDES = 0.8  # of each of its sides a drawn box has
NEAR = 0.2  # of the digit's size: a gap in a broken stroke
SECOND = 0.35  # of the digit's size: what is larger and not near is another digit
SPAN = 0.5  # of the common height: two parts that stand side by side and are that high are two digits
STACKED = 0.3  # of the common height: two parts above each other that are that high are two digits
MANY = 12  # parts or more: a texture, and no digit
WIDEST = 1.8  # width by height; no single digit is as wide

TWO = "holds more than one digit"
UNCLEAR = "paper and digit are hard to tell apart"


def find_digit(grey: np.ndarray) -> tuple[np.ndarray | None, str]:
    """Find the ink of the digit in a picture.

    Args:
        grey: brightness float32 (H, W) in 0..1.

    Returns:
        ink float32 (H, W), 0 paper and 1 full ink, or None if there is none, and a warning, "" if there is none.
    """
    contrast = contrast_to_edge(grey)
    if min(grey.shape) < SMALL:
        return _digit(contrast, FAINTEST)
    threshold = INK * full_contrast(contrast)
    if _is_crop(contrast):
        return _digit(contrast, threshold)
    edge = edge_of(grey)
    if edge.min() == edge.max() and _is_thin(contrast > threshold):  # drawn, and neither in a frame nor on a table
        return _digit(_without_background(_without_boxes(contrast, FAINTEST)), threshold)
    contrast = contrast_to_paper(grey)
    noise = noise_of(contrast)
    contrast = np.maximum(contrast, 0)
    faintest = max(FAINTEST_LINE * full_contrast(contrast), 3 * noise)
    contrast = _without_boxes(contrast, faintest)  # before one of their sides counts as a line
    contrast = without_lines(contrast, faintest)
    contrast = _without_background(contrast)
    full = full_contrast(contrast)
    if full < LOUDER * noise:
        return None, ""
    return _digit(contrast, INK * full)


# ---------------------------------------------------------------------------------------------------- what it is not


def _is_crop(contrast: np.ndarray) -> bool:
    """Whether a digit was cut out along its box: one stroke reaches from edge to edge, both across and down.

    Such a picture has too little paper to estimate it everywhere, and too little for other things to be on it.
    """
    full = full_contrast(contrast)
    mask = contrast > INK * full
    if full < FAINTEST:
        return False
    parts = find_components(mask)
    largest = int(parts.areas.argmax())
    on_edge = edge_of(parts.labels) == largest
    strokes = int((on_edge != np.roll(on_edge, 1)).sum()) // 2  # that the edge cuts; it cuts more lines of a grid
    return bool(
        (parts.sizes[largest] >= np.array(mask.shape) * (1 - MARGIN)).all()
        and parts.areas[largest] >= MOST * mask.sum()
        and 1 <= strokes <= 8
        and on_edge.mean() < 0.4
        and evenness(contrast / full) >= TWO_TONES
        and not _has_sides(parts, largest)
        and _is_thin(mask)
    )


def _is_thin(mask: np.ndarray) -> bool:
    """Whether no square of ``THICKEST`` fits into the mask (H, W)."""
    reach = round(THICKEST / 2 * max(mask.shape))
    outside = np.pad(mask, reach).astype(np.float32)
    return bool((-maximum(-outside, reach)).max() == 0)


def _without_boxes(contrast: np.ndarray, faintest: float) -> np.ndarray:
    """The ink float32 (H, W) without drawn boxes, whose lines may be thin and pale."""
    parts = find_components(contrast > faintest)
    return np.where(_grown(parts.mask(_boxes(parts)), BLUR * max(contrast.shape)), 0, contrast)


def _without_background(contrast: np.ndarray) -> np.ndarray:
    """The ink float32 (H, W) without frames, table edges and boxes."""
    blur = BLUR * max(contrast.shape)
    for _ in range(3):  # what is left may be fainter than a frame or a table
        parts = find_components(contrast > INK * max(full_contrast(contrast), FAINTEST))
        others = _background(parts)
        if not len(others):
            break
        contrast = np.where(_grown(parts.mask(others), blur), 0, contrast)
    return contrast


def _background(parts: Components) -> np.ndarray:
    """Numbers int64 (n,) of the frames, table edges and drawn boxes."""
    height, width = parts.labels.shape
    band = round(BAND * min(height, width))
    inside = parts.labels[band : height - band, band : width - band]
    deep = np.bincount(inside[inside >= 0], minlength=len(parts.areas))
    frames = (parts.contacts >= BACKGROUND * parts.sizes.sum(1)) & (deep <= 0.1 * parts.areas)
    boxes = np.isin(np.arange(len(parts.areas)), _boxes(parts))
    # What is cut off by the edge does not belong to the digit, unless it is most of what there is.
    inner, longest = parts.contacts == 0, parts.sizes.max(1)
    cut_off = ~inner & ~frames & ~boxes
    enough = max(SMALLEST * min(parts.labels.shape), SECOND * longest[cut_off].max(initial=0))
    if (inner & ~boxes & (longest >= enough)).any():
        frames |= cut_off
    return np.flatnonzero(frames | boxes)


def _boxes(parts: Components) -> np.ndarray:
    """Numbers int64 (n,) of the drawn boxes: four straight sides around something else, and nothing within them."""
    sizes, boxes, found = parts.sizes, parts.boxes, []
    for number in np.flatnonzero(sizes.min(1) >= SMALLEST * min(parts.labels.shape)).tolist():
        height, width = sizes[number]
        within = (boxes[:, :2] > boxes[number, :2]).all(1) & (boxes[:, 2:] < boxes[number, 2:]).all(1)
        if sizes[within].max(initial=0) < SPECK * min(height, width) or not _has_sides(parts, number):
            continue
        top, left, bottom, right = boxes[number]
        inside = parts.labels[top:bottom, left:right] == number
        deep = max(2, height // RIMS), max(2, width // RIMS)
        if inside[deep[0] : -deep[0], deep[1] : -deep[1]].sum() <= 0.05 * inside.sum():
            found.append(number)
    return np.array(found, int)


def _has_sides(parts: Components, number: int) -> bool:
    """Whether four straight sides bound the component, nearly level ones."""
    top, left, bottom, right = parts.boxes[number]
    inside = parts.labels[top:bottom, left:right] == number
    height, width = max(2, (bottom - top) // RIMS), max(2, (right - left) // RIMS)
    sides = inside[:height].any(0), inside[-height:].any(0), inside[:, :width].any(1), inside[:, -width:].any(1)
    return all(side.mean() >= SIDES for side in sides)


def _grown(mask: np.ndarray, reach: float) -> np.ndarray:
    """The mask bool (H, W) and the blurred rims of its strokes."""
    return maximum(mask.astype(np.float32), max(1, math.ceil(reach))) > 0


# ---------------------------------------------------------------------------------------------------- the digit


def _digit(contrast: np.ndarray, threshold: float) -> tuple[np.ndarray | None, str]:
    """Ink of the digit and a warning, as in ``find_digit``, out of the contrast float32 (H, W)."""
    full = full_contrast(contrast)
    parts = find_components(contrast > max(threshold, INK * FAINTEST))
    groups = _groups(parts)
    if full < FAINTEST or not groups:
        return None, ""
    chosen = np.concatenate(groups)
    warning = TWO if len(groups) > 1 or _are_two(parts, chosen) else ""
    if len(chosen) >= MANY or parts.areas.sum() > 2 * parts.areas[chosen].sum():
        warning = UNCLEAR
    ink = np.minimum(contrast / full, 1)
    return np.where(_grown(parts.mask(chosen), RIM * _size(parts, chosen)), ink, 0), warning


def _groups(parts: Components) -> list[np.ndarray]:
    """Numbers of the components of each digit, the largest digit first."""
    longest = parts.sizes.max(1)
    if not len(longest) or longest.max() < SMALLEST * min(parts.labels.shape):
        return []
    size = longest[np.argmax(parts.areas * (longest >= SMALLEST * min(parts.labels.shape)))]
    left = [int(number) for number in np.argsort(-parts.areas)[:MANY] if longest[number] >= SPECK * size]
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
    height, width = parts.boxes[group, 2:].max(0) - parts.boxes[group, :2].min(0)
    if width > WIDEST * height:
        return True
    for index, one in enumerate(group):
        for other in group[:index]:
            pair = parts.boxes[[one, other]]
            overlap = pair[:, 2:].min(0) - pair[:, :2].max(0)  # of rows and of columns
            lower = min(parts.sizes[one, 0], parts.sizes[other, 0])
            common = pair[:, 2].max() - pair[:, 0].min()
            if (overlap[1] <= 0 and lower >= SPAN * common) or (overlap[0] <= 0 and lower >= STACKED * common):
                return True
    return False
