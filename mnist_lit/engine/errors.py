"""The errors that end a command with one message, an exit code and no traceback."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ENGINE = __name__.partition(".")[0]  # the package that the extras belong to, whichever project runs


class UserError(Exception):
    """A user's mistake. The message names the thing, what was expected and the way out."""

    def __init__(self, message: str) -> None:
        # The worker of a data loader hands on its traceback, at the end of which the message is.
        _, worker, traceback = message.partition("\nOriginal Traceback")
        super().__init__(traceback.rpartition(f"{type(self).__name__}: ")[2].strip() if worker else message)


def unusable(path: Any, error: Exception) -> UserError:
    """The error for a file that is not a usable checkpoint."""
    lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
    return UserError(f"{path} cannot be used as a checkpoint ({lines[0]})")


@contextmanager
def explain_damage(path: Any = None) -> Iterator[None]:
    """Name the checkpoint if something in it cannot be restored."""
    try:
        yield
    except Exception as error:  # whatever is in a damaged file
        raise unusable(path or "--ckpt_path", error) from error


def no_pipe(path: str | Path) -> Path:
    """The path. Raises ``UserError`` for a pipe or a device, which might be read without an end."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} is a pipe or a device; expected a file")
    return path


def require(extra: str, *modules: str) -> None:
    """Ask for an extra before anything takes time.

    Args:
        extra: of the engine's package.
        modules: that have to be there.

    Raises:
        UserError: naming those that are missing and the command that installs them.

    Example:
        >>> require("sweep", "optuna", "matplotlib")
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise UserError(f"{', '.join(missing)} not installed: pip install '{ENGINE}[{extra}]'")
