"""Checkpoints of pi0 and pi0.5 act: through openpi's protocol, in the simulator, merged or as an adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from websockets.sync.client import connect

from experiments.robot.acting import load_policy
from experiments.robot.libero.rollouts.protocol import to_env_action
from experiments.robot.libero.run_libero_eval import GenerateConfig, eval_libero
from experiments.robot.policy import Query
from experiments.robot.serving.server import PolicyServer, ServerSettings, load_served
from prismatic.checkpoint.folder import check_policy_flags, open_checkpoint
from prismatic.models.pi.model import PiPolicy
from prismatic.util.errors import UsageError
from tests.helpers.tiny_pi import write_tiny_pi

FLAGS: dict[str, Any] = {"num_images_in_input": 2, "use_proprio": True, "center_crop": True, "device": "cpu"}
FLAGS |= {"use_l1_regression": True, "use_diffusion": False, "use_film": False}
ASSET = "physical-intelligence/libero"


def openpi_folder(folder: Path, kind: str) -> Path:
    """A folder as openpi's: no model type, statistics below assets/."""
    write_tiny_pi(folder, kind)
    rng = np.random.default_rng(5)
    stats = {
        name: {
            "mean": rng.normal(size=n),
            "std": rng.random(n) + 0.5,
            "q01": -1 - rng.random(n),
            "q99": 1 + rng.random(n),
        }
        for name, n in (("state", 8), ("actions", 7))
    }
    stored = {name: {key: value.tolist() for key, value in entry.items()} for name, entry in stats.items()}
    file = folder / "assets" / ASSET / "norm_stats.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"norm_stats": stored}))
    return folder


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openpi_folder(tmp_path_factory.mktemp(request.param) / "openpi", request.param)


@pytest.fixture(scope="module")
def query() -> Query:
    rng = np.random.default_rng(3)
    wide, square = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((60, 84), (42, 42)))
    return Query(wide, square, rng.normal(size=8), "pick up the_mug", prepared=True)


