"""Words of the source: docstrings say what a thing is or does, names say the thing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("prismatic", "rocket_align", "experiments", "vla-scripts", "patches", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
OPENINGS = ("What", "Where", "Of", "How", "Which", "Whether")
NAMES = ("found", "mine", "there", "made", "one")


def faults(tree: ast.Module) -> Iterator[str]:
    """Docstrings that begin with a question's word, and bindings whose name says nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            words = (ast.get_docstring(node) or "-").split()
            if words[0].rstrip(",:") in OPENINGS:
                yield f"{getattr(node, 'lineno', 1)}: docstring begins with {words[0]}"
        bound = node.arg if isinstance(node, ast.arg) else ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = node.id
        if bound in NAMES or bound.startswith("of_"):
            yield f"{getattr(node, 'lineno', 1)}: {bound} names nothing"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_and_names_say_the_thing(path: Path) -> None:
    assert list(faults(ast.parse(path.read_text()))) == []


def test_faults_are_seen() -> None:
    source = '"""Where it is."""\ndef where(of_all):\n    """What it is."""\n    found = of_all\n    return found\n'
    assert [fault.split(": ")[1] for fault in faults(ast.parse(source))] == [
        "docstring begins with Where",
        "docstring begins with What",
        "of_all names nothing",
        "found names nothing",
    ]
