"""The tutorial "What is torch.nn really?" as a PyTorch Lightning project."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_lit.archive import ArchiveError
    from mnist_lit.data import MNISTDataModule
    from mnist_lit.models import CNN, Classifier, FastCNN, Logistic

__version__ = "0.1.0"

__all__ = ["CNN", "ArchiveError", "Classifier", "FastCNN", "Logistic", "MNISTDataModule"]

_MODULES = {"ArchiveError": "archive", "MNISTDataModule": "data"}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and not before: the command line sees to how (see ``__main__``)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'models')}"), name)
