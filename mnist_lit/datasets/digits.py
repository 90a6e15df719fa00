"""The embedded dataset: real handwriting that needs no network.

``digits.npz`` beside this file holds 1,797 digits of 8 x 8 pixels from 13 writers, in the order in which they
were collected: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
Learning Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0 (the repository's test
set, unchanged but for its file format). This module turns them into 70,000 images of MNIST's form.
"""

from importlib.resources import as_file, files

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

VERSION = "digits-1"  # changes whenever the code below makes other images

# Number of originals, and of images made from them. The sizes are MNIST's own, so that step
# counts, learning-rate schedules and timings carry over.
SPLITS = {"train": (1197, 50_000), "valid": (300, 10_000), "test": (300, 10_000)}


def make_digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Make a dataset in MNIST's form from the digits, the same one every time.

    The originals are split first, so that no validation or test image is a variation of a training
    image; as they are in the order of their writers, most writers are in one split only.

    Returns:
        by split images uint8 (n, 28, 28) and labels int64 (n,).
    """
    with as_file(files(__package__) / "digits.npz") as path, np.load(path) as asset:
        images = torch.from_numpy(asset["images"]).float() / 16  # (1797, 8, 8), 0..1
        labels = asset["labels"].astype(np.int64)  # (1797,)
    generator = torch.Generator().manual_seed(0)
    made, first = {}, 0
    for split, (originals, n) in SPLITS.items():
        picked = (torch.arange(n) % originals + first)[torch.randperm(n, generator=generator)]
        made[split] = _vary(images[picked], generator).numpy(), labels[picked]
        first += originals
    return made


def _vary(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits float32 (n, 8, 8) in 0..1 to MNIST's form, uint8 (n, 28, 28), each with a random affine variation.

    MNIST's form (https://yann.lecun.com/exdb/mnist): the digit fills a 20 x 20 box, which lies in
    28 x 28 pixels with its centre of mass in the middle. Stronger variations starve the tutorial's small CNN.
    """
    n = len(images)

    def uniform(bound: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * bound

    angle, shear = uniform(0.075), uniform(0.04)  # in radians; a fraction
    zoom = 28 / 20 * (1 + uniform(0.04))  # grid_sample asks where each output pixel comes from
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    linear = torch.stack([cos, shear * cos - sin, sin, shear * sin + cos], -1).view(n, 2, 2)
    # The centre of mass, in grid_sample's coordinates (-1..1 from edge to edge).
    axis = (torch.arange(8) * 2 + 1) / 8 - 1
    mass = images.sum((1, 2))
    centre = torch.stack([images.sum(1) @ axis, images.sum(2) @ axis], -1) / mass[:, None]  # (n, 2)
    shift = torch.stack([uniform(0.33), uniform(0.33)], -1) * 2 / 28  # in pixels of 28
    theta = torch.cat([linear, centre[:, :, None] - linear @ shift[:, :, None]], -1)  # (n, 2, 3)
    chunks = []
    for part, affine in zip(images.split(4096), theta.split(4096), strict=True):  # in blocks, to save memory
        grid = F.affine_grid(affine, [len(part), 1, 28, 28], align_corners=False)
        pixels = F.grid_sample(part[:, None], grid, align_corners=False)[:, 0]  # (n, 28, 28)
        chunks.append((pixels * 255).round().to(torch.uint8))
    return torch.cat(chunks)
