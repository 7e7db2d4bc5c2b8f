"""Folders of openpi with several robots' statistics, and with actions that count from the state."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.robot.acting import load_policy
from experiments.robot.policy import PolicyFlags, Query
from experiments.robot.robotwin.policy import RoboTwinPolicy, from_raw
from experiments.robot.serving.server import load_served
from prismatic.checkpoint.folder import open_checkpoint
from prismatic.checkpoint.foreign import for_robot
from prismatic.checkpoint.layout import acting_flags
from prismatic.util.cli import parse
from prismatic.util.errors import UsageError
from tests.helpers.robotwin_task import StandInTask
from tests.helpers.tiny_pi import write_tiny_pi

FLAGS = PolicyFlags(device="cpu")
ROBOTS = {"libero": (7, 8), "robotwin_clean": (14, 14), "robotwin_randomized": (14, 14)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pi0 with the statistics of two robots."""
    folder, rng = write_tiny_pi(tmp_path_factory.mktemp("openpi") / "pi0", "pi0", width=16), np.random.default_rng(5)
    for name, widths in ROBOTS.items():
        file = folder / "assets" / name / "norm_stats.json"
        file.parent.mkdir(parents=True)
        kinds = zip(("actions", "state"), widths, strict=True)
        stats = {kind: {"mean": rng.normal(size=n).tolist(), "std": [0.7] * n} for kind, n in kinds}
        file.write_text(json.dumps({"norm_stats": stats}))
    return folder


@pytest.fixture
def query() -> Query:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (42, 42, 3), dtype=np.uint8)
    return Query(image, image, rng.normal(size=8), "pick up the mug", prepared=True)


def test_the_robot_is_that_of_the_statistics_that_are_named(folder: Path, query: Query) -> None:
    opened = open_checkpoint(str(folder))
    for key, widths in ROBOTS.items():
        chosen = for_robot(opened, key)
        assert (chosen.platform.action_dim, chosen.platform.proprio_dim) == widths
        assert set(chosen.statistics) == {name for name in ROBOTS if ROBOTS[name] == widths}
    policy = load_served(opened, FLAGS, "robotwin_clean")
    assert policy.act([replace(query, state=np.zeros(14))])[0].shape == (4, 14)
    assert policy.spec("pi0", "robotwin_clean").unnorm_keys == ("robotwin_clean", "robotwin_randomized")


def test_without_a_name_several_robots_are_refused(folder: Path) -> None:
    opened = open_checkpoint(str(folder))
    with pytest.raises(
        UsageError, match=r"--unnorm_key: not given.* accepted: libero \(7 numbers\), robotwin_clean \(14"
    ):
        for_robot(opened, "")
    one = replace(opened, statistics={"libero": opened.statistics["libero"]})
    assert for_robot(one, "").platform == opened.platform


@pytest.mark.parametrize("given", [[6, -1, 6, -1], "6,-1,6"])
def test_joint_deltas_of_two_arms_are_answered_as_joints(given: Any, folder: Path, tmp_path: Path) -> None:
    told = {"checkpoint_path": str(folder), "task_name": "lift_pot", "device": "cpu", "record": tmp_path / "record"}
    task = StandInTask(9)
    query = from_raw(task.get_obs(), task.get_instruction())
    relative, absolute = (RoboTwinPolicy({**told, "delta_actions": mask}).act([query])[0] for mask in (None, given))
    joints = [number for number in range(14) if number not in (6, 13)]
    np.testing.assert_allclose(absolute[:, joints], relative[:, joints] + task.joints[joints], atol=1e-6)
    np.testing.assert_array_equal(absolute[:, [6, 13]], relative[:, [6, 13]])
    assert json.loads((tmp_path / "record").read_text().splitlines()[2])["delta_actions"] == given


def test_a_server_of_robotwin_s_adapters_is_told_of_deltas_by_its_own_flag() -> None:
    with pytest.raises(UsageError, match="delta_actions: 6,-1,6,-1 found beside server http://host:1; accepted: with"):
        RoboTwinPolicy({"server": "http://host:1", "delta_actions": "6,-1,6,-1"})


def test_deltas_of_a_robot_with_more_states_than_actions(folder: Path, query: Query) -> None:
    flags = parse(PolicyFlags, ["--delta_actions", "6,-1", "--device", "cpu"])
    opened = open_checkpoint(str(folder))
    chosen = for_robot(opened, "libero", flags.delta_actions)  # As an evaluation does before it loads.
    relative, absolute = (
        np.asarray(load_policy(*asked, "libero").act([query])[0]) for asked in ((opened, FLAGS), (chosen, flags))
    )
    np.testing.assert_allclose(absolute[:, :6], relative[:, :6] + query.state[:6], atol=1e-6)
    np.testing.assert_array_equal(absolute[:, 6], relative[:, 6])
    served = load_served(opened, replace(flags, use_proprio=False), "libero").spec("pi0", "libero")
    assert served.metadata()["state_dim"] == 8 and served.settings["delta_actions"] == "6,-1"
    assert "delta_actions" not in acting_flags(FLAGS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("six", "'six' found; accepted: the numbers of openpi's make_bool_mask, as in 6,-1,6,-1"),
        ("6,-1,6,-1", "6,-1,6,-1 found, for 14 numbers; accepted: up to 7"),
    ],
)
def test_deltas_that_do_not_fit_are_refused(text: str, message: str, folder: Path) -> None:
    with pytest.raises(UsageError, match=f"--delta_actions: {message}"):
        for_robot(open_checkpoint(str(folder)), "libero", text)


def test_checkpoints_that_record_their_robot_take_no_deltas() -> None:
    student = open_checkpoint("experiments/mini/weights/student")
    with pytest.raises(UsageError, match="--delta_actions: 6,-1 found; accepted: nothing, since"):
        for_robot(student, next(iter(student.statistics)), "6,-1")
