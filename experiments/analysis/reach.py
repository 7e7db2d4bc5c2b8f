"""Measure where the hand closes first, beside the object it is to pick up.

That tells a policy that goes to the wrong place from one that grasps badly, and keeps measuring where success is 0 or
100%. Not an analysis of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.analysis.config import ReachConfig, ReadoutConfig
from experiments.analysis.report import COLORS, Report, new_figure, save_figure, write_json
from experiments.mini.expert import read_goal
from experiments.mini.moved_scene import MovedScene
from experiments.robot.acting import load_policy
from experiments.robot.libero.rollouts.episode import EpisodeRunner, make_libero_env
from experiments.robot.libero.rollouts.plan import Plan, make_plan
from experiments.robot.libero.rollouts.protocol import Episode, Protocol, to_env_action
from experiments.robot.libero.run_libero_eval import GenerateConfig
from experiments.robot.libero.simulator.environment import LiberoEnv
from experiments.robot.libero.suites.tasks import get_task
from experiments.robot.robot_utils import set_seed_everywhere
from prismatic.checkpoint.layout import recorded_policy_flags, split_checkpoint_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from experiments.robot.policy import Policy

# A hand this far beside an object's middle misses the objects of LIBERO, which are 3 to 8 cm wide.
NEAR = 0.02
COLUMNS = ("task_id", "init_state", "step", "hand_x", "hand_y", "object_x", "object_y")
_KEPT = 4  # Environments at a time; one takes about 1 GB.
Array = npt.NDArray[Any]


class Watch:
    """Starts episodes as the evaluation does, and stops each at the first action that closes the gripper.

    Keeps the environments of a few tasks for the next policy: to make one takes longer than its episodes.
    """

    def __init__(self, protocol: Protocol, suite: str, tasks: Iterable[int], scene: str = "task") -> None:
        self._protocol, self._scene = protocol, scene
        self._goals = {task: read_goal(get_task(suite, task)) for task in tasks}
        self._envs: dict[int, LiberoEnv] = {}
        self._runners: dict[int, EpisodeRunner] = {}

    def _make_env(self, episode: Episode, protocol: Protocol) -> LiberoEnv:
        env: LiberoEnv = (
            make_libero_env(episode, protocol)
            if self._scene == "task"
            else MovedScene(episode.suite, episode.task_id, image_size=protocol.image_size, render=protocol.render)
        )
        self._envs[episode.task_id] = env
        return env

    def _runner(self, task: int) -> EpisodeRunner:
        if task not in self._runners:
            if len(self._runners) == _KEPT:
                self._runners.pop(next(iter(self._runners))).close()
            self._runners[task] = EpisodeRunner(self._protocol, self._make_env)
        return self._runners[task]

    def run(self, policy: Policy, episode: Episode) -> list[Any]:
        """An episode's row of :data:`COLUMNS`; `step` is None for a hand that never closed (its place: the last)."""
        runner = self._runner(episode.task_id)
        turn = runner.begin(episode)
        env = self._envs[episode.task_id]
        item = env.domain.objects_dict[self._goals[episode.task_id].item].root_body
        object_xy = env.domain.sim.data.get_body_xpos(item)[:2].copy()
        closed = False
        while turn.query is not None and not closed:
            chunk: Array = np.asarray(policy.act([turn.query])[0])[: self._protocol.open_loop_steps]
            closing = np.flatnonzero([to_env_action(action)[-1] > 0 for action in chunk])
            closed = bool(closing.size)
            turn = runner.advance(chunk[: closing[0] + 1] if closed else chunk)
        place = (*env.state[:2], *object_xy)
        return [episode.task_id, episode.init_state, turn.steps if closed else None, *map(float, place)]

    def close(self) -> None:
        for runner in self._runners.values():
            runner.close()


def policy_flags(config: ReachConfig | ReadoutConfig, folder: str) -> GenerateConfig:
    """The evaluation's flags for a checkpoint: inputs and heads as its run recorded them."""
    values = recorded_policy_flags(Path(folder))
    shared = {field.name for field in fields(GenerateConfig)} & {field.name for field in fields(config)}
    values |= {name: getattr(config, name) for name in shared}
    return GenerateConfig(pretrained_checkpoint=folder, **values)


def measure(flags: GenerateConfig, plan: Plan, watch: Watch) -> Report:
    assert plan.checkpoint is not None
    set_seed_everywhere(flags.seed)
    policy = load_policy(plan.checkpoint, flags, plan.unnorm_key)
    rows = [watch.run(policy, episode) for episode in plan.episodes]
    name = Path(flags.pretrained_checkpoint).name
    run, step = split_checkpoint_name(name)
    return {
        "checkpoint": name,
        "label": run if step is None else f"{run}, step {step:,}",
        "step": step or 0,
        "tasks": {str(episode.task_id): episode.task for episode in plan.episodes},
        "columns": list(COLUMNS),
        "episodes": rows,
        **summarize(rows),
    }


