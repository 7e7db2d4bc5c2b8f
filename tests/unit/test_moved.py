"""Modules that moved answer under their earlier names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import experiments
import prismatic
from prismatic.util.moved import _MovedFinder
from tests.helpers.programs import run_program

FINDERS = [finder for finder in sys.meta_path if isinstance(finder, _MovedFinder)]
MOVED = {earlier: later for finder in FINDERS for earlier, later in finder.names.items()}


def test_both_packages_have_a_table() -> None:
    assert {name.split(".")[0] for name in MOVED} == {experiments.__name__, prismatic.__name__}


@pytest.mark.parametrize("earlier", sorted(MOVED))
def test_an_earlier_name_is_the_same_module(earlier: str) -> None:
    module = importlib.import_module(MOVED[earlier])
    assert importlib.import_module(earlier) is module
    assert module.__spec__ is not None and module.__spec__.name == MOVED[earlier]


def test_a_name_in_the_table_hides_no_file(repo_root: Path) -> None:
    for earlier in MOVED:
        path = repo_root / earlier.replace(".", "/")
        assert not path.with_suffix(".py").exists() and not (path / "__init__.py").exists(), earlier


def test_an_earlier_command_runs(repo_root: Path) -> None:
    command = [sys.executable, "-m", "experiments.mini.demo", "--help"]
    run = run_program(command, cwd=repo_root)
    assert run.returncode == 0 and "--seeds" in run.stdout, run.stderr
