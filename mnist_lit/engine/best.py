"""The best checkpoint of a run."""

import os
import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from mnist_lit.engine.errors import UserError, explain_damage
from mnist_lit.engine.run import Run

DEFAULT_MONITOR = "val/loss"
LOWER_IS_BETTER = "loss error err mse rmse mae mape nll perplexity wer cer fid ece hamming".split()
HIGHER_IS_BETTER = """acc accuracy f1 f1score precision recall specificity auroc auc ap map iou jaccard dice r2
r2score psnr ssim bleu rouge kappa mcc pearson spearman""".split()
KEPT = "best_epoch", "best_step", "best_metrics", "current_score"  # restored in addition to what Lightning restores


def infer_mode(monitor: str, mode: str) -> Literal["min", "max"]:
    """Whether a lower or a higher value of a metric is better; goes by its name if the mode is ``auto``.

    Raises:
        UserError: if the name does not tell.
    """
    words = set(re.findall(r"[a-z]+\d*", monitor.lower()))
    if mode == "min" or (mode == "auto" and words.intersection(LOWER_IS_BETTER)):
        return "min"
    if mode == "max" or words.intersection(HIGHER_IS_BETTER):
        return "max"
    raise UserError(f"--monitor={monitor}: is lower or higher better? Say --mode=min or --mode=max")


