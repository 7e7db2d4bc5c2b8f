"""From models to a file of layer pairs to a fine-tuning that aligns them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

import select_layers as script
from prismatic.training.metrics import read_log
from prismatic.util.cli import run as run_command
from prismatic.util.errors import UsageError


@pytest.fixture
def select(
    student_folder: Path, teacher_folder: Path, rlds_root: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """Run the command in this process; returns what it wrote."""

    def call(*flags: object) -> dict[str, Any]:
        AcceleratorState._reset_state(reset_partial_state=True)
        models = ["--checkpoint", student_folder, "--vggt_path", teacher_folder, "--data_root_dir", rlds_root]
        inputs = ["--num_images_in_input", 2, "--use_proprio", True, "--num_samples", 4, "--batch_size", 2]
        file = tmp_path / "layers.json"
        command = [*models, *inputs, "--out", file, *flags]
        with pytest.raises(SystemExit) as end:
            run_command(script.SelectConfig, script.main, list(map(str, command)))
        if end.value.code:
            raise UsageError(str(end.value.code))
        return json.loads(file.read_text())

    return call


@pytest.mark.parametrize(
    ("strategy", "student", "teacher"),
    [
        ("uniform", [2, 4, 6], [1, 3, 5]),
        ("e2m_last1", [2, 4, 5], [2, 4, 5]),
        ("deep", [4, 5, 6], [3, 4, 5]),
    ],
)
def test_by_position(select: Any, strategy: str, student: list[int], teacher: list[int]) -> None:
    found = select("--strategy", strategy, "--count", 3)
    assert (found["student_layers"], found["teacher_layers"]) == (student, teacher)
    assert found["convention"] == {"student": "states", "teacher": "python"}
    assert (found["student_depth"], found["teacher_depth"]) == (6, 6)
    assert found["made"]["strategy"] == strategy


@pytest.mark.parametrize("window", [1, 2])
def test_by_similarity_of_input_and_output(select: Any, window: int) -> None:
    strategies = ("sim_top", "sim_last")
    found = {name: select("--strategy", name, "--count", 2, "--window", window) for name in strategies}
    for strategy, highest in (("sim_top", True), ("sim_last", False)):
        made = found[strategy]["made"]
        assert (made["samples"], made["seed"], made["window"]) == (4, 0, window)
        for side, offset in (("student", 1), ("teacher", 0)):
            scores = made["scores"][side]
            assert len(scores) == 7 - window
            assert all(-1 <= score <= 1 for score in scores)
            order = sorted(range(len(scores)), key=scores.__getitem__, reverse=highest)
            blocks = [layer - offset for layer in found[strategy][f"{side}_layers"]]
            expected = sorted(order[:2]) if window == 1 else [order[0], order[0] + 1]
            assert blocks == expected
    assert found["sim_top"]["student_layers"] != found["sim_last"]["student_layers"]


def test_the_sides_may_have_strategies_of_their_own(select: Any) -> None:
    found = select("--strategy", "sim_top", "--teacher_strategy", "uniform", "--count", 2)
    assert found["teacher_layers"] == [2, 5]
    assert set(found["made"]["scores"]) == {"student"}


def test_by_cka_and_then_trained(
    select: Any, finetune: Callable[..., Path], teacher_folder: Path, tmp_path: Path
) -> None:
    found = select("--strategy", "cka", "--count", 3)
    scores = found["made"]["scores"]
    pairs = list(zip(found["student_layers"], found["teacher_layers"]))
    assert [scores["cka"][student][teacher] for student, teacher in pairs] == pytest.approx(scores["matched"])
    assert len(set(found["teacher_layers"])) == 3
    assert 0 not in found["student_layers"]
    file = tmp_path / "layers.json"
    # Matched layers need not ascend on the teacher's side.
    content = {**found, "student_layers": [1, 3, 4], "teacher_layers": [2, 5, 0]}
    file.write_text(json.dumps(content))
    runs = finetune(recipe="shared", vggt_path=str(teacher_folder), align_layers_file=str(file), max_steps=1)
    (row,) = read_log(runs / "run" / "metrics.jsonl")
    assert sum(key.startswith("align_loss_pair") for key in row) == 3
    config = json.loads((runs / "run--1_chkpt" / "run_config.json").read_text())
    assert config["align_layers_file"] == str(file)
    flags: dict[str, Any] = {"vggt_path": str(teacher_folder), "run_id_override": "other", "max_steps": 1}
    with pytest.raises(UsageError, match="--vla_layers_align given too"):
        finetune(**flags, align_layers_file=str(file), vla_layers_align="1,2,3")
    file.write_text(json.dumps({**content, "student_depth": 32}))
    with pytest.raises(UsageError, match=r"--align_layers_file: .*made for a student of 32"):
        finetune(**flags, align_layers_file=str(file))


def test_candidates_are_matched_among_themselves(select: Any) -> None:
    found = select("--strategy", "cka", "--candidates", "uniform", "--count", 3)
    assert found["student_layers"] == [2, 4, 6]
    assert sorted(found["teacher_layers"]) == [1, 3, 5]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--strategy", "uniform", "--count", "7"], "accepted: 1 to 6"),
        (["--strategy", "cka", "--count", "7"], "accepted: 1 to 6"),
        (["--strategy", "cka", "--count", "2", "--teacher_strategy", "deep"], "--teacher_strategy"),
        (["--strategy", "sim_top", "--count", "2", "--window", "9"], "--window"),
        (["--strategy", "uniform", "--count", "2", "--vggt_path", "./nowhere"], "nowhere"),
        (["--strategy", "uniform", "--count", "2", "--vggt_path", ""], "--vggt_path"),
        (["--strategy", "uniform", "--count", "2", "--checkpoint", "a,b"], "--checkpoint: 2 folders"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    select: Any, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="2"):
        select(*flags)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert said in errors[0]
