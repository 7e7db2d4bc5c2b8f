"""Two arms in gym-aloha's real simulator: its rules, the scripted expert, and the harness from data to results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.mini.collect import CollectConfig, collect
from experiments.mini.transfer import demonstrate, joint_angles, plan
from experiments.robot.aloha.environment import AlohaEnv
from experiments.robot.aloha.suite import IDLE, INSTALL_HINT, INSTRUCTION, NUM_STATES, scene_path
from experiments.robot.libero.results.run_folder import load_episodes
from experiments.robot.libero.run_libero_eval import GenerateConfig, eval_libero
from experiments.robot.policy import Query
from prismatic.util.errors import UsageError

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("gym_aloha") is None, reason=f"no gym-aloha: {INSTALL_HINT}"),
    pytest.mark.sim,
]


def small(folder: Path, **changes: Any) -> GenerateConfig:
    settings: dict[str, Any] = {
        "task_suite_name": "gym_aloha",
        "task_ids": "0",
        "num_images_in_input": 3,
        "num_trials_per_task": 2,
        "num_open_loop_steps": 10,
        "env_img_res": 32,
        "render": "fast",
        "num_workers": 1,
        "local_log_dir": str(folder),
        "run_name": "run",
        "device": "cpu",
    }
    return GenerateConfig(**{**settings, **changes})


class Replay:
    """Plays the plan for one initial state in every episode; sees pictures only to check them."""

    def __init__(self, state: int) -> None:
        with AlohaEnv() as env:
            settle(env, state)
            self.plan = plan(env.cube())
        self.step = 0

    def act(self, queries: Sequence[Query]) -> np.ndarray:
        (query,) = queries
        pictures = (query.image, query.wrist_image, *query.extra_images)
        assert [picture.shape for picture in pictures] == [(32, 32, 3)] * 3 and query.state.shape == (14,)
        assert len({picture.tobytes() for picture in pictures}) == 3 and query.instruction == INSTRUCTION
        self.step = 0 if np.allclose(query.state, IDLE, atol=0.02) else self.step + 10
        return np.pad(self.plan, ((0, 20), (0, 0)), mode="edge")[None, self.step : self.step + 10]


def settle(env: AlohaEnv, state: int) -> None:
    env.reset(env.init_states[state])
    for _ in range(10):
        env.step(np.array(IDLE))


@pytest.mark.parametrize(("arm", "tip"), [(0, (-0.05, 0.45, 0.15)), (1, (0.2, 0.6, 0.02))])
def test_joint_angles_put_the_fingertips_there(arm: int, tip: tuple[float, ...]) -> None:
    with AlohaEnv() as env:
        env.data.qpos[8 * arm : 8 * arm + 6] = joint_angles(arm, np.array(tip), pitch=0.8)
        env._mujoco.mj_forward(env.model, env.data)
        hand = env.data.body(f"vx300s_{('left', 'right')[arm]}/gripper_link")
        forward = hand.xmat.reshape(3, 3)[:, 0]
        np.testing.assert_allclose(hand.xpos + 0.135 * forward, tip, atol=1e-5)
        assert np.arcsin(-forward[2]) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="out of reach"):
        joint_angles(arm, np.array([0.0, 2.0, 0.0]), pitch=0.8)


def test_the_expert_solves_seeds_spread_over_the_table_and_noise_is_repeatable() -> None:
    with AlohaEnv(image_size=16, render="fast") as env:
        for state in (2, 4, 8, 11):
            settle(env, state)
            assert not env.transferred()
            outcomes = [env.step(action) for action in plan(env.cube())]
            # The touch may flicker at the very end, but the cube hangs in the left hand.
            assert any(outcomes) and not any(outcomes[:90]) and env.cube()[2] > 0.2
        first, again = (demonstrate(env, 3, "here").episode for _ in range(2))
        other = demonstrate(env, 4, "there", noise=False).episode
    assert first is not None and again is not None and other is not None
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    states, actions = np.array(first["observation/state"]), np.array(first["action"])
    assert states.shape == actions.shape == (140, 14)
    noise = np.abs(states - np.array(other["observation/state"])).max()
    assert noise > 0.05 and set(np.unique(actions[:, [6, 13]])) == {0.0, 1.0}


def test_the_harness_runs_resumes_and_tells_success_from_failure(tmp_path: Path) -> None:
    policy, states = Replay(1), {"first_init_state": 1, "save_videos": "all"}
    summary = eval_libero(small(tmp_path, **states, num_trials_per_task=1), policy)
    assert summary["total"]["successes"] == 1
    summary = eval_libero(small(tmp_path, first_init_state=1, num_trials_per_task=2), policy)
    assert (summary["total"]["successes"], summary["total"]["failures"]) == (1, 1)
    first, second = load_episodes(tmp_path / "run")
    assert (first.status, second.status, second.steps) == ("success", "failure", 150) and first.steps < 120
    assert (tmp_path / "run" / "videos" / "gym_aloha--task00--init01--success.mp4").stat().st_size > 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"task_suite_name": "libero_object"}, "--num_images_in_input: found 3; accepted: 1 to 2, the cameras of"),
        ({"first_init_state": NUM_STATES}, f"transfer_cube has {NUM_STATES} initial states"),
        ({"task_ids": "2"}, "--task_ids"),
        ({"initial_states_path": "states.npz"}, "gym-aloha has initial states of its own"),
        (
            {
                "pretrained_checkpoint": "experiments/mini/weights/student",
                "unnorm_key": "libero_object_no_noops",
            },
            "a policy of libero, with actions of 7 numbers; accepted: 14, as gym_aloha takes",
        ),
    ],
)
def test_what_does_not_fit_is_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    policy = None if "pretrained_checkpoint" in flags else Replay(0)
    with pytest.raises(UsageError, match=message):
        eval_libero(small(tmp_path, **flags), policy)


def test_from_demonstrations_to_a_served_policy(finetune: Callable[..., Path], tmp_path: Path) -> None:
    """A checkpoint answers in the simulator the same from its folder and through the server."""
    from experiments.robot.serving.server import PolicyServer, ServedPolicy, ServerSettings
    from prismatic.checkpoint.folder import open_checkpoint

    collect(CollectConfig(suite="gym_aloha", tasks="1", episodes=1, image_size=32, workers=1, out=tmp_path / "data"))
    inputs: dict[str, Any] = {"num_images_in_input": 3, "use_proprio": True}
    platform = "experiments/mini/gym_aloha.yaml"
    data = {"data_root_dir": tmp_path / "data", "dataset_name": "gym_aloha", "platform": platform}
    runs = finetune(**data, **inputs, max_steps=1, use_lora=False)
    folder = str(runs / "run--1_chkpt")
    settings = small(tmp_path, pretrained_checkpoint=folder, num_trials_per_task=1, max_steps=30)
    eval_libero(settings)
    policy = ServedPolicy.from_checkpoint(open_checkpoint(folder), settings, "gym_aloha")
    with PolicyServer(policy, policy.spec("two arms", "gym_aloha"), ServerSettings(port=0)) as server:
        url = f"http://127.0.0.1:{server.port}"
        eval_libero(small(tmp_path, policy=url, run_name="served", num_trials_per_task=1, max_steps=30))
        upstream = ask_as_upstream(url)
    assert upstream.shape == (10, 14)
    alone, served = (load_episodes(tmp_path / run)[0] for run in ("run", "served"))
    assert (alone.steps, alone.status) == (served.steps, served.status) == (30, "failure")


def ask_as_upstream(url: str) -> np.ndarray:
    """A request as upstream's ALOHA client makes it: `requests.post(url, json=...)` with json_numpy's arrays."""
    import json
    import urllib.request

    import json_numpy

    with AlohaEnv(image_size=84, render="fast") as env:
        seen = env.observe()
    observation = {
        "full_image": seen.image,
        "left_wrist_image": seen.wrist_image,
        "right_wrist_image": seen.extra_images[0],
        "state": seen.state,
        "instruction": INSTRUCTION,
    }
    body = json_numpy.dumps(observation).encode()
    request = urllib.request.Request(f"{url}/act", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return np.array(json_numpy.loads(json.dumps(json.load(response))))


def test_physics_and_success_are_those_of_gym_alohas_own_environment() -> None:
    control = pytest.importorskip("dm_control.rl.control", reason="dm-control is not installed")
    from dm_control import mujoco
    from gym_aloha.tasks import sim
    from gym_aloha.utils import sample_box_pose

    with AlohaEnv() as env:
        np.testing.assert_array_equal(env.init_states[7], sample_box_pose(7))
        env.reset(env.init_states[7])
        task = sim.TransferCubeTask()
        task.get_observation = lambda physics: {}  # Three pictures of 480 x 640 a step
        sim.BOX_POSE[0] = sample_box_pose(7)
        physics = mujoco.Physics.from_xml_path(str(scene_path()))
        theirs = control.Environment(physics, task, float("inf"), control_timestep=0.02, flat_observation=False)
        theirs.reset()
        rewards = []
        for action in plan(env.cube()):
            transferred = env.step(action)
            rewards += [theirs.step(action).reward for _ in range(2)]
            np.testing.assert_array_equal(env.data.qpos, physics.data.qpos)
            assert transferred == (rewards[-1] == 4)
    assert {0, 2, 4} <= set(rewards)
