from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from prismatic.checkpoint.folder import check_policy_flags, open_checkpoint, resolve_unnorm_key
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
    (folder / "model.safetensors").write_bytes(_weights())
    return folder


def _weights(value: int = 0) -> bytes:
    header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes([value] * 4)


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
    (folder / "lora_adapter" / "adapter_model.safetensors").write_bytes(_weights())
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
    with pytest.raises(UsageError, match=r"--pretrained_checkpoint: 'nobody/nothing' is no folder here"):
        open_checkpoint("nobody/nothing")


SHARDS = {"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "neither model weights"),
        ("model.safetensors", _weights()[:-1], r"model.safetensors: damaged or cut short"),
        ("model.safetensors.index.json", json.dumps(SHARDS).encode(), "missing: model-00002-of-00002.safetensors"),
        ("dataset_statistics.json", b"{", "dataset_statistics.json: not valid JSON"),
        (
            "dataset_statistics.json",
            b'{"goal": {"action": [0]}}',
            "dataset_statistics.json: statistics of a data set are",
        ),
    ],
)
def test_a_missing_or_damaged_file_is_refused(model: Path, file: str, content: bytes | None, message: str) -> None:
    (model / file).unlink(missing_ok=True)
    if content is not None:
        (model / file).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        open_checkpoint(str(model))


@pytest.mark.parametrize("action", [{"mean": [0.0]}, {"q01": [0.0], "q99": [1.0, 2.0]}, {"q01": 0, "q99": "1"}])
def test_statistics_without_the_bounds_in_use_are_refused(action: dict[str, object], model: Path) -> None:
    (model / "dataset_statistics.json").write_text(json.dumps({"goal": {"action": action}}))
    platform = ALOHA.to_json() | {"normalization": "bounds_q99"}
    (model / "config.json").write_text(json.dumps({"model_type": "openvla", "platform": platform}))
    flags = SimpleNamespace(use_l1_regression=False, use_diffusion=False, use_proprio=False, use_film=False)
    with pytest.raises(UsageError, match=f"{model}: statistics of action: .*(q01|shapes)"):
        check_policy_flags(flags, open_checkpoint(str(model)), "goal")  # type: ignore[arg-type]


def test_the_fingerprint_follows_contents_not_places(model: Path, tmp_path: Path) -> None:
    first = open_checkpoint(str(model)).fingerprint()
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    assert open_checkpoint(str(copy)).fingerprint() == first
    for change in (
        lambda: (copy / "model.safetensors").write_bytes(_weights(1)),
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
    with pytest.raises(UsageError, match=r'run_config.json: .*my_arm.*accepted: .*"platform_numbers": '):
        recorded_platform(tmp_path)
    arm = Platform("my_arm", 4, 8, 8, NormalizationType.BOUNDS_Q99)
    record.write_text(json.dumps({"platform": "my_arm", "platform_numbers": arm.to_json()}))
    assert recorded_platform(tmp_path) == arm
    record.write_text(json.dumps({"platform_numbers": {**arm.to_json(), "chunk": 0}}))
    with pytest.raises(UsageError, match=r"run_config.json: platform 'my_arm': chunk is 0"):
        recorded_platform(tmp_path)
