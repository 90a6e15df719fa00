"""The digit in a photo, by OpenCV: without the light on the paper, and without what else is on the paper.

Lengths are pixels of a picture whose longer side has 400 of them.
"""

import cv2
import numpy as np

INK = 0.45  # of the ink's contrast; smudges and shades have less
FAINTEST = 0.05  # contrast; fainter ink than that is not told from an empty paper's texture
SMALLEST = 0.1  # of the picture's shorter side; what is smaller is a speck
BLUR = 5  # around what is taken away


def find_digit(grey: np.ndarray, even: np.ndarray) -> tuple[np.ndarray, str]:
    """Find the ink of the digit in a picture.

    Args:
        grey: brightness float32 (H, W) in 0..1.
        even: what is ink (H, W) in 0..1 if the light is even.

    Returns:
        ink float32 (h, w), 0 paper and 1 full ink, and a warning or "".
    """
    scale = 400 / max(grey.shape)
    grey, even = (cv2.blur(cv2.resize(values, None, fx=scale, fy=scale), (3, 3)) for values in (grey, even))  # (h, w)
    if _needs_no_light(grey, even):
        return _digit(even)
    contrast = _contrast(grey)
    noise = 2 * float(np.median(np.abs(np.diff(contrast))))
    faintest = max(0.12 * _full(contrast), 3 * noise)  # of lines and boxes
    contrast = contrast * (1 - _grown(_boxes(_mask(contrast, faintest)), BLUR))
    for _ in ("level lines", "upright lines"):
        contrast = np.ascontiguousarray(_without_lines(contrast, faintest).T)
    mask = _mask(contrast, INK * _full(contrast))  # what is left may be fainter than a frame or a table
    contrast = contrast * (1 - _grown(_boxes(mask) | _cut_off(mask), BLUR))
    return _digit(contrast if _full(contrast) > max(FAINTEST, 7 * noise) else np.zeros_like(contrast))


def _digit(contrast: np.ndarray) -> tuple[np.ndarray, str]:
    """Ink and warning, as in ``find_digit``, out of the contrast float32 (h, w)."""
    full = _full(contrast)
    mask = _mask(contrast, INK * full)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    stats[0] = 0  # the paper
    longest = stats[:, 2:4].max(1)
    size = longest[(stats[:, 4] * (longest >= SMALLEST * min(mask.shape))).argmax()]
    parts = np.isin(labels, np.flatnonzero(longest >= max(0.17 * size, 1)))  # the bar of a 5 is larger, a speck is not
    _, groups, extents, _ = cv2.connectedComponentsWithStats(_grown(parts, 0.05 * size))  # a stroke may have gaps
    digits = 1 + np.flatnonzero(extents[1:, 2:4].max(1) >= 0.45 * size)
    digit = parts & np.isin(groups, digits)
    _, _, width, height = cv2.boundingRect(digit.astype(np.uint8))
    warning = "holds more than one digit" if len(digits) > 1 or width > 1.8 * height else ""
    if digits.size and mask.sum() > 2 * digit.sum():
        warning = "paper and digit are hard to tell apart"
    ink = np.minimum(contrast / max(full, FAINTEST), 1)
    return ink * (ink > 0.15) * _grown(digit, 0.05 * size), warning  # paler than the rims of strokes is noise


def _needs_no_light(grey: np.ndarray, even: np.ndarray) -> bool:
    """Whether a digit was drawn on a screen, or cut out so tightly that too little paper is left to tell its light."""
    mask = _mask(even, INK * _full(even))
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    _, _, across, down, area = max(stats[1:].tolist(), key=lambda part: part[4], default=(0, 0, 0, 0, 0))
    shades, edge = (np.concatenate([x[0], x[-1], x[:, 0], x[:, -1]]) for x in (grey, mask))
    drawn = np.ptp(shades) < 0.03 and not _boxes(mask).any()  # paper varies by more from edge to edge
    fills = across > 0.7 * mask.shape[1] and down > 0.7 * mask.shape[0] and area > 0.8 * mask.sum()
    return mask.mean() < 0.5 and bool(drawn or (fills and edge.mean() < 0.4 and _evenness(even) > 0.94))


