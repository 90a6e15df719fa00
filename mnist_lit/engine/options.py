"""What is typed on the command line, as jsonargparse takes it, and the names that were probably meant."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pkgutil
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import pairwise
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
from mnist_lit.engine.errors import UserError
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
        UserError: if there is no such checkpoint, or no config for it.
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
            raise UserError(no_such_checkpoint("ckpt_path", ckpt_path))
        elif command in WITH_CHECKPOINT and not whole:
            raise UserError(
                f"--ckpt_path={ckpt_path} is not in a run's folder, where its config.yaml would be; name the config "
                "that it was trained with: --config=FILE"
            )
    if command == "fit" and not configs and not whole and Path(project.default_config).is_file():
        rank_zero_info(f"Using the default config: {project.default_config}")
        configs = [project.default_config]
    given = {key: _given(key, others) for key in ("model", "data")}
    contents = [_read(config) for config in configs]
    first = next((content["data"] for content in contents if content.get("data")), None)
    if project.data_module and not _find(given["data"]) and not _names_class(first):
        configs = [json.dumps({"data": {"class_path": project.data_module}}), *configs]
        contents = [{}, *contents]
    for place, content in enumerate(contents):
        changed = {key: _of_class(content[key], given[key], project) for key in given if given[key] and key in content}
        if changed:
            configs[place] = json.dumps({**content, **changed})
    return [command, *(f"--config={config}" for config in configs), *others]


def _given(key: str, args: Sequence[str]) -> str:
    """The class that the command line chooses for a model or the data, or ""."""
    names = (f"--{key}", f"--{key}.class_path")
    found = [value for option, _, value in (arg.partition("=") for arg in args) if option in names and value]
    return ([""] + found + [value for option, value in pairwise(args) if option in names])[-1]


def _names_class(section: Any) -> bool:
    return isinstance(section, str) or (isinstance(section, dict) and "class_path" in section)


def _of_class(section: Any, chosen: str, project: Project) -> Any:
    """A config's model or data for the class that the command line chooses in its place.

    It keeps the options if the class inherits from the one before. jsonargparse would hand on every option of the same
    name: ``--data=my_data.MyData`` would silently take the ``batch_size`` of another data module.
    """
    if (new := _find(chosen)) is None:
        return section  # the parser says what is wrong, or it is more than a class
    section = section if isinstance(section, dict) else {"class_path": section}
    old = _find(section.get("class_path", project.data_module))
    if old is None or not issubclass(new, old):
        return {"class_path": chosen}
    given = section.get("init_args", {} if "class_path" in section else section)
    return {"class_path": chosen, "init_args": given}


def _read(config: str) -> dict[str, Any]:
    """The content of a config, of a file or as it is; nothing if it cannot be read, which the parser explains."""
    try:
        content = yaml.safe_load(config if config.startswith("{") else Path(config).read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    return content if isinstance(content, dict) else {}


def _find(path: str) -> type | None:
    """A class by its import path or, of those that are imported, its name; None if there is none."""
    if "." not in path:
        return next((kind for base in BASES for kind in _subclasses(base) if kind.__name__ == path), None)
    with suppress(Exception):  # whatever a user's module raises; the parser says what is wrong
        found = pkgutil.resolve_name(path)
        return found if isinstance(found, type) else None
    return None


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

    Numbers of jsonargparse's own types become plain ones, which YAML can write for whatever class they reach.

    Args:
        values: arguments, or a config, which is changed in place.

    Example:
        >>> expand_home(["--ckpt_path=~/last.ckpt"])
        ['--ckpt_path=/home/ada/last.ckpt']
    """
    if isinstance(values, str):
        option, equals, path = values.partition("=") if values.startswith("--") else ("", "", values)
        return option + equals + (os.path.expanduser(path) if re.match(r"~[\w.-]*(/|\\|$)", path) else path)
    if isinstance(values, (int, float)) and not isinstance(values, bool):
        return int(values) if isinstance(values, int) else float(values)
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
    classes = {kind.__name__: kind for base in BASES for kind in _subclasses(base)}
    options = {part for key, _ in parser.get_defaults().items() for part in key.split(".")}
    options |= {"class_path", "init_args", "config", "help"}
    typed = dict.fromkeys(_words(args))
    for word, _ in typed:
        for kind in classes[word].__mro__ if word in classes else ():
            options |= set(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    meant = ((closest(word, classes if is_class else options), word) for word, is_class in typed)
    return "".join(f"\nDid you mean {close}, not {word}?" for close, word in meant if close)


def closest(word: str, known: Collection[str]) -> str:
    """The known name that is closest to an unknown one, whatever its case; "" if it is known, or none is close."""
    lower, letters = {name.lower(): name for name in known}, sorted(word.lower())
    close = [] if word in known else get_close_matches(word.lower(), lower, 5)
    # The likeliest mistake is that of letters that have changed places.
    return lower[min(close, key=lambda name: sorted(name) != letters)] if close else ""


def _words(args: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Names in options and, file by file, in configs, and whether each is of a class."""
    for option, value in zip(args, [*args[1:], ""], strict=True):
        if option.startswith("-"):
            name, equals, given = option.lstrip("-").rstrip("+").partition("=")
            value = given if equals else value
            yield from _words_of(name.rstrip("+").split("."), value)
            if name in ("c", "config"):
                yield from _words_of_config(_read(value))


def _words_of(names: Sequence[str], value: Any) -> Iterator[tuple[str, bool]]:
    yield from ((name, False) for name in names if name.isidentifier())
    if names[-1] in OF_CLASSES and isinstance(value, str) and (kind := value.rpartition(".")[2]).isidentifier():
        yield kind, True


def _words_of_config(config: Any) -> Iterator[tuple[str, bool]]:
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
