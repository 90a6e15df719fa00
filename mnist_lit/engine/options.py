"""Prepares the command line for jsonargparse, and suggests the names that were probably meant."""

import argparse
import inspect
import json
import math
import os
import pkgutil
import re
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, get_loader
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mnist_lit.engine.checkpoint import no_such_checkpoint
from mnist_lit.engine.errors import UserError, no_pipe, require
from mnist_lit.engine.project import Project
from mnist_lit.engine.provenance import written_here
from mnist_lit.engine.run import Run, relative

USAGE = "%(prog)s --config FILE [--config FILE ...] [--KEY=VALUE ...]"
WITH_CHECKPOINT = "validate", "test", "predict", "export"  # commands that need a checkpoint
# Options whose values name classes, and the base classes.
OF_CLASSES = {"model", "data", "optimizer", "lr_scheduler", "callbacks", "logger", "class_path"}
BASES = LightningModule, LightningDataModule, Optimizer, LRScheduler, Callback, Logger


def with_config(args: Sequence[str], project: Project) -> list[str]:
    """Put configs first, so that other options override them wherever they stand, and add one if none is named.

    That is the config.yaml of the checkpoint's run, or for ``fit`` without a model the project's default.

    Raises:
        UserError: if there is no such checkpoint, no config for it, or one that was written on another machine.
    """
    command, *options = args
    settings: dict[str, Any] = {"usage": USAGE, "add_help": False, "allow_abbrev": False}
    parser = argparse.ArgumentParser(project.command(command), **settings)
    parser.add_argument("-c", "--config", metavar="FILE", action="append", default=[])
    parser.add_argument("--data.images", dest="images", nargs="*")  # a shell expands *.png to several
    named, others = parser.parse_known_args(options)
    if images := named.images:  # one may be a list already, in a further process
        others.append(f"--data.images={images[0] if len(images) == 1 else json.dumps(images)}")
    parser.add_argument("--ckpt_path", nargs="?", type=Path)
    for key in ("model", "data"):
        parser.add_argument(f"--{key}", f"--{key}.class_path", dest=key, default="")
    parser.add_argument("-h", "--help", action="store_true")
    given = parser.parse_known_args(others)[0]

    configs, whole = named.config, bool(given.model or given.help)
    if not configs and given.ckpt_path is not None and ":/" not in str(given.ckpt_path):
        configs = _config_of_run(given.ckpt_path, command, whole)
    if command == "fit" and not configs and not whole and Path(project.default_config).is_file():
        rank_zero_info(f"Using the default config: {project.default_config}")
        configs = [project.default_config]
    chosen = {"model": given.model, "data": given.data}
    return [command, *(f"--config={_with_classes(config, chosen, project)}" for config in configs), *others]


def _with_classes(config: str, chosen: dict[str, str], project: Project) -> str:
    """Put the classes that the command line names into a config, and drop the options of unrelated classes.

    jsonargparse would keep every option of the same name: ``--model=FastCNN`` would silently get the ``lr`` of CNN.
    """
    try:
        content = get_loader("yaml")(no_pipe(config).read_text("utf-8"))  # as the parser: no dates, 1e-4 is a number
    except (OSError, ValueError, yaml.YAMLError):  # the parser reports it
        return config
    changed = _interpolated(config, content) if "${" in str(content) else {}
    content = {**content, **changed} if changed else content
    for key in chosen.keys() & content if isinstance(content, dict) else ():
        section = content[key] if isinstance(content[key], dict) else {"class_path": str(content[key])}
        named = section.get("class_path", project.data_module if key == "data" else "")
        old, new = _find(named), _find(chosen[key])
        related = new is old or (isinstance(new, type) and isinstance(old, type) and issubclass(new, old))
        if new and named and not related:
            changed[key] = {"class_path": chosen[key]}
        elif new:  # of an overlay that names no class, too
            options = section.get("init_args", {} if "class_path" in section else section)
            changed[key] = {"class_path": chosen[key], "init_args": options}
    return yaml.safe_dump({**content, **changed}, default_flow_style=True, width=math.inf) if changed else config


