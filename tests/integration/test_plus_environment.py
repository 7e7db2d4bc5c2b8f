"""LIBERO-Plus in the real simulator: what each kind changes, and a short run of every kind that the assets allow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.rollouts.protocol import DUMMY_ACTION
from experiments.robot.libero.run_libero_eval import eval_libero
from experiments.robot.libero.simulator.environment import LiberoEnv
from experiments.robot.libero.suites import plus
from experiments.robot.libero.suites.plus import PlusTask
from tests.helpers.episode_results import small_run
from tests.helpers.eval_helpers import NoisePolicy

pytest.importorskip("libero", reason="LIBERO is not installed")
pytest.importorskip("liberoplus", reason=f"LIBERO-Plus is not installed: {plus.INSTALL_HINT}")
pytestmark = pytest.mark.sim

SUITE = "libero_plus_object"
BASE = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"  # Task 0 of libero_object.


def task_of(kind: str, level: int | None = None) -> PlusTask:
    candidates = [task for task in plus.plus_tasks(SUITE) if task.kind == kind and task.base == BASE]
    return next(task for task in candidates if level in (None, task.level))


def make(task: PlusTask) -> LiberoEnv:
    return LiberoEnv(task.suite, task.task_id, image_size=64)


def arm(env: LiberoEnv) -> np.ndarray:
    return env._data.qpos[env._robot._ref_joint_pos_indexes].copy()


@pytest.fixture(scope="module")
def base() -> Iterator[LiberoEnv]:
    with LiberoEnv("libero_object", 0, image_size=64) as env:
        env.reset(env.init_states[0])
        yield env


def test_the_robot_starts_and_stays_where_the_task_puts_it(base: LiberoEnv) -> None:
    task = task_of("robot", level=5)
    with make(task) as env:
        wanted = np.array(plus._robot_starts()[task.robot])
        liberos = env.init_states[0][1:8]
        assert np.linalg.norm(wanted - liberos) == pytest.approx(0.5, abs=0.1)
        env.reset(env.init_states[0])
        assert np.array_equal(arm(env), wanted)
        seen = env.observe()
        for _ in range(10):
            env.step(np.array(DUMMY_ACTION))
        assert np.abs(arm(env) - wanted).max() < 0.01
        # Nothing else moved: the objects are LIBERO's, the picture of the hand's camera is another one.
        assert np.array_equal(env.init_states[0][10:], base.init_states[0][10:])
        assert np.abs(seen.wrist_image.astype(int) - base.observe().wrist_image).mean() > 10
        env.robot_start = "package"
        env.reset(env.init_states[0])
        assert np.array_equal(arm(env), liberos)
        for _ in range(10):
            env.step(np.array(DUMMY_ACTION))
        assert np.linalg.norm(arm(env) - liberos) > 0.1  # On its way, pulled by the controller.


def test_the_camera_moves_and_the_hands_camera_does_not(base: LiberoEnv) -> None:
    with make(task_of("camera")) as env:
        env.reset(env.init_states[0])
        seen, unperturbed = env.observe(), base.observe()
        assert np.abs(seen.image.astype(int) - unperturbed.image).mean() > 5
        assert np.array_equal(seen.wrist_image, unperturbed.wrist_image)
        assert np.array_equal(seen.state, unperturbed.state)


def test_noise_is_on_one_picture_and_repeats(base: LiberoEnv) -> None:
    with make(task_of("noise")) as env:
        env.reset(env.init_states[0])
        first, again = env.observe(), env.observe()
        assert np.array_equal(first.image, again.image)
        assert np.abs(first.image.astype(int) - base.observe().image).mean() > 1
        assert np.array_equal(first.wrist_image, base.observe().wrist_image)
        env.step(np.array(DUMMY_ACTION))
        moved = env.observe().image
        env.reset(env.init_states[0])
        assert np.array_equal(env.observe().image, first.image)
        env.step(np.array(DUMMY_ACTION))
        assert np.array_equal(env.observe().image, moved)


def test_every_kind_that_can_runs_and_is_resumed(tmp_path: Path) -> None:
    chosen = {"perturbations": "camera,robot,language,noise,layout_level", "task_subset": 5, "num_trials_per_task": 1}
    config = small_run(tmp_path, task_suite_name=SUITE, task_ids="", max_steps=8, num_steps_wait=2, **chosen)
    summary = eval_libero(config, NoisePolicy())
    lines = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    assert sorted(line["kind"] for line in lines) == ["camera", "language", "layout", "noise", "robot"]
    assert all(line["status"] == "failure" and line["steps"] == 8 and line["suite"] == SUITE for line in lines)
    assert all(line["level"] for line in lines if line["kind"] in ("noise", "robot", "layout"))
    assert set(summary["perturbations"]["kinds"]) == {line["kind"] for line in lines}
    assert lines[0]["identity"]["instruction_source"] == "bddl"
    kept = (tmp_path / "run" / "episodes.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "episodes.jsonl").write_text("".join(kept[:4]))
    eval_libero(config, NoisePolicy())
    resumed = [json.loads(line) for line in (tmp_path / "run" / "episodes.jsonl").read_text().splitlines()]
    assert [line["task_name"] for line in resumed] == [line["task_name"] for line in lines]


def test_a_task_of_libero_pro_runs(tmp_path: Path) -> None:
    short = {"num_trials_per_task": 1, "max_steps": 8, "num_steps_wait": 2}
    config = small_run(tmp_path, task_suite_name="libero_object_swap", task_ids="0", **short)
    assert eval_libero(config, NoisePolicy())["total"]["failures"] == 1
