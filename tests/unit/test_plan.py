from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.libero.rollouts.plan import default_run_name, make_plan, run_environment, run_identity
from experiments.robot.libero.rollouts.protocol import protocol_deviations
from experiments.robot.libero.run_libero_eval import GenerateConfig
from experiments.robot.libero.suites import tasks
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import ALOHA, BRIDGE, Platform

pytest.importorskip("libero", reason="LIBERO is not installed")


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., GenerateConfig]:
    """A configuration for a checkpoint with every file that is looked at before loading."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla"}))
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    bounds = dict.fromkeys(("q01", "min"), [-1.0] * 8) | dict.fromkeys(("q99", "max"), [1.0] * 8)
    statistics = {"libero_spatial_no_noops": {"action": bounds, "proprio": bounds}, "libero_goal": {"action": bounds}}
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    for name in ("action_head", "proprio_projector"):
        (folder / f"{name}--7_checkpoint.pt").write_bytes(b"weights")

    def make(**changes: Any) -> GenerateConfig:
        return GenerateConfig(**{"pretrained_checkpoint": str(folder), **changes})

    return make


def test_the_default_run_is_the_protocol(config: Callable[..., GenerateConfig]) -> None:
    plan = make_plan(config())
    assert len(plan.episodes) == 500
    assert [episode.key for episode in plan.episodes[49:51]] == [("libero_spatial", 0, 49), ("libero_spatial", 1, 0)]
    assert plan.protocol.max_steps == 220 and plan.protocol.is_standard
    assert plan.unnorm_key == "libero_spatial_no_noops"
    assert plan.episodes[0].task == tasks.get_task("libero_spatial", 0).instruction


def test_a_part_of_the_episodes(config: Callable[..., GenerateConfig]) -> None:
    plan = make_plan(config(task_ids="3,1", num_trials_per_task=2, first_init_state=48))
    assert [(episode.task_id, episode.init_state) for episode in plan.episodes] == [(3, 48), (3, 49), (1, 48), (1, 49)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task_suite_name": "libero_spacial"}, r"--task_suite_name: .*did you mean 'libero_spatial'"),
        ({"pretrained_checkpoint": "/nowhere"}, r"--pretrained_checkpoint: no such folder: '/nowhere'"),
        ({"unnorm_key": "bridge"}, r"--unnorm_key: no statistics of 'bridge'.*libero_goal, libero_spatial_no_noops"),
        ({"task_suite_name": "libero_10"}, r"--unnorm_key \(not given"),
        ({"use_diffusion": True}, r"--use_diffusion: both heads are on"),
        ({"use_diffusion": True, "use_l1_regression": False}, r"--use_diffusion: .* no noisy_action_projector"),
        ({"use_film": True}, r"--use_film: .* has no vision_backbone--\*_checkpoint.pt"),
        ({"unnorm_key": "libero_goal"}, r"--use_proprio: the statistics 'libero_goal' .* have no proprio"),
        ({"num_trials_per_task": 51}, r"--num_trials_per_task: found 51; accepted: at most 50"),
        ({"num_trials_per_task": 2, "first_init_state": 49}, r"--num_trials_per_task: found 2 from .*at most 1"),
        ({"num_open_loop_steps": 9}, r"--num_open_loop_steps: found 9; accepted: 1 to 8"),
        ({"load_in_8bit": True, "load_in_4bit": True}, r"--load_in_4bit: both"),
        ({"num_diffusion_steps_inference": 51}, r"--num_diffusion_steps_inference: found 51; accepted: at most"),
        ({"initial_states_path": "none.json"}, r"--initial_states_path: no such file: none.json"),
    ],
)
def test_mistakes_are_found_before_anything_is_loaded(
    config: Callable[..., GenerateConfig], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        make_plan(config(**changes))


def test_flags_that_contradict_the_training_are_refused(config: Callable[..., GenerateConfig]) -> None:
    folder = Path(config().pretrained_checkpoint)
    (folder / "run_config.json").write_text(json.dumps({"num_images_in_input": 1, "use_proprio": True}))
    with pytest.raises(UsageError, match=r"--num_images_in_input: found 2; accepted: 1, as .* says it was trained"):
        make_plan(config())
    assert make_plan(config(num_images_in_input=1)).checkpoint is not None


@pytest.mark.parametrize(
    ("platform", "use_proprio", "words"),
    [(ALOHA, False, "actions of 14 numbers"), (BRIDGE, True, "states of 7 numbers"), (BRIDGE, False, "")],
)
def test_a_policy_of_another_robot_is_refused_once_and_not_in_every_episode(
    platform: Platform, use_proprio: bool, words: str, config: Callable[..., GenerateConfig]
) -> None:
    file = Path(config().pretrained_checkpoint) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "platform": platform.to_json()}))
    flags = {"use_proprio": use_proprio, "num_open_loop_steps": 5}
    if not words:
        assert make_plan(config(**flags)).checkpoint is not None
        return
    with pytest.raises(UsageError, match=f"is a policy of {platform.name}, with {words}; accepted: "):
        make_plan(config(**flags))


def test_a_film_or_diffusion_checkpoint_is_not_taken_for_another(config: Callable[..., GenerateConfig]) -> None:
    folder = Path(config().pretrained_checkpoint)
    (folder / "noisy_action_projector--7_checkpoint.pt").write_bytes(b"weights")
    with pytest.raises(UsageError, match="holds a diffusion head"):
        make_plan(config())
    (folder / "vision_backbone--7_checkpoint.pt").write_bytes(b"weights")
    with pytest.raises(UsageError, match="was trained with FiLM"):
        make_plan(config(use_l1_regression=False, use_diffusion=True))


def test_scenes_with_the_same_instruction_have_states_of_their_own(
    config: Callable[..., GenerateConfig], tmp_path: Path
) -> None:
    """As regenerate_libero_dataset.py writes them: the second scene's are under the task's whole name."""
    names = {"turn_on_the_stove": 3.0, "KITCHEN_SCENE9_turn_on_the_stove": 9.0}
    states = {name: {"demo_0": {"initial_state": [value], "success": True}} for name, value in names.items()}
    file = tmp_path / "libero_90_metainfo.json"
    file.write_text(json.dumps(states))
    flags = {"task_suite_name": "libero_90", "unnorm_key": "libero_spatial_no_noops", "num_trials_per_task": 1}
    plan = make_plan(config(task_ids="20,44", initial_states_path=str(file), **flags))
    assert [episode.start_vector for episode in plan.episodes] == [(3.0,), (9.0,)]


def test_no_renderer_is_found_out_early(config: Callable[..., GenerateConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(UsageError, match="no off-screen renderer found"):
        make_plan(config())


def test_own_initial_states(config: Callable[..., GenerateConfig], tmp_path: Path) -> None:
    """Upstream's JSON layout; demonstrations that failed are left out."""
    task = tasks.get_task("libero_spatial", 2)
    vectors = tasks.load_init_states(task)[:3]
    demos = {
        f"demo_{number}": {"initial_state": vector.tolist(), "success": number != 1}
        for number, vector in enumerate(vectors)
    }
    file = tmp_path / "states.json"
    file.write_text(json.dumps({task.instruction.replace(" ", "_"): demos}))
    plan = make_plan(config(task_ids="2", num_trials_per_task=3, initial_states_path=str(file)))
    assert [episode.init_state for episode in plan.episodes] == [0, 2]
    np.testing.assert_array_equal(np.asarray(plan.episodes[1].start_vector), vectors[2])
    with pytest.raises(UsageError, match=r"--num_trials_per_task: found 4; accepted: at most 3"):
        make_plan(config(task_ids="2", num_trials_per_task=4, initial_states_path=str(file)))
    with pytest.raises(UsageError, match=r"--initial_states_path: .* has no entry 'pick_up"):
        make_plan(config(task_ids="3", num_trials_per_task=1, initial_states_path=str(file)))


