"""What is typed on the command line, as jsonargparse takes it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from mnist_lit.engine.checkpoints import no_such_checkpoint
from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.engine.runs import Run, relative
from mnist_lit.engine.storage import printable

Values = TypeVar("Values")


def with_homes(values: Values) -> Values:
    """Replace ``~`` and ``~name`` where a path begins, which a shell does not do within quotes, after a ``=``, or in
    a config.

    Args:
        values: arguments, or a config, which is changed itself.

    Example:
        >>> with_homes(["--ckpt_path=~/last.ckpt"])
        ['--ckpt_path=/home/ada/last.ckpt']
    """
    return _with_homes(values)


def _with_homes(value: Any) -> Any:
    if isinstance(value, str):
        option, equals, rest = value.partition("=") if value.startswith("--") else ("", "", value)
        return option + equals + (os.path.expanduser(rest) if re.match(r"~[\w.-]*(/|\\|$)", rest) else rest)
    if isinstance(value, (Namespace, dict)):
        for key, inner in value.items(branches=False) if isinstance(value, Namespace) else [*value.items()]:
            value[key] = _with_homes(inner)
    elif isinstance(value, list):
        value[:] = map(_with_homes, value)
    return value


def with_config(args: Sequence[str], default: str = "") -> list[str]:
    """Put configs first, so that the other options override them wherever they stand, and add one if none is named:
    the config.yaml of the checkpoint's run, or else the default.

    Args:
        args: the command, and its options.
        default: config of ``fit``, if it is there and no model is named.

    Raises:
        ConfigurationError: if there is no such checkpoint.
    """
    command, *options = args
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--ckpt_path", type=Path)
    named, _ = parser.parse_known_args(options)
    configs, others = named.config, _without_configs(options)
    if not configs and named.ckpt_path is not None and ":/" not in str(named.ckpt_path):
        if named.ckpt_path.exists():
            config = Run(named.ckpt_path.absolute().parents[1]).config
            if config.is_file():
                rank_zero_info(f"The config is the run's: {relative(config)}")
                configs = [str(config)]
        elif command in ("validate", "test", "predict", "export"):
            raise ConfigurationError(no_such_checkpoint("ckpt_path", named.ckpt_path))
    names = {option.partition("=")[0] for option in options}
    whole = names & {"--model", "--model.class_path", "--help", "-h", "--print_schema", "--print_completion"}
    if command == "fit" and not configs and not whole and Path(default).is_file():
        rank_zero_info(f"No --config is given: it is {default}")
        configs = [default]
    return [command, *(f"--config={config}" for config in configs), *others]


def _without_configs(options: Sequence[str]) -> list[str]:
    left, follows = [], False
    for option in options:
        if not follows and not option.startswith(("--config=", "-c=")) and option not in ("--config", "-c"):
            left.append(option)
        follows = option in ("--config", "-c")
    return left


def join_values(args: Sequence[str]) -> list[str]:
    """Make a list of several values after an option, such as the files that a shell finds for ``*.png``.

    Example:
        >>> join_values(["--data.images", "1.png", "2.png"])
        ['--data.images+=1.png', '--data.images+=2.png']
    """
    for value in args:
        if (text := printable(value)) != value:
            raise ConfigurationError(
                f"{text}: a name that is not UTF-8 cannot stand on the command line; name its folder, or a pattern in "
                "quotation marks"
            )
    joined, rest = list[str](), list(args)
    while rest:
        option, *rest = rest
        number = next((index for index, value in enumerate(rest) if value.startswith("-")), len(rest))
        if option.startswith("--") and "=" not in option and number > 1:
            joined += [f"{option}+={value}" for value in rest[:number]]  # as jsonargparse appends to a list
            rest = rest[number:]
        else:
            joined.append(option)
    return joined
