"""The plain evaluation loop, as upstream's script has it: the reference for results and for speed.

LIBERO's own environment, one at a time: built anew for every task, hard reset for every episode, every step rendered,
the policy asked for one robot. Nothing of `experiments/robot/libero` takes part but the protocol's data.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiments.robot.libero.rollouts.protocol import DUMMY_ACTION, Episode, Protocol, to_env_action
from experiments.robot.libero.simulator.rendering import choose_renderer
from experiments.robot.libero.suites.tasks import get_task, load_init_states
from experiments.robot.policy import Policy, Query


@dataclass
class PlainResult:
    """One episode: how it ended, the simulator's state after every step (S, nq + nv), and where the time went."""

    success: bool
    steps: int
    states: list[np.ndarray] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def spend(self, part: str, since: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - since


def plain_rollouts(
    policy: Policy,
    episodes: Iterable[Episode],
    protocol: Protocol,
    on_result: Callable[[Episode, PlainResult], None] = lambda episode, result: None,
) -> dict[tuple[str, int, int], PlainResult]:
    """Run all episodes one after the other; they have to be sorted by task."""
    choose_renderer()
    results: dict[tuple[str, int, int], PlainResult] = {}
    env, env_task = None, None
    for episode in episodes:
        started = time.perf_counter()
        if env is None or env_task != (episode.suite, episode.task_id):
            if env is not None:
                env.close()
            env, env_task = _make(episode, protocol), (episode.suite, episode.task_id)
        creation = time.perf_counter() - started
        results[episode.key] = result = _run(env, policy, episode, protocol)
        result.seconds["creation"] = creation
        on_result(episode, result)
    if env is not None:
        env.close()
    return results


def _make(episode: Episode, protocol: Protocol) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero.envs import OffScreenRenderEnv

        path = get_task(episode.suite, episode.task_id).bddl_path
        return OffScreenRenderEnv(
            bddl_file_name=str(path), camera_heights=protocol.image_size, camera_widths=protocol.image_size
        )


def _run(env: Any, policy: Policy, episode: Episode, protocol: Protocol) -> PlainResult:
    result = PlainResult(success=False, steps=0)
    started = time.perf_counter()
    env.env.object_property_initializers.clear()  # LIBERO appends the same samplers again at every reset.
    env.seed(protocol.env_seed + episode.init_state)
    env.reset()
    states = load_init_states(get_task(episode.suite, episode.task_id))
    seen = env.set_init_state(states[episode.init_state])
    for _ in range(protocol.settle_steps):
        seen, _, _, _ = env.step(list(DUMMY_ACTION))
    result.spend("reset", started)
    waiting: list[np.ndarray] = []
    while result.steps < protocol.max_steps and not result.success:
        if not waiting:
            started = time.perf_counter()
            (chunk,) = policy.act([_query(seen, episode, result.steps)])
            waiting = list(np.asarray(chunk, dtype=np.float64)[: protocol.open_loop_steps])
            result.spend("policy", started)
        started = time.perf_counter()
        seen, _, done, _ = env.step(to_env_action(waiting.pop(0)).tolist())
        result.spend("physics and rendering", started)
        result.steps, result.success = result.steps + 1, bool(done)
        result.states.append(np.concatenate([env.sim.data.qpos, env.sim.data.qvel]))
    return result


def _query(seen: Mapping[str, np.ndarray], episode: Episode, step: int) -> Query:
    from robosuite.utils.transform_utils import quat2axisangle

    turn = quat2axisangle(seen["robot0_eef_quat"].copy())
    return Query(
        image=np.ascontiguousarray(seen["agentview_image"][::-1, ::-1]),
        wrist_image=np.ascontiguousarray(seen["robot0_eye_in_hand_image"][::-1, ::-1]),
        state=np.concatenate([seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]]),
        instruction=episode.task,
        seed=episode.query_seed(step),
    )
