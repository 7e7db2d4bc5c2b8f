"""CKA, matching, layer selection and layer importance against the recorded output of the released scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rocket_align.analysis.cka import linear_cka
from rocket_align.analysis.importance import layer_importance, residual_stream
from rocket_align.analysis.matching import match_layers
from rocket_align.analysis.selection import select_layers
from rocket_align.layers import layers_by_position, student_states


@pytest.fixture(scope="module")
def scripts(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "layer_selection_scripts.json").read_text())


@pytest.mark.parametrize("case", ["c0", "c1", "c2"])
def test_biased_cka(golden_dir: Path, case: str) -> None:
    recorded = load_file(golden_dir / "cka.safetensors")
    value = linear_cka(recorded[f"{case}.x"], recorded[f"{case}.y"])
    for name in ("cka_biased", "compute_linear_cka"):
        assert value.item() == pytest.approx(recorded[f"{case}.{name}"].item(), rel=1e-4)


@pytest.mark.parametrize("strategy", ["balanced", "uniform"])
def test_balanced_selection(scripts: dict[str, Any], strategy: str) -> None:
    for num_layers, count, expected in scripts["get_balanced_layers"]:
        assert list(select_layers(strategy, num_layers=num_layers, count=count)) == expected, (num_layers, count)


@pytest.mark.parametrize(("side", "depth", "name"), [("student", 32, "vla"), ("teacher", 24, "vggt")])
def test_numbering_of_selected_layers(scripts: dict[str, Any], side: str, depth: int, name: str) -> None:
    """The released script counts the student's layers from 1 and the teacher's from 0."""
    found = dict(re.findall(rf"^{name} +\| (\d+) +\| ([\d,]+)$", scripts["compute_layer_selection_stdout"], re.M))
    assert set(found) == {"8", "16", "24"}
    for count, expected in found.items():
        layers = layers_by_position("uniform", side, num_student_layers=32, num_teacher_layers=24, count=int(count))
        assert ",".join(map(str, layers)) == expected


def test_ranking_with_ties(scripts: dict[str, Any]) -> None:
    for table in scripts["rank_random_tables"]:
        scores = [float(line.split(":")[1]) for line in table["raw"].splitlines()]
        for count, expected in table["selections"].items():
            for strategy in ("top", "bottom"):
                chosen = select_layers(strategy, num_layers=len(scores), count=int(count), scores=scores)
                assert ",".join(map(str, student_states(chosen))) == expected[strategy]


def test_hungarian_matching(scripts: dict[str, Any]) -> None:
    for case in scripts["hungarian"]:
        table = case["input"]["raw_similarities"]
        students = sorted(table, key=int)
        teachers = sorted(table[students[0]], key=int)
        similarity = [[table[student][teacher] for teacher in teachers] for student in students]
        pairs = [(students[row], teachers[column]) for row, column in match_layers(similarity)]
        rows = case["optimal_alignment_txt"].split()[1:]
        assert pairs == [tuple(row.split(",")[:2]) for row in rows]


def test_layer_importance(golden_dir: Path) -> None:
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.models.lora import load_lora

    recorded = load_file(golden_dir / "layer_importance.safetensors")
    first = load_file(golden_dir / "forward_l1_discrete.safetensors")
    model = OpenVLAForActionPrediction.from_pretrained(golden_dir / "openvla_tiny", dtype=torch.float32).eval()
    model.vision_backbone.set_num_images_in_input(2)
    vla = load_lora(model, golden_dir / "lora_adapter").eval()
    names = ("input_ids", "attention_mask", "labels", "pixel_values")
    batches = [{name: first[name] for name in names}, {name: recorded[f"batch1.{name}"] for name in names}]
    streams = []
    with residual_stream(model.language_model.model.layers) as states, torch.no_grad():
        for batch in batches:
            vla(**batch)
            streams.append(list(states))
    importance = layer_importance(streams, windows=(1, 2, 3, 4))
    for window, values in importance.items():
        torch.testing.assert_close(values, recorded[f"window{window}"], atol=1e-4, rtol=1e-4)
