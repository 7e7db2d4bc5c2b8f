"""RoboTwin's demonstrations of both layouts as training data: every frame equals the source's; stops and damage."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments.robot.robotwin import convert as module
from experiments.robot.robotwin.convert import ConvertConfig, convert
from prismatic.util.errors import UsageError
from prismatic.util.files import read_json
from prismatic.vla.datasets.builder import find_splits
from prismatic.vla.datasets.episodes import EpisodeData
from prismatic.vla.datasets.specs import DATASETS
from prismatic.vla.platforms import ALOHA_AGILEX
from tests.helpers.robotwin_files import SEEN, UNSEEN, as_read, make_episode, write_legacy, write_v1

NAME = "robotwin_lift_pot_clean"
EPISODES = [make_episode(frames, seed) for seed, frames in enumerate((5, 8, 4))]
FORMATS: list[dict[str, Any]] = [{"lerobot_version": "v3.0"}, {"lerobot_version": "v2.1"}, {"format": "rlds"}]


def config(root: Path, **flags: Any) -> ConvertConfig:
    return ConvertConfig(data_dir=root / "data", out=root / "out", **flags)


def read_back(folder: Path) -> EpisodeData:
    return find_splits(folder.parent, folder.name, DATASETS[NAME], ALOHA_AGILEX)["train"].load()


def files_of(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


@pytest.mark.parametrize("write", [write_legacy, write_v1])
@pytest.mark.parametrize("flags", FORMATS, ids=["v3.0", "v2.1", "rlds"])
def test_frames_equal_the_sources(write: Any, flags: dict[str, Any], tmp_path: Path) -> None:
    for number, episode in enumerate(EPISODES):
        write(tmp_path / "data", number, episode)
    (folder,) = convert(config(tmp_path, **flags))
    assert folder.name == NAME and read_json(folder / "conversion.json")["settings"]["instructions"] == "seen"
    data = read_back(folder)
    joints = [episode["joints"].astype(np.float32) for episode in EPISODES]
    np.testing.assert_array_equal(data.state, np.concatenate([values[:-1] for values in joints]))
    np.testing.assert_array_equal(data.action, np.concatenate([values[1:] for values in joints]))
    assert data.episode_start.tolist() == [0, 4, 11, 14]
    assert set(data.instructions) <= set(SEEN)
    for view, camera in enumerate(("head_camera", "left_camera", "right_camera")):
        expected = np.concatenate([as_read(episode["pictures"][camera][:-1]) for episode in EPISODES])
        np.testing.assert_array_equal([data.image(view, frame) for frame in range(14)], expected)


@pytest.mark.parametrize("flags", FORMATS, ids=["v3.0", "v2.1", "rlds"])
def test_an_interrupted_conversion_goes_on_and_gives_the_same_files(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, episode in enumerate(EPISODES):
        write_legacy(tmp_path / "data", number, episode)
    (straight,) = convert(ConvertConfig(data_dir=tmp_path / "data", out=tmp_path / "straight", **flags))
    read, asked = module.read_demonstration, []

    def stop_at_the_third(path: Path, split: str) -> Any:
        asked.append(path.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return read(path, split)

    monkeypatch.setattr(module, "read_demonstration", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        convert(config(tmp_path, **flags))
    with open(tmp_path / "out" / f".{NAME}.converting" / "journal.jsonl", "a") as journal:
        journal.write('{"form": [24')  # As a power cut leaves it.
    with pytest.raises(UsageError, match="unfinished conversion of other files or settings"):
        convert(config(tmp_path, **flags, image_format="jpeg"))
    (folder,) = convert(config(tmp_path, **flags))
    assert asked == ["episode0.hdf5", "episode1.hdf5", "episode2.hdf5", "episode2.hdf5"]
    assert files_of(folder) == files_of(straight)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    convert(config(tmp_path, **flags))
    assert len(asked) == 4  # A finished one is left alone.
    with pytest.raises(UsageError, match="holds other data"):
        convert(config(tmp_path, **flags, seed=1))


@pytest.mark.parametrize("flags", FORMATS, ids=["v3.0", "v2.1", "rlds"])
def test_a_stop_while_tidying_up_leaves_no_record_of_files_that_are_gone(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, episode in enumerate(EPISODES):
        write_legacy(tmp_path / "data", number, episode)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            convert(config(tmp_path, **flags))
    shutil.copytree(tmp_path / "out", tmp_path / "again")
    (folder,) = convert(config(tmp_path, **flags))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    whole = files_of(folder)
    shutil.rmtree(tmp_path / "again" / NAME)
    (anew,) = convert(ConvertConfig(data_dir=tmp_path / "data", out=tmp_path / "again", **flags))
    assert files_of(anew) == whole and read_back(anew).num_episodes == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [("joint_action/left_gripper", 0.5), ("observation/head_camera/rgb", 3), ("joint_action", 1), ("observation", 1)],
)
def test_parts_of_another_kind_are_damage_that_names_the_file(key: str, value: float, tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "data", 0, EPISODES[0])
    with h5py.File(path, "a") as file:
        del file[key]
        file[key] = value
    with pytest.raises(UsageError, match=r"episode0.hdf5: no whole RoboTwin episode"):
        convert(config(tmp_path))


def test_instructions_that_are_no_texts_and_rates_that_are_none_are_damage(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "data", 0, EPISODES[0])
    (path.parents[1] / "instructions" / "episode0.json").write_text('{"seen": null}')
    with pytest.raises(UsageError, match=r"episode0.hdf5: .*instructions: None found"):
        convert(config(tmp_path))
    path = write_v1(tmp_path / "new" / "data", 0, EPISODES[0])
    with h5py.File(path, "a") as file:
        file["additional_info/frequency"][()] = 0
    with pytest.raises(UsageError, match=r"episode_0000000.hdf5: .*0.0 frames a second"):
        convert(config(tmp_path / "new"))


def test_a_missing_h5py_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_legacy(tmp_path / "data", 0, EPISODES[0])
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UsageError, match=r"^HDF5 files need h5py"):
        convert(config(tmp_path, skip_damaged=True))
    assert not (tmp_path / "out").exists()


def test_damaged_files_are_named_and_left_out_by_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_legacy(tmp_path / "data", number, episode) for number, episode in enumerate(EPISODES)]
    paths[0].write_bytes(paths[0].read_bytes()[:3000])
    broken = EPISODES[1]["joints"].copy()
    broken[2, 3] = np.nan
    write_legacy(tmp_path / "data", 1, {**EPISODES[1], "joints": broken})
    with pytest.raises(UsageError, match=r"episode0.hdf5: no whole RoboTwin episode .*; --skip_damaged True leaves it"):
        convert(config(tmp_path))
    (folder,) = convert(config(tmp_path, skip_damaged=True))
    assert read_back(folder).num_episodes == 1
    said = capsys.readouterr().out
    assert "left out:" in said and "episode1.hdf5: no whole RoboTwin episode (joints that are not finite)" in said
    assert len(read_json(folder / "conversion.json")["damaged"]) == 2


def test_tasks_configurations_and_unknown_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_legacy(tmp_path / "data", 0, EPISODES[0], config="demo_randomized")
    write_v1(tmp_path / "data" / "RoboTwin", 0, EPISODES[1], task="fold_towel")
    folders = convert(config(tmp_path, instructions="unseen", format="rlds"))
    assert [folder.name for folder in folders] == ["robotwin_fold_towel_clean", "robotwin_lift_pot_randomized"]
    assert read_back(folders[1]).instructions == tuple(UNSEEN)
    assert "--dataset_file" in capsys.readouterr().out
    assert (tmp_path / "out" / "datasets.yaml").read_text().startswith("robotwin_fold_towel_clean:")


def test_downloads_tell_configuration_and_robot_by_their_folders(tmp_path: Path) -> None:
    for name, episode in zip(("aloha-agilex_clean_50", "aloha-agilex_randomized_500"), EPISODES):
        write_legacy(tmp_path / "data", 0, episode, config=name)
    folders = convert(config(tmp_path))
    assert [folder.name for folder in folders] == [NAME, "robotwin_lift_pot_randomized"]
    assert [read_back(folder).num_frames for folder in folders] == [4, 7]
    write_legacy(tmp_path / "data", 0, EPISODES[0], config="piper_clean_50")
    for flags in ({}, {"dataset_name": "all"}):
        with pytest.raises(UsageError, match=r"piper_clean_50 of another robot found; accepted: .*aloha-agilex"):
            convert(config(tmp_path, **flags))


def test_two_folders_are_not_one_dataset_unless_it_is_named(tmp_path: Path) -> None:
    write_legacy(tmp_path / "data", 0, EPISODES[0])
    write_legacy(tmp_path / "data", 0, EPISODES[1], config="my_light")
    with pytest.raises(UsageError, match=rf"demo_clean and .*my_light found for {NAME}; accepted: one folder"):
        convert(config(tmp_path))
    (folder,) = convert(config(tmp_path, dataset_name="both"))
    assert read_back(folder).num_episodes == 2


def test_a_task_is_told_by_its_folder_wherever_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_legacy(tmp_path, 0, EPISODES[0])
    (path.parents[1] / "instructions" / "episode0.json").unlink()
    for place, given in ((tmp_path / "lift_pot", "."), (path.parent, "."), (path.parents[1], "data")):
        monkeypatch.chdir(place)
        (folder,) = convert(ConvertConfig(data_dir=Path(given), out=tmp_path / "out" / place.name))
        assert folder.name == NAME and read_back(folder).instructions == ("lift pot",)


def test_a_named_dataset_takes_so_many_episodes_of_each_task(tmp_path: Path) -> None:
    for number, episode in enumerate(EPISODES[:2]):
        write_legacy(tmp_path / "data", number, episode)
        write_v1(tmp_path / "data", number, episode, task="fold_towel")
    (folder,) = convert(config(tmp_path, dataset_name="both", episodes=1))
    sources = [name for name, _ in read_json(folder / "conversion.json")["sources"]]
    assert [name.split("/")[0] for name in sources] == ["fold_towel", "lift_pot"]


@pytest.mark.parametrize(
    "flags",
    [{"dataset_name": name} for name in ("a/b", "..", " a", "a,b", "robotwin_clean", "libero_spatial", "gym_aloha")]
    + [{"task_config": "clean/x"}],
)
def test_names_that_training_could_not_read_are_refused_before_anything_is(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    write_v1(tmp_path / "data", 0, EPISODES[0])
    with pytest.raises(UsageError, match=rf"--{next(iter(flags))}: dataset .* found; accepted: the name of a folder"):
        convert(config(tmp_path, **flags))
    assert not (tmp_path / "out").exists()


def test_a_picture_that_is_cut_short_and_another_robot_are_refused(tmp_path: Path) -> None:
    path = write_v1(tmp_path / "data", 0, EPISODES[0])
    with h5py.File(path, "a") as file:
        colors = file["vision/cam_head/colors"][()]
        del file["vision/cam_head/colors"]
        file["vision/cam_head/colors"] = np.array([bytes(colors[0])[:80], *colors[1:]])
    with pytest.raises(UsageError, match=r"episode_0000000.hdf5: image: 80 bytes that are no complete JPEG"):
        convert(config(tmp_path))
    with h5py.File(path, "a") as file:
        del file["state/left_arm_joint_states"]
        file["state/left_arm_joint_states"] = np.zeros((4, 7))
    with pytest.raises(UsageError, match=r"7, 1, 6, 1.* accepted: those of aloha-agilex"):
        convert(config(tmp_path))


def test_lerobot_finds_tasks_by_name_and_statistics_of_all_frames(tmp_path: Path) -> None:
    for number, episode in enumerate(EPISODES):
        write_v1(tmp_path / "data", number, episode)
    (folder,) = convert(config(tmp_path))
    stats = json.loads((folder / "meta" / "stats.json").read_text())
    tasks = json.loads(pq.read_schema(folder / "meta" / "tasks.parquet").metadata[b"pandas"])
    assert tasks["index_columns"] == ["task"] and tasks["columns"][0]["field_name"] == "task"
    actions = np.concatenate([episode["joints"][1:] for episode in EPISODES])
    np.testing.assert_allclose(stats["action"]["mean"], actions.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], actions.std(axis=0), atol=1e-6)
    assert stats["action"]["count"] == [14] and np.shape(stats["observation.images.cam_high"]["mean"]) == (3, 1, 1)
