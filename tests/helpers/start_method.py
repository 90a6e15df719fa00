"""What macOS and Windows do: processes that are no forks."""

from __future__ import annotations

import multiprocessing

from lightning.pytorch import Callback


class StartMethod(Callback):
    """Chooses how the processes of loaders start.

    Args:
        method: fork, spawn or forkserver.
    """

    def __init__(self, method: str) -> None:
        multiprocessing.set_start_method(method, force=True)
