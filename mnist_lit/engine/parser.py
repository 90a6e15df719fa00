"""Lightning's parser, with messages of one line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse._typehints import get_all_subclass_paths
from lightning.pytorch.cli import LightningArgumentParser

# Lines of jsonargparse on how it looks at types, beside those that say what is wrong.
BOOKKEEPING = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value type: |Given value: NestedArg|"
    r"Expected a <class 'NoneType'>|Expected a path but .* not accessible|$"
)
# Lines that the next one belongs to.
HEAD = re.compile(r"(Parser key|Problem with given class_path) .*:$")


class Parser(LightningArgumentParser):
    """Says in one line what is wrong, and which known name is close to an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error:  # else it is another parser that asks, to make more of the message
            message = in_short(message, (getattr(ex, "subcommand_parser", None) or self)._option_string_actions)
        super().error(message, ex)


def in_short(message: str, options: Iterable[str] = ()) -> str:
    r"""Make one line of jsonargparse's message.

    Args:
        message: of several lines.
        options: of the command.

    Example:
        >>> in_short("Parser key a:\n  Subtypes: [x, y]\n  Errors:\n    - Expected a number\n  Given value: b")
        'Parser key a: Expected a number; Given value: b'
    """
    said, head, owner = list[str](), "", ""
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if BOOKKEEPING.match(line):
            continue
        if HEAD.match(line):
            found = re.match(r"Problem with given class_path '(.*)':", line)
            head, owner = f"{head}{line} ", found[1] if found else ""
            continue
        known: Iterable[str] = ()
        if found := re.match(r"Option '(.*)' is not accepted", line):
            known = options_of(_resolved(owner))
        elif found := re.match(r"Expected a dot import path string: (.*)", line):
            bases = map(_resolved, re.findall(r"<class '(\w+\.[\w.]+)'>", message))
            known = [path.rpartition(".")[2] for base in bases if base for path in get_all_subclass_paths(base)]
        elif found := re.match(r"unrecognized arguments: (--[^\s=]+)", line):
            known = options
        line += did_you_mean(found[1], known) if found else ""
        if head or not any(text.endswith(line) for text in said):
            said.append(head + line)
        head = ""
    return "; ".join([*said, head.strip()] if head else said)


def _resolved(path: str) -> Any:
    """A class or a function by its import path, None if there is none: a suggestion is not worth an error."""
    try:
        return resolve_name(path)
    except (AttributeError, ImportError, ValueError):
        return None


def options_of(kind: Any) -> list[str]:
    """Names of the arguments that a class or a function takes, and of those that it hands on."""
    parser, arguments = LightningArgumentParser(), list[str]()
    if isinstance(kind, type):
        arguments = parser.add_class_arguments(kind, "of", fail_untyped=False)
    elif callable(kind):
        arguments = parser.add_function_arguments(kind, "of", fail_untyped=False)
    return [name.partition(".")[2] for name in arguments]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A known name that is close to an unknown one, as an addition to a message, or nothing.

    Example:
        >>> did_you_mean("fitt", ["fit", "test"])
        ' (did you mean fit?)'
    """
    close = get_close_matches(name, [*known], 1, 0.7)
    return f" (did you mean {close[0]}?)" if close else ""
