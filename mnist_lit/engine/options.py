"""What is typed on the command line, as jsonargparse takes it, and the names that were probably meant."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pkgutil
import re
from collections.abc import Collection, Sequence
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
from mnist_lit.engine.errors import UserError
from mnist_lit.engine.project import Project
from mnist_lit.engine.provenance import written_here
from mnist_lit.engine.run import Run, relative

USAGE = "%(prog)s --config FILE [--config FILE ...] [--KEY=VALUE ...]"
WITH_CHECKPOINT = "validate", "test", "predict", "export"  # commands that need one
# Options whose values name classes, and what the classes inherit from.
OF_CLASSES = {"model", "data", "optimizer", "lr_scheduler", "callbacks", "logger", "class_path"}
BASES = LightningModule, LightningDataModule, Optimizer, LRScheduler, Callback, Logger


def with_config(args: Sequence[str], project: Project) -> list[str]:
    """Put configs first, so that other options override them wherever they stand, and add one if none is named:
    the config.yaml of the checkpoint's run, or else for ``fit``, if no model is named, the project's default.

    Raises:
        UserError: if there is no such checkpoint, no config for it, or one that was written on another machine.
    """
    command, *options = args
    settings: dict[str, Any] = {"usage": USAGE, "add_help": False, "allow_abbrev": False}
    parser = argparse.ArgumentParser(project.command(command), **settings)
    parser.add_argument("-c", "--config", metavar="FILE", action="append", default=[])
    parser.add_argument("--data.images", dest="images", nargs="*")  # which a shell finds for *.png
    named, others = parser.parse_known_args(options)
    if images := named.images:  # one may be a list already, in a further process
        others.append(f"--data.images={images[0] if len(images) == 1 else json.dumps(images)}")
    parser.add_argument("--ckpt_path", nargs="?", type=Path)
    for key in ("model", "data"):
        parser.add_argument(f"--{key}", f"--{key}.class_path", dest=key, default="")
    parser.add_argument("-h", "--help", action="store_true")
    given = parser.parse_known_args(others)[0]

    configs, whole = named.config, given.model or given.help
    if not configs and given.ckpt_path is not None and ":/" not in str(given.ckpt_path):
        configs = _config_of_run(given.ckpt_path, command, bool(whole))
    if command == "fit" and not configs and not whole and Path(project.default_config).is_file():
        rank_zero_info(f"Using the default config: {project.default_config}")
        configs = [project.default_config]
    contents, own = [_read(config) for config in configs], LightningModule.train_dataloader
    data: Any = next((content["data"] for content in contents if content.get("data")), {})
    model: Any = next((content["model"] for content in contents if content.get("model")), {})
    names_data = _find(given.data) or isinstance(data, str) or "class_path" in data
    module = _find(given.model or (model if isinstance(model, str) else model.get("class_path", "")))
    brings_data = getattr(module, "train_dataloader", own) is not own
    if project.data_module and not names_data and not brings_data:
        configs = [json.dumps({"data": {"class_path": project.data_module}}), *configs]
        contents = [{}, *contents]
    for place, content in enumerate(contents):
        chosen = {key: kind for key in ("model", "data") if key in content and (kind := _find(vars(given)[key]))}
        changed = {key: _of_class(content[key], kind, project) for key, kind in chosen.items()}
        if changed:
            configs[place] = json.dumps({**content, **changed})
    return [command, *(f"--config={config}" for config in configs), *others]


def _config_of_run(ckpt_path: Path, command: str, named: bool) -> list[str]:
    """The config.yaml beside a checkpoint. It can run any code, so only one that was written here is taken unasked."""
    if not ckpt_path.exists():
        if command in WITH_CHECKPOINT:
            raise UserError(no_such_checkpoint("ckpt_path", ckpt_path))
        return []  # such as last, which fit looks for
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


def _of_class(section: Any, new: type, project: Project) -> dict[str, Any]:
    """A config's model or data for the class that the command line chooses in its place.

    It keeps the options if the class inherits from the one before. jsonargparse would hand on every option of the same
    name: ``--data=my_data.MyData`` would silently take the ``batch_size`` of another data module.
    """
    path = f"{new.__module__}.{new.__qualname__}"
    section = section if isinstance(section, dict) else {"class_path": section}
    old = _find(section.get("class_path", project.data_module))
    if old is None or not issubclass(new, old):
        return {"class_path": path}
    return {"class_path": path, "init_args": section.get("init_args", {} if "class_path" in section else section)}


def _read(config: str) -> dict[str, Any]:
    """The content of a config, of a file or as it is; nothing if it cannot be read, which the parser explains."""
    with suppress(OSError, ValueError, yaml.YAMLError):
        content = yaml.safe_load(config if config.startswith("{") else Path(config).read_text("utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def _find(path: str) -> type | None:
    """A class by its import path or, of those that are imported, its name; None if there is none."""
    if "." not in path:
        return _classes().get(path)
    with suppress(Exception):  # whatever a user's module raises; the parser says what is wrong
        found = pkgutil.resolve_name(path)
        return found if isinstance(found, type) else None
    return None


def expand_home(values: Any) -> Any:
    """Replace ``~`` and ``~name`` where a path begins. A shell does not: within quotes, after ``=``, or in a config.

    Numbers of jsonargparse's own types become plain ones, which YAML can write for whatever class they reach.
    Changes lists and configs in place.
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
    """The known names that are close to unknown ones in a command, as an addition to a message."""
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
    return "".join(f"\nDid you mean {close}, not {word}?" for word, close in meant.items() if close)


def closest(word: str, known: Collection[str]) -> str:
    """The known name that is closest to an unknown one, whatever its case; "" if it is known, or none is close."""
    lower, letters = {name.lower(): name for name in known}, sorted(word.lower())
    close = [] if word in known else get_close_matches(word.lower(), lower, 5)
    # The likeliest mistake is that of letters that have changed places.
    return lower[min(close, key=lambda name: sorted(name) != letters)] if close else ""


def _classes() -> dict[str, type]:
    """Every class that an option may name, of those that are imported, by its name."""
    found, bases = dict[str, type](), list[type](BASES)
    while bases:
        found.setdefault(bases[0].__name__, bases[0])
        bases = [*bases[1:], *bases[0].__subclasses__()]
    return found