def _interpolated(config: str, content: Any) -> Any:
    """The content of a config with values in the place of ``${oc.env:NAME}`` and ``${other.option}``."""
    require("omegaconf", "omegaconf")
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(content), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{config}: {error}") from error


def _config_of_run(ckpt_path: Path, command: str, named: bool) -> list[str]:
    """The config.yaml next to a checkpoint. It can run any code, so only one that was written here is used unasked."""
    if not ckpt_path.exists():
        if command in WITH_CHECKPOINT:
            raise UserError(no_such_checkpoint("ckpt_path", ckpt_path))
        return []  # such as last, which fit resolves
    run = Run(ckpt_path.absolute().parent.parent)
    config = relative(run.config)
    if run.config.is_file():
        if not written_here(run):
            raise UserError(
                f"{config} was not written by you on this machine, and a config can run any code: read it, then name "
                f"it with --config={config}"
            )
        rank_zero_info(f"Using the run's config: {config}")
        return [config]
    if command in WITH_CHECKPOINT and not named:
        raise UserError(
            f"--ckpt_path={ckpt_path} is not in a run's folder, where its config.yaml would be; name the config "
            "that it was trained with: --config=FILE"
        )
    return []


def _find(path: str) -> Any:
    """A class or function by its import path, or an imported class by its name."""
    with suppress(Exception):  # whatever a user's module raises; the parser reports it
        return pkgutil.resolve_name(path) if "." in path else _classes()[path]
    return None


def expand_home(values: Any) -> Any:
    """Replace ``~`` and ``~name`` at the start of paths, also within quotes, after ``=`` and in configs.

    Numbers of jsonargparse's own types become plain ones, which YAML can write. Changes lists and configs in place.
    """
    if isinstance(values, str):
        home = r"^(--[^=]*=)?(~[\w.-]*)(?=[/\\]|$)"
        return re.sub(home, lambda found: (found[1] or "") + os.path.expanduser(found[2]), values)
    if isinstance(values, (int, float)) and not isinstance(values, bool):
        return int(values) if isinstance(values, int) else float(values)
    if isinstance(values, (Namespace, dict)):
        for key, value in list(values.items(branches=False) if isinstance(values, Namespace) else values.items()):
            values[key] = expand_home(value)
    elif isinstance(values, list):
        values[:] = map(expand_home, values)
    return values


def did_you_mean(args: Sequence[str], parser: ArgumentParser) -> str:
    """Suggestions for the unknown names in a command, to be appended to a message."""
    classes, meant = _classes(), dict[str, str]()
    known = {part for key, _ in parser.get_defaults().items() for part in key.split(".")}
    known |= {"model", "data", "class_path", "init_args", "config", "help"}
    known.update(*(inspect.signature(kind).parameters for kind in classes.values()))
    for option, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        names = name.strip("-+").split(".") if name.startswith("--") else []
        meant |= {word: closest(word, known) for word in names}
        if names and names[-1] in OF_CLASSES:
            kind = (value if equals else following).rpartition(".")[2]
            meant[kind] = closest(kind, classes)
    hints = [f"\nDid you mean {close}, not {word}?" for word, close in meant.items() if close]
    if "pytorch_lightning" in sys.modules:  # imported by a module of the user's
        hints += ["\nClasses of pytorch_lightning are not those of lightning.pytorch: import lightning.pytorch instead"]
    return "".join(hints)


def closest(word: str, known: Collection[str]) -> str:
    """The known name closest to an unknown one, ignoring case; "" if the name is known or none is close."""
    lower, letters = {name.lower(): name for name in known}, sorted(word.lower())
    close = [] if word in known else get_close_matches(word.lower(), lower, 5)
    # Swapped letters are the likeliest mistake.
    return lower[min(close, key=lambda name: sorted(name) != letters)] if close else ""


def _classes() -> dict[str, type]:
    """Imported classes that an option may name, by name."""
    found, bases = dict[str, type](), list[type](BASES)
    while bases:
        found.setdefault(bases[0].__name__, bases[0])
        bases = [*bases[1:], *bases[0].__subclasses__()]
    return found
