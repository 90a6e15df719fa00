"""Lightning's parser, with messages of one line."""

from __future__ import annotations

import re
from collections.abc import Collection
from difflib import SequenceMatcher, get_close_matches
from pkgutil import resolve_name
from typing import Any, NoReturn

from jsonargparse._typehints import get_all_subclass_paths
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, tensor

# Lines of jsonargparse on how it looks at types, beside those that say what is wrong.
BOOKKEEPING = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Given value type: |Expected a <class 'NoneType'>|"
    r"Subclass types expect one of:|a class path \(str\)|a dict with|$"
)
# Lines that the next one belongs to.
HEAD = re.compile(r"(Parser key|Problem with given class_path) .*:$")
# Of a value that may be a path to a config or the name of a class: whoever writes this means a path.
NO_FILE = re.compile(r"Expected a path but (.*/.*|.*\.(ya?ml|json)) either not accessible")
# What is worth a word only if nothing else is said, the first most.
OF_A_TYPE = "Expected a <class '", "Not a valid subclass of", "Expected a path but "


# Weights of classes as numbers: --model.loss.weight=[1,2,1]
register_type(Tensor, serializer=Tensor.tolist, deserializer=lambda numbers: tensor(numbers).float())


class Parser(LightningArgumentParser):
    """Says in one line what is wrong, and which known name is close to an unknown one."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error:  # else it is another parser that asks, to make more of the message
            message = in_short(message, (getattr(ex, "subcommand_parser", None) or self)._option_string_actions)
        super().error(message, ex)


def in_short(message: str, options: Collection[str] = ()) -> str:
    r"""Make one line of jsonargparse's message.

    Args:
        message: of several lines.
        options: of the command, such as ``"--trainer.max_epochs"``.

    Example:
        >>> in_short("Parser key a:\n  Subtypes: [x, y]\n  Errors:\n    - Expected a number\n  Given value: b")
        'Parser key a: Expected a number; Given value: b'
    """
    said, given, head = dict[str, str](), "", ""  # in the order of the message, every line once
    for line in (line.strip().removeprefix("- ") for line in message.splitlines()):
        if HEAD.match(line):
            head += f"{line} "
        elif found := re.match(r"Given value: (?:NestedArg\(key='(.*?)', val='?(.*?)'?\)$)?", line):
            given = f"{found[1]}={found[2]}" if found[1] else line[found.end() :]
        elif not BOOKKEEPING.match(line):
            said.setdefault(line, head)
            head = head if _of_a_type(line) else ""
    lines = [line for line in said if NO_FILE.match(line)] or [line for line in said if not _of_a_type(line)]
    for kind in OF_A_TYPE:
        lines = lines or [line for line in said if line.startswith(kind)]
    parts = [said[line] + line + _hint(said[line], line, message, options) for line in lines]
    if given and not any(given.rpartition("=")[2] in part or "is not accepted" in part for part in parts):
        parts.append(f"{'' if parts else head}Given value: {given}")
    return "; ".join(parts or [head.strip()])


def _of_a_type(line: str) -> bool:
    return line.startswith(OF_A_TYPE) and "Got value" not in line


def _hint(head: str, line: str, message: str, options: Collection[str]) -> str:
    """The names that are close to the unknown one in a line."""
    if found := re.match(r"Option '(.*)' is not accepted", line):
        owner = re.search(r".*Problem with given class_path '(.*?)':", head)
        known = ["class_path", "init_args", *options_of(_resolved(owner[1] if owner else ""))]
        if (name := found[1].removesuffix("+")) in known:
            return f"; {name} takes one value"
        return did_you_mean(name, known)
    if found := re.match(r"Expected a dot import path string: (.*)", line):
        bases = map(_resolved, re.findall(r"<class '(\w+\.[\w.]+)'>", message))
        return did_you_mean(
            found[1], [path.rpartition(".")[2] for base in bases if base for path in get_all_subclass_paths(base)]
        )
    if found := re.search(r"does not accept option '(.*)'", line):
        return did_you_mean(found[1], [option.lstrip("-") for option in options])
    if line.startswith("unrecognized arguments: "):
        unknown = re.findall(r"(?<!\S)-+([^\s=]+)", line)
        return "".join(did_you_mean(f"--{name}", options) for name in unknown)
    return ""


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


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The known names that are close to an unknown one, as an addition to a message, or nothing.

    Of a name with dots, the first part is looked up alone if nothing known starts with it: what comes
    after it may be an option of a class that is not chosen yet.

    Example:
        >>> did_you_mean("Fitt", ["fit", "test"])
        ' (did you mean fit?)'
        >>> did_you_mean("--dta.size", ["--data", "--data.help"])
        ' (did you mean --data.size?)'
    """
    root, dot, rest = name.partition(".")
    roots = {other.partition(".")[0] for other in known if "." in other}
    if dot and root not in roots:
        name, known = root, roots
    else:
        known, rest = [other for other in known if not other.endswith(".help")], ""
    known, name = {other.lower(): other for other in known}, name.lower()
    likeness = {other: _likeness(name, other) for other in get_close_matches(name, known)}
    # Others only if they are about as close as the first.
    close = [
        known[other] + dot * bool(rest) + rest for other in likeness if likeness[other] > max(likeness.values()) - 0.07
    ]
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _likeness(one: str, other: str) -> float:
    """From 0 to 1; the likeliest mistake is that of two letters that have changed places."""
    return 1 if sorted(one) == sorted(other) else SequenceMatcher(None, other, one).ratio()