def by_hand(folder: Path, query: Query) -> np.ndarray:
    """openpi's steps, one by one: Pillow's letterbox, normalization, prompt, Euler steps, the data's units again."""
    policy = PiPolicy.from_pretrained(folder)
    stats = json.loads((folder / "assets" / ASSET / "norm_stats.json").read_text())["norm_stats"]
    state, action = ({k: np.array(v) for k, v in stats[name].items()} for name in ("state", "actions"))
    if policy.kind == "pi05":
        normalized = (query.state - state["q01"]) / (state["q99"] - state["q01"] + 1e-6) * 2 - 1
        bins = np.digitize(normalized, np.linspace(-1, 1, 257)[:-1]) - 1
        text = f"Task: pick up the mug, State: {' '.join(map(str, bins))};\nAction: "
    else:
        normalized, text = (query.state - state["mean"]) / (state["std"] + 1e-6), "pick up the mug\n"
    boxed = np.zeros((42, 42, 3), np.uint8)
    boxed[6:36] = np.asarray(Image.fromarray(query.image).resize((42, 30), Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(np.stack([boxed, query.wrist_image])).permute(0, 3, 1, 2).float() / 127.5 - 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    noise = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(query.seed))
    masks = torch.ones(1, 2, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool)
    sampled = policy.sample_actions(
        pixels[None], masks[0], ids, masks[1], torch.from_numpy(normalized)[None].float(), num_steps=3, noise=noise
    )[0, :, :7].numpy()
    if policy.kind == "pi05":
        return (sampled + 1) / 2 * (action["q99"] - action["q01"] + 1e-6) + action["q01"]
    return sampled * (action["std"] + 1e-6) + action["mean"]


def pack(value: Any) -> Any:
    """An array in the form of openpi's client."""
    return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def unpack(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" not in value:
        return value
    return np.frombuffer(value[b"data"], value[b"dtype"]).reshape(value[b"shape"])


def test_openpis_client_gets_what_openpis_server_would_answer(checkpoint: Path, query: Query) -> None:
    opened = open_checkpoint(str(checkpoint))
    assert opened.platform.chunk == 4 and opened.platform.action_dim == 7
    policy = load_served(opened, SimpleNamespace(**FLAGS), ASSET)  # type: ignore[arg-type]
    running = PolicyServer(policy, policy.spec("pi", ASSET), ServerSettings(port=0))
    with running as server, connect(f"ws://127.0.0.1:{server.port}") as client:
        metadata = msgpack.unpackb(client.recv(), object_hook=unpack)
        observation = {"observation/image": query.image, "observation/wrist_image": query.wrist_image}
        message = {**observation, "observation/state": query.state, "prompt": query.instruction}
        client.send(msgpack.packb(message, default=pack))
        reply = msgpack.unpackb(client.recv(), object_hook=unpack)
    assert metadata["action_horizon"] == 4 and metadata["state_dim"] == 8
    assert reply["actions"].shape == (4, 7)
    np.testing.assert_allclose(reply["actions"], by_hand(checkpoint, query), rtol=1e-4, atol=1e-5)


def test_in_the_simulator_openpis_gripper_is_turned_into_ours(checkpoint: Path, query: Query) -> None:
    policy = load_policy(open_checkpoint(str(checkpoint)), SimpleNamespace(**FLAGS), ASSET)  # type: ignore[arg-type]
    expected, actions = by_hand(checkpoint, query), policy.act([query])[0]
    assert isinstance(actions, np.ndarray)
    np.testing.assert_allclose(actions[:, :6], expected[:, :6], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([to_env_action(a)[-1] for a in actions], np.sign(expected[:, 6]))


def test_answers_do_not_depend_on_the_batch(checkpoint: Path, query: Query) -> None:
    policy = load_policy(open_checkpoint(str(checkpoint)), SimpleNamespace(**FLAGS), ASSET)  # type: ignore[arg-type]
    other = Query(query.wrist_image, query.wrist_image, query.state + 1, "open the drawer of the cabinet", seed=4)
    alone, together = policy.act([query]), policy.act([other, query])
    np.testing.assert_allclose(together[1], alone[0], atol=1e-5)


@pytest.mark.parametrize("flag", ["use_diffusion", "use_film", "load_in_8bit"])
def test_flags_of_other_policies_are_refused(flag: str, checkpoint: Path) -> None:
    flags: Any = SimpleNamespace(**{**FLAGS, flag: True})
    with pytest.raises(UsageError, match=f"--{flag}: True found; accepted for pi"):
        check_policy_flags(flags, open_checkpoint(str(checkpoint)), ASSET)


@pytest.mark.parametrize(
    ("action", "message"),
    [([0.0], "list found"), ({"q01": [0.0], "q99": [1.0]}, "mean, std: missing"), ({"mean": 1, "std": 1}, "shapes")],
)
def test_statistics_of_another_form_are_refused(action: object, message: str, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    file = tmp_path / "copy" / "assets" / ASSET / "norm_stats.json"
    stored = json.loads(file.read_text())["norm_stats"]
    file.write_text(json.dumps({"norm_stats": {**stored, "actions": action}}))
    with pytest.raises(UsageError, match=f"copy: statistics of {ASSET}: .*{message}"):
        open_checkpoint(str(tmp_path / "copy"))
    for statistics in stored.values():
        statistics.pop("q99")
    file.write_text(json.dumps({"norm_stats": stored}))
    opened = open_checkpoint(str(tmp_path / "copy"))
    if opened.family == "pi05":
        with pytest.raises(UsageError, match="q01, q99: None found"):
            check_policy_flags(SimpleNamespace(**FLAGS), opened, ASSET)  # type: ignore[arg-type]
    else:
        check_policy_flags(SimpleNamespace(**FLAGS), opened, ASSET)  # type: ignore[arg-type]


@pytest.mark.sim
def test_a_trained_adapter_acts_in_the_simulator_as_the_merged_policy(
    finetune: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("libero", reason="LIBERO is not installed")
    base = write_tiny_pi(tmp_path / "pi05", "pi05", chunk=8)
    run = finetune(vla_path=str(base), learning_rate=1e-2, image_aug=True) / "run--2_chkpt"
    settings: dict[str, Any] = {"task_suite_name": "libero_spatial", "task_ids": "2", "num_trials_per_task": 1}
    settings |= {"max_steps": 10, "env_img_res": 64, "num_workers": 1, "local_log_dir": str(tmp_path / "eval")}
    summary = eval_libero(GenerateConfig(pretrained_checkpoint=str(run), run_name="merged", **settings))
    assert summary["total"]["failures"] == 1 and not summary["total"]["errors"]
    key = "libero_spatial_no_noops"
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    query = Query(image, image, np.zeros(8), "open the drawer")
    merged = load_policy(open_checkpoint(str(run)), SimpleNamespace(**FLAGS), key).act([query])  # type: ignore[arg-type]
    (run / "model.safetensors").unlink()
    opened = open_checkpoint(str(run), str(base))
    assert opened.adapter_path is not None and opened.platform.chunk == 8
    adapted = load_policy(opened, SimpleNamespace(**FLAGS), key).act([query])  # type: ignore[arg-type]
    np.testing.assert_allclose(adapted, merged, atol=1e-5)


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_openpis_trained_folders_have_no_configuration(kind: str, tmp_path: Path) -> None:
    folder = openpi_folder(tmp_path / "openpi", kind)
    (folder / "config.json").unlink()
    opened = open_checkpoint(str(folder))
    assert (opened.family, list(opened.statistics)) == (kind, [ASSET])
    assert opened.fingerprint()
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        open_checkpoint(str(folder))
