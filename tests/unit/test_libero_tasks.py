"""Task lookup, initial states, the renderer and its GPU: what is chosen, and what is refused, and how."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.demonstrations import instruction_of
from experiments.robot.libero.simulator import environment, rendering
from experiments.robot.libero.suites import tasks
from experiments.robot.libero.suites.task import read_states, states_of
from prismatic.util.errors import UsageError

installed = pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed")


@installed
def test_instruction_is_the_file_name_in_words() -> None:
    task = tasks.get_task("libero_object", 1)
    assert task.instruction == "pick up the cream cheese and place it in the basket"
    assert task.bddl_path.is_file()
    assert tasks.num_tasks("libero_spatial") == 10


@installed
@pytest.mark.parametrize(
    ("suite", "number", "told"),
    [
        ("libero_goal_lan", 7, "switch on the stove"),
        ("libero_goal_task", 1, "put the plate on the stove"),
        ("libero_10_task", 8, "put the left moka pot on the stove"),
        # Only the scene is perturbed: the wording of LIBERO's data, not that of its file ("Pick the milk ...").
        ("libero_object_swap", 7, "pick up the milk and place it in the basket"),
    ],
)
def test_the_policy_is_told_what_the_tasks_file_says(suite: str, number: int, told: str) -> None:
    assert tasks.get_task(suite, number).instruction == told
    unperturbed = tasks.get_task(suite.rpartition("_")[0], number).instruction
    assert tasks.get_task(suite, number, "name").instruction == unperturbed


@installed
def test_all_sixteen_suites_of_libero_pro_judge_and_tell_one_goal() -> None:
    for base in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        for ending in tasks.PRO_ENDINGS:
            specs = [tasks.get_task(f"{base}_{ending}", number) for number in range(10)]
            plain = [tasks.get_task(base, number) for number in range(10)]
            changed = [a.instruction != b.instruction for a, b in zip(specs, plain)]
            assert all(changed) if ending in ("lan", "task") else not any(changed), (base, ending)
            assert tasks.find_suite(f"{base}_{ending}").base == base


@installed
def test_a_sentence_of_ones_own_in_another_copy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = tasks.get_task("libero_object", 7)
    own = tmp_path / "bddl_files" / "libero_object" / spec.bddl_path.name
    own.parent.mkdir(parents=True)
    own.write_text(spec.bddl_path.read_text().replace("Pick the milk", "Fetch the milk"))
    (tmp_path / "config.yaml").write_text(f"bddl_files: {tmp_path / 'bddl_files'}\n")
    before = tasks.suite_files("libero_object")
    assert before == tasks.LIBERO_FILES["libero_object"]
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    assert tasks.get_task("libero_object", 7).instruction == "fetch the milk and place it in the basket"
    assert tasks.suite_files("libero_object")["tasks"] != before["tasks"]


@pytest.mark.parametrize("name", ["s.json", "s.npz", "s.npy", "s.init", "s.pruned_init", "s.pt", "s.hdf5"])
def test_initial_states_in_every_format_of_the_field(name: str, tmp_path: Path) -> None:
    torch, h5py = pytest.importorskip("torch"), pytest.importorskip("h5py")
    states, path = np.random.default_rng(0).normal(size=(3, 5)), tmp_path / name
    if name == "s.json":
        demos = {f"demo_{i}": {"initial_state": state.tolist(), "success": i != 1} for i, state in enumerate(states)}
        path.write_text(json.dumps({"do_it": demos}))
    elif path.suffix in (".npz", ".npy"):
        np.savez(path, states=states) if path.suffix == ".npz" else np.save(path, states)
    elif name == "s.hdf5":
        with h5py.File(path, "w") as file:
            for number, state in enumerate(states):
                file[f"data/demo_{number}/states"] = np.stack([state, state + 1])
    else:
        torch.save(torch.from_numpy(states) if name == "s.pt" else states, path)
    task = tasks.TaskSpec("suite", 0, "name", "do it", tmp_path, tmp_path)
    expected = [tuple(state) if name != "s.json" or i != 1 else None for i, state in enumerate(states.tolist())]
    assert states_of(read_states(path), task, path) == expected


def test_a_file_that_is_no_table_of_states_is_one_line(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "b.npz").write_bytes(b"nothing")
    (tmp_path / "c.csv").write_text("1,2")
    for name, words in {"a.npy": "plain numbers", "b.npz": "plain numbers", "c.csv": "accepted are files"}.items():
        with pytest.raises(UsageError, match=words):
            read_states(tmp_path / name)


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


def test_torch_initial_states_run_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "owned"), "w"))

    torch, file = pytest.importorskip("torch"), tmp_path / "b.pruned_init"
    torch.save(Evil(), file)
    with pytest.raises(UsageError, match="no torch file, or one with more in it than numbers"):
        tasks.load_init_states(tasks.TaskSpec("suite", 0, "name", "do it", file, file))
    assert not (tmp_path / "owned").exists()


def test_missing_initial_states(tmp_path: Path) -> None:
    task = tasks.TaskSpec("suite", 4, "name", "do it", tmp_path, tmp_path / "gone.pruned_init")
    with pytest.raises(UsageError, match="suite task 4: no initial states at"):
        tasks.load_init_states(task)


@pytest.mark.parametrize(
    ("distributions", "said"),
    [
        (["hf-libero", "libero"], "several packages provide `libero`: hf-libero, libero"),
        ([], r'pip install "rocket-vla\[sim\]"'),
    ],
)
def test_several_distributions_and_none_are_refused(
    distributions: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if distributions else None)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"libero": distributions})
    tasks.check_installation.cache_clear()
    with pytest.raises(UsageError, match=said):
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


def test_a_device_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "first")
    with pytest.raises(UsageError, match="MUJOCO_EGL_DEVICE_ID: found 'first'"):
        rendering.choose_renderer()


@installed
def test_an_environment_that_cannot_be_built_is_one_line_for_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(task: tasks.TaskSpec) -> None:
        raise AttributeError("qM")

    monkeypatch.setattr(environment, "_build_domain", build)
    with pytest.raises(UsageError, match=r"task 2: the simulator cannot be built \(AttributeError: qM, .*MUJOCO_GL="):
        environment.LiberoEnv("libero_object", 2)


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ({}, "pick up the milk"),
        ({"bddl_file_name": "bddl_files/libero_object/a.bddl", "problem_info": "Pick the milk"}, "pick up the milk"),
        ({"bddl_file_name": "bddl_files/libero_object_lan/a.bddl", "problem_info": "Fetch milk"}, "fetch milk"),
        ({"instruction": "bring the milk"}, "bring the milk"),
    ],
)
def test_demonstrations_tell_what_the_evaluation_tells(attributes: dict[str, str], told: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "pick_up_the_milk_demo.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for name, text in attributes.items():
            data.attrs[name] = json.dumps({"language_instruction": text}) if name == "problem_info" else text
    assert instruction_of(path) == told


SOFTWARE, GPU = b"EGL_MESA_device_software", b"EGL_NV_device_cuda EGL_EXT_device_drm"


@pytest.mark.parametrize(
    ("devices", "broken", "rank", "expected"),
    [
        ([GPU, GPU, GPU, SOFTWARE], (), 0, "0"),
        ([GPU, GPU, GPU, SOFTWARE], (), 2, "2"),
        ([GPU, GPU, SOFTWARE], (), 3, "1"),
        ([SOFTWARE, GPU, GPU], (), 0, "1"),
        ([GPU, GPU], ("1",), 1, "0"),
        ([GPU, GPU], ("0", "1"), 1, None),
        ([GPU, SOFTWARE], (), 1, None),
        ([SOFTWARE], (), 1, None),
    ],
)
def test_every_rank_draws_on_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, devices: list[bytes], broken: tuple[str, ...], rank: int, expected: str | None
) -> None:
    """A device is what EGL says of it here; `broken` ones are listed, but do not start."""
    if rendering.choose_renderer() != "egl":
        pytest.skip("MUJOCO_GL names another renderer than EGL")
    from mujoco import egl
    from OpenGL.EGL.EXT import device_query

    def start() -> object:
        return egl.EGL.EGL_NO_DISPLAY if os.environ["MUJOCO_EGL_DEVICE_ID"] in broken else object()

    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    monkeypatch.setattr(egl.EGL, "eglQueryDevicesEXT", lambda: devices)
    monkeypatch.setattr(device_query, "eglQueryDeviceStringEXT", lambda device, name: device)
    monkeypatch.setattr(egl, "create_initialized_egl_device_display", start)
    rendering._draw_on_own_gpu(rank)
    chosen = os.environ.get("MUJOCO_EGL_DEVICE_ID")
    monkeypatch.delenv("MUJOCO_EGL_DEVICE_ID", raising=False)
    assert chosen == expected


def test_a_gpu_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_EGL_DEVICE_ID", "5")
    rendering._draw_on_own_gpu(0)
    assert os.environ["MUJOCO_EGL_DEVICE_ID"] == "5"
