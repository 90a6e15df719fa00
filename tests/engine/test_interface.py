"""The public interface: complete, documented, and the only thing that is imported from the engine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import OVERLAYS, ROOT

import mnist_lit
from mnist_lit import engine

PACKAGE = ROOT / "mnist_lit"
README = (PACKAGE / "engine" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", engine.__all__)
def test_name_is_documented(name: str) -> None:
    public = getattr(engine, name)
    assert f"`{name}" in README
    assert public.__doc__
    assert not public.__name__.startswith("_")


def test_only_public_names_are_imported_from_above() -> None:
    allowed = {*engine.__all__, "serve", "testing", "ProjectSuite"}  # modules with one job each, see the README
    above = (path for path in PACKAGE.rglob("*.py") if not path.is_relative_to(PACKAGE / "engine"))
    for node in (node for path in above for node in ast.walk(ast.parse(path.read_text("utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mnist_lit.engine"):
            assert node.module in ("mnist_lit.engine", "mnist_lit.engine.testing"), node.module
            assert {alias.name for alias in node.names} <= allowed


@pytest.mark.parametrize("path", sorted(OVERLAYS.parent.rglob("*.yaml")), ids=lambda path: path.name)
def test_configs_name_public_classes(path: Path) -> None:
    assert set(re.findall(r"^[^#]*mnist_lit\.engine\.(\w+)", path.read_text("utf-8"), re.MULTILINE)) <= {
        *engine.__all__
    }


def test_names_are_imported_when_they_are_asked_for() -> None:
    """A server of an ONNX file starts without torch, and the command line sees to how its imports are done."""
    code = "import sys, mnist_lit; from mnist_lit.engine import Project, serve; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert mnist_lit.CNN.__name__ == "CNN"
    with pytest.raises(AttributeError, match="no attribute 'Transformer'"):
        mnist_lit.Transformer  # noqa: B018
