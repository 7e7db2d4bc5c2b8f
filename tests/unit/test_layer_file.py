"""Files of layer pairs: written, read, refused, and taken by the flags of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rocket_align.config import paper_pairs
from rocket_align.flags import AlignFlags
from rocket_align.layers import LayerFile, layers_by_position, layers_for_models, read_layer_file


def write(path: Path, **changes: Any) -> Path:
    content = json.loads(LayerFile((1, 3, 6), (2, 0, 5), 6, 6, {"strategy": "cka"}).to_json())
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_round_trip(tmp_path: Path) -> None:
    found = read_layer_file(write(tmp_path / "layers.json"))
    assert found == LayerFile((1, 3, 6), (2, 0, 5), 6, 6, {"strategy": "cka"})
    assert layers_for_models(tmp_path / "layers.json", 6, 6) == ((1, 3, 6), (2, 0, 5))


@pytest.mark.parametrize(("convention", "last"), [("states", 6), ("released", 5)])
def test_negative_layers_follow_the_convention_that_the_file_names(tmp_path: Path, convention: str, last: int) -> None:
    file = write(
        tmp_path / "layers.json",
        student_layers=[1, -1],
        teacher_layers=[0, -1],
        convention={"student": convention, "teacher": "python"},
    )
    assert layers_for_models(file, 6, 6) == ((1, last), (0, 5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "other"}, "no layer file"),
        ({"version": 2}, "no layer file"),
        ({"student_layers": [3, 1, 6]}, "ascending"),
        ({"student_layers": [1, 3, 7]}, "accepted: -7 to 6"),
        ({"teacher_layers": [0, 2]}, "3 student and 2 teacher"),
        ({"teacher_layers": [0, 2, 6]}, "found 6"),
        ({"teacher_layers": []}, "teacher_layers"),
        ({"teacher_layers": "0,2,5"}, "a list of layers"),
        ({"student_layers": [1, 3.5, 6]}, "3.5"),
        ({"student_depth": None}, "student_depth"),
        ({"convention": {"student": "blocks", "teacher": "python"}}, "convention of student"),
        ({"convention": None}, "convention of student"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    file = write(tmp_path / "layers.json", **changes)
    flags = AlignFlags(vggt_path=str(tmp_path), align_layers_file=str(file))
    with pytest.raises(ValueError, match="--align_layers_file") as error:
        flags.validate_alignment()
    assert said in str(error.value)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [None, "{", "[1]", "\xff"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "layers.json"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"layers\.json"):
        read_layer_file(file)


def test_teacher_layers_of_a_file_and_of_flags_keep_their_order_and_repeats(tmp_path: Path) -> None:
    file = str(write(tmp_path / "layers.json", student_layers=[1, 2, 3], teacher_layers=[-1, 2, -1]))
    layers = {"vla_layers_align": "1,2,3", "vggt_layers_align": "[5, 2, -1]"}
    for given in ({"align_layers_file": file}, layers):
        flags = AlignFlags(vggt_path=str(tmp_path), **given)
        flags.validate_alignment()
        assert flags.align_config(6, 6).teacher_layers == (5, 2, 5)


@pytest.mark.parametrize(("layer", "state"), [("-1", 5), ("-2", 5), ("-3", 4)])
def test_a_single_negative_student_layer_of_the_flags_is_the_release_s(tmp_path: Path, layer: str, state: int) -> None:
    flags = AlignFlags(vggt_path=str(tmp_path), vla_layers_align=layer, vggt_layers_align="-1")
    assert flags.align_config(6, 6).student_layers == (state,)


def test_training_takes_the_file_and_nothing_beside_it(tmp_path: Path) -> None:
    file = str(write(tmp_path / "layers.json"))
    flags = AlignFlags(vggt_path=str(tmp_path), align_layers_file=file)
    flags.validate_alignment()
    config = flags.align_config(6, 6)
    assert (config.student_layers, config.teacher_layers) == ((1, 3, 6), (2, 0, 5))
    assert config.projector == "matryoshka"
    for given in ({"vla_layers_align": "1,2,3"}, {"vggt_layers_align": "1,2,3"}):
        flags = AlignFlags(vggt_path=str(tmp_path), align_layers_file=file, **given)
        with pytest.raises(ValueError, match=f"--{next(iter(given))} given too"):
            flags.validate_alignment()


def test_a_file_for_models_of_other_depths_is_refused(tmp_path: Path) -> None:
    flags = AlignFlags(vggt_path=str(tmp_path), align_layers_file=str(write(tmp_path / "layers.json")))
    with pytest.raises(ValueError, match=r"made for a student of 6 and a teacher of 6 blocks; accepted: 32 and 24"):
        flags.align_config(32, 24)


def by_position(strategy: str, side: str, count: int, student: int = 32, teacher: int = 24) -> tuple[int, ...]:
    return layers_by_position(strategy, side, num_student_layers=student, num_teacher_layers=teacher, count=count)


def test_selected_student_blocks_are_aligned_at_their_outputs() -> None:
    assert by_position("shallow", "student", 3) == (1, 2, 3)
    assert by_position("shallow", "teacher", 3) == (0, 1, 2)
    assert by_position("deep", "student", 2) == (31, 32)
    assert by_position("deep", "teacher", 2) == (22, 23)
    assert by_position("middle", "student", 4) == (15, 16, 17, 18)


def test_early_to_middle_is_the_papers_recipe() -> None:
    assert (by_position("e2m_last1", "student", 10), by_position("e2m_last1", "teacher", 10)) == paper_pairs(32, 24)
    assert by_position("e2m_last1", "student", 3, 6, 6) == (2, 4, 5)
    with pytest.raises(ValueError, match="count"):
        by_position("uniform", "student", 25)
    with pytest.raises(ValueError, match="count"):
        by_position("e2m_last1", "student", 6, 6, 6)
