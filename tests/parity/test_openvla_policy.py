"""The evaluation side against upstream: proprio, images, and actions of a checkpoint loaded from its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch_file
from safetensors.torch import save_file

from experiments.robot import openvla_utils
from experiments.robot.openvla_utils import OpenVLAPolicy, get_action_head, get_vla, prepare_images_for_vla
from experiments.robot.policy import PolicyFlags, Query
from prismatic.checkpoint.folder import Checkpoint, open_checkpoint
from prismatic.util.errors import UsageError
from tests.helpers.student_helpers import beneath, load_heads

INPUTS = ("input_ids", "attention_mask", "pixel_values")


def settings(folder: Path, **changes: Any) -> PolicyFlags:
    steps = {"num_diffusion_steps_train": 10, "num_diffusion_steps_inference": 10}
    return PolicyFlags(str(folder), unnorm_key="libero_tiny", device="cpu", **{**steps, **changes})


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    rng = np.random.default_rng(3)
    words = ("put the bowl on the stove", "open the middle drawer of the cabinet and put the mug into it", "stop")
    images = rng.integers(0, 256, (len(words), 2, 96, 96, 3), dtype=np.uint8)
    return [
        Query(image, wrist, rng.normal(size=8), text, seed=number)
        for number, ((image, wrist), text) in enumerate(zip(images, words))
    ]


def test_proprio(golden_dir: Path) -> None:
    tensors = load_file(golden_dir / "normalization.safetensors")
    statistics = json.loads((golden_dir / "normalization.json").read_text())["metadata"]["proprio"]
    normalized = openvla_utils.normalize_proprio(tensors["in.proprio"], statistics)
    assert normalized.dtype == np.float64
    np.testing.assert_allclose(normalized, tensors["eval.normalize_proprio"], atol=1e-6)
    constant = np.asarray(statistics["min"]) == np.asarray(statistics["max"])
    assert constant.any() and (normalized[:, constant] != 0).all()


@pytest.mark.parametrize("head", ["l1", "diffusion"])
def test_actions_of_a_loaded_checkpoint(head: str, golden_dir: Path, openvla_checkpoint: Path) -> None:
    cfg = settings(openvla_checkpoint, use_l1_regression=head == "l1", use_diffusion=head == "diffusion")
    vla = get_vla(cfg)
    golden = load_torch_file(golden_dir / "predict_action.safetensors")
    parts = {"proprio_projector": openvla_utils.get_proprio_projector(cfg, vla.llm_dim, 8)}
    if head == "l1":
        parts["action_head"] = get_action_head(cfg, vla.llm_dim)
    else:
        parts["action_head"] = load_heads(golden_dir)["action_head_diffusion"].eval()
        parts["action_head"].noise_scheduler.set_timesteps(10)
        parts["noisy_action_projector"] = openvla_utils.get_noisy_action_projector(cfg, vla.llm_dim)
        parts["initial_noise"] = golden["diffusion.initial_noise"]
    prompt = json.loads((golden_dir / "predict_action.json").read_text())["prompt"]
    assert openvla_utils.get_processor(cfg).tokenizer(prompt)["input_ids"] == golden["input_ids"][0].tolist()
    inputs = (golden[name] for name in INPUTS)
    actions, _ = vla.predict_action(*inputs, "libero_tiny", proprio=golden["proprio"], **parts)
    # Ten steps of diffusion run freely: test_modeling_prismatic.py compares each at 2e-5, and says what rounding makes.
    np.testing.assert_allclose(actions[0], golden[f"{head}.actions"], rtol=0, atol=1e-4 if head == "l1" else 5e-3)


def test_an_adapter_acts_as_the_merged_model(golden_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(golden_dir / "lora_adapter", tmp_path / "lora_adapter")
    shutil.copytree(golden_dir / "openvla_tiny", tmp_path / "openvla_tiny")
    statistics = (golden_dir / "openvla_tiny" / "dataset_statistics.json").read_text()
    (tmp_path / "dataset_statistics.json").write_text(statistics)
    vla = get_vla(settings(tmp_path))
    state = vla.state_dict()
    assert not [key for key in state if "lora" in key]
    golden = load_torch_file(golden_dir / "lora_merged.safetensors")
    compared = [key for key in golden if key in state]
    assert len(compared) >= 5
    for key in compared:
        torch.testing.assert_close(state[key].float(), golden[key].float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", ["plain model", "model saved with the wrapper"])
def test_a_film_checkpoint(golden_dir: Path, openvla_checkpoint: Path, tmp_path: Path, layout: str) -> None:
    """The vision weights come from `vision_backbone--*`, whatever names the model's own file has."""
    folder = Path(shutil.copytree(openvla_checkpoint, tmp_path / "film"))
    golden = load_torch_file(golden_dir / "forward_film.safetensors")
    backbone = {f"module.{key}": value for key, value in beneath(golden, "weights.").items()}
    torch.save(backbone, folder / "vision_backbone--7_checkpoint.pt")
    if layout != "plain model":
        weights = load_torch_file(folder / "model.safetensors")
        kept = {key: value for key, value in weights.items() if not key.startswith("vision_backbone.")}
        wrapped = {f"vision_backbone.{key.removeprefix('module.')}": value for key, value in backbone.items()}
        save_file({**kept, **wrapped}, folder / "model.safetensors", metadata={"format": "pt"})
    cfg = settings(folder, use_film=True)
    vla = get_vla(cfg)
    inputs = load_torch_file(golden_dir / "predict_action.safetensors")
    heads = openvla_utils.get_proprio_projector(cfg, vla.llm_dim, 8), get_action_head(cfg, vla.llm_dim)
    parts = {"proprio": inputs["proprio"], "proprio_projector": heads[0], "action_head": heads[1], "use_film": True}
    actions, _ = vla.predict_action(*(inputs[name] for name in INPUTS), "libero_tiny", **parts)
    np.testing.assert_allclose(actions[0], golden["predict_action.actions"].numpy(), atol=1e-4)


