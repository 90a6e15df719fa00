"""How warnings look, and which lines of libraries are not shown."""

import logging
import sys
import threading
import warnings

# Warnings that a user can do nothing about.
NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 on torch 2.13
    r".*does not have many workers",  # the data is in memory, workers would only slow it down
    r".*Checkpoint directory .* exists and is not empty",  # a resumed run continues in its own folder
    r"Experiment logs directory .* exists and is not empty",  # CSVLogger, in the folder of the run
    r".*configure_optimizers` will be overridden by",  # which is what --optimizer asks for
    r"Attempting to set identical low and high .lims",  # a sweep's plot of one value
    r"The dirpath has changed from",  # a test of a run's checkpoint has a folder of its own
)
# Lines of Lightning's log that say nothing about the run.
SILENT = (
    *("Tip: ", "TPU available: False", "GPU available: False", "configured with model summary"),
    "will override existing callbacks passed to Trainer",  # a model's own metrics in the place of the default
)


def leave_out_noise() -> None:
    """Hide lines that a user can do nothing about, and print warnings without the line of code."""
    for noise in NOISE:
        warnings.filterwarnings("ignore", message=noise)
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(lambda record: not any(part in record.getMessage() for part in SILENT))
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    threading.excepthook = _thread_failed


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    """Ignore TensorBoard's writer: its errors are raised again when training waits for it."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)
