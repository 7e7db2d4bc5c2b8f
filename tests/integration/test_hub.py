"""Checkpoints by hub id and published ones, against a hub that runs on this machine and speaks the real protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import push_to_hub as script
from prismatic.util.errors import UsageError
from tests.helpers.fake_hub import serve_hub
from tests.helpers.programs import run_program

JOINT = "moojink/openvla-7b-oft-finetuned-libero-spatial-object-goal-10"
SUITES = [f"libero_{name}_no_noops" for name in ("10", "goal", "object", "spatial")]

LOAD = """
import json, sys
from types import SimpleNamespace
import numpy as np
from experiments.robot.openvla_utils import OpenVLAPolicy
from experiments.robot.policy import Query
from prismatic.checkpoint.folder import resolve_checkpoint
from prismatic.training.config import TrainConfig

cfg = SimpleNamespace(pretrained_checkpoint=sys.argv[1], use_l1_regression=True, use_diffusion=False, use_film=False,
    num_images_in_input=2, use_proprio=True, center_crop=True, device="cpu")
policy = OpenVLAPolicy.from_checkpoint(sys.argv[1], cfg, "libero_goal")
picture = np.arange(96 * 96 * 3, dtype=np.uint8).reshape(96, 96, 3)
actions = policy.act([Query(picture, picture, np.linspace(-1, 1, 8), "open the drawer")])
sources = resolve_checkpoint(TrainConfig(vla_path=sys.argv[1], use_proprio=True, num_images_in_input=2))
heads = sorted(file.name for file in sources.checkpoint.glob("*_checkpoint.pt"))
print(json.dumps({"key": policy.unnorm_key, "actions": actions.tolist(), "base": sources.base, "heads": heads}))
"""


def run(root: Path, hub: str, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python process that talks to the hub; huggingface_hub reads the address when it is imported."""
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(cache), "HF_TOKEN": "a token", "PYTHONPATH": str(root)}
    environment |= {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command, environment = [sys.executable, "-W", "ignore", *arguments], {**os.environ, **environment}
    return run_program(command, env=environment, cwd=root)


@pytest.fixture(scope="module")
def released(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub with the tiny model laid out as the released joint checkpoint is."""
    hub = tmp_path_factory.mktemp("hub")
    weights = golden_dir / "openvla_tiny" / "model.safetensors"
    shutil.copytree(weights.parent, hub / JOINT)
    for name in ("action_head", "proprio_projector"):
        component = golden_dir / "finetuned_ckpt_files" / f"{name}--7_checkpoint.pt"
        shutil.copyfile(component, hub / JOINT / f"{name}--300000_checkpoint.pt")
    statistics = json.loads((hub / JOINT / "dataset_statistics.json").read_text())["libero_tiny"]
    (hub / JOINT / "dataset_statistics.json").write_text(json.dumps(dict.fromkeys(SUITES, statistics)))
    (hub / JOINT / "modeling_prismatic.py").write_text("raise RuntimeError('never run')")
    return hub


def test_a_released_checkpoint_loads_by_id(released: Path, repo_root: Path, tmp_path: Path) -> None:
    local = run(repo_root, "http://127.0.0.1:9", tmp_path / "cache", "-c", LOAD, str(released / JOINT))
    with serve_hub(released) as (address, fetched):
        from_hub = run(repo_root, address, tmp_path / "cache", "-c", LOAD, JOINT)
    assert local.returncode == from_hub.returncode == 0, local.stderr + from_hub.stderr
    expected, actual = (json.loads(done.stdout.splitlines()[-1]) for done in (local, from_hub))
    assert actual["key"] == "libero_goal_no_noops"
    assert actual["actions"] == expected["actions"]
    assert actual["base"] == JOINT
    assert actual["heads"] == ["action_head--300000_checkpoint.pt", "proprio_projector--300000_checkpoint.pt"]
    assert f"{JOINT}/model.safetensors" in fetched
    assert not any(name.endswith(".py") for name in fetched)


def make_run(released: Path, folder: Path) -> Path:
    """A checkpoint as training leaves it, with what must not be published."""
    checkpoint = folder / "run--500_chkpt"
    shutil.copytree(released / JOINT, checkpoint)
    for file in checkpoint.glob("*--300000_checkpoint.pt"):
        file.rename(file.with_name(file.name.replace("300000", "500")))
    flags = {"vla_path": "/home/somebody/openvla-7b", "vggt_path": "/home/somebody/VGGT-1B", "recipe": "rocket"}
    flags |= {"dataset_name": "libero_4_task_suites_no_noops", "lora_rank": 32, "data_root_dir": "/home/somebody/data"}
    (checkpoint / "run_config.json").write_text(json.dumps(flags))
    (checkpoint / "training_state").mkdir()
    torch.save({"step": 500}, checkpoint / "training_state" / "state.pt")
    row = {"successes": 49, "failures": 1, "errors": 0, "success_rate": 0.98, "interval_95": [0.895, 0.9965]}
    (folder / "summary.json").write_text(json.dumps({"suites": {"libero_goal": row}, "identity": {}}))
    return checkpoint


def push(checkpoint: Path, **flags: Any) -> list[str]:
    given = {"checkpoint": str(checkpoint), "repo_id": "me/my-policy", "license": "llama2", **flags}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_a_published_checkpoint(released: Path, repo_root: Path, tmp_path: Path) -> None:
    checkpoint = make_run(released, tmp_path)
    hub = tmp_path / "hub"
    hub.mkdir()
    flags = push(checkpoint, results=tmp_path / "summary.json", base_model="openvla/openvla-7b", datasets="me/data")
    with serve_hub(hub) as (address, _):
        done = run(repo_root, address, tmp_path / "cache", "vla-scripts/push_to_hub.py", *flags)
    assert done.returncode == 0, done.stderr
    published = hub / "me/my-policy"
    names = {file.relative_to(published).as_posix() for file in published.rglob("*") if file.is_file()}
    kept = {file.name for file in checkpoint.iterdir() if file.is_file() and file.suffix != ".py"}
    assert names == {"README.md", *kept} and "training_state" not in names
    assert kept >= {"model.safetensors", "dataset_statistics.json", "action_head--500_checkpoint.pt", "run_config.json"}
    assert (published / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert "/home/somebody" not in (published / "run_config.json").read_text()
    card = (published / "README.md").read_text()
    for words in (
        "license: llama2",
        "base_model: openvla/openvla-7b",
        "- me/data",
        "value: 0.98",
        "for 500 steps",
        "`VGGT-1B` (recipe `rocket`)",
        "| libero_goal | 98.0% | 89.5 to 99.7% | 50 | 0 |",
        "--pretrained_checkpoint me/my-policy --num_images_in_input 2 --use_proprio True",
        "--use_l1_regression True",
        "`libero_spatial_no_noops`",
    ):
        assert words in card, words
    assert "/home/somebody" not in card


def test_a_dry_run_writes_the_same_files(released: Path, tmp_path: Path) -> None:
    checkpoint = make_run(released, tmp_path)
    config = script.PushConfig(str(checkpoint), "me/my-policy", "mit", dry_run=str(tmp_path / "out"))
    assert script.main(config) == 0
    assert not (tmp_path / "out" / "training_state").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card and "fine-tuned from `openvla-7b`" in card and "base_model:" not in card
    with pytest.raises(UsageError, match=r"--dry_run: .* exists"):
        script.main(config)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher_path": "/home/somebody/depth-anything"}, "aligned with the 3D teacher `depth-anything`"),
        ({"feature_store": "/home/somebody/store"}, "aligned with a 3D teacher's stored features"),
    ],
)
def test_an_alignment_without_vggt_path_is_not_called_a_baseline(
    released: Path, tmp_path: Path, given: dict[str, str], words: str
) -> None:
    """Without --recipe, any teacher means rocket; where it lay on this machine is nobody's business."""
    checkpoint = make_run(released, tmp_path)
    flags = {"vla_path": "openvla/openvla-7b", "recipe": None, "align_layers_file": "/home/somebody/l.json", **given}
    (checkpoint / "run_config.json").write_text(json.dumps(flags))
    assert script.main(script.PushConfig(str(checkpoint), "me/x", "mit", dry_run=str(tmp_path / "out"))) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{words} (recipe `rocket`)" in card
    assert "/home/somebody" not in card + (tmp_path / "out" / "run_config.json").read_text()


def test_what_cannot_be_published_is_refused(released: Path, golden_dir: Path, tmp_path: Path) -> None:
    checkpoint = make_run(released, tmp_path)

    def refused(message: str, **flags: Any) -> None:
        given = {"checkpoint": str(checkpoint), "repo_id": "me/x", "license": "mit", "dry_run": str(tmp_path / "o")}
        with pytest.raises(UsageError, match=message):
            script.main(script.PushConfig(**{**given, **flags}))

    refused("--license: not given", license="")
    refused("--repo_id: 'mine' found; accepted: a hub id", repo_id="mine")
    refused("--checkpoint: no such folder", checkpoint=str(tmp_path / "nothing"))
    refused("--results: .* has no suites", results=str(checkpoint / "config.json"))
    (checkpoint / "model.safetensors").unlink()
    refused(r"holds neither a model nor lora_adapter")
    adapter = golden_dir / "lora_adapter" / "adapter_config.json"
    shutil.copytree(adapter.parent, checkpoint / "lora_adapter")
    refused(r"--base_model: .*only an adapter, whose base model .* others cannot find", base_model="local-folder")
    config = script.PushConfig(str(checkpoint), "me/x", "mit", "openvla/openvla-7b", dry_run=str(tmp_path / "o"))
    assert script.main(config) == 0
    written = json.loads((tmp_path / "o" / "lora_adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "openvla/openvla-7b"
