"""Every flag of every command: declared limits hold at their ends, and what earlier releases took is still taken."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import sys
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prismatic.util.cli import parse
from prismatic.util.errors import UsageError
from prismatic.util.flags import (
    check,
    choices_of,
    choose_numbers,
    declared,
    describe_bounds,
    limited,
    names,
    numbers,
    split_names,
    split_numbers,
    split_paths,
    within,
)

ROOT = Path(__file__).resolve().parents[2]
# {command: {flag: default as text, None for none}}, or [flags] of a command with words beside them, at commit f37abbc.
RECORDED: dict[str, Any] = json.loads((ROOT / "tests" / "golden" / "flags.json").read_text())
# Numbers that any value will do for.
FREE = {"shuffle_buffer_size", "resume_step"}


@cache
def load(path: str) -> ModuleType:
    """A command's module; nothing of its main runs."""
    name = "command_" + re.sub(r"\W", "_", path)
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flags_class(path: str) -> str | None:
    """Name of the dataclass in `run(Class, main)`, if the file has such a line."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "run" and node.args:
            return node.args[0].id if isinstance(node.args[0], ast.Name) else None
    return None


def configurations() -> dict[str, type]:
    """The dataclass of every command that has one."""
    folders = ("vla-scripts", "experiments", "benchmarks", "patches")
    files = (str(file.relative_to(ROOT)) for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    found = {path: getattr(load(path), name) for path in files if (name := flags_class(path))}
    commands = load("vla-scripts/analyze.py").COMMANDS
    return found | {f"vla-scripts/analyze.py {name}": kind for name, kind in commands.items()}


CONFIGURATIONS = configurations()
FIELDS = [
    pytest.param(command, name, kind, field.metadata, id=f"{command} --{name}")
    for command, config in CONFIGURATIONS.items()
    for name, kind, field in declared(config)
]


def given(command: str, **flags: Any) -> list[str]:
    """A command line with what the command cannot do without."""
    base = {
        name: "x" if choices_of(kind) == () and not field.metadata.get("choices") else field.metadata["choices"][0]
        for name, kind, field in declared(CONFIGURATIONS[command])
        if "needed" in field.metadata or field.default is field.default_factory
    }
    base |= {"count": 1} if command == "vla-scripts/select_layers.py" else {}
    return [word for name, value in (base | flags).items() for word in (f"--{name}", str(value))]


def refusal(command: str, **flags: Any) -> str:
    with pytest.raises(UsageError) as refused:
        parse(CONFIGURATIONS[command], given(command, **flags))
    return str(refused.value)


def ends(kind: Any, limits: Any) -> list[tuple[float, float]]:
    """(last accepted, first refused) of each declared end."""
    whole = limits.get("list") is int or int in (kind, *getattr(kind, "__args__", ()))
    down = (lambda value: value - 1) if whole else (lambda value: math.nextafter(value, -math.inf))
    up = (lambda value: value + 1) if whole else (lambda value: math.nextafter(value, math.inf))
    found = []
    for name, step, inside in (("least", down, True), ("most", up, True), ("above", up, False), ("below", down, False)):
        if name in limits:
            end = limits[name] if whole else float(limits[name])
            found.append((end, step(end)) if inside else (step(end), end))
    return found


@pytest.mark.parametrize(("command", "name", "kind", "limits"), FIELDS)
def test_every_flag_takes_its_ends_and_refuses_what_lies_beyond(
    command: str, name: str, kind: Any, limits: Any
) -> None:
    flag = f"--{name}"
    for accepted, refused in ends(kind, limits):
        assert getattr(parse(CONFIGURATIONS[command], given(command, **{name: accepted})), name) in (
            accepted,
            str(accepted),
        )
        message = refusal(command, **{name: refused})
        assert message == f"{flag}: {refused} found; accepted: {describe_bounds(limits)}"
    for choice in (choices := choices_of(kind) or limits.get("choices", ())):
        parse(CONFIGURATIONS[command], given(command, **{name: choice}))
    if choices and isinstance(choices[0], str):
        assert f"(did you mean {choices[0]!r}?)" in refusal(command, **{name: f"{choices[0]}x"})
    elif choices:
        assert refusal(command, **{name: max(choices) + 1}).startswith(f"{flag}: ")
    if "needed" in limits:
        assert refusal(command, **{name: ""}) == f"{flag}: not given; accepted: {limits['needed']}"
    if kind in (int, float, bool):
        assert refusal(command, **{name: "x"}).startswith(f"{flag}: 'x' found; accepted: ")
    if kind in (int, float) and name not in FREE:
        assert ends(kind, limits), "a number without limits"


@pytest.mark.parametrize("command", RECORDED)
def test_every_command_takes_the_flags_and_defaults_that_it_took(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(RECORDED[command], dict):
        defaults = {name: field.default for name, _, field in declared(CONFIGURATIONS[command])}
        now = {name: str(value).replace(str(ROOT), ".") for name, value in defaults.items() if value is not MISSING}
        assert {name: now.get(name, "None") for name in RECORDED[command]} == {
            name: str(value) for name, value in RECORDED[command].items()
        }
        return
    path, *words = command.split()
    monkeypatch.setattr(sys, "argv", [path, *words, "--help"])
    with pytest.raises(SystemExit):
        load(path).main()
    assert set(RECORDED[command]) <= {flag[2:] for flag in re.findall(r"--\w+", capsys.readouterr().out)}


def test_every_command_is_recorded() -> None:
    assert set(CONFIGURATIONS) <= set(RECORDED)


@pytest.mark.parametrize("text", ["7,9", "[7,9]", "[7, 9]", "(7,9)", " 7 , 9 ", "7,9,7", [7, 9], "7-7,9"])
def test_one_list_of_numbers_reads_every_way_of_writing_it(text: Any) -> None:
    assert split_numbers("--tasks", text) == (7, 9)


def test_ranges_and_everything() -> None:
    assert split_numbers("--tasks", "0-3,7,-1") == (0, 1, 2, 3, 7, -1)
    assert choose_numbers("--tasks", "5,1-3", 10) == (5, 1, 2, 3)
    assert [choose_numbers("--tasks", text, 3) for text in ("", "all", "[]", "none")] == [(0, 1, 2)] * 4


@pytest.mark.parametrize("text", ["1;2", "a", "1.5", "3-1", "0-9999999999", "--1"])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--tasks: .* found; accepted: whole numbers, as in 7,9 or 0-3,7"):
        split_numbers("--tasks", text)


def test_a_number_that_there_is_not_is_refused() -> None:
    with pytest.raises(UsageError, match="--tasks: 10 found; accepted: 0 to 9"):
        choose_numbers("--tasks", "8-10", 10)


def test_names_and_paths_are_split_at_commas(tmp_path: Path) -> None:
    assert split_names("a, b") == split_names("[a,b]") == split_names("['a', 'b']") == split_names(["a", "b"])
    run = tmp_path / "base+spatial,object+b8--5_chkpt"
    run.mkdir()
    assert split_paths(f"x,{run}, y") == ("x", str(run), "y")


@dataclass
class Optimizer:
    rate: float = limited(0.1, above=0)


@dataclass
class Base:
    steps: int = limited(1, least=1)
    trackers: str = names("a", choices=("a", "b"))


@dataclass
class Config(Base):
    optimizer: Optimizer = field(default_factory=Optimizer)
    seeds: str = numbers("0", least=0, some=True)


def test_nested_and_inherited_flags_are_checked() -> None:
    check(Config())
    for config, message in (
        (Config(optimizer=Optimizer(0.0)), "--optimizer.rate: 0.0 found; accepted: above 0"),
        (Config(optimizer=Optimizer(math.nan)), "--optimizer.rate: nan found; accepted: above 0"),
        (Config(steps=0), "--steps: 0 found; accepted: 1 or more"),
        (Config(trackers="a,c"), "--trackers: unknown value 'c'; accepted: a, b"),
        (Config(seeds="0,-1"), "--seeds: -1 found; accepted: 0 or more"),
        (Config(seeds=""), "--seeds: '' found; accepted: one or more, as a comma list"),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
            check(config)


def test_words_for_ranges() -> None:
    ranges = (
        {"least": 0, "below": 1},
        {"above": 0, "most": 1},
        {"least": 16, "most": 64},
        {"least": 0, "below": math.inf},
    )
    said = ["0 or more, below 1", "above 0, at most 1", "16 to 64", "a finite number, 0 or more"]
    assert [describe_bounds(limits) for limits in ranges] == said
    assert not within(math.inf, ranges[-1])
