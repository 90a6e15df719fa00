"""A callback that says how much memory each process has to itself."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer


class Memory(Callback):
    """Writes ``memory.RANK.json`` at the end of the first epoch, in bytes, while all processes live.

    ``anonymous`` is memory of the process alone, ``data`` and ``data_dirty`` the pages of the fast copy that
    it has mapped, and those of them that are its own.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        memory = {"anonymous": kilobytes(status["RssAnon"]), "data": 0, "data_dirty": 0}
        mapping = ""
        for line in Path("/proc/self/smaps").read_text().splitlines():
            key, _, value = line.partition(":")
            if not key[0].isupper():
                mapping = line
            elif mapping.endswith((".pt", ".pt (deleted)")) and key in ("Rss", "Private_Dirty"):
                memory["data" if key == "Rss" else "data_dirty"] += kilobytes(value)
        Path(f"memory.{trainer.global_rank}.json").write_text(json.dumps(memory))
        trainer.strategy.barrier()


def kilobytes(text: str) -> int:
    return int(text.split()[0]) * 1024