class BestCheckpoint(ModelCheckpoint):
    """Keep the best checkpoint as ``best.ckpt``, or the best few with epoch and step in their names.

    Args:
        monitor: metric that decides which is best; ``val_loss`` replaces a ``val/loss`` that is not logged.
        mode: ``min`` if lower is better, ``max`` if higher is better, ``auto`` to tell from the name.
        save_top_k: number of checkpoints to keep.
        filename: without ``.ckpt``, may contain ``{epoch}``, ``{step}`` and metrics.
        options: as in Lightning's ``ModelCheckpoint``; ``dirpath`` is by default ``checkpoints`` in the run's folder.

    Raises:
        UserError: before training, if the model logs no such metric.

    Example:
        >>> Trainer(callbacks=[BestCheckpoint(monitor="val/acc", save_top_k=3)])
    """

    def __init__(
        self,
        monitor: str = DEFAULT_MONITOR,
        mode: Literal["auto", "min", "max"] = "auto",
        save_top_k: int = 1,
        filename: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            filename=filename or ("best" if save_top_k == 1 else "best-{epoch}-{step}"),
            monitor=monitor,
            mode=infer_mode(monitor, mode),
            save_top_k=save_top_k,
            enable_version_counter=False,
            **options,
        )
        self._warned = False
        self.best_epoch, self.best_step = 0, 0  # the epoch is counted from 1
        self.best_metrics = dict[str, float]()  # all metrics then

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Absolute, because ModelCheckpoint forgets the best if its folder is named in another way.
        if self.dirpath or Run.of(trainer).exists:
            self.dirpath = os.path.abspath(self.dirpath or Run.of(trainer).checkpoints)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a second ``ModelCheckpoint`` that writes the same files."""
        for other in trainer.checkpoint_callbacks:
            if other is self or not isinstance(other, ModelCheckpoint) or str(other.dirpath) != str(self.dirpath):
                continue
            if other.filename == self.filename or other.save_last:
                raise UserError(
                    f"a {type(other).__name__} of trainer.callbacks writes {self.filename}.ckpt or last.ckpt, as "
                    "--best_checkpoint or --last_checkpoint do; give it another filename or dirpath"
                )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse validation metrics that nothing logs, also as monitors of early stopping and schedulers."""
        strict: list[Any] = [callback for callback in trainer.early_stopping_callbacks if callback.strict]
        strict += [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau and config.strict]
        for owner in (*strict, *([self] if self.monitor != DEFAULT_MONITOR else [])):
            # Others may be logged in training, which has not begun.
            if str(owner.monitor).startswith("val") and owner.monitor not in trainer.callback_metrics:
                raise UserError(f"monitor={owner.monitor}: there is no such metric; {_way_out(trainer)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(trainer, super().on_validation_end)
        value = trainer.callback_metrics.get(str(self.monitor))
        if value is not None and not value.isfinite() and not trainer.sanity_checking:
            rank_zero_warn(f"{self.monitor} is {value.item()} after step {trainer.global_step}: it cannot be the best")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(trainer, super().on_train_epoch_end)

    @property
    def state_key(self) -> str:
        """The same for every metric."""
        return f"{type(self).__name__} {self.filename}"

    def _update(self, trainer: Trainer, hook: Callable[[Trainer, LightningModule], None]) -> None:
        if self.monitor == DEFAULT_MONITOR and "val_loss" in trainer.callback_metrics:
            self.monitor = "val_loss"
        if trainer.sanity_checking or self.monitor in trainer.callback_metrics:
            before = self.best_model_score
            hook(trainer, trainer.lightning_module)
            if self.best_model_score is not before:  # a new best has a new score, if of the same value
                self.best_epoch, self.best_step = trainer.current_epoch + 1, trainer.global_step
                self.best_metrics = logged_values(trainer)
        elif not self._warned:
            rank_zero_warn(f"no best.ckpt is kept: it is chosen by {self.monitor}, and {_way_out(trainer)}")
            self._warned = True

    def format_checkpoint_name(self, *args: Any, **kwargs: Any) -> str:
        """As in Lightning, but a metric such as val/loss in the name does not make a subfolder."""
        name = super().format_checkpoint_name(*args, **kwargs)
        folder = str(self.dirpath or "")
        return os.path.join(folder, os.path.relpath(name, folder or ".").replace(os.sep, "_"))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **{name: getattr(self, name) for name in KEPT}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best ones so far, also if the run's folder was moved.

        Of the paths in the checkpoint only names are taken that this callback gives: other files would be deleted when
        the next best is saved.
        """
        if not self.dirpath:
            return

        def here(path: str) -> str:
            return path and os.path.join(str(self.dirpath), os.path.basename(path))

        names = ("best_model_path", "kth_best_model_path", "last_model_path")
        with explain_damage():
            state = {**state_dict, **{name: here(state_dict[name]) for name in names}, "dirpath": str(self.dirpath)}
            kept = {here(path): torch.as_tensor(score).view(()) for path, score in state["best_k_models"].items()}
            state["best_k_models"] = kept
            pattern = re.sub(r"\\{.*?\\}", ".*", re.escape(str(self.filename).replace(os.sep, "_")))
            names_of_ours = re.compile(rf"(?!last\.ckpt){pattern}\.ckpt")
            ours = all(os.path.exists(path) and names_of_ours.fullmatch(os.path.basename(path)) for path in kept)
            if ours and state["kth_best_model_path"] in {"", *kept}:
                super().load_state_dict(state)
                vars(self).update({name: state[name] for name in KEPT})


def best_checkpoint(trainer: Trainer) -> Checkpoint | None:
    """The callback that keeps the best checkpoint."""
    ours = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, BestCheckpoint)]
    return ours[0] if ours else trainer.checkpoint_callback


def best_or_last(trainer: Trainer) -> str:
    """The path of the best checkpoint of a run, or else of its last; "" if there is none."""
    run = Run.of(trainer)
    last = str(run.checkpoints / "last.ckpt") if run.exists else ""
    return getattr(best_checkpoint(trainer), "best_model_path", "") or (last if os.path.isfile(last) else "")


def logged_values(trainer: Trainer) -> dict[str, float]:
    """The metrics that callbacks see, as numbers."""
    return {name: metric.item() for name, metric in trainer.callback_metrics.items()}


def _way_out(trainer: Trainer) -> str:
    names = ", ".join(sorted(trainer.callback_metrics))
    return (
        f"the model logs {names}; choose one of these with --monitor and --mode" if names else "the model logs nothing"
    )
