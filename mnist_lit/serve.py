"""``python -m mnist_lit serve``: who reads the pictures that are sent."""

from functools import partial

from mnist_lit.datasets.pictures import PictureReader
from mnist_lit.engine import serving

main = partial(serving.main, reader=PictureReader)
