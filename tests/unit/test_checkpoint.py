from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from prismatic.checkpoint.folder import open_checkpoint, resolve_unnorm_key
from prismatic.checkpoint.layout import recorded_platform
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import ALOHA, NormalizationType, Platform

STATISTICS = {"libero_spatial_no_noops": {"action": {}}, "libero_goal": {"action": {}}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A merged checkpoint with an empty safetensors file."""
    folder = tmp_path / "run--500_chkpt"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    (folder / "preprocessor_config.json").write_text("{}")
    _write_weights(folder / "model.safetensors")
    return folder


def _write_weights(file: Path, value: int = 0) -> None:
    header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes([value] * 4))


def test_a_merged_checkpoint(model: Path) -> None:
    (model / "action_head--500_checkpoint.pt").write_bytes(b"x")
    found = open_checkpoint(str(model))
    assert (found.model_path, found.adapter_path, found.statistics) == (model, None, STATISTICS)
    assert found.component("action_head", "--use_l1_regression").name == "action_head--500_checkpoint.pt"
    with pytest.raises(UsageError, match=r"--use_proprio: .*no proprio_projector--.*components present: action_head"):
        found.component("proprio_projector", "--use_proprio")


def test_an_adapter_finds_its_base_model(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapted"
    (folder / "lora_adapter").mkdir(parents=True)
    _write_weights(folder / "lora_adapter" / "adapter_model.safetensors")
    config = folder / "lora_adapter" / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": model.name}))
    (folder / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    found = open_checkpoint(str(folder))
    assert (found.model_path, found.adapter_path) == (model, folder / "lora_adapter")
    assert found.processor_path == model
    config.write_text(json.dumps({"base_model_name_or_path": "/nowhere/base"}))
    with pytest.raises(UsageError, match=r"--base_checkpoint: .*'/nowhere/base' was not found"):
        open_checkpoint(str(folder))
    assert open_checkpoint(str(folder), str(model)).model_path == model


def test_norm_stats_of_the_configuration_serve_when_there_is_no_file(model: Path) -> None:
    (model / "dataset_statistics.json").unlink()
    with pytest.raises(UsageError, match=r"no dataset_statistics.json and no norm_stats"):
        open_checkpoint(str(model))
    (model / "config.json").write_text(json.dumps({"norm_stats": {"bridge": {}}}))
    assert open_checkpoint(str(model)).statistics == {"bridge": {}}


@pytest.mark.parametrize("name", ["", "no/such/folder", "/tmp/definitely/not/here"])
def test_a_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"--pretrained_checkpoint: no such folder"):
        open_checkpoint(name)


def test_an_unreachable_hub_id_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"--pretrained_checkpoint: 'nobody/nothing' is no folder here") as caught:
        open_checkpoint("nobody/nothing")
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="neither model weights"):
        open_checkpoint(str(model))


def test_cut_short_weights_are_refused(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"model.safetensors: damaged or cut short"):
        open_checkpoint(str(model))


def test_a_missing_shard_is_refused(model: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"missing: model-00002-of-00002.safetensors"):
        open_checkpoint(str(model))


def test_broken_json_is_refused_with_the_file(model: Path) -> None:
    (model / "dataset_statistics.json").write_text("{")
    with pytest.raises(UsageError, match=r"dataset_statistics.json: not valid JSON"):
        open_checkpoint(str(model))


def test_of_several_steps_the_folders_own_is_taken(model: Path) -> None:
    for step in ("100", "500"):
        (model / f"action_head--{step}_checkpoint.pt").write_bytes(b"x")
    assert open_checkpoint(str(model)).components["action_head"].name == "action_head--500_checkpoint.pt"
    other = model.with_name("other")
    model.rename(other)
    with pytest.raises(UsageError, match="several files for action_head"):
        open_checkpoint(str(other))
    (other / "action_head--latest_checkpoint.pt").write_bytes(b"x")
    assert open_checkpoint(str(other)).components["action_head"].name == "action_head--latest_checkpoint.pt"


def test_the_fingerprint_follows_contents_not_places(model: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(model)).fingerprint()
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert open_checkpoint(str(copy)).fingerprint() == first
    for change in (
        lambda: _write_weights(copy / "model.safetensors", 1),
        lambda: (copy / "dataset_statistics.json").write_text(json.dumps({"libero_goal": {}})),
        lambda: (copy / "action_head--500_checkpoint.pt").write_bytes(b"x"),
    ):
        before = open_checkpoint(str(copy)).fingerprint()
        change()
        assert open_checkpoint(str(copy)).fingerprint() != before


def test_unnorm_keys() -> None:
    assert resolve_unnorm_key(STATISTICS, "", "libero_goal") == "libero_goal"
    assert resolve_unnorm_key(STATISTICS, "", "libero_spatial") == "libero_spatial_no_noops"
    assert resolve_unnorm_key(STATISTICS, "libero_goal", "libero_spatial") == "libero_goal"
    with pytest.raises(UsageError, match=r"--unnorm_key: .*'bridge'.*accepted: libero_goal, libero_spatial_no_noops"):
        resolve_unnorm_key(STATISTICS, "bridge", "libero_goal")
    with pytest.raises(UsageError, match=r"--unnorm_key \(not given.*'libero_10'"):
        resolve_unnorm_key(STATISTICS, "", "libero_10")


def test_a_record_gives_the_platforms_numbers_or_says_what_to_add(tmp_path: Path) -> None:
    """A name alone, as earlier versions recorded it, means something only where it is known."""
    record = tmp_path / "run_config.json"
    assert recorded_platform(tmp_path) is None
    record.write_text(json.dumps({"platform": "aloha"}))
    assert recorded_platform(tmp_path) == ALOHA
    record.write_text(json.dumps({"platform": "my_arm"}))
    with pytest.raises(UsageError, match=r'run_config.json: .*my_arm.*accepted: .*"platform_numbers": ') as refusal:
        recorded_platform(tmp_path)
    assert "\n" not in str(refusal.value)
    arm = Platform("my_arm", 4, 8, 8, NormalizationType.BOUNDS_Q99)
    record.write_text(json.dumps({"platform": "my_arm", "platform_numbers": arm.to_json()}))
    assert recorded_platform(tmp_path) == arm
    record.write_text(json.dumps({"platform_numbers": {**arm.to_json(), "chunk": 0}}))
    with pytest.raises(UsageError, match=r"run_config.json: platform 'my_arm': chunk is 0"):
        recorded_platform(tmp_path)
