"""The errors that end a command with one message, an exit code and no traceback."""

from __future__ import annotations

from importlib.util import find_spec

ENGINE = __name__.partition(".")[0]  # the package that the extras belong to, whichever project runs


class UserError(Exception):
    """A user's mistake. The message names the thing, what was expected and the way out."""

    def __init__(self, message: str) -> None:
        # The worker of a data loader hands on its traceback, at the end of which the message is.
        _, worker, traceback = message.partition("\nOriginal Traceback")
        super().__init__(traceback.rpartition(f"{type(self).__name__}: ")[2].strip() if worker else message)


class ConfigurationError(UserError):
    """An option, or a combination of options, that cannot be honoured."""


class DatasetError(UserError):
    """A dataset that is missing, damaged or not what it should be."""


class DownloadError(DatasetError):
    """A dataset that could not be downloaded."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, written or resumed from."""


class DivergenceError(UserError):
    """A loss or weights that are infinite or not a number."""


def require(extra: str, *modules: str) -> None:
    """Ask for an extra before anything takes time.

    Args:
        extra: of the engine's package.
        modules: that have to be there.

    Raises:
        ConfigurationError: naming those that are missing and the command that installs them.

    Example:
        >>> require("sweep", "optuna", "matplotlib")
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ConfigurationError(f"{', '.join(missing)} not installed: pip install '{ENGINE}[{extra}]'")