def test_a_batch_answers_as_each_query_alone(openvla_checkpoint: Path, queries: list[Query]) -> None:
    policy = OpenVLAPolicy.from_checkpoint(str(openvla_checkpoint), settings(openvla_checkpoint), "libero_tiny")
    together = policy.act(queries)
    assert together.shape == (3, 8, 7) and together.dtype == np.float64
    for one, query in zip(together, queries):
        np.testing.assert_allclose(one, policy.act([query])[0], atol=1e-4)
    # Upstream's function on the same observation; its dictionary is left alone.
    query = queries[1]
    observation = {"full_image": query.image, "wrist_image": query.wrist_image, "state": query.state.copy()}
    cfg, model = settings(openvla_checkpoint), (policy.vla, policy.processor)
    chunk = openvla_utils.get_vla_action(cfg, *model, observation, query.instruction, **policy._parts)
    assert len(chunk) == 8
    np.testing.assert_allclose(np.stack(chunk), together[1], atol=1e-4)
    np.testing.assert_array_equal(observation["state"], query.state)


def test_diffusion_noise_belongs_to_the_query(openvla_checkpoint: Path, queries: list[Query]) -> None:
    policy = OpenVLAPolicy.from_checkpoint(str(openvla_checkpoint), settings(openvla_checkpoint), "libero_tiny")
    policy._cfg = settings(openvla_checkpoint, use_diffusion=True, use_l1_regression=False)
    noise = policy._noise(queries)
    assert noise.shape == (3, 8, 7)
    torch.testing.assert_close(noise[1:2], policy._noise(queries[1:2]), rtol=0, atol=0)
    assert not torch.equal(noise[0], noise[1])


