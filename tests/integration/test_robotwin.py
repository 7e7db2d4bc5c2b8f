"""Checkpoints of all families in RoboTwin's conventions: each adapter, called as its harness calls it.

XPOLICYLAB names a checkout of XPolicyLab, whose own server and debug client are then run; else that test is skipped.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from experiments.robot.acting import load_policy
from experiments.robot.policy import Array, PolicyFlags, Query
from experiments.robot.robotwin.convert import ConvertConfig, convert
from experiments.robot.robotwin.policy import RoboTwinPolicy
from experiments.robot.serving.server import PolicyServer, ServerSettings, load_served
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.util.errors import UsageError
from tests.helpers.programs import run_program
from tests.helpers.robotwin_files import make_episode, write_legacy
from tests.helpers.robotwin_task import StandInTask
from tests.helpers.tiny_pi import write_tiny_pi

KEY = "robotwin_lift_pot_clean"
CHECKPOINTS: dict[str, Path] = {}
LAB = os.environ.get("XPOLICYLAB", "")
ADAPTERS = Path(__file__).resolve().parents[2] / "experiments" / "robot" / "robotwin"


@pytest.fixture(params=["openvla", "pi0", "pi05"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, finetune: Callable[..., Path]
) -> Path:
    """Two steps of fine-tuning on converted demonstrations."""
    if request.param not in CHECKPOINTS:
        folder = tmp_path_factory.mktemp(request.param)
        for number in range(2):
            write_legacy(folder / "data", number, make_episode(30, number))
        convert(ConvertConfig(data_dir=folder / "data", out=folder / "rlds", format="rlds"))
        flags: dict[str, Any] = {"platform": "aloha_agilex", "num_images_in_input": 3, "image_aug": False}
        if request.param != "openvla":
            flags["vla_path"] = str(write_tiny_pi(folder / "base", request.param, width=16))
        runs = finetune(
            data_root_dir=folder / "rlds", dataset_name=KEY, run_root_dir=folder / "runs", recipe="baseline", **flags
        )
        CHECKPOINTS[request.param] = runs / "run--2_chkpt"
    return CHECKPOINTS[request.param]


def direct(checkpoint: Path, task: StandInTask, seed: int) -> Array:
    """The policy's own answer to what a task shows."""
    flags = PolicyFlags(num_images_in_input=3, center_crop=False, device="cpu")
    views = [view["rgb"] for view in task.get_obs()["observation"].values()]
    query = Query(views[0], views[1], task.joints, task.get_instruction(), seed, extra_images=(views[2],))
    chunk = np.array(load_policy(open_checkpoint(str(checkpoint)), flags, KEY).act([query])[0], np.float64)
    chunk[:, [6, 13]] = chunk[:, [6, 13]].clip(0, 1)
    return chunk


@pytest.fixture
def deploy_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The adapter as RoboTwin finds it: policy/ROCKET on its path."""
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "ROCKET").symlink_to(ADAPTERS / "deploy_policy")
    monkeypatch.syspath_prepend(str(tmp_path / "policy"))
    monkeypatch.delitem(sys.modules, "ROCKET", raising=False)
    return importlib.import_module("ROCKET")


def settings(checkpoint: Path, tmp_path: Path, **more: Any) -> dict[str, Any]:
    """RoboTwin's usr_args."""
    told = {"task_name": "lift_pot", "task_config": "demo_clean", "seed": 0, "instruction_type": "unseen"}
    told |= {"checkpoint_path": str(checkpoint), "unnorm_key": None, "left_arm_dim": 6, "right_arm_dim": 6}
    return {**told, "record": str(tmp_path / "record.jsonl"), "device": "cpu", **more}


def run_episode(module: ModuleType, model: Any, task: StandInTask) -> None:
    """An episode as RoboTwin's evaluation runs it."""
    module.reset_model(model)
    while task.take_action_cnt < task.step_lim:
        module.eval(task, model, task.get_obs())


def test_deploy_policy(checkpoint: Path, deploy_policy: ModuleType, tmp_path: Path) -> None:
    model = deploy_policy.get_model(settings(checkpoint, tmp_path))
    task = StandInTask(step_lim=model.steps + 2)
    expected = direct(checkpoint, task, zlib.crc32(b"0:1:1"))
    run_episode(deploy_policy, model, task)
    np.testing.assert_allclose(task.taken[: model.steps], expected, atol=1e-5)
    assert len(task.taken) == model.steps + 2
    run, episode = (json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines())
    assert (run["instruction_type"], run["unnorm_key"], run["platform"]) == ("unseen", KEY, "aloha_agilex")
    assert episode == {"episode": 1, "instruction": "lift the pot"} and len(run["checkpoint_hash"]) == 16


