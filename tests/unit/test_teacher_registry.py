"""Which teacher a folder holds is read from its config.json."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rocket_align import flags
from rocket_align.alignment import MultiLayerAlignment
from rocket_align.config import AlignConfig
from rocket_align.teacher.registry import (
    TEACHER_TYPES,
    TeacherInfo,
    describe_teacher,
    detect_kind,
    load_teacher,
    teacher_hash,
)
from rocket_align.teacher.vggt.aggregator import VGGTAggregator
from rocket_align.teacher.vggt.config import VGGTConfig, save_folder
from tests.helpers.teacher_models import DEPTH, VIT_TEACHERS, WIDTH, save_vit

CONFIG = VGGTConfig(image_size=28, embed_dim=16, depth=3, num_heads=2, vit_depth=1, vit_num_heads=2)


def save_teacher(kind: str, folder: Path) -> Path:
    if kind != "vggt":
        return save_vit(kind, folder)
    torch.manual_seed(0)
    weights = {f"aggregator.{key}": value for key, value in VGGTAggregator(CONFIG).state_dict().items()}
    save_folder(folder, CONFIG, weights)
    return folder


@pytest.mark.parametrize("model", ["vggt", *VIT_TEACHERS])
def test_every_teacher_feeds_the_same_alignment(model: str, tmp_path: Path) -> None:
    folder = save_teacher(model, tmp_path / "teacher")
    kind = model.removesuffix("_with_registers")
    info = describe_teacher(folder)
    assert info == (TeacherInfo("vggt", 3, 32) if kind == "vggt" else TeacherInfo(kind, DEPTH, WIDTH))
    assert detect_kind(folder, kind) == kind
    teacher = load_teacher(folder, "1,2")
    config = AlignConfig(student_layers=(1, 2), teacher_layers=(1, 2))
    alignment = MultiLayerAlignment(config, student_dim=8, teacher_dim=info.channels // 2)
    states = [torch.randn(2, 12, 8, requires_grad=True) for _ in range(4)]
    output = alignment(states, 1, 8, teacher(torch.rand(2, 2, 3, 40, 40)))
    output.loss.backward()
    assert torch.isfinite(output.loss) and states[1].grad is not None


def test_the_flag_names_the_teachers_there_are() -> None:
    assert tuple(flags.TEACHER_TYPES[1:]) == tuple(TEACHER_TYPES)


def test_a_wrong_type_is_refused(tmp_path: Path) -> None:
    folder = save_teacher("dinov2", tmp_path / "teacher")
    with pytest.raises(ValueError, match="holds dinov2; accepted: auto or dinov2"):
        load_teacher(folder, "1", "vggt")
    with pytest.raises(ValueError, match="did you mean 'dinov2'"):
        detect_kind(folder, "dino2")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config.json: a llama model; accepted: dinov2, .* plain vision transformer"):
        detect_kind(folder)


@pytest.mark.parametrize("kind", ["depth_anything", "dinov2"])
def test_a_file_that_says_nothing_is_not_called_vggts(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "published.pth"
    torch.save({"pretrained.cls_token": torch.zeros(1, 1, 8)}, file)
    with pytest.raises(ValueError, match=rf"published.pth: no config.json is there; accepted for {kind}: a folder"):
        load_teacher(file, "0", kind)
    for guess in ("auto", "vggt"):
        with pytest.raises(ValueError, match=r"none of VGGT's tensors .*but pretrained.cls_token; accepted: "):
            load_teacher(file, "0", guess)
    (tmp_path / "config.json").write_text('{"architecture": "something"}')
    with pytest.raises(ValueError, match="names no model_type"):
        load_teacher(file, "0", kind)
    with pytest.raises(ValueError, match=r"absent: no such file or folder"):
        load_teacher(tmp_path / "absent", "0", kind)


def test_the_hash_covers_weights_and_preprocessing(tmp_path: Path) -> None:
    folder = save_teacher("dinov2", tmp_path / "teacher")
    first = teacher_hash(folder)
    assert first == teacher_hash(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    assert teacher_hash(folder) != first
    second = teacher_hash(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert teacher_hash(folder) != second
