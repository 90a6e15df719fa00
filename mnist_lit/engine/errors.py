"""The errors that end a command with one message, an exit code and no traceback."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake. The message names the thing, what was expected and the way out."""


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
