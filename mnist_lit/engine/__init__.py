"""The lower floor: carries any ``LightningModule`` and any ``LightningDataModule``, and knows neither.

These names are the public interface: projects import from here alone, and configs name classes by these paths, such as
``class_path: mnist_lit.engine.Schedule``. What is not listed here may change between versions. Nothing in here imports
from the floor above; ``lint-imports`` checks that. Names are imported when they are asked for, because a server of an
ONNX file needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_lit.engine.best import BestCheckpoint
    from mnist_lit.engine.checkpoint import Checkpoint
    from mnist_lit.engine.cli import CLI, main
    from mnist_lit.engine.compiling import Compile
    from mnist_lit.engine.dashboard import Dashboard
    from mnist_lit.engine.data.files import read_dataset
    from mnist_lit.engine.data.loaders import augment, eval_dataloader, train_dataloader
    from mnist_lit.engine.data.module import ImageDataModule
    from mnist_lit.engine.defaults import default_callbacks
    from mnist_lit.engine.divergence import StopOnNonFinite
    from mnist_lit.engine.errors import UserError
    from mnist_lit.engine.execution import StepsPerExecution
    from mnist_lit.engine.finetuning import FineTuning, adapt
    from mnist_lit.engine.last import LastCheckpoint
    from mnist_lit.engine.metrics import Metrics
    from mnist_lit.engine.outputs import Outputs
    from mnist_lit.engine.predictions import PredictionsFile
    from mnist_lit.engine.project import Project
    from mnist_lit.engine.provenance import Provenance
    from mnist_lit.engine.run import Run
    from mnist_lit.engine.schedules import Schedule
    from mnist_lit.engine.summary import Summary

_MODULES = {
    "best": ["BestCheckpoint"],
    "checkpoint": ["Checkpoint"],
    "cli": ["CLI", "main"],
    "compiling": ["Compile"],
    "dashboard": ["Dashboard"],
    "data.files": ["read_dataset"],
    "data.loaders": ["augment", "eval_dataloader", "train_dataloader"],
    "data.module": ["ImageDataModule"],
    "defaults": ["default_callbacks"],
    "divergence": ["StopOnNonFinite"],
    "errors": ["UserError"],
    "execution": ["StepsPerExecution"],
    "finetuning": ["FineTuning", "adapt"],
    "last": ["LastCheckpoint"],
    "metrics": ["Metrics"],
    "outputs": ["Outputs"],
    "predictions": ["PredictionsFile"],
    "project": ["Project"],
    "provenance": ["Provenance"],
    "run": ["Run"],
    "schedules": ["Schedule"],
    "summary": ["Summary"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
