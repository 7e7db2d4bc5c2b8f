"""Which teacher a folder holds is read from its config.json; what all teachers have in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rocket_align import flags
from rocket_align.alignment import MultiLayerAlignment
from rocket_align.config import AlignConfig
from rocket_align.teacher import registry
from rocket_align.teacher.registry import describe_teacher, detect_kind, load_teacher, teacher_hash
from tests.helpers.teacher_models import DEPTH, VIT_TEACHERS, WIDTH, save_teacher

TEACHERS = ("vggt", *VIT_TEACHERS)


@pytest.fixture(scope="module", params=TEACHERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(request.param, tmp_path_factory.mktemp("teacher"))


def views() -> torch.Tensor:
    return torch.rand(2, 3, 3, 84, 84, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layers", ["2,0,1", "1,1,1", [-1, 0, -1]])
def test_layers_come_in_the_order_asked_for_and_repeat(folder: Path, layers: str | list[int]) -> None:
    every = load_teacher(folder, tuple(range(describe_teacher(folder).depth)))(views()).layers
    teacher = load_teacher(folder, layers)
    for feature, layer in zip(teacher(views()).layers, teacher.layers, strict=True):
        torch.testing.assert_close(feature, every[layer])


def test_frozen_clamped_and_in_the_precision_asked_for(folder: Path) -> None:
    teacher = load_teacher(folder, [1])
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(views().requires_grad_()).layers[0].requires_grad
    beyond = views() * 3 - 1
    assert torch.equal(teacher(beyond).layers[0], teacher(beyond.clamp(0, 1)).layers[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(views()).layers[0].dtype == torch.float32
    half = load_teacher(folder, [1], dtype=torch.bfloat16)(views()).layers[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), teacher(views()).layers[0], atol=0.1, rtol=0.1)


def test_layers_that_are_not_there_are_refused(folder: Path) -> None:
    depth = describe_teacher(folder).depth
    for layers in ([depth], [-depth - 1], ""):
        with pytest.raises(ValueError, match="layers"):
            load_teacher(folder, layers)


@pytest.mark.parametrize("model", TEACHERS)
def test_every_teacher_feeds_the_same_alignment(model: str, tmp_path: Path) -> None:
    folder = save_teacher(model, tmp_path / "teacher")
    kind = model.removesuffix("_with_registers")
    info = describe_teacher(folder)
    assert info == registry.TeacherInfo(kind, *((3, 32) if kind == "vggt" else (DEPTH, WIDTH)))
    assert detect_kind(folder, kind) == kind
    teacher = load_teacher(folder, "1,2")
    config = AlignConfig(student_layers=(1, 2), teacher_layers=(1, 2))
    alignment = MultiLayerAlignment(config, student_dim=8, teacher_dim=info.channels // 2)
    states = [torch.randn(2, 12, 8, requires_grad=True) for _ in range(4)]
    output = alignment(states, 1, 8, teacher(torch.rand(2, 2, 3, 40, 40)))
    output.loss.backward()
    assert torch.isfinite(output.loss) and states[1].grad is not None


def test_the_flag_names_the_teachers_there_are() -> None:
    assert tuple(flags.TEACHER_TYPES[1:]) == tuple(registry.TEACHER_TYPES)


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
