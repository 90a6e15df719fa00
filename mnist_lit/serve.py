"""``python -m mnist_lit serve``: how the pictures that are sent are brought to the model's size."""

from functools import partial

from mnist_lit.datasets.pictures import fit_pictures
from mnist_lit.engine import Project, serve

main = partial(serve.main, fit_pictures=fit_pictures)
app = partial(serve.app, Project("mnist_lit", "mnist_lit.MNISTDataModule"), fit_pictures)
