"""The errors that end a command with one message, an exit code and no traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any

ENGINE = __name__.partition(".")[0]  # the package that the extras belong to, whichever project runs
# Modules that restore what is in a checkpoint, or use it first; not those that load data or compute gradients.
RESTORING = re.compile(
    rf"(lightning|torch(?!\.(_tensor|autograd|distributed|utils\.data)\b)|torchmetrics|numpy|packaging|{__package__})(\.|$)"
)


class UserError(Exception):
    """A user's mistake. The message names the thing, what was expected and the way out."""

    def __init__(self, message: str) -> None:
        # The worker of a data loader hands on its traceback, at the end of which the message is.
        _, worker, traceback = message.partition("\nOriginal Traceback")
        super().__init__(traceback.rpartition(f"{type(self).__name__}: ")[2].strip() if worker else message)


def unusable(path: Any, error: Exception) -> UserError:
    """The error for a file that is not a usable checkpoint."""
    reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
    return UserError(f"{path} cannot be used as a checkpoint ({reason[:200]})")


@contextmanager
def explain_damage(path: Any) -> Iterator[None]:
    """Name the checkpoint if something in it cannot be used."""
    try:
        yield
    except Exception as error:  # whatever is in a damaged file
        raise unusable(path, error) from error


def raised_in_restoring(error: Exception) -> bool:
    """Whether only modules that restore a checkpoint took part in an error, and no code of the project's."""
    names = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    return all(RESTORING.match(name) or name.partition(".")[0] in sys.stdlib_module_names for name in names)


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
