"""``torch.compile`` as a callback."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Compile(Callback):
    """Compile the model's ``forward`` with ``torch.compile``. Its weights keep their names.

    Args:
        mode: as in ``torch.compile``, such as ``reduce-overhead``.
        dynamic: as in ``torch.compile``, whether sizes may change without compiling again.

    Example:
        >>> Trainer(callbacks=[Compile(mode="reduce-overhead")])
    """

    def __init__(self, mode: str | None = None, dynamic: bool | None = None) -> None:
        self.mode, self.dynamic = mode, dynamic

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.compile(mode=self.mode, dynamic=self.dynamic)