def _contrast(grey: np.ndarray) -> np.ndarray:
    """Share float32 (h, w) of the paper's light that the ink takes, the same in the sun and in the shade."""
    dark = np.log(grey + 0.05)  # a camera's black is noise
    (ink, cost), (chalk, cost_of_chalk) = _read(dark), _read(-dark)
    if cost <= cost_of_chalk:
        return ink
    # A negative of a photo, or chalk on a board. The right one of both has ink of the same contrast everywhere.
    return max(_read(np.log(1 - grey + 0.05))[0], chalk, key=_evenness)


def _read(values: np.ndarray) -> tuple[np.ndarray, float]:
    """Ink float32 (h, w) that is darker than the paper, and how much of it there is, and how uneven the paper.

    With light and dark confused, strokes are paper, which then has edges, and what they enclose is ink.
    """
    side = round(0.25 * min(values.shape))  # what is darker and narrower is ink, and no shade on the paper
    paper = cv2.morphologyEx(values, cv2.MORPH_CLOSE, np.ones((side, side), np.uint8))
    edges = sum(float(np.abs(np.diff(paper, axis=axis)).mean()) for axis in (0, 1))
    share = 1 - np.exp(values - paper)
    share -= np.median(share)  # the closing is the upper envelope of the paper's noise
    return np.maximum(share, 0), float((paper - values).mean()) + edges * side / 2


def _evenness(contrast: np.ndarray) -> float:
    """Otsu's criterion: the share of the variance that two classes explain."""
    values = (contrast * 255).astype(np.uint8)
    _, ink = cv2.threshold(values, 0, 1, cv2.THRESH_OTSU)
    if ink.min() == ink.max():
        return 0
    return float(np.corrcoef(values.ravel(), ink.ravel())[0, 1]) ** 2


def _full(contrast: np.ndarray) -> float:
    return float(np.quantile(contrast[::2, ::2], 0.999))


def _mask(contrast: np.ndarray, threshold: float) -> np.ndarray:
    return (contrast > threshold).astype(np.uint8)


def _grown(mask: np.ndarray, reach: float) -> np.ndarray:
    size = 2 * max(1, round(reach)) + 1
    return cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))


def _boxes(mask: np.ndarray) -> np.ndarray:
    """Drawn boxes uint8 (h, w): rectangles, level or not, around something else."""
    found = np.zeros_like(mask)
    contours, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for number, contour in enumerate(contours):
        (left, top, width, height), (_, sides, _) = cv2.boundingRect(contour), cv2.minAreaRect(contour)
        inside = left > 0 and top > 0 and left + width < mask.shape[1] and top + height < mask.shape[0]
        area = sides[0] * sides[1]
        if inside and min(sides) > SMALLEST * min(mask.shape) and cv2.contourArea(contour) > 0.88 * area:
            holes = [cv2.contourArea(contours[hole]) for hole in np.flatnonzero(tree[0, :, 3] == number).tolist()]
            if sum(holes) > 0.4 * area:
                cv2.drawContours(found, contours, number, 1, cv2.FILLED, hierarchy=tree, maxLevel=1)
    return found


def _without_lines(contrast: np.ndarray, faintest: float) -> np.ndarray:
    """The ink float32 (h, w) without lines of ruled paper, level to 7 degrees. Strokes that cross a line stay whole."""
    mask = _mask(contrast, faintest)
    found = cv2.HoughLines(mask, 1, np.pi / 360, round(0.7 * mask.shape[1]), min_theta=1.45, max_theta=1.69)
    lines = np.zeros_like(mask)
    for rho, theta in [] if found is None else found.reshape(-1, 2).tolist():
        start, end = ((x, round((rho - x * np.cos(theta)) / np.sin(theta))) for x in (0, mask.shape[1]))
        cv2.line(lines, start, end, 1, 2 * BLUR)
    thin = cv2.morphologyEx(mask, cv2.MORPH_TOPHAT, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (17, 17)))
    if not (lines & thin).any():
        return contrast
    strokes = contrast > 1.8 * np.median(contrast[(lines & thin) > 0])
    upright = cv2.morphologyEx(contrast, cv2.MORPH_OPEN, np.ones((13, 1), np.uint8))  # lines are thinner
    return np.where((lines > 0) & ~strokes, upright, contrast)


def _cut_off(mask: np.ndarray) -> np.ndarray:
    """What touches the picture's edge uint8 (h, w), as frames and tables do, unless it is most of what there is."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    cut = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    inner = np.setdiff1d(np.arange(1, len(stats)), cut)
    enough = stats[inner, 2:4].max(initial=0) >= SMALLEST * min(mask.shape)
    return (np.isin(labels, cut[cut > 0]) & enough).astype(np.uint8)
