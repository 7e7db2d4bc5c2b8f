"""One recorded demonstration of the scripted expert: noisy execution, clean labels.

Noise on the executed action shows the policy states beside the expert's path, each with the action that leads back; the
record holds the clean action. Everything random is a function of (seed, suite, task, episode, attempt).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from experiments.mini.expert import MAX_STEPS, OPEN, Expert, settle
from experiments.robot.libero.demonstrations import is_no_op
from experiments.robot.libero.simulator.environment import LiberoEnv, Observation
from prismatic.vla.datasets.rlds_writer import Episode, encode_jpeg

NOISE_LEVELS = (0.1, 0.2, 0.3)
_NOISE_MEMORY = 0.8  # Coefficient of the first-order autoregressive noise.
_NOISE_SHARE = np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
_DELICATE_SHARE = 0.4
_MAX_START_STEPS = 9
_START_SIZE = 0.5


def derive_seed(*parts: int | str) -> int:
    """A 32-bit seed from `parts`, the same on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


@dataclass(frozen=True)
class Demonstration:
    """What one attempt gave: `episode` is None if the task was not solved; `ended_in` names the last phase."""

    episode: Episode | None
    steps: int
    ended_in: str


def demonstrate(env: LiberoEnv, seed: int, source: str, noise: bool = True) -> Demonstration:
    """Reset `env` to a placement drawn with `seed`, let the expert solve the task, record it.

    The grasp is chosen before the hand is moved to a random start, so that the choice depends on the objects alone.
    """
    rng = np.random.default_rng(derive_seed(seed, "noise"))
    env.reset(None, seed=seed)
    settle(env)
    expert = Expert(env)
    level = float(rng.choice(NOISE_LEVELS)) if noise else 0.0
    if noise:
        _random_start(env, rng)
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    previous: np.ndarray | None = None
    drift, solved = np.zeros(6), False
    for _ in range(MAX_STEPS):
        delicate = expert.delicate
        action = expert.act()
        if not is_no_op(action, previous):
            observations.append(env.observe())
            actions.append(action)
        drift = _NOISE_MEMORY * drift + np.sqrt(1 - _NOISE_MEMORY**2) * level * rng.standard_normal(6) * _NOISE_SHARE
        executed = action.copy()
        executed[:6] = np.clip(action[:6] + drift * (_DELICATE_SHARE if delicate else 1.0), -1.0, 1.0)
        solved, previous = env.step(executed), action
        if expert.done:
            break
    success = solved and expert.done and not expert.failed
    episode = _as_episode(env, observations, actions, source) if success else None
    return Demonstration(episode, len(actions), "failed in " + expert.phase if expert.failed else expert.phase)


def _random_start(env: LiberoEnv, rng: np.random.Generator) -> None:
    """0 to 9 unrecorded steps in one random direction."""
    action = np.concatenate([_START_SIZE * rng.standard_normal(6) * _NOISE_SHARE, [OPEN]])
    for _ in range(int(rng.integers(_MAX_START_STEPS + 1))):
        env.step(action)


def _as_episode(env: LiberoEnv, observations: list[Observation], actions: list[np.ndarray], source: str) -> Episode:
    return Episode(
        images=[encode_jpeg(seen.image) for seen in observations],
        wrist_images=[encode_jpeg(seen.wrist_image) for seen in observations],
        state=np.stack([seen.state for seen in observations]),
        joint_state=np.stack([seen.joint_state for seen in observations]),
        action=np.stack(actions),
        instruction=env.instruction,
        source=source,
    )
