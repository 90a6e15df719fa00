"""The callbacks of every run."""

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar

from mnist_lit.engine.best import BestCheckpoint
from mnist_lit.engine.compat import LessOverhead
from mnist_lit.engine.dashboard import Dashboard
from mnist_lit.engine.divergence import StopOnNonFinite
from mnist_lit.engine.exact import ExactResume
from mnist_lit.engine.last import LastCheckpoint
from mnist_lit.engine.metrics import Metrics
from mnist_lit.engine.predictions import PredictionsFile
from mnist_lit.engine.progress import ProgressBar
from mnist_lit.engine.provenance import Provenance
from mnist_lit.engine.resume import ResumeGuard
from mnist_lit.engine.summary import Summary


def default_callbacks(*own: Callback, without: type[Callback] | tuple[type[Callback], ...] = ()) -> list[Callback]:
    """Everything that the command line adds to a ``Trainer``: best and last checkpoint, exact resume, metrics,
    dashboard, provenance, progress bar and the table at the end.

    Args:
        own: further callbacks. One of the kind of a default takes its place.
        without: kinds to leave out, such as Lightning's ``ProgressBar`` for a trainer with
            ``enable_progress_bar=False``.

    Example:
        >>> trainer = Trainer(callbacks=default_callbacks(BestCheckpoint(monitor="val/acc")))
        >>> trainer.fit(model, datamodule=datamodule, ckpt_path="lightning_logs/version_0/checkpoints/last.ckpt")
    """
    first = Provenance, ProgressBar, Metrics, Dashboard, StopOnNonFinite, LessOverhead, ExactResume, ResumeGuard
    defaults: list[type[Callback]] = [*first, PredictionsFile, BestCheckpoint, LastCheckpoint, Summary]
    if any(isinstance(callback, AnyProgressBar) for callback in own):
        defaults.remove(ProgressBar)
    made = [make() for make in defaults if not any(isinstance(callback, make) for callback in own)]
    kept = [callback for callback in (*own, *made) if not isinstance(callback, without)]
    # The means of a resumed epoch are completed before anything looks at them. The last checkpoint is saved after the
    # best, because what that knows is part of it.
    return sorted(kept, key=lambda each: isinstance(each, LastCheckpoint) - isinstance(each, ExactResume))
