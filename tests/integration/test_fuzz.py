"""The fuzzing script: a few of its cases, and that it notices what it looks for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_cases import Case
from prismatic.util.files import read_json


def test_wrong_flags_and_damaged_files_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    assert fuzz.main(fuzz.FuzzConfig(configurations=14, inputs=12, seed=3, out=str(out))) == 0
    results = read_json(out)
    assert results["cases"] == 26 and not results["failures"] and len(results["kinds"]) > 5


@pytest.mark.parametrize(
    ("code", "said", "harmless", "faults"),
    [
        (2, ["error: --out: x"], False, 0),
        (2, ["warning: y", "error: --out: x"], False, 0),
        (0, [], True, 0),
        (0, [], False, 2),
        (1, ["error: --out: x"], False, 1),
        (2, ["error: --out: x", "more of it"], False, 1),
        (2, ["error: a", "error: b"], False, 1),
    ],
)
def test_an_outcome_is_judged_by_code_and_line(code: int, said: list[str], harmless: bool, faults: int) -> None:
    assert len(fuzz.judge(fuzz.Outcome(code, said), harmless=harmless)) == faults


def test_a_lost_input_and_a_traceback_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kept.txt").write_text("1")
    (tmp_path / "script.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'in' / 'kept.txt')!r}).unlink()\n1 / 0\n"
    )
    faults = fuzz.try_case(Case("any", [str(tmp_path / "script.py")]), tmp_path)
    assert faults[0].startswith("ZeroDivisionError") and faults[1] == "inputs changed: kept.txt"


def test_the_same_seed_makes_the_same_cases(tmp_path: Path) -> None:
    from benchmarks.fuzz_cases import wrong_configurations

    (tmp_path / "in").mkdir()
    first, second = (wrong_configurations(random.Random(5), tmp_path, 40) for _ in range(2))
    assert first == second and len({case.kind for case in first}) > 4
