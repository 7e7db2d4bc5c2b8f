"""Files of a feature store: built, resumed, read, and refused when anything does not belong together."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rocket_align.teacher.store import layout as store_layout
from rocket_align.teacher.store.codec import Basis, encode, pool_to_grid
from rocket_align.teacher.store.layout import StoreLayout
from rocket_align.teacher.store.reader import FeatureStore
from rocket_align.teacher.store.writer import DatasetBuild, begin_store, fit_basis
from rocket_align.teacher.vggt.config import VGGTConfig
from rocket_align.teacher.vggt.teacher import VGGTTeacher

LAYERS = (0, 1, 2)
FRAMES = np.array([3, 4, 5, 9, 10])
LAYOUT = StoreLayout(
    teacher_kind="vggt", teacher_hash="abc", teacher_depth=3, layers=LAYERS, channels=32, components=8, dtype="int8",
    views=("primary", "wrist"), view_pixels=42, teacher_image_hw=(42, 42), teacher_grid_hw=(3, 3), grid_hw=(3, 3),
)  # fmt: skip


@pytest.fixture(autouse=True)
def two_frames_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_layout, "SHARD_FRAMES", 2)


@pytest.fixture(scope="module")
def teacher() -> VGGTTeacher:
    torch.manual_seed(0)
    config = VGGTConfig(image_size=42, embed_dim=16, depth=3, num_heads=2, patch_embed="conv", layer_scale_init=1.0)
    return VGGTTeacher(config, LAYERS)


def images(frames: np.ndarray) -> Iterator[torch.Tensor]:
    """One batch a frame: any picture that only depends on its number."""
    for frame in frames:
        yield torch.rand(1, 2, 3, 42, 42, generator=torch.Generator().manual_seed(int(frame)))


def work(root: Path, teacher: VGGTTeacher, layout: StoreLayout = LAYOUT) -> tuple[DatasetBuild, Basis]:
    begin_store(root, layout)
    basis = fit_basis(root, layout, teacher, images(FRAMES))
    return DatasetBuild(root, "some_data", "print", layout, FRAMES), basis


def build(root: Path, teacher: VGGTTeacher, layout: StoreLayout = LAYOUT) -> Path:
    job, basis = work(root, teacher, layout)
    for shard in job.missing():
        assert sum(job.build_shard(shard, teacher, basis, images(job.frames_of(shard)))) == len(job.frames_of(shard))
    job.finish()
    return root


def open_store(
    root: Path, layers: tuple[int, ...] = LAYERS, fingerprint: str = "print", **changes: object
) -> FeatureStore:
    given = {"teacher_hash": None, "views": ("primary", "wrist"), "view_pixels": 42, **changes}
    return FeatureStore(root, {"some_data": fingerprint}, layers, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_what_is_read_is_what_was_seen(tmp_path: Path, teacher: VGGTTeacher, dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    store = open_store(build(tmp_path, teacher, layout), layers=(2, 0))
    crop = (0.1, 0.2, 0.8, 0.8)
    for frame in FRAMES.tolist():
        read = store("some_data", frame, [crop, crop])
        seen = pool_to_grid(teacher(next(images(np.array([frame])))), (3, 3))
        expected = encode(seen, fit_basis(tmp_path, layout, teacher, ()), getattr(torch, dtype))
        assert torch.equal(read["values_BKVPR"], expected.values_BKVPR[0, [2, 0]])
        assert torch.equal(read["crops_BV4"], torch.tensor([crop, crop]))
        assert ("scales_BKVP" in read) == (dtype == "int8")
    sizes = sum(path.stat().st_size for path in (tmp_path / "some_data").glob("*.safetensors"))
    assert layout.frame_bytes * len(FRAMES) <= sizes < layout.frame_bytes * len(FRAMES) + 3 * 700


def test_layers_are_read_in_any_order_and_repeated(tmp_path: Path, teacher: VGGTTeacher) -> None:
    root = build(tmp_path, teacher)
    crops = [(0.0, 0.0, 1.0, 1.0)] * 2
    plain = open_store(root)("some_data", 9, crops)
    store = open_store(root, layers=(2, 0, 2))
    mixed = store("some_data", 9, crops)
    for name in ("values_BKVPR", "scales_BKVP"):
        assert torch.equal(mixed[name], plain[name][[2, 0, 2]])
    targets = store.teacher(9, position_embedding=True)(**{name: value[None] for name, value in mixed.items()})
    assert torch.equal(targets.pooled_KBNC[0], targets.pooled_KBNC[2])
    assert not torch.equal(targets.pooled_KBNC[0], targets.pooled_KBNC[1])


def test_stored_features_make_targets_near_the_teacher_s(tmp_path: Path, teacher: VGGTTeacher) -> None:
    store = open_store(build(tmp_path, teacher, replace(LAYOUT, components=32)))
    stored = store.teacher(9, position_embedding=False)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2)
    records = [store("some_data", frame, whole.tolist()) for frame in FRAMES.tolist()]
    targets = stored(**{name: torch.stack([record[name] for record in records]) for name in records[0]})
    expected = torch.cat([pool_to_grid(teacher(one), (3, 3)) for one in images(FRAMES)]).transpose(0, 1).flatten(2, 3)
    assert torch.nn.functional.cosine_similarity(targets.pooled_KBNC, expected, dim=-1).min() > 0.999


def test_an_interrupted_build_goes_on(tmp_path: Path, teacher: VGGTTeacher) -> None:
    whole = build(tmp_path / "whole", teacher)
    job, basis = work(tmp_path / "resumed", teacher)
    assert job.missing() == [0, 1, 2]
    list(job.build_shard(1, teacher, basis, images(job.frames_of(1))))
    with pytest.raises(ZeroDivisionError):
        list(job.build_shard(2, teacher, basis, (one / (1 // 0) for one in images(job.frames_of(2)))))
    with pytest.raises(ValueError, match="holds no finished features of data set 'some_data'"):
        open_store(tmp_path / "resumed")
    with pytest.raises(ValueError, match="2 of 3 shards are missing"):
        job.finish()
    assert job.missing() == [0, 2]
    build(tmp_path / "resumed", teacher)
    for path in whole.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "resumed" / path.relative_to(whole)).read_bytes(), path


def test_another_selection_of_frames_is_built_anew(tmp_path: Path, teacher: VGGTTeacher) -> None:
    build(tmp_path, teacher)
    job, basis = work(tmp_path, teacher)
    fewer = replace(job, frames=FRAMES[:3])
    assert fewer.missing() == [0, 1]
    for shard in fewer.missing():
        list(fewer.build_shard(shard, teacher, basis, images(fewer.frames_of(shard))))
    fewer.finish()
    assert len(list((tmp_path / "some_data").glob("*.safetensors"))) == 2
    with pytest.raises(ValueError, match="no record of frame 9"):
        open_store(tmp_path)("some_data", 9, [])


def test_two_processes_share_the_shards(tmp_path: Path, teacher: VGGTTeacher) -> None:
    job, basis = work(tmp_path, teacher)
    shares = [job.missing()[rank::2] for rank in range(2)]
    assert shares == [[0, 2], [1]]
    for share in shares:
        for shard in share:
            list(job.build_shard(shard, teacher, basis, images(job.frames_of(shard))))
    job.finish()
    assert set(open_store(tmp_path).datasets) == {"some_data"}


def test_a_damaged_record_is_found_when_it_is_read(tmp_path: Path, teacher: VGGTTeacher) -> None:
    store = build(tmp_path, teacher)
    shard = sorted((store / "some_data").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1  # within the values of the shard's last frame
    shard.write_bytes(content)
    opened = open_store(store)
    crops = [(0.0, 0.0, 1.0, 1.0)] * 2
    opened("some_data", 3, crops)
    with pytest.raises(ValueError, match=rf"{shard.name}: record 1 is damaged"):
        opened("some_data", 9, crops)
    with pytest.raises(ValueError, match="is damaged"):
        opened.datasets["some_data"].verify()
    with pytest.raises(ValueError, match="no record of frame 6"):
        opened("some_data", 6, crops)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": (0, 5)}, "holds no teacher layers 5; accepted: 0, 1, 2"),
        ({"teacher_hash": "other"}, "made with another teacher"),
        ({"fingerprint": "other"}, "made of other data"),
        ({"views": ("primary",)}, "made of the views primary, wrist"),
        ({"view_pixels": 224}, "made of views of 42 pixels"),
    ],
)
def test_a_store_for_something_else_is_refused(
    tmp_path: Path, teacher: VGGTTeacher, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as refused:
        open_store(build(tmp_path, teacher), **change)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("harm", ["cut", "gone", "basis", "index", "format", "no store"])
def test_a_store_that_is_not_whole_is_refused(tmp_path: Path, teacher: VGGTTeacher, harm: str) -> None:
    root = build(tmp_path / "store", teacher)
    shard = next((root / "some_data").glob("*.safetensors"))
    if harm == "cut":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif harm == "gone":
        shard.unlink()
    elif harm == "basis":
        (root / "basis.safetensors").unlink()
        fit_basis(root, LAYOUT, teacher, images(FRAMES[:2]))
    elif harm == "index":
        (root / "some_data" / "index.json").write_text("{")
    elif harm == "format":
        (root / "index.json").write_text('{"format": 0}')
    else:
        root = tmp_path / "nowhere"
    with pytest.raises(ValueError, match="accepted: ") as refused:
        open_store(root)
    assert "\n" not in str(refused.value)


def test_another_teacher_or_layers_do_not_go_into_the_same_folder(tmp_path: Path, teacher: VGGTTeacher) -> None:
    build(tmp_path, teacher)
    begin_store(tmp_path, LAYOUT)
    for change, said in (
        ({"teacher_hash": "other"}, "teacher_hash abc, not other"),
        ({"layers": (0, 1)}, r"layers \(0, 1, 2\), not \(0, 1\)"),
        ({"dtype": "float16"}, "dtype int8, not float16"),
    ):
        with pytest.raises(ValueError, match=said):
            begin_store(tmp_path, replace(LAYOUT, **change))  # type: ignore[arg-type]


def test_a_build_that_stopped_before_its_first_record_is_in_nobodys_way(tmp_path: Path, teacher: VGGTTeacher) -> None:
    begin_store(tmp_path, replace(LAYOUT, layers=(0, 1)))
    assert open_store(build(tmp_path, teacher))("some_data", int(FRAMES[0]), [(0.0, 0.0, 1.0, 1.0)] * 2)


def test_an_opened_store_can_be_sent_to_a_worker(tmp_path: Path, teacher: VGGTTeacher) -> None:
    store = open_store(build(tmp_path, teacher))
    crops = [(0.0, 0.0, 1.0, 1.0)] * 2
    here = store("some_data", 4, crops)
    there = pickle.loads(pickle.dumps(store))("some_data", 4, crops)
    assert all(torch.equal(here[name], there[name]) for name in here)
