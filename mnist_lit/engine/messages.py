"""What is said of an error, and which warnings and lines of libraries are left out."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import Tensor, nn

from mnist_lit.engine.errors import ENGINE, UserError

# Warnings that a user can do nothing about: they tell one library's authors about another's.
NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 on torch 2.13
    r".*does not have many workers",  # the data is in memory, workers would only slow it down
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run continues in its own folder
    r"Experiment logs directory .* exists and is not empty",  # CSVLogger, in the folder of the run
    r".*configure_optimizers` will be overridden by",  # which is what --optimizer asks for
    r"Attempting to set identical low and high .lims",  # a sweep's plot of one value
    r"The dirpath has changed from",  # a test of a run's checkpoint has a folder of its own
)
# Lines of Lightning's log about what is not there.
SILENT = (
    *("Tip: ", "TPU available: False", "GPU available: False", "configured with model summary"),
    "will override existing callbacks passed to Trainer",  # those that the model has passed before, at --test_after_fit
)

# ----------------------------------------------------------------------------------------------------- errors


def raised_by_libraries(traceback: TracebackType | None, inside: str = "") -> bool:
    """Whether only libraries and the engine were at work: then it is an option that was wrong, and no code.

    Args:
        traceback: of the error.
        inside: the package that has raised it; by default any of them.
    """
    name = ""
    known = ("lightning", "jsonargparse", "optuna", "torch", "torchmetrics", *sys.stdlib_module_names)
    for frame in _frames(traceback):
        name = frame.f_globals.get("__name__", "")
        ours = name.rpartition(".")[2] == "__main__" or name.startswith(f"{ENGINE}.engine.")
        if not ours and name.partition(".")[0] not in known:
            return False
    return name.startswith(inside)


def misfit(error: RuntimeError, net: nn.Module) -> str:
    """Of an error inside a network made of PyTorch's layers: that it does not take these images, in words.

    Nothing for an error anywhere else. One in a user's own ``forward`` stays what it is, with the shape as a note.
    """
    given, own = None, False
    if isinstance(error, torch.OutOfMemoryError):
        return ""
    for frame in _frames(error.__traceback__):
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is net:
            given = next((value for value in frame.f_locals["args"] if isinstance(value, Tensor)), None)
            own = False
        elif not frame.f_globals.get("__name__", "").startswith("torch."):
            own = True
    if given is None:
        return ""
    said = f"{type(net).__name__} does not take images of the shape {tuple(given.shape)}"
    if own:
        if hasattr(error, "add_note"):  # since Python 3.11
            error.add_note(said)
        return ""
    return f"{said} ({error})"


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


def full_disk(error: OSError) -> str:
    """The message of a full disk: of the checkpoint that did not fit, if the loggers have failed after it."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, UserError):
        first = first.__context__
    place = f"{error.filename}: " if error.filename else ""
    return str(first or f"{place}{error.strerror}; make room, then resume with --ckpt_path=last")


# --------------------------------------------------------------------------------------------------- warnings


def leave_out_noise() -> None:
    """Print no lines that a user can do nothing about, and this package's own without the line of code."""
    threading.excepthook = _thread_failed
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: not any(part in record.getMessage() for part in SILENT))
    warnings.formatwarning = _format_warning


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Ignore TensorBoard's writer: its errors are raised again where training waits for it."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Print the package's own warnings without the line of code that they come from."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        return f"warning: {message}\n"
    return _format_other(message, category, filename, lineno, line)


_format_other = warnings.formatwarning