def test_images_of_the_policys_size_are_only_cropped(golden_dir: Path) -> None:
    golden = load_file(golden_dir / "eval_image_path.safetensors")
    cfg = SimpleNamespace(center_crop=True)
    for name in ("sq224", "sq256"):
        (cropped,) = prepare_images_for_vla([golden[f"{name}.jpeg_lanczos224"]], cfg)
        difference = np.abs(cropped.astype(int) - golden[f"{name}.center_crop_of_224"].astype(int))
        assert difference.max() <= 1
    (whole,) = prepare_images_for_vla([golden["sq224.in"]], SimpleNamespace(center_crop=False))
    np.testing.assert_array_equal(whole, golden["sq224.in"])


def test_missing_weights_are_never_random_numbers(openvla_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(openvla_checkpoint, tmp_path / "partial")
    weights = load_torch_file(openvla_checkpoint / "model.safetensors")
    removed = next(key for key in weights if "layers.1.mlp.up_proj" in key)
    del weights[removed]
    save_file(weights, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=f"weights missing or of the wrong shape: .*{removed.split('.')[-2]}"):
        get_vla(settings(tmp_path / "partial"))


def test_a_head_of_another_model_is_refused(openvla_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(openvla_checkpoint, tmp_path / "mixed")
    shutil.copy(
        openvla_checkpoint / "proprio_projector--7_checkpoint.pt", tmp_path / "mixed" / "action_head--7_checkpoint.pt"
    )
    cfg = settings(tmp_path / "mixed")
    with pytest.raises(UsageError, match=r"action_head--7_checkpoint.pt: does not fit the model"):
        get_action_head(cfg, 64)


def test_model_and_heads_come_from_the_folder_that_was_given(
    openvla_checkpoint: Path, tmp_path: Path, queries: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Path(shutil.copytree(openvla_checkpoint, tmp_path / "given"))
    file = given / "action_head--7_checkpoint.pt"
    torch.save({key: value * 1.5 for key, value in torch.load(file).items()}, file)
    opened: list[str] = []

    def open_and_count(name: str, base_checkpoint: str | None = None) -> Checkpoint:
        opened.append(name)
        return open_checkpoint(name, base_checkpoint)

    monkeypatch.setattr(openvla_utils, "open_checkpoint", open_and_count)
    of_another = OpenVLAPolicy.from_checkpoint(str(given), settings(openvla_checkpoint), "libero_tiny")
    assert opened == [str(given)]
    expected = OpenVLAPolicy.from_checkpoint(str(given), settings(given), "libero_tiny").act(queries[:1])
    np.testing.assert_array_equal(of_another.act(queries[:1]), expected)
    other = OpenVLAPolicy.from_checkpoint(str(openvla_checkpoint), settings(given), "libero_tiny").act(queries[:1])
    assert np.abs(other - expected).max() > 1e-3


def test_statistics_of_the_folder_replace_those_of_the_configuration(openvla_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(openvla_checkpoint, tmp_path / "joint")
    statistics = json.loads((openvla_checkpoint / "dataset_statistics.json").read_text())
    (tmp_path / "joint" / "dataset_statistics.json").write_text(json.dumps({"mine": statistics["libero_tiny"]}))
    assert set(get_vla(settings(tmp_path / "joint")).norm_stats) == {"mine"}
    with pytest.raises(UsageError, match=r"--unnorm_key: .*accepted: mine"):
        OpenVLAPolicy.from_checkpoint(str(tmp_path / "joint"), settings(openvla_checkpoint), "libero_tiny")


def test_component_files_are_not_unpickled(openvla_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(openvla_checkpoint, tmp_path / "evil")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (marker.touch, ())

    torch.save({"weight": Evil()}, tmp_path / "evil" / "action_head--7_checkpoint.pt")
    with pytest.raises(UsageError, match=r"action_head--7_checkpoint\.pt"):
        get_action_head(settings(tmp_path / "evil"), 64)
    assert not marker.exists()
