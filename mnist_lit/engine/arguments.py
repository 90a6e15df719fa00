"""What is typed on the command line, as jsonargparse takes it."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from mnist_lit.engine.checkpoints import no_such_checkpoint
from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.engine.project import Project
from mnist_lit.engine.runs import Run, relative
from mnist_lit.engine.storage import printable

USAGE = "%(prog)s --config FILE [--config FILE ...] [--KEY=VALUE ...]"
PLAIN: dict[str, Any] = {"add_help": False, "allow_abbrev": False}
WITH_CHECKPOINT = "validate", "test", "predict", "export"  # commands that need one


def with_homes(values: Any) -> Any:
    """Replace ``~`` and ``~name`` where a path begins, which a shell does not do within quotes, after a ``=``, or in
    a config.

    Args:
        values: arguments, or a config, which is changed itself.

    Example:
        >>> with_homes(["--ckpt_path=~/last.ckpt"])
        ['--ckpt_path=/home/ada/last.ckpt']
    """
    if isinstance(values, str):
        option, equals, path = values.partition("=") if values.startswith("--") else ("", "", values)
        return option + equals + (os.path.expanduser(path) if re.match(r"~[\w.-]*(/|\\|$)", path) else path)
    if isinstance(values, (Namespace, dict)):
        for key, value in list(values.items(branches=False) if isinstance(values, Namespace) else values.items()):
            values[key] = with_homes(value)
    elif isinstance(values, list):
        values[:] = map(with_homes, values)
    return values


def with_config(args: Sequence[str], project: Project) -> list[str]:
    """Put configs first, so that the other options override them wherever they stand, and add one if none is named:
    the config.yaml of the checkpoint's run, or else the default.

    Args:
        args: the command, and its options.
        project: whose default config ``fit`` takes, if it is there and no model is named.

    Raises:
        ConfigurationError: if there is no such checkpoint, or no config for it.
    """
    command, *options = args
    of_configs = argparse.ArgumentParser(prog=project.command(command), usage=USAGE, **PLAIN)
    of_configs.add_argument("-c", "--config", metavar="FILE", action="append", default=[])
    of_checkpoint = argparse.ArgumentParser(**PLAIN)
    of_checkpoint.add_argument("--ckpt_path", nargs="?", type=Path)
    found, others = of_configs.parse_known_args(options)
    configs, ckpt_path = found.config, of_checkpoint.parse_known_args(options)[0].ckpt_path
    names = {option.partition("=")[0] for option in options}
    whole = names & {"--model", "--model.class_path", "--help", "-h", "--print_schema", "--print_completion"}
    if not configs and ckpt_path is not None and ":/" not in str(ckpt_path):
        if ckpt_path.exists():
            of_run = Run(ckpt_path.absolute().parent.parent).config
            if of_run.is_file():
                rank_zero_info(f"The config is the run's: {relative(of_run)}")
                configs = [str(of_run)]
            elif command in WITH_CHECKPOINT and not whole:
                raise ConfigurationError(
                    f"--ckpt_path={ckpt_path} is no checkpoint in a run's folder, where its config.yaml would be; name "
                    "the config that it was trained with: --config=FILE"
                )
        elif command in WITH_CHECKPOINT:
            raise ConfigurationError(no_such_checkpoint("ckpt_path", ckpt_path))
    if command == "fit" and not configs and not whole and Path(project.default_config).is_file():
        rank_zero_info(f"No --config is given: it is {project.default_config}")
        configs = [project.default_config]
    return [command, *(f"--config={config}" for config in configs), *others]


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
