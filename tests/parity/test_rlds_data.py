"""The data path against what the TensorFlow reference read, normalized and tokenized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.training.train_utils import get_current_action_mask, get_next_actions_mask
from prismatic.util.data_utils import PaddedCollatorForActionPrediction
from prismatic.vla.action_tokenizer import ActionTokenizer
from prismatic.vla.datasets import RLDSBatchTransform, RLDSDataset
from prismatic.vla.datasets.specs import libero_transform, split_libero_state
from prismatic.vla.datasets.statistics import normalize
from prismatic.vla.datasets.transitions import chunk_starts
from prismatic.vla.platforms import NormalizationType


@pytest.fixture(scope="module")
def processor(golden_dir: Path) -> PrismaticProcessor:
    return PrismaticProcessor.from_pretrained(golden_dir / "openvla_tiny")


def _transform(processor: PrismaticProcessor, use_wrist: bool, use_proprio: bool) -> RLDSBatchTransform:
    return RLDSBatchTransform(
        ActionTokenizer(processor.tokenizer),
        processor.tokenizer,
        image_transform=processor.image_processor.apply_transform,
        use_wrist_image=use_wrist,
        use_proprio=use_proprio,
    )


@pytest.fixture(scope="module")
def pipeline(golden_dir: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    description = json.loads((golden_dir / "rlds_pipeline.json").read_text())
    return load_file(golden_dir / "rlds_pipeline.safetensors"), description


@pytest.fixture(scope="module")
def dataset(golden_dir: Path, processor: PrismaticProcessor, tmp_path_factory: pytest.TempPathFactory) -> RLDSDataset:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        transform = _transform(processor, True, True)
        return RLDSDataset(golden_dir / "rlds", "libero_spatial_no_noops", transform, resize_resolution=(56, 56))


def test_statistics(dataset: RLDSDataset, pipeline: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
    expected, found = pipeline[1]["dataset_statistics"], dataset.dataset_statistics["libero_spatial_no_noops"]
    assert found["num_transitions"] == expected["num_transitions"]
    assert found["num_trajectories"] == expected["num_trajectories"]
    assert found["action"]["mask"] == expected["action"]["mask"]
    for group in ("action", "proprio"):
        assert found[group].keys() == expected[group].keys()
        for name in ("mean", "std", "min", "max", "q01", "q99"):
            np.testing.assert_allclose(found[group][name], expected[group][name], atol=1e-6, err_msg=f"{group} {name}")


def test_frames(dataset: RLDSDataset, pipeline: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
    tensors, description = pipeline
    frames = [dataset.frame(index) for index in range(len(dataset))]
    assert len(frames) == len(tensors["action"])
    assert [frame["task"]["language_instruction"] for frame in frames] == description["languages"]
    np.testing.assert_allclose(np.stack([frame["action"] for frame in frames]), tensors["action"], atol=2e-6)
    observations = [frame["observation"] for frame in frames]
    np.testing.assert_allclose(np.stack([o["proprio"] for o in observations]), tensors["proprio"], atol=2e-6)
    np.testing.assert_array_equal(np.stack([o["timestep"] for o in observations]), tensors["timestep"])
    for view in ("image_primary", "image_wrist"):
        images = np.stack([observation[view] for observation in observations[::2]])
        assert np.abs(images.astype(int) - tensors[view].astype(int)).max() <= 1, view


def test_samples_of_files(dataset: RLDSDataset, pipeline: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
    tensors = pipeline[0]
    collate = PaddedCollatorForActionPrediction(2048, 32000)
    batch = collate([dataset[index] for index in range(len(tensors["batch0_3.input_ids"]))])
    np.testing.assert_array_equal(batch["input_ids"].numpy(), tensors["batch0_3.input_ids"])
    np.testing.assert_array_equal(batch["labels"].numpy(), tensors["batch0_3.labels"])
    np.testing.assert_allclose(batch["proprio"].numpy(), tensors["batch0_3.proprio"], atol=2e-6)


def _frame(tensors: dict[str, np.ndarray], number: int, dataset: str | bytes, words: str | bytes) -> dict[str, Any]:
    observation = {key: tensors[f"in.{number}.{key}"] for key in ("image_primary", "image_wrist", "proprio")}
    frame = {"dataset_name": dataset, "action": tensors[f"in.{number}.action"], "observation": observation}
    return {**frame, "task": {"language_instruction": words}}


@pytest.mark.parametrize("name", ["data_batch_wrist_proprio", "data_batch_primary_only"])
def test_batch_transform_and_collator(golden_dir: Path, processor: PrismaticProcessor, name: str) -> None:
    tensors = load_file(golden_dir / f"{name}.safetensors")
    if name == "data_batch_primary_only":
        tensors = {**load_file(golden_dir / "data_batch_wrist_proprio.safetensors"), **tensors}
    description = json.loads((golden_dir / f"{name}.json").read_text())
    transform = _transform(processor, description["use_wrist_image"], description["use_proprio"])
    samples = []
    for number, language in enumerate(description["language"]):
        samples.append(transform(_frame(tensors, number, b"libero_tiny", language.encode())))
        np.testing.assert_array_equal(samples[-1]["input_ids"].numpy(), tensors[f"sample.{number}.input_ids"])
        np.testing.assert_array_equal(samples[-1]["labels"].numpy(), tensors[f"sample.{number}.labels"])
        assert processor.tokenizer.decode(samples[-1]["input_ids"]) == description["prompts"][number]
    batch = PaddedCollatorForActionPrediction(2048, 32000)(samples)
    expected = {key[len("batch.") :]: value for key, value in tensors.items() if key.startswith("batch.")}
    if name == "data_batch_primary_only":
        expected.pop("proprio", None)
    assert set(batch) - {"dataset_names"} == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(batch[key].numpy(), value, atol=1e-5, err_msg=key)
        assert batch[key].numpy().dtype == value.dtype
    labels = batch["labels"]
    for key, mask in (("current", get_current_action_mask), ("next", get_next_actions_mask)):
        np.testing.assert_array_equal(mask(labels).numpy(), tensors[f"mask.{key}.labels"])
        np.testing.assert_array_equal(mask(labels[:, 1:]).numpy(), tensors[f"mask.{key}.labels_shift1"])


def test_collator_keeps_the_batch_axis_of_one_sample(golden_dir: Path, processor: PrismaticProcessor) -> None:
    tensors = load_file(golden_dir / "data_batch_wrist_proprio.safetensors")
    frame = _frame(tensors, 0, "libero_tiny", "open the top drawer")
    batch = PaddedCollatorForActionPrediction(2048, 32000)([_transform(processor, True, True)(frame)])
    assert batch["proprio"].shape == (1, 8) and batch["actions"].shape == (1, 8, 7)
    assert batch["dataset_names"] == ["libero_tiny"]
    with pytest.raises(ValueError, match="at most 10"):
        PaddedCollatorForActionPrediction(10, 32000)([_transform(processor, True, True)(frame)])


@pytest.mark.parametrize("kind", list(NormalizationType))
def test_normalization(golden_dir: Path, kind: NormalizationType) -> None:
    tensors = load_file(golden_dir / "normalization.safetensors")
    metadata = json.loads((golden_dir / "normalization.json").read_text())["metadata"]
    for group in ("action", "proprio"):
        found = normalize(tensors[f"in.{group}"], metadata[group], kind)
        # Division by a standard deviation far from 1 leaves a few units in the last place.
        np.testing.assert_allclose(found, tensors[f"{kind.value}.{group}"], rtol=1e-5, atol=2e-6)


def test_libero_transform(golden_dir: Path) -> None:
    tensors = load_file(golden_dir / "libero_transform_chunking.safetensors")
    action, proprio = libero_transform(tensors["in.action"], tensors["in.state"])
    eef, gripper = split_libero_state(tensors["in.state"])
    np.testing.assert_array_equal(action, tensors["libero.action"])
    np.testing.assert_array_equal(eef, tensors["libero.EEF_state"])
    np.testing.assert_array_equal(gripper, tensors["libero.gripper_state"])
    np.testing.assert_array_equal(proprio, np.concatenate([eef, gripper], axis=1))


@pytest.mark.parametrize("future", [7, 0, 13])
def test_chunking(golden_dir: Path, future: int) -> None:
    tensors = load_file(golden_dir / "libero_transform_chunking.safetensors")
    prefix = f"chunk.w1_f{future}."
    starts = chunk_starts(len(tensors["in.action"]), future)
    chunks = starts[:, None] + np.arange(future + 1)
    np.testing.assert_array_equal(tensors["in.action"][chunks], tensors[prefix + "action"])
    np.testing.assert_array_equal(tensors["in.state"][starts[:, None]], tensors[prefix + "proprio"])
    np.testing.assert_array_equal(starts[:, None], tensors[prefix + "timestep"])


def test_pixels_are_what_the_processor_makes_of_the_frame(dataset: RLDSDataset, processor: PrismaticProcessor) -> None:
    sample, frame = dataset[0], dataset.frame(0)
    expected = processor.image_processor.apply_transform(frame["observation"]["image_wrist"][0])
    assert torch.equal(sample["pixel_values_wrist"], expected)
