"""The tutorial "What is torch.nn really?" as a PyTorch Lightning project."""

from mnist_lit.archive import ArchiveError
from mnist_lit.data import MNISTDataModule
from mnist_lit.models import CNN, Classifier, FastCNN, Logistic

__version__ = "0.1.0"

__all__ = ["CNN", "ArchiveError", "Classifier", "FastCNN", "Logistic", "MNISTDataModule"]
