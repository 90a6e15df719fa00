"""What is typed on the command line, as jsonargparse takes it, and the names that were probably meant."""

from __future__ import annotations

import argparse
import inspect
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_lit.engine.checkpoint import no_such_checkpoint
from mnist_lit.engine.errors import ConfigurationError
from mnist_lit.engine.project import Project
from mnist_lit.engine.run import Run, relative

USAGE = "%(prog)s --config FILE [--config FILE ...] [--KEY=VALUE ...]"
WITH_CHECKPOINT = "validate", "test", "predict", "export"  # commands that need one
# Options whose values name classes, and what the classes inherit from.
OF_CLASSES = {"model", "data", "optimizer", "lr_scheduler", "callbacks", "logger", "class_path"}
BASES = LightningModule, LightningDataModule, Optimizer, LRScheduler, Callback, Logger


def with_config(args: Sequence[str], project: Project) -> list[str]:
    """Put configs first, so that other options override them wherever they stand, and add one if none is named:
    the config.yaml of the checkpoint's run, or else the project's default.

    Args:
        args: the command, and its options.
        project: whose default config ``fit`` takes, if it is there and no model is named.

    Raises:
        ConfigurationError: if there is no such checkpoint, or no config for it.
    """
    command, *options = args
    parser = argparse.ArgumentParser(project.command(command), USAGE, add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", metavar="FILE", action="append", default=[])
    named, others = parser.parse_known_args(options)
    parser.add_argument("--ckpt_path", nargs="?", type=Path)
    ckpt_path, configs = parser.parse_known_args(options)[0].ckpt_path, named.config
    whole = {option.partition("=")[0] for option in options} & {"--model", "--model.class_path", "--help", "-h"}
    if not configs and ckpt_path is not None and ":/" not in str(ckpt_path):
        config = Run(ckpt_path.absolute().parent.parent).config
        if ckpt_path.exists() and config.is_file():
            rank_zero_info(f"Using the run's config: {relative(config)}")
            configs = [str(config)]
        elif command in WITH_CHECKPOINT and not ckpt_path.exists():
            raise ConfigurationError(no_such_checkpoint("ckpt_path", ckpt_path))
        elif command in WITH_CHECKPOINT and not whole:
            raise ConfigurationError(
                f"--ckpt_path={ckpt_path} is not in a run's folder, where its config.yaml would be; name the config "
                "that it was trained with: --config=FILE"
            )
    if command == "fit" and not configs and not whole and Path(project.default_config).is_file():
        rank_zero_info(f"Using the default config: {project.default_config}")
        configs = [project.default_config]
    return [command, *(f"--config={config}" for config in configs), *others]


def join_values(args: Sequence[str]) -> list[str]:
    """Make a list of several values after an option, such as the files that a shell finds for ``*.png``.

    Example:
        >>> join_values(["--data.images", "1.png", "2.png"])
        ['--data.images+=1.png', '--data.images+=2.png']
    """
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


def expand_home(values: Any) -> Any:
    """Replace ``~`` and ``~name`` where a path begins. A shell does not: within quotes, after ``=``, or in a config.

    Args:
        values: arguments, or a config, which is changed in place.

    Example:
        >>> expand_home(["--ckpt_path=~/last.ckpt"])
        ['--ckpt_path=/home/ada/last.ckpt']
    """
    if isinstance(values, str):
        option, equals, path = values.partition("=") if values.startswith("--") else ("", "", values)
        return option + equals + (os.path.expanduser(path) if re.match(r"~[\w.-]*(/|\\|$)", path) else path)
    if isinstance(values, (Namespace, dict)):
        for key, value in list(values.items(branches=False) if isinstance(values, Namespace) else values.items()):
            values[key] = expand_home(value)
    elif isinstance(values, list):
        values[:] = map(expand_home, values)
    return values


def did_you_mean(args: Sequence[str], parser: ArgumentParser) -> str:
    r"""The known names that are close to unknown ones in a command and its configs, as an addition to a message.

    Args:
        args: options of the command.
        parser: of the command.

    Example:
        >>> did_you_mean(["--trainer.max_epoch=3"], parser)
        '\nDid you mean max_epochs, not max_epoch?'
    """
    typed = list(dict.fromkeys(_words(args)))
    classes = {kind.__name__: kind for base in BASES for kind in _subclasses(base)}
    known = {part for key, _ in parser.get_defaults().items() for part in key.split(".")} | classes.keys()
    known |= {"class_path", "init_args", "config", "help"}
    for name in typed:
        for kind in classes[name].__mro__ if name in classes else ():
            known |= set(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    return "".join(f"\nDid you mean {close}, not {word}?" for word in typed if (close := closest(word, known)))


def closest(word: str, known: Collection[str]) -> str:
    """The known name that is closest to an unknown one, whatever its case; "" if it is known, or none is close."""
    lower, letters = {name.lower(): name for name in known}, sorted(word.lower())
    close = [] if word in known else get_close_matches(word.lower(), lower, 5)
    # The likeliest mistake is that of letters that have changed places.
    return lower[min(close, key=lambda name: sorted(name) != letters)] if close else ""


def _words(args: Sequence[str]) -> Iterator[str]:
    """Names in options and, file by file, in configs."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        if option.startswith("-"):
            name, equals, given = option.lstrip("-").rstrip("+").partition("=")
            value = given if equals else value
            yield from _words_of(name.rstrip("+").split("."), value)
            if name in ("c", "config"):
                with suppress(OSError, ValueError, yaml.YAMLError):
                    yield from _words_of_config(yaml.safe_load(Path(value).read_text("utf-8")))


def _words_of(names: Sequence[str], value: Any) -> Iterator[str]:
    yield from (name for name in names if name.isidentifier())
    if names[-1] in OF_CLASSES and isinstance(value, str) and (kind := value.rpartition(".")[2]).isidentifier():
        yield kind


def _words_of_config(config: Any) -> Iterator[str]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _words_of([str(key).rstrip("+")], value)
            yield from _words_of_config(value)
    for each in config if isinstance(config, list) else ():
        yield from _words_of_config(each)


def _subclasses(base: type) -> Iterator[type]:
    yield base
    kind: type
    for kind in base.__subclasses__():
        yield from _subclasses(kind)
