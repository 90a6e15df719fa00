"""Your transforms: what ``data.train_transform`` and ``data.mix`` do to batches of training images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RandomAffine(nn.Module):
    """Rotate, scale and shift each image at random, uniformly within bounds.

    Args:
        degrees: by which an image is rotated at most.
        scale: fraction by which it is made larger or smaller at most.
        shift: fraction of height and width by which it is shifted at most.
        padding: what comes in from outside: ``zeros``, the nearest pixel (``border``) or ``reflection``.

    Example:
        >>> RandomAffine(degrees=10)(images)  # (B, C, H, W) to (B, C, H, W)
    """

    def __init__(self, degrees: float = 10, scale: float = 0.1, shift: float = 0.1, padding: str = "zeros") -> None:
        super().__init__()
        self.degrees, self.scale, self.shift, self.padding = degrees, scale, shift, padding

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) to images of the same shape."""
        n, _, height, width = images.shape
        angle, zoom, right, down = 2 * torch.rand(4, n, device=images.device) - 1  # each (B,) in -1..1
        angle, zoom = angle * math.radians(self.degrees), 1 + zoom * self.scale
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        # Where each output pixel comes from, in grid_sample's coordinates of -1..1 from edge to edge.
        rows = [cos, -sin * height / width, 2 * self.shift * right, sin * width / height, cos, 2 * self.shift * down]
        theta = torch.stack(rows, -1).view(n, 2, 3).to(images.dtype)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode=self.padding, align_corners=False)


class MixUp(nn.Module):
    """Blend each training image and its target with another one's (H. Zhang et al., https://arxiv.org/abs/1710.09412).

    Args:
        alpha: of the beta distribution that shares are drawn from; the larger, the more is blended.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) and one-hot targets (B, K) to the same, mixed."""
        share = torch.distributions.Beta(self.alpha, self.alpha).sample().item()
        share = max(share, 1 - share)
        return share * images + (1 - share) * images.roll(1, 0), share * target + (1 - share) * target.roll(1, 0)
