"""rocket_align serves any policy: it imports nothing of prismatic, and importing it is cheap."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import rocket_align
from tests.helpers.programs import run_program

FORBIDDEN = {"prismatic", "experiments", "transformers", "peft", "tensorflow"}
# The teachers that are transformers models, imported only when one is built.
ALLOWED = {"vit.py": {"transformers"}}


def test_sources_import_nothing_of_the_policy(repo_root: Path) -> None:
    sources = sorted((repo_root / "rocket_align").rglob("*.py"))
    assert sources
    for source in sources:
        imported = set(re.findall(r"^ *(?:from|import) (\w+)", source.read_text(encoding="utf-8"), re.MULTILINE))
        assert not imported & FORBIDDEN - ALLOWED.get(source.name, set()), source


def test_import_loads_no_torch(repo_root: Path) -> None:
    code = "import sys, rocket_align, rocket_align.recipes; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert run_program([sys.executable, "-c", code], cwd=repo_root).stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    for name in rocket_align.__all__:
        assert getattr(rocket_align, name) is not None
    assert dir(rocket_align) == sorted(rocket_align.__all__)


@pytest.mark.parametrize("earlier", sorted(rocket_align._EARLIER))
def test_an_earlier_name_is_the_same_module(earlier: str) -> None:
    assert importlib.import_module(earlier) is importlib.import_module(rocket_align._EARLIER[earlier])
