"""Task lookup, initial states and renderer choice: what is refused, and how."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.simulator import rendering
from experiments.robot.libero.suites import tasks
from prismatic.util.errors import UsageError

installed = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed")


@installed
def test_instruction_is_the_file_name_in_words() -> None:
    task = tasks.get_task("libero_object", 1)
    assert task.instruction == "pick up the cream cheese and place it in the basket"
    assert task.bddl_path.is_file()
    assert tasks.num_tasks("libero_spatial") == 10


@installed
def test_unknown_suite_and_task() -> None:
    with pytest.raises(UsageError, match=r"unknown value 'libero_objects' \(did you mean 'libero_object'\?\)"):
        tasks.get_task("libero_objects", 0)
    with pytest.raises(UsageError, match="tasks 0 to 9, got 10"):
        tasks.get_task("libero_object", 10)


@installed
def test_initial_states_are_fifty() -> None:
    states = tasks.load_init_states(tasks.get_task("libero_object", 0))
    assert states.shape == (50, 110) and states.dtype == np.float64


def torch_states(path: Path, content: object) -> tasks.TaskSpec:
    import torch

    torch.save(content, path)
    return tasks.TaskSpec("suite", 0, "name", "do it", path, path)


def test_torch_initial_states_load_safely(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(3, 5))
    assert np.array_equal(tasks.load_init_states(torch_states(tmp_path / "a.pruned_init", states)), states)


def test_torch_initial_states_run_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "owned"), "w"))

    with pytest.raises(UsageError, match="no torch file, or one with more in it than numbers"):
        tasks.load_init_states(torch_states(tmp_path / "b.pruned_init", Evil()))
    assert not (tmp_path / "owned").exists()


def test_missing_initial_states(tmp_path: Path) -> None:
    task = tasks.TaskSpec("suite", 4, "name", "do it", tmp_path, tmp_path / "gone.pruned_init")
    with pytest.raises(UsageError, match="suite task 4: no initial states at"):
        tasks.load_init_states(task)


def test_two_distributions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"libero": ["hf-libero", "libero"]})
    tasks.check_installation.cache_clear()
    with pytest.raises(UsageError, match="several packages provide `libero`: hf-libero, libero"):
        tasks.check_installation()
    tasks.check_installation.cache_clear()


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tasks.check_installation.cache_clear()
    with pytest.raises(UsageError, match=r'pip install "rocket-vla\[sim\]"'):
        tasks.check_installation()
    tasks.check_installation.cache_clear()


@pytest.mark.parametrize(("libraries", "expected"), [({"EGL", "OSMesa"}, "egl"), ({"OSMesa"}, "osmesa")])
def test_renderer_is_egl_then_osmesa(monkeypatch: pytest.MonkeyPatch, libraries: set[str], expected: str) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name if name in libraries else None)
    assert rendering.choose_renderer() == expected


def test_no_renderer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(UsageError, match="apt-get install -y libegl1 libegl-mesa0 libgl1-mesa-dri"):
        rendering.choose_renderer()


def test_a_mujoco_that_robosuite_cannot_use_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendering, "package_version", lambda name: "4.0.0")
    with pytest.raises(UsageError, match=r"^mujoco 4.0.0 found; accepted: 3.3.7 \(pip uninstall -y mujoco mujoco-core"):
        rendering.choose_renderer()
