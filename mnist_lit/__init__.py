"""The tutorial "What is torch.nn really?" as a PyTorch Lightning project."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_lit.data import MNISTDataModule
    from mnist_lit.models import CNN, Classifier, FastCNN, Logistic

__version__ = "0.3.0"

__all__ = ["CNN", "Classifier", "FastCNN", "Logistic", "MNISTDataModule"]


def __getattr__(name: str) -> Any:
    """Import a class when it is asked for, so that the command line can prepare its imports first."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{'data' if name.endswith('DataModule') else 'models'}"), name)
