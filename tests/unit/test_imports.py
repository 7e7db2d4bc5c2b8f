"""Who may import whom, and no circles; imports in functions and for types alone count, too."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rocket_align", "prismatic", "experiments", "patches", "vla-scripts", "benchmarks")
# A package and the packages that its modules must not know.
UNKNOWN_TO = {
    "rocket_align": ("prismatic", "experiments", "patches", "benchmarks"),
    "prismatic": ("rocket_align", "experiments", "patches", "benchmarks"),
    "patches": ("experiments", "benchmarks"),
    "experiments": ("patches", "benchmarks"),
    "experiments.robot.libero.simulator": ("experiments.robot.libero.rollouts", "experiments.robot.libero.results"),
    "experiments.robot.libero.suites": ("experiments.robot.libero.rollouts", "experiments.robot.libero.results"),
    "experiments.robot.libero.rollouts": ("experiments.robot.libero.results",),
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, Path]:
    """Every module of the source by its full name."""
    return {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of this source that `module` names in an import statement, wherever it stands."""
    path = sources()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            members = {f"{origin}.{alias.name}" for alias in node.names}
            named |= {member if member in sources() else origin for member in members}
    return frozenset(name for name in named if name in sources() and name != module)


def circle_from(start: str) -> list[str]:
    """Modules along a way of imports from `start` back to it, or []."""
    ways = [[start]]
    visited: set[str] = set()
    while ways:
        way = ways.pop()
        for target in sorted(imports_of(way[-1])):
            if target == start:
                return [*way, start]
            if target not in visited:
                visited.add(target)
                ways.append([*way, target])
    return []


def test_the_parser_sees_imports_at_the_top_in_functions_and_for_types() -> None:
    seen = imports_of("experiments.robot.libero.run_libero_eval")
    assert "prismatic.util.cli" in seen
    assert "experiments.robot.libero.rollouts.workers" in seen
    assert "experiments.robot.policy" in seen


def test_no_module_leads_back_to_itself() -> None:
    circles = {frozenset(circle): " -> ".join(circle) for name in sources() if (circle := circle_from(name))}
    assert not circles, "\n".join(circles.values())


@pytest.mark.parametrize("package", UNKNOWN_TO)
def test_imports_point_one_way(package: str) -> None:
    inside = [name for name in sources() if f"{name}.".startswith(f"{package}.")]
    assert inside
    wrong = [
        f"{name} imports {target}"
        for name in inside
        for target in sorted(imports_of(name))
        if f"{target}.".startswith(tuple(f"{other}." for other in UNKNOWN_TO[package]))
    ]
    assert not wrong, "\n".join(wrong)
