"""``python -m mnist_lit serve``: who reads the pictures that are sent."""

from functools import partial

from mnist_lit.datasets.pictures import PictureReader
from mnist_lit.engine import Project, serve

main = partial(serve.main, reader=PictureReader)
app = partial(serve.app, Project("mnist_lit", "mnist_lit.MNISTDataModule"), PictureReader)
