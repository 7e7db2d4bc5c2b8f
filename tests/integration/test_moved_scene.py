"""One object anywhere on the table, alone, and a camera that moves: a function of the reset's arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed")

from experiments.mini.collect import CollectConfig, collect
from experiments.mini.moved_scene import MovedScene, make_scene
from experiments.robot.libero.simulator.environment import LiberoEnv
from prismatic.util.errors import UsageError

OBJECT, TARGET = "milk_1", "basket_1"


@pytest.fixture(scope="module")
def scene() -> Iterator[MovedScene]:
    with make_scene("moved", "libero_object", 7, image_size=64, render="fast", camera_depths=True) as env:
        assert isinstance(env, MovedScene)
        yield env


def place(env: LiberoEnv, name: str) -> np.ndarray:
    return env.domain.sim.data.get_body_xpos(env.domain.objects_dict[name].root_body)[:2].copy()


def test_object_and_camera_are_drawn_anew(scene: MovedScene) -> None:
    places, cameras = [], []
    for seed in range(6):
        scene.reset(None, seed)
        places.append(place(scene, OBJECT))
        cameras.append(scene.observe_geometry()["agentview"].camera_to_world[:3, 3])
        assert np.linalg.norm(places[-1] - place(scene, TARGET)) > 0.18
        others = set(scene.domain.objects_dict) - {OBJECT, TARGET}
        assert others and all(np.abs(place(scene, name)).min() > 5 for name in others)
    assert (np.std(places, axis=0) > 0.03).all()  # By itself the task moves it by 3 mm.
    assert (np.std(cameras, axis=0) > 0.01).all()


def test_the_same_arguments_give_the_same_picture(scene: MovedScene) -> None:
    states = scene.init_states

    def picture(state: np.ndarray | None, seed: int) -> bytes:
        scene.reset(state, seed)
        return scene.observe().image.tobytes()

    first = picture(None, 3)
    official = picture(states[0], 3)
    assert picture(states[1], 3) != official
    assert picture(None, 4) != first
    assert (picture(None, 3), picture(states[0], 3)) == (first, official)


def test_the_task_itself_stays_as_it_is() -> None:
    with make_scene("task", "libero_object", 7, image_size=64, render="fast") as env:
        assert type(env) is LiberoEnv


def test_a_task_without_one_object_to_place_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot solve libero_goal task 0"):
        make_scene("moved", "libero_goal", 0, image_size=64, render="fast")


def test_demonstrations_are_collected_in_it(tmp_path: Path) -> None:
    flags = {"suite": "libero_object", "tasks": "7", "episodes": 1, "workers": 1, "out": tmp_path, "image_size": 64}
    folder = collect(CollectConfig(**flags, scene="moved"))  # type: ignore[arg-type]
    assert json.loads((folder / "collection.json").read_text())["identity"]["scene"] == "moved"
    with pytest.raises(UsageError, match="holds another dataset"):
        collect(CollectConfig(**flags))  # type: ignore[arg-type]
    assert "scene" not in CollectConfig().identity()
