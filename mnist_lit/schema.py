"""What editors and shells complete and check by: a JSON schema of the configs, and its words."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from torch import nn

from mnist_lit.data import MNISTDataModule
from mnist_lit.models import CNN, FastCNN, Logistic

MODELS = CNN, FastCNN, Logistic  # those of which every argument is a plain value
COMMANDS = ["fit", "validate", "test", "predict", "export", "sweep", "new"]

Schema = dict[str, Any]


class Print(argparse.Action):
    """Prints what ``const`` makes of the parser, and exits."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(self.const(parser))
        parser.exit()


def print_schema(parser: ArgumentParser) -> str:
    """The schema as JSON."""
    return json.dumps(config_schema(parser), indent=1)


def print_completion(parser: ArgumentParser) -> str:
    """A line for bash that completes commands, options and files."""
    words = []
    for key, setting in config_schema(parser)["properties"].items():
        words += [f"--{key}", *(f"--{key}.{name}" for name in setting.get("properties", ()))]
    for key, classes in (("model", MODELS), ("data", (MNISTDataModule,))):
        names = {name for kind in classes for name in inspect.signature(kind).parameters}
        words += [f"--{key}.{name}" for name in sorted(names)]
    return f"complete -o default -W '{' '.join(COMMANDS + [w for w in words if '$' not in w])}' mnist-lit"


def config_schema(parser: ArgumentParser) -> Schema:
    """Jsonargparse's schema, opened to what configs may say beside it: overlays, which leave out most of it,
    short names of classes, and classes of one's own.
    """
    models = ArgumentParser()
    models.add_subclass_arguments(MODELS, "model")
    choices = [choice for model in _generated(models)["$defs"].values() for choice in model["anyOf"]]
    # All modules of torch are more than an editor bears, and what jsonargparse can describe.
    set_parsing_settings(subclasses_disabled=[nn.Module])
    schema = _generated(parser)
    del schema["required"]
    schema["properties"].pop(argparse.SUPPRESS, None)
    trainer = schema["properties"]["trainer"]["properties"]
    trainer["callbacks+"] = trainer["callbacks"]
    definitions = schema["$defs"]
    definitions["Module"] = {"type": ["string", "object"]}
    definitions["LightningModule"] = {"anyOf": choices}
    for definition in definitions.values():
        _open(definition)
    data = definitions["LightningDataModule"]["anyOf"]
    ours = next(choice for choice in data if "MNISTDataModule" in _class_path(choice).get("enum", ()))
    data.append(ours["properties"]["init_args"])  # whose settings may stand in data itself
    return schema


def _generated(parser: ArgumentParser) -> Schema:
    return json.loads(parser.get_completion_script("jsonschema"))


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
