"""LIBERO's HDF5 demonstrations, from the raw file through the real simulator to samples for training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed")
pytest.importorskip("h5py", reason="h5py is not installed")

import h5py

from experiments.mini.expert import Expert, settle
from experiments.robot.libero import regenerate_libero_dataset
from experiments.robot.libero.convert_hdf5_to_rlds import ConvertConfig, convert
from experiments.robot.libero.demonstrations import (
    Demonstration,
    demonstration_file,
    read_demonstrations,
    rotate,
    write_demonstration,
)
from experiments.robot.libero.regenerate_libero_dataset import RegenerateConfig, quaternions, regenerate
from experiments.robot.libero.simulator.environment import LiberoEnv
from experiments.robot.libero.suites.task import read_states, states_of
from experiments.robot.libero.suites.tasks import get_task
from prismatic.util.errors import UsageError
from prismatic.vla.datasets import RLDSDataset

SUITE, TASK = "libero_object", 6
NO_OP_AT = (0, 5, 12)


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with LiberoEnv(SUITE, TASK, image_size=32, render="fast") as simulator:
        yield simulator


@pytest.fixture(scope="module")
def raw(env: LiberoEnv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like LIBERO's: the end of an expert's episode with no-ops put in, and some steps that reach no goal.

    The first one begins where the butter is held above the basket.
    """
    folder = tmp_path_factory.mktemp("raw")
    env.reset(env.init_states[0])
    settle(env)
    expert, actions, state = Expert(env), [], None
    while not expert.done:
        if state is None and expert.phase == "open":
            state = env.domain.sim.get_state().flatten()
        action = expert.act()
        env.step(action)
        if state is not None:
            actions.append(action)
    task, first_state = env.task, env.init_states[0]
    assert not expert.failed and state is not None
    for place in NO_OP_AT:
        gripper = actions[place - 1][6] if place else -1.0
        actions.insert(place, np.array([0.0] * 6 + [gripper]))
    with h5py.File(demonstration_file(folder, task.name), "w") as file:
        write_demonstration(file, "demo_0", _blank(np.array(actions[:6]), np.tile(first_state, (6, 1))))
        write_demonstration(file, "demo_1", _blank(np.array(actions), np.tile(state, (len(actions), 1))))
    return folder


def _blank(actions: np.ndarray, states: np.ndarray, side: int = 8) -> Demonstration:
    images = np.zeros((len(actions), side, side, 3), np.uint8)
    widths = {"robot_states": 9, "ee_states": 6, "gripper_states": 2, "joint_states": 7}
    zeros = {name: np.zeros((len(actions), width)) for name, width in widths.items()}
    return Demonstration(actions=actions, states=states, images=images, wrist_images=images, **zeros)


