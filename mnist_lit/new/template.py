"""What a new project consists of, and what is left out of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from mnist_lit.engine.errors import ENGINE as PROJECT

HERE = Path(__file__).parent
PACKAGE = HERE.parent
# The files around the package: beside it in a checkout, in here in an installed wheel.
ROOT = HERE / "checkout" if (HERE / "checkout").exists() else PACKAGE.parent

COPIED = """.gitignore .pre-commit-config.yaml LICENSE configs lightning_logs/.gitignore pyproject.toml
tests/project""".split()
WRITTEN = {".ci/run": "run", ".github/workflows/ci.yml": "ci.yml", "README.md": "README.md"}  # from project/
IGNORED = "__pycache__", ".*"
LINE_LENGTH = 120
BINARY = ".npz", ".png"
CREDIT = f"\nMade from the project template {PROJECT}.\n"

# By file: paragraphs that are left out, by words in them, and regular expressions with what replaces each match.
Paragraphs = dict[str, list[str]]
Edits = dict[str, list[tuple[str, str]]]

DROPPED: Paragraphs = {
    "configs/README.md": ["test_machines.py"],
    "pyproject.toml": ["wheel.force-include]"],
}
EDITS: Edits = {
    f"{PROJECT}/engine/README.md": [  # which names tests of the engine
        (r"(?m)^(\|[^|\n]*\|[^|\n]*\|)[^|\n]*\|$", r"\1"),
        (r"(?s)The tests are in .*? named\.\s", ""),
    ],
    f"{PROJECT}/__init__.py": [
        (r'(?s)^""".*?"""', '"""A PyTorch Lightning project: models and data on top, the engine below."""'),
        (r'__version__ = ".*"', '__version__ = "0.1.0"'),
    ],
    f"{PROJECT}/__main__.py": [(r'"new": .*?, (?="serve")', "")],
    "pyproject.toml": [
        (r'description = ".*"', 'description = "A PyTorch Lightning project"'),
        (r"(?s)\ntest = \[\n.*?\n\]", f'\ntest = ["{PROJECT}[export]", "pytest>=8.2,<10", "pytest-xdist>=3.6.1,<4"]'),
        (rf'"{PROJECT}\[test\]"', f'"{PROJECT}[serve,sweep,test]"'),  # mypy reads what both import
        (r'    "(mnist|gpu|matrix): .*\n', ""),
        (r"pythonpath = .*\n", ""),
        (rf" \| {PROJECT}\.new", ""),
    ],
}

# Of the package and of configs: the example's data, and what are options of it.
BARE_LEFT_OUT = "datasets", "data.py", "transforms.py", "augment.yaml", "accurate.yaml"
BARE_DROPPED: Paragraphs = {
    f"{PROJECT}/models.py": ["-- the tutorial's", "-- better ones", "def accurate_cnn("],
    "LICENSE": ["digits.npz"],
    "pyproject.toml": ["The example's data has no circles"],
}
BARE_EDITS: Edits = {
    f"{PROJECT}/serve.py": [(r"from \S+\.pictures import .*\n", ""), (", PictureReader", "")],
    f"{PROJECT}/engine/README.md": [
        ("knows nothing of MNIST and ", ""),
        (r"\| (a damaged or hostile dataset file|eight processes start) .*\n", ""),
    ],
    f"{PROJECT}/__init__.py": [
        (r"__all__ = .*", '__all__ = ["CNN", "Classifier", "DataModule", "FastCNN", "Logistic"]'),
        ("MNISTDataModule", "DataModule"),
    ],
    f"{PROJECT}/__main__.py": [("MNISTDataModule", "DataModule")],
    f"{PROJECT}/models.py": [
        ("The tutorial's logistic", "Logistic"),
        ("The tutorial's CNN", "A small CNN"),
        (r"The last ReLU is the tutorial's, too\. It cuts", "The last ReLU cuts"),
        ("A better CNN", "A CNN"),
        ("MNISTDataModule", "DataModule"),
    ],
    "configs/README.md": [(r"(?s)`logistic\.yaml` .*? configuration alone\.\n", ""), (r"\| \[augment.*\n", "")],
    "configs/cnn.yaml": [("^#.*", "# A small CNN.")],
    "configs/fast.yaml": [("^#.*", "# A CNN with batch norm, Adam and a one-cycle learning rate.")],
    "configs/logistic.yaml": [("^#.*", "# Logistic regression.")],
    "configs/overlays/per_class.yaml": [("num_classes: 10", "num_classes: 3")],
    "pyproject.toml": [
        (r'    "requests>.*\n', ""),
        (r'"types-requests", ', ""),
        ("# Digits out of image files, and sheets of them;", "# Sheets of images;"),
        (", the example's data beside it, and the engine below both", ", and the engine below"),
        (rf' "{PROJECT}\.datasets",', ""),
        (rf" \| {PROJECT}\.transforms", ""),
    ],
    "tests/project/test_project.py": [
        (r"(?s)(def data\().*?\).*?(\n    \"\"\".*?\"\"\").*?\n\n\n", r"\1) -> list[str]:\2\n    return []\n\n\n"),
        (r"from importlib\.resources import files\n", ""),
    ],
}


def write_project(project: Path, package: str, bare: bool) -> None:
    """Write all files of a project.

    Args:
        project: the folder.
        package: name of the package, in the place of this one's.
        bare: leave out the example's datasets.
    """
    names = {case(PROJECT): case(package) for case in (str, str.upper, lambda name: name.replace("_", "-"))}
    for source, name in _files(bare):
        target = project / name.replace(PROJECT, package)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix in BINARY:
            shutil.copyfile(source, target)
            continue
        text = _edited(source.read_text(encoding="utf-8"), name, DROPPED, EDITS)
        if bare:
            text = _edited(text, name, BARE_DROPPED, BARE_EDITS)
        if name == "README.md":
            data = HERE / ("bare" if bare else "project") / "data.md"
            text = text.replace("DATA\n", data.read_text(encoding="utf-8"))
        for old, new in names.items():
            text = text.replace(old, new)
        if name == "README.md":
            text += CREDIT
        if source.suffix == ".py":
            text = re.sub(r"(?m)^from \S+ import [^(\n]+$", _wrapped, text)
        target.write_bytes(text.encode())  # on every platform with the same line ends
    (project / ".ci" / "run").chmod(0o755)


def _files(bare: bool) -> Iterator[tuple[Path, str]]:
    """Each file, and its path in the project as long as that still has this one's name."""
    left_out = [HERE, *(PACKAGE / name for name in BARE_LEFT_OUT)] if bare else [HERE]
    for path in _walk(PACKAGE.parent, PROJECT):
        if not any(path.is_relative_to(place) for place in left_out):
            yield path, path.relative_to(PACKAGE.parent).as_posix()
    for part in COPIED:
        for path in _walk(ROOT, part):
            if not (bare and path.name in BARE_LEFT_OUT):
                yield path, path.relative_to(ROOT).as_posix()
    yield from ((HERE / "project" / source, name) for name, source in WRITTEN.items())
    if bare:
        yield HERE / "bare" / "data.py", f"{PROJECT}/data.py"


def _walk(folder: Path, part: str) -> Iterator[Path]:
    if (folder / part).is_file():
        yield folder / part
    for path in sorted((folder / part).rglob("*")):
        names = path.relative_to(folder).parts
        if path.is_file() and not any(fnmatch(name, pattern) for name in names for pattern in IGNORED):
            yield path


def _edited(text: str, name: str, dropped: Paragraphs, edits: Edits) -> str:
    paragraphs = text.split("\n\n")
    kept = [p for p in paragraphs if not any(words in p for words in dropped.get(name, ()))]
    if len(kept) < len(paragraphs):
        text = "\n\n".join(kept).rstrip("\n") + "\n"
    for pattern, replacement in edits.get(name, ()):
        text = re.sub(pattern, replacement, text)
    return text


def _wrapped(line: re.Match[str]) -> str:
    """An import that a longer name of the package has made too long, as formatters write it."""
    if len(line[0]) <= LINE_LENGTH:
        return line[0]
    start, names = line[0].split(" import ")
    return "\n    ".join([f"{start} import (", *(f"{name}," for name in names.split(", "))]) + "\n)"
