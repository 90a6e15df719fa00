"""Networks for other data than the tests have, as those with trained weights are."""

from __future__ import annotations

from torch import nn


class Wide(nn.Module):
    """For images of three channels and 20 classes.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(width * 16, 20)

    def forward(self, images):
        return self.fc(self.drop(self.pool(self.bn1(self.conv1(images)).relu()).flatten(1)))


def wide(width: int = 8) -> Wide:
    """As torchvision and timm make their networks: by a function."""
    return Wide(width)
