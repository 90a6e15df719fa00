"""A JSON schema of the configs for editors, and its words for shells."""

from __future__ import annotations

import argparse
import json
from inspect import signature
from pkgutil import resolve_name
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from lightning.pytorch import LightningModule
from torch import nn

from mnist_lit.engine.errors import ENGINE as PROJECT

Schema = dict[str, Any]
BASH = """\
_{name}_complete() {{
    case "${{COMP_WORDS[*]:0:3}}" in
        *"-m {name}" | "{script} "* | "{script}") COMPREPLY=($(compgen -W '{words}' -- "$2")) ;;
    esac
}}
complete -o default -F _{name}_complete {script} python python3"""


class Print(argparse.Action):
    """Print what ``const`` makes of the parser, and exit."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(self.const(parser))
        parser.exit()


def print_schema(parser: ArgumentParser) -> str:
    """The schema as JSON."""
    return json.dumps(config_schema(parser), indent=1)


def print_completion(parser: ArgumentParser, commands: list[str]) -> str:
    """Lines for bash that complete commands, options and files, for the script and for ``python -m``.

    Args:
        parser: of a command.
        commands: names of all commands.
    """
    schema = config_schema(parser)
    words = []
    for key, option in schema["properties"].items():
        words += [f"--{key}", *(f"--{key}.{name}" for name in option.get("properties", ()))]
    for key, kind in (("model", "LightningModule"), ("data", "LightningDataModule")):
        options = [choice["properties"]["init_args"]["properties"] for choice in _of_project(schema, kind)]
        words += [f"--{key}.{name}" for name in sorted(set().union(*options))]
    words = commands + [word for word in words if "$" not in word]
    return BASH.format(words=" ".join(words), name=PROJECT, script=PROJECT.replace("_", "-"))


def config_schema(parser: ArgumentParser) -> Schema:
    """The schema of jsonargparse, opened to what configs may contain: overlays, which leave out most of it, short
    names of classes, and custom classes.
    """
    # All modules of torch are more than an editor can take, and more than jsonargparse can describe.
    set_parsing_settings(subclasses_disabled=[_is_network])
    schema = json.loads(parser.get_completion_script("jsonschema"))
    del schema["required"]
    schema["properties"].pop(argparse.SUPPRESS, None)
    trainer = schema["properties"]["trainer"]["properties"]
    trainer["callbacks+"] = trainer["callbacks"]
    definitions = schema["$defs"]
    for definition in definitions.values():
        _open(definition)
    for network in ("Module", "Metric"):
        definitions[network] = {"type": ["string", "object"]}
    for choice in _of_project(schema, "LightningModule"):  # jsonargparse leaves out networks that have no default
        known = choice["properties"]["init_args"]["properties"]
        for name, parameter in signature(resolve_name(_class_path(choice)["enum"][0])).parameters.items():
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                known.setdefault(name, {"type": ["string", "object"]})
    data = definitions["LightningDataModule"]["anyOf"]
    # The options of the default data module may stand in data itself.
    data += [choice["properties"]["init_args"] for choice in _of_project(schema, "LightningDataModule")]
    return schema


def _is_network(kind: type) -> bool:
    return issubclass(kind, nn.Module) and not issubclass(kind, LightningModule)


def _of_project(schema: Schema, kind: str) -> list[Schema]:
    """The project's own choices for a kind of class."""
    choices = schema["$defs"][kind]["anyOf"]
    return [choice for choice in choices if str(_class_path(choice).get("enum", [""])[0]).startswith(f"{PROJECT}.")]


def _class_path(choice: Schema) -> Schema:
    return choice.get("properties", {}).get("class_path", {})


def _open(definition: Schema) -> None:
    known: list[str] = []
    for choice in definition.get("anyOf", []):
        if path := _class_path(choice).get("const"):
            choice["properties"]["class_path"] = {"enum": [path, path.rpartition(".")[2]]}
            known += choice["properties"]["class_path"]["enum"]
    if known:
        own = {"type": "string", "not": {"enum": known}}
        definition["anyOf"] += [
            {"type": "object", "properties": {"class_path": own}, "required": ["class_path"]},
            {
                "type": "object",
                "properties": {"init_args": {"type": "object"}},
                "additionalProperties": False,
            },
        ]