@pytest.mark.parametrize(
    "change",
    [{"seed": 8}, {"env_seed": 1}, {"render": "fast"}, {"center_crop": False}, {"max_steps": 10}, {"env_img_res": 128}],
)
def test_what_changes_the_numbers_changes_the_identity(
    config: Callable[..., GenerateConfig], change: dict[str, Any]
) -> None:
    def identity(one: GenerateConfig) -> dict[str, Any]:
        return run_identity(one, make_plan(one), ("cpu", "float32"))

    assert identity(config()) == identity(config(num_trials_per_task=3, num_workers=4, save_videos="all"))
    assert identity(config()) != identity(config(**change))
    assert default_run_name(config(), identity(config())) != default_run_name(config(), identity(config(**change)))


def test_a_default_name_fits_whatever_the_checkpoints_name(tmp_path: Path) -> None:
    flags = GenerateConfig(pretrained_checkpoint="c" * 255, local_log_dir=str(tmp_path), run_id_note="try")
    name = default_run_name(flags, {"policy": {}})
    (tmp_path / name).mkdir()
    assert name.startswith("EVAL-libero_spatial-openvla-ccc") and name.endswith("--try")
    assert default_run_name(flags, {"policy": {}}, "pi05").startswith("EVAL-libero_spatial-pi05-ccc")


def test_versions_are_recorded() -> None:
    assert run_environment(GenerateConfig(pretrained_checkpoint="x"))["torch"] is not None


def test_a_complete_suite_of_ones_own_needs_its_step_limit_alone(config: Callable[..., GenerateConfig]) -> None:
    flags = {"task_suite_name": "libero_study_table", "num_trials_per_task": 1, "unnorm_key": "libero_spatial_no_noops"}
    plan = make_plan(config(max_steps=400, **flags))
    assert len(plan.episodes) == 5 and {episode.max_steps for episode in plan.episodes} == {400}
    with pytest.raises(UsageError, match="--max_steps: no step limit is known for libero_study_table"):
        make_plan(config(**flags))


def test_every_deviation_from_the_protocol_is_listed(config: Callable[..., GenerateConfig], tmp_path: Path) -> None:
    states = tmp_path / "states.npy"
    np.save(states, tasks.load_init_states(tasks.get_task("libero_spatial", 0)))
    odd = config(render="fast", env_seed=3, max_steps=280, instruction_source="name", initial_states_path=str(states))
    odd.num_trials_per_task = 1
    identity = run_identity(odd, make_plan(odd), ())
    assert protocol_deviations(identity) == [
        "max_steps 280", "render fast", "env_seed 3", "initial states of a file", "instruction_source name",
    ]  # fmt: skip
    short = config(render="fast", max_steps=12)
    assert protocol_deviations(run_identity(short, make_plan(short), ())) == ["max_steps 12", "render fast"]
    usual = run_identity(config(), make_plan(config()), ())
    assert protocol_deviations(usual) == [] and usual["standard_protocol"] is True
    other = {**usual, "task_files": {"tasks": "0", "initial_states": usual["task_files"]["initial_states"]}}
    assert protocol_deviations(other) == ["tasks that are not LIBERO's"]
    earlier = {name: value for name, value in usual.items() if name != "task_files"}
    assert default_run_name(config(), usual) == default_run_name(config(), earlier)