@pytest.fixture(scope="module")
def regenerated(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("new") / "libero_object_no_noops"
    regenerate(_config(raw, target))
    return target


def _config(raw: Path, target: Path, **changes: object) -> RegenerateConfig:
    values = {"libero_task_suite": SUITE, "task_ids": str(TASK), "image_size": 32, "render": "fast"}
    return RegenerateConfig(**{**values, "libero_raw_data_dir": raw, "libero_target_dir": target, **changes})


def test_keeps_the_successful_one_without_no_ops(raw: Path, regenerated: Path) -> None:
    file = demonstration_file(regenerated, get_task(SUITE, TASK).name)
    ((name, found),) = read_demonstrations(file)
    ((_, _), (_, given)) = read_demonstrations(demonstration_file(raw, get_task(SUITE, TASK).name))
    assert name == "demo_0"
    kept = np.delete(given.actions, NO_OP_AT, axis=0)
    np.testing.assert_array_equal(found.actions, kept)
    np.testing.assert_array_equal(found.states[0], given.states[0])
    assert found.images.shape == found.wrist_images.shape == (len(kept), 32, 32, 3)
    hand, axis_angle = found.ee_states[:, :3], found.ee_states[:, 3:]
    np.testing.assert_array_equal(found.robot_states, np.hstack([found.gripper_states, hand, quaternions(axis_angle)]))
    assert hand[-1, 2] - hand[0, 2] > 0.03  # it retreats
    with h5py.File(file) as opened:
        demo = opened["data/demo_0"]
        assert demo["dones"][:].tolist() == demo["rewards"][:].tolist() == [0] * (len(kept) - 1) + [1]
        np.testing.assert_array_equal(demo["obs/ee_ori"][:], axis_angle)


def test_images_are_raw_and_of_the_recorded_moment(env: LiberoEnv, regenerated: Path) -> None:
    task = get_task(SUITE, TASK)
    ((_, found),) = read_demonstrations(demonstration_file(regenerated, task.name))
    env.reset(found.states[0])
    settle(env)
    for step in range(4):
        seen = env.observe()
        np.testing.assert_array_equal(rotate(found.images[step]), seen.image)
        np.testing.assert_array_equal(rotate(found.wrist_images[step]), seen.wrist_image)
        np.testing.assert_array_equal(np.hstack([found.ee_states, found.gripper_states])[step], seen.state)
        if step:
            np.testing.assert_array_equal(found.states[step], env.domain.sim.get_state().flatten())
        env.step(found.actions[step])


def test_metainfo_gives_the_evaluation_its_states(raw: Path, regenerated: Path) -> None:
    task = get_task(SUITE, TASK)
    path = regenerated / "libero_object_metainfo.json"
    content = json.loads(path.read_text())
    key = "pick_up_the_butter_and_place_it_in_the_basket"
    assert {name: entry["success"] for name, entry in content[key].items()} == {"demo_0": False, "demo_1": True}
    states = states_of(read_states(path), task, path)
    assert states[0] is None
    ((_, found),) = read_demonstrations(demonstration_file(regenerated, task.name))
    np.testing.assert_array_equal(states[1], found.states[0])


def test_runs_again_only_for_what_is_missing(
    raw: Path, regenerated: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(regenerate_libero_dataset, "regenerate_task", lambda *_: pytest.fail("the task is finished"))
    regenerate(_config(raw, regenerated))
    copy = shutil.copytree(regenerated, tmp_path / "copy")
    (copy / "libero_object_metainfo.json").unlink()
    with pytest.raises(UsageError, match=r"_demo.hdf5 is there, but not from this command; remove it"):
        regenerate(_config(raw, copy))
    for changes, message in (
        ({"task_ids": "5,6"}, r"--libero_raw_data_dir: no such file: .*tomato_sauce.*_demo.hdf5"),
        ({"libero_raw_data_dir": tmp_path / "nowhere"}, r"--libero_raw_data_dir: no such folder"),
        ({"libero_target_dir": raw}, r"is the raw folder; accepted: another one"),
        ({"libero_task_suite": "libero_objects"}, r"unknown value 'libero_objects'"),
    ):
        with pytest.raises(UsageError, match=message):
            regenerate(_config(raw, tmp_path / "new", **changes))


def test_converted_data_are_samples_for_training(regenerated: Path, tmp_path: Path) -> None:
    folder = convert(ConvertConfig(hdf5_dir=regenerated, out=tmp_path, task_suite_name=SUITE))
    assert folder == tmp_path / "libero_object_no_noops" / "1.0.0"
    assert [path.name for path in tmp_path.iterdir()] == ["libero_object_no_noops"]
    ((_, found),) = read_demonstrations(demonstration_file(regenerated, get_task(SUITE, TASK).name))
    dataset = RLDSDataset(tmp_path, "libero_object_no_noops", lambda frame: frame, (32, 32))
    assert len(dataset) == len(found) - 7
    frame = dataset.frame(4)
    assert frame["task"]["language_instruction"] == "pick up the butter and place it in the basket"
    for view, images in (("image_primary", found.images), ("image_wrist", found.wrist_images)):
        difference = frame["observation"][view][0].astype(int) - rotate(images[4])
        assert np.abs(difference).mean() < 6  # JPEG
        assert np.abs(frame["observation"][view][0].astype(int) - images[4]).mean() > 10
    statistics = dataset.dataset_statistics["libero_object_no_noops"]
    assert statistics["num_transitions"] == len(found)
    np.testing.assert_allclose(statistics["proprio"]["max"][:6], found.ee_states.max(axis=0), rtol=1e-6)
    assert set(frame["action"][:, 6]) <= {0.0, 1.0}
    with pytest.raises(UsageError, match=r"--dataset_name: .*libero_object_no_noops exists"):
        convert(ConvertConfig(hdf5_dir=regenerated, out=tmp_path, task_suite_name=SUITE))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def _delete(name: str) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file[name]

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "no readable HDF5 file"),
        (_delete("data"), "no group 'data'"),
        (_delete("data/demo_0/actions"), "demo_0: no data set actions; found: "),
        (_delete("data/demo_0"), "hold no demonstration"),
        (Path.unlink, r"holds no \*_demo.hdf5"),
    ],
)
def test_damaged_files(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    source = tmp_path / "hdf5"
    source.mkdir()
    file = source / "KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5"
    with h5py.File(file, "w") as opened:
        write_demonstration(opened, "demo_0", _blank(np.zeros((3, 7)), np.zeros((3, 5))))
    damage(file)
    with pytest.raises(UsageError, match=message):
        convert(ConvertConfig(hdf5_dir=source, out=tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*")) or not (tmp_path / "out").exists()


def test_what_is_finished_is_written_down_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks end in any order; the metainfo tells of each that has ended, in the order of the tasks."""
    config = RegenerateConfig(libero_raw_data_dir=tmp_path, libero_target_dir=tmp_path / "out")
    report = {"demo_0": {"success": True, "initial_state": [0.0]}}

    def reports(config: RegenerateConfig, tasks: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield 1, report
        assert list(json.loads(config.metainfo.read_text())) == ["second"]
        yield 0, report

    monkeypatch.setattr(regenerate_libero_dataset, "_todo", lambda config, done: {0: "first", 1: "second"})
    monkeypatch.setattr(regenerate_libero_dataset, "_reports", reports)
    assert list(json.loads(regenerate(config).read_text())) == ["first", "second"]
