"""CPU seconds of an episode of two arms in simulators that come from the package registry, cameras included.

    python benchmarks/two_arms.py --steps 40

An episode is 150 actions and three pictures of 128 pixels at every tenth. It is estimated from `--steps` actions. A
simulator that is not installed is left out: `pip install --no-deps dm-control==1.0.34 dm-env lxml` for gym-aloha's own.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.robot.libero.simulator.rendering import choose_renderer, import_robosuite
from prismatic.util.cli import run
from prismatic.util.flags import check, limited

EPISODE, QUERY, SIZE = 150, 10, 128
Simulator = tuple[str, Callable[[], object], Callable[[], object]]  # Name, one action, three pictures


@dataclass
class BenchmarkConfig:
    steps: int = limited(40, least=10)  # Actions measured in each simulator

    def __post_init__(self) -> None:
        check(self)


def simulators() -> Iterator[Simulator]:
    """Those that are installed, each made when it is asked for."""
    if importlib.util.find_spec("gym_aloha"):
        from experiments.robot.aloha.environment import AlohaEnv
        from experiments.robot.aloha.suite import IDLE

        for render in ("fast", "protocol"):
            env = AlohaEnv(image_size=SIZE, render=render)
            yield f"gym-aloha's scene, {render}", partial(env.step, np.array(IDLE)), env.observe
    if importlib.util.find_spec("gym_aloha") and importlib.util.find_spec("dm_control"):
        from gym_aloha.env import AlohaEnv as OwnEnv

        own = OwnEnv("transfer_cube", observation_width=SIZE, observation_height=SIZE)
        own.reset(seed=0)
        # Two of its steps are one of ours; it draws its three pictures by itself, in 480 x 640.
        yield "gym-aloha's own environment", lambda: [own.step(np.array(IDLE)) for _ in range(2)], lambda: None
    if importlib.util.find_spec("robosuite"):
        import_robosuite()
        import robosuite

        lift = robosuite.make(
            "TwoArmLift", robots=["Panda", "Panda"], has_renderer=False, use_camera_obs=False, ignore_done=True
        )
        lift.reset()
        cameras = ("agentview", "robot0_eye_in_hand", "robot1_eye_in_hand")
        idle = np.zeros(lift.action_dim)
        yield (
            "robosuite TwoArmLift",
            lambda: lift.step(idle),
            lambda: [lift.sim.render(width=SIZE, height=SIZE, camera_name=name) for name in cameras],
        )


def main(config: BenchmarkConfig) -> None:
    """Print a row for each simulator."""
    choose_renderer()
    fastest = 0.0
    print("| simulator | CPU seconds an episode | relative |\n|---|---:|---:|")
    for name, act, draw in simulators():
        act()
        draw()
        spent = {"act": 0.0, "draw": 0.0}
        for step in range(config.steps):
            started = time.process_time()
            act()
            acted = time.process_time()
            spent["act"] += acted - started
            if step % QUERY == 0:
                draw()
                spent["draw"] += time.process_time() - acted
        queries = -(-config.steps // QUERY)
        seconds = EPISODE * (spent["act"] / config.steps + spent["draw"] / queries / QUERY)
        fastest = fastest or seconds
        print(f"| {name} | {seconds:.2f} | {seconds / fastest:.1f} |", flush=True)


if __name__ == "__main__":
    run(BenchmarkConfig, main)