def summarize(rows: Sequence[Sequence[Any]]) -> Report:
    """Numbers of one policy from rows of :data:`COLUMNS`.

    Returns:
        miss: distance in m between hand and object, horizontally, where the hand first closes; each task's median, and
            their mean, since a policy that goes to one task's object in all of them would have a fine median.
        near_share: part of the episodes in which it is below :data:`NEAR`.
        task_ignored: mean over episodes of how far from the task's own object toward the middle of all tasks' objects
            the hand closes: 0 at its own, 1 for a policy that goes to the same place whatever the task; None for a
            single task.
        never_closed: episodes in which the hand did not close; they count in none of the above.
    """
    closed = [row for row in rows if row[2] is not None]
    hands, objects = np.array([row[3:5] for row in closed]), np.array([row[5:7] for row in closed])
    result: Report = {"never_closed": len(rows) - len(closed), "task_ignored": None}
    if not closed:
        return {**result, "miss": None, "near_share": None}
    misses, tasks = np.linalg.norm(hands - objects, axis=1), np.array([row[0] for row in closed])
    numbers = dict.fromkeys(tasks.tolist())
    result["miss"] = float(np.mean([np.median(misses[tasks == task]) for task in numbers]))
    result["near_share"] = float(np.mean(misses < NEAR))
    places = {task: objects[tasks == task].mean(0) for task in numbers}
    if len(places) > 1:
        toward = np.mean(list(places.values()), axis=0) - objects
        result["task_ignored"] = float(np.mean(((hands - objects) * toward).sum(1) / (toward**2).sum(1)))
    return result


def reach(config: ReachConfig) -> int:
    """Measure, write reach.json and reach.png; policies are loaded as for an evaluation."""
    flags = [policy_flags(config, folder) for folder in config.checkpoints]
    plans = [make_plan(policy) for policy in flags]  # Before the first of them runs: a wrong folder is named at once.
    tasks = dict.fromkeys(episode.task_id for episode in plans[0].episodes)
    watch = Watch(plans[0].protocol, config.task_suite_name, tasks, config.scene)
    try:
        parts = [measure(policy, plan, watch) for policy, plan in zip(flags, plans, strict=True)]
    finally:
        watch.close()
    settings = {
        name: getattr(config, name) for name in ("task_suite_name", "scene", "num_trials_per_task", "render", "seed")
    }
    write_json(config.out_dir / "reach.json", {"analysis": "reach", **settings, "near": NEAR, "subjects": parts})
    draw(config, parts)
    for part in parts:
        if part["miss"] is None:
            print(f"{part['label']}: the hand never closed")
            continue
        ignored = "" if part["task_ignored"] is None else f", task ignored {part['task_ignored']:.2f}"
        print(
            f"{part['label']}: closes {100 * part['miss']:.1f} cm beside the object, "
            f"{100 * part['near_share']:.0f}% within {100 * NEAR:.0f} cm{ignored}"
        )
    return 0


def draw(config: ReachConfig, parts: list[Report]) -> None:
    """From above: the objects, and where each policy closed its hand; a color a task, a row a run of several steps."""
    steps = len({part["step"] for part in parts})
    columns = steps if steps > 1 else min(len(parts), 5)
    rows = -(-len(parts) // columns)
    figure = new_figure(max(1.7 * columns, 3.5), 1.9 * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.ravel()[len(parts) :]:
        axes.set_axis_off()
    for axes, part in zip(grid.ravel(), parts, strict=False):
        _draw_part(axes, part)
    grid[0, 0].margins(0.15)
    figure.supxlabel("to the side (cm)", fontsize=9)
    figure.supylabel("to the front (cm)", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    save_figure(figure, config.out_dir / "reach.png")


def _draw_part(axes: Axes, part: Report) -> None:
    for number, (task, instruction) in enumerate(part["tasks"].items()):
        rows = [row for row in part["episodes"] if str(row[0]) == task]
        color = COLORS[number % len(COLORS)]
        own_cm = 100 * np.median([row[5:7] for row in rows], axis=0)
        axes.plot(own_cm[1], own_cm[0], "s", ms=9, mfc="none", mec=color)
        closed_cm = 100 * np.array([row[3:5] for row in rows if row[2] is not None]).reshape(-1, 2)
        what = re.sub(r"^pick up the (.*?) and place it .*", r"\1", instruction)
        axes.plot(closed_cm[:, 1], closed_cm[:, 0], "x", ms=4, mew=1, color=color, label=f"{what}: box; hand: x")
    miss = "" if part["miss"] is None else f": {100 * part['miss']:.1f} cm"
    axes.set_title(part["label"].replace(", step ", "\nstep ") + miss, fontsize=8)
    axes.set_aspect("equal")