def test_a_server_acts_for_the_adapter(checkpoint: Path, deploy_policy: ModuleType, tmp_path: Path) -> None:
    flags = PolicyFlags(num_images_in_input=3, center_crop=False, device="cpu")
    policy = load_served(open_checkpoint(str(checkpoint)), flags, KEY)
    with PolicyServer(policy, policy.spec("tiny", ""), ServerSettings(port=0)) as server:
        model = deploy_policy.get_model(settings(checkpoint, tmp_path, server=server.url, num_open_loop_steps=3))
        task = StandInTask(step_lim=3)
        expected = direct(checkpoint, task, zlib.crc32(b"0:1:1"))
        run_episode(deploy_policy, model, task)
        np.testing.assert_allclose(task.taken, expected[:3], atol=1e-5)


def test_vla_evals_robotwin_benchmark(checkpoint: Path) -> None:
    """Its runner, its messages and its verified seeds, around the stand-in task."""
    runner = pytest.importorskip("vla_eval.runners.sync_runner", reason="vla-eval is not installed").SyncEpisodeRunner()
    from vla_eval import specs
    from vla_eval.benchmarks.robotwin import benchmark as module
    from vla_eval.connection import Connection

    verified = json.loads((module.EXPERT_SEEDS_DIR / "demo_clean.json").read_text())["tasks"]["lift_pot"]["episodes"]
    benchmark: Any = module.RoboTwinBenchmark("lift_pot", fast_init=False)
    task = benchmark._task_entry(verified[0]["seed"], 0, verified[0]["seen"])
    stand_in = StandInTask(step_lim=5)
    benchmark._args, benchmark._env_class = {"clear_cache_freq": 5}, lambda: stand_in

    async def talk(port: int) -> dict[str, Any]:
        async with Connection(f"ws://127.0.0.1:{port}/vla-eval") as connection:
            told = connection.server_info
            actions, seen = (
                {name: specs.DimSpec.from_dict(spec) for name, spec in told[kind].items()}
                for kind in ("action_spec", "observation_spec")
            )
            wanted = benchmark.get_action_spec(), benchmark.get_observation_spec()
            assert specs.check_specs(actions, wanted[0], seen, wanted[1]) == []
            return await runner.run_episode(benchmark, task, connection)

    flags = PolicyFlags(num_images_in_input=3, center_crop=False, device="cpu")
    policy = load_served(open_checkpoint(str(checkpoint)), flags, KEY)
    with PolicyServer(policy, policy.spec("tiny", ""), ServerSettings(port=0)) as server:
        episode = asyncio.run(talk(server.port))
    assert episode["steps"] == 5 and stand_in.seed == verified[0]["seed"] >= module.BUNDLED_SEED_BASE
    if "openvla" in str(checkpoint):  # Others' noise is the session's.
        expected = direct(checkpoint, StandInTask(5, verified[0]["seen"]), 0)
        np.testing.assert_allclose(stand_in.taken, expected[:5], atol=1e-5)


@pytest.fixture
def xpolicylab(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("experiments.robot.robotwin.xpolicylab.model")


def test_xpolicylab(checkpoint: Path, xpolicylab: ModuleType, tmp_path: Path) -> None:
    config = settings(checkpoint, tmp_path, env_cfg_type="aloha_agilex", action_type="joint", ckpt_name="x")
    model, task = xpolicylab.Model(config), StandInTask(9)
    model.reset()
    with pytest.raises(UsageError, match="no observation found"):
        model.get_action()
    model.update_obs(task.as_xpolicylab())
    actions = model.get_action()
    parts = ("left_arm_joint_state", "left_ee_joint_state", "right_arm_joint_state", "right_ee_joint_state")
    flat = np.array([np.concatenate([action[part] for part in parts]) for action in actions])
    np.testing.assert_allclose(flat, direct(checkpoint, task, zlib.crc32(b"0:1:1")), atol=1e-5)
    assert all(set(action) == set(parts) for action in actions)
    pair = [task.as_xpolicylab(), {**task.as_xpolicylab(), "env_idx": 1, "instruction": "lift it"}]
    for batch in (pair, pair[1:], pair[:1]):  # XPolicyLab's WebSocket client asks for one after the other.
        model.update_obs_batch(batch)
        assert [len(chunk) for chunk in model.get_action_batch()] == [len(actions)] * len(batch)
    episodes = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()[1:]]
    told = [(row["episode"], row["environment"], row["instruction"]) for row in episodes]
    assert told == [(1, 0, "lift the pot"), (1, 1, "lift it")]
    with pytest.raises(UsageError, match="action_type: ee found; accepted: joint"):
        xpolicylab.Model({**config, "action_type": "ee"})


