"""A file with all names and shapes of VGGT-1B's weights, track head included, loads at its real size.

The file is sparse and mapped, so its 5 GB take neither disk nor memory.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rocket_align.teacher.vggt.geometry import VGGTGeometry
from rocket_align.teacher.vggt.teacher import VGGTTeacher

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def shapes(golden_dir: Path) -> Shapes:
    real = json.loads((golden_dir / "vggt1b_real_keys.json").read_text())
    found = {name: tuple(shape) for name, (shape, _) in real["keys"].items()}
    assert len(found) == 1797
    assert sum(map(math.prod, found.values())) == real["total_params"] == 1_256_537_516
    return found


def write_sparse(file: Path, shapes: Shapes) -> Path:
    """A safetensors file of float32 zeros that the file system does not store."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        stream.truncate(8 + len(encoded) + end)
    return file


def test_the_teacher(shapes: Shapes, tmp_path: Path) -> None:
    file = write_sparse(tmp_path / "model.safetensors", shapes)
    teacher = VGGTTeacher.from_pretrained(tmp_path, layers="-1")
    loaded = {name: tuple(value.shape) for name, value in teacher.state_dict().items()}
    assert loaded == {name: shape for name, shape in shapes.items() if name.startswith("aggregator.")}
    assert file.stat().st_blocks * 512 < 10**6, "the file system stores zeros, the test would take 5 GB"


def test_the_teacher_cut_after_its_last_layer(shapes: Shapes, tmp_path: Path) -> None:
    teacher = VGGTTeacher.from_pretrained(write_sparse(tmp_path / "model.safetensors", shapes), layers="2,4")
    names = {name for name in shapes if name.startswith("aggregator.")}
    left_out = {
        name for name in names if "_blocks." in name and int(name.split(".")[2]) > 4 and "patch_embed" not in name
    }
    assert set(teacher.state_dict()) == names - left_out
    assert len(left_out) == 2 * 19 * 18


def test_all_heads_but_the_track_head(shapes: Shapes, tmp_path: Path) -> None:
    model = VGGTGeometry.from_pretrained(write_sparse(tmp_path / "model.safetensors", shapes))
    loaded = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert loaded == {name: shape for name, shape in shapes.items() if not name.startswith("track_head.")}