@pytest.mark.parametrize("checkpoint", ["pi0"], indirect=True)
def test_each_of_robotwins_workers_has_its_own_episodes(
    checkpoint: Path, xpolicylab: ModuleType, tmp_path: Path
) -> None:
    """Calls in the order in which two workers' connections bring them to one server."""
    model, task = xpolicylab.Model(settings(checkpoint, tmp_path)), StandInTask(9)

    def begin(worker: int, seed: int) -> None:
        model.prepare_case({"task_name": "lift_pot", "seed": seed, "action_case_id": f"lift_pot-case-worker{worker}"})

    def act(worker: int) -> Array:
        model.update_obs({**task.as_xpolicylab(), "env_idx": worker})
        return np.concatenate(list(model.get_action()[0].values()))

    begin(0, 100001), begin(1, 100002)
    model.reset(), model.reset()
    first, other, second = act(0), act(1), act(0)
    begin(1, 100001)
    model.reset()
    np.testing.assert_array_equal(act(1), first)  # Noise is the seed's, whoever has it and whenever.
    assert not np.array_equal(first, other) and not np.array_equal(first, second)
    rows = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()[1:]]
    told = [(row["environment"], row["episode"], row["seed"]) for row in rows]
    assert told == [(0, 1, 100001), (1, 1, 100002), (1, 2, 100001)]


@pytest.mark.parametrize("checkpoint", ["openvla"], indirect=True)
@pytest.mark.parametrize(
    ("name", "value"),
    [("num_open_loop_steps", "x"), ("use_film", "maybe"), ("num_images_in_input", "x"), ("server", "http://host:x")],
)
def test_a_setting_of_the_wrong_type_is_named(name: str, value: str, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{name}: '?{value}'? found; accepted: "):
        RoboTwinPolicy(settings(checkpoint, tmp_path, **{name: value}))


@pytest.mark.skipif(not LAB, reason="XPOLICYLAB names no checkout of XPolicyLab")
@pytest.mark.parametrize("batch", ["false", "true"])
def test_xpolicylabs_server_and_debug_client(batch: str, checkpoint: Path, tmp_path: Path) -> None:
    """Their server loads the adapter from policy/ROCKET, and their debug client checks every action."""
    lab, port = tmp_path / "XPolicyLab", "23917"

    def others(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == Path(LAB) / "policy" and name[0].isupper()]

    shutil.copytree(LAB, lab, ignore=others)
    adapter = lab / "policy" / "ROCKET"
    adapter.symlink_to(ADAPTERS / "xpolicylab")
    (tmp_path / "env_cfg" / "robot").mkdir(parents=True)
    (tmp_path / "env_cfg" / "aloha_agilex.yml").write_text("config: {robot: aloha_agilex, sim: none}\n")
    info = {"aloha_agilex": {"arm_dim": [6, 6], "ee_dim": [1, 1]}}
    (tmp_path / "env_cfg" / "robot" / "_robot_info.json").write_text(json.dumps(info))
    path = f"{tmp_path}:{lab}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    task = f"RoboTwin lift_pot {checkpoint} aloha_agilex joint 0".split()
    serve = ["bash", str(adapter / "setup_eval_policy_server.sh"), *task, "", sys.prefix, port]
    server = subprocess.Popen(serve, env=environment, cwd=tmp_path)
    try:
        while server.poll() is None and socket.socket().connect_ex(("localhost", int(port))):
            time.sleep(1)
        named = "--bench_name RoboTwin --task_name lift_pot --env_cfg_type aloha_agilex --policy_name ROCKET"
        client = f"{lab}/debug_env_client.py {named} --port {port} --eval_episode_num 2 --eval_batch {batch}".split()
        run = run_program([sys.executable, *client], env=environment)
        assert run.returncode == 0, run.stdout[-1500:] + run.stderr[-1500:]
        assert run.stdout.count("[TestEnv] Episode finished") == 2
        assert len((tmp_path / "eval_result" / "rocket.jsonl").read_text().splitlines()) >= 2
    finally:
        server.kill()
        server.wait()
