"""The simulator wrapper against LIBERO's own environment: same states and pixels, cheap resets, lazy drawing."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("libero", reason="LIBERO is not installed")

from experiments.robot.libero.simulator.environment import CAMERAS, LiberoEnv, Observation
from experiments.robot.libero.suites.plus import plus_tasks
from prismatic.util.errors import UsageError

SIZE = 64
# Task 9 of libero_spatial has fixtures that every reset moves, and objects that stand on them.
SUITE, TASK = "libero_spatial", 9


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    with LiberoEnv(SUITE, TASK, image_size=SIZE, camera_depths=True) as made:
        yield made


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (6, 7))


def snapshot(env: LiberoEnv) -> tuple[np.ndarray, ...]:
    """Everything the physics holds and everything the policy sees."""
    data, seen = env.domain.sim.data._data, env.observe()
    physics = (data.qpos, data.qvel, data.qacc_warmstart, env.domain.sim.model._model.body_pos)
    return tuple(np.copy(part) for part in (*physics, seen.image, seen.wrist_image, seen.state, seen.joint_state))


def equal(first: tuple[np.ndarray, ...], second: tuple[np.ndarray, ...]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def reference_environment(env: LiberoEnv):
    """LIBERO's own environment, as upstream's evaluation makes it."""
    from libero.libero.envs import OffScreenRenderEnv

    reference = OffScreenRenderEnv(
        bddl_file_name=str(env.task.bddl_path), camera_heights=SIZE, camera_widths=SIZE, hard_reset=True
    )
    # Every hard reset appends the same samplers once more; start from none, as a new environment does.
    reference.env.object_property_initializers.clear()
    return reference


def assert_same(seen: Observation, expected: dict[str, np.ndarray]) -> None:
    from robosuite.utils.transform_utils import quat2axisangle

    assert np.array_equal(seen.image, expected["agentview_image"][::-1, ::-1])
    assert np.array_equal(seen.wrist_image, expected["robot0_eye_in_hand_image"][::-1, ::-1])
    turn = quat2axisangle(expected["robot0_eef_quat"].copy())
    state = np.concatenate([expected["robot0_eef_pos"], turn, expected["robot0_gripper_qpos"]])
    assert np.array_equal(seen.state, state)
    assert np.array_equal(seen.joint_state, expected["robot0_joint_pos"])


def test_states_and_pixels_are_those_of_libero(env: LiberoEnv, actions: np.ndarray) -> None:
    reference = reference_environment(env)
    try:
        reference.seed(0)
        reference.reset()
        expected = reference.set_init_state(env.init_states[3])
        for action in actions[:2]:
            env.step(action)  # History that the reset must forget.
        env.reset(env.init_states[3], seed=0)
        assert_same(env.observe(), expected)
        for number, action in enumerate(actions):
            expected, _, expected_done, _ = reference.step(action)
            assert env.step(action) == expected_done
            if number % 2:
                assert_same(env.observe(), expected)
        assert np.array_equal(env.domain.sim.data.qpos, reference.sim.data.qpos)
        assert np.array_equal(env.domain.sim.data.qvel, reference.sim.data.qvel)

        # Without an initial state: the placement that LIBERO's sampler draws, fixtures included.
        reference.env.object_property_initializers.clear()
        reference.seed(11)
        env.close()  # robosuite frees its old context's objects in whatever context is current; ours opens again.
        expected = reference.reset()
        env.reset(None, seed=11)
        assert np.array_equal(env.domain.sim.data.qpos, reference.sim.data.qpos)
        assert_same(env.observe(), expected)
    finally:
        env.close()
        reference.close()


def test_reset_forgets_history(env: LiberoEnv, actions: np.ndarray) -> None:
    runs = []
    for history in range(3):
        env.reset(None, seed=5 + history)
        for action in actions[:history]:
            env.step(action)
        env.reset(env.init_states[1], seed=2)
        for action in actions:
            env.step(action)
        runs.append(snapshot(env))
    assert equal(runs[0], runs[1]) and equal(runs[0], runs[2])


def test_seed_moves_fixtures_and_leaves_numpys_generator_alone(env: LiberoEnv) -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    env.reset(env.init_states[0], seed=0)
    first = env.domain.sim.model.body_pos.copy()
    env.reset(env.init_states[0], seed=1)
    assert not np.array_equal(first, env.domain.sim.model.body_pos)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_drawing_changes_nothing(env: LiberoEnv, actions: np.ndarray) -> None:
    results = []
    for looks in (False, True):
        env.reset(env.init_states[0])
        for action in actions:
            if looks:
                env.observe()
                env.observe_geometry()
            env.step(action)
        results.append(snapshot(env))
    assert equal(*results)


def test_torques_are_those_of_robosuite(env: LiberoEnv) -> None:
    """The hand is pressed onto the table, which is where the smallest difference would grow."""

    class Robosuites:
        def begin(self, action: np.ndarray) -> None:
            env.domain._pre_action(action, True)

        def substep(self, gripper_action: np.ndarray) -> None:
            env.domain._pre_action(action, False)

    runs, ours = [], env._arm
    for arm in (ours, Robosuites()):
        env.reset(env.init_states[0])
        env._arm = arm
        for number in range(24):
            action = np.array([0.3, 0.1 * (-1) ** number, -1.0, 0.2, 0.0, 0.3, (-1) ** (number // 4)])
            env.step(action)
        runs.append(np.concatenate([env.domain.sim.data.qpos, env.domain.sim.data.qvel, env.domain.sim.data.ctrl]))
    env._arm = ours
    assert env.domain.sim.data.ncon > 0
    assert np.array_equal(*runs)


def test_what_is_out_of_view_changes_no_pixel(env: LiberoEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer geoms are drawn, and no pixel differs, though the stove mirrors some that are not in view themselves."""
    from experiments.robot.libero.simulator import rendering

    model, left_out = env.domain.sim.model._model, []
    find = rendering.geoms_out_of_view
    for aside in (0, 16):
        env.reset(env.init_states[0])
        for _ in range(aside):
            env.step(np.array([0.5, 0.8, -0.5, 0, 0, 0, 0]))
        fewer = env.observe()
        left_out.append([find(model, env._scratch, model.camera(name).id).sum() for name in CAMERAS])
        with monkeypatch.context() as patch:
            patch.setattr(rendering, "geoms_out_of_view", lambda *_: np.zeros(model.ngeom, dtype=bool))
            everything = env.observe()
        assert np.array_equal(fewer.image, everything.image)
        assert np.array_equal(fewer.wrist_image, everything.wrist_image)
    assert max(max(counts) for counts in left_out) > 20, left_out


def skip_unless_software_draws(env: LiberoEnv) -> None:
    holder = env._draw_ready()._holder
    holder["gl"].make_current()
    from OpenGL import GL  # MuJoCo has chosen its platform by now.

    if b"llvmpipe" not in GL.glGetString(GL.GL_RENDERER) or holder["mujoco"].offSamples != 4:
        pytest.skip("every triangle is drawn: by a GPU, or with another number of samples")


@pytest.mark.parametrize("suite, size", [("libero_goal", 256), ("libero_plus_spatial", 224), ("libero_10", 128)])
def test_triangles_that_touch_no_sample_change_no_pixel(suite: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few triangles are drawn, before mirrors and moved cameras and while the arm moves, and no pixel differs."""
    from experiments.robot.libero.simulator import rendering, triangles

    task = 0
    if suite == "libero_plus_spatial":
        pytest.importorskip("liberoplus")
        task = next(task.task_id for task in plus_tasks(suite) if task.camera and task.camera.horizontal)
    drawn: list[tuple[int, int]] = []
    select = triangles._Mesh.select

    def counted(self: triangles._Mesh, *arguments: np.ndarray) -> np.ndarray:
        faces = select(self, *arguments)
        drawn.append((len(faces), len(self.faces_F3)))
        return faces

    monkeypatch.setattr(triangles._Mesh, "select", counted)
    with LiberoEnv(suite, task, image_size=size) as env:
        fewer: list[np.ndarray] = []
        everything: list[np.ndarray] = []
        for pictures in (fewer, everything):
            env.reset(env.init_states[0])
            for number in range(24):
                env.step(np.array([0.5, 0.2, -0.9, 0.2, 0.0, 0.3, (-1) ** (number // 8)]))
                if number % 4 == 0:
                    seen = env.observe()
                    pictures += [seen.image, seen.wrist_image]
            skip_unless_software_draws(env)
            env.close()
            monkeypatch.setattr(rendering.Cameras, "_triangle_filter", lambda cameras: None)
    assert all(np.array_equal(*pair) for pair in zip(fewer, everything, strict=True))
    kept, faces = np.sum(drawn, axis=0)
    assert 0 < kept < 0.2 * faces


def test_meshes_without_room_for_their_triangles_are_drawn_whole(
    env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mujoco

    from experiments.robot.libero.simulator import triangles

    skip_unless_software_draws(env)
    env.reset(env.init_states[0])
    parts, pictures = [], []
    for room in (triangles._MOST_TRIANGLES, 2000):
        monkeypatch.setattr(triangles, "_MOST_TRIANGLES", room)
        env.close()  # Opens again with this room.
        seen = env.observe()
        pictures.append((seen.image, seen.wrist_image))
        scene = env._draw_ready()._scene
        parts.append(sum(geom.type == mujoco.mjtGeom.mjGEOM_FLEX for geom in scene.geoms[: scene.ngeom]))
    env.close()
    assert equal(*pictures)
    assert parts[0] > parts[1] > 0


@pytest.mark.parametrize("trouble", ["another mujoco", "an error", "no list left", "no scene", "back faces"])
def test_without_the_triangle_filter_everything_is_drawn(
    trouble: str, env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trouble with what only saves time ends nothing, and pictures that back faces could change are drawn whole."""
    import mujoco

    skip_unless_software_draws(env)
    from OpenGL import GL, error

    from experiments.robot.libero.simulator import triangles

    cameras = env._draw_ready()
    assert cameras._triangle_filter() is not None

    def fail(*_: object) -> None:
        raise error.GLError(1282)

    if trouble == "another mujoco":
        monkeypatch.setattr(mujoco, "__version__", "3.17.0")
    elif trouble == "no scene":
        monkeypatch.setattr(triangles, "_MOST_TRIANGLES", 0)
    elif trouble == "an error":
        monkeypatch.setattr(GL, "glGetMultisamplefv", fail)
    elif trouble == "no list left":
        monkeypatch.setattr(GL, "glGenLists", lambda count: 0)
    else:
        monkeypatch.setattr(cameras, "_scene", mujoco.MjvScene(env._model, maxgeom=1))
        cameras._scene.flags[mujoco.mjtRndFlag.mjRND_CULL_FACE] = 0
    assert cameras._triangle_filter() is None


def dome(size: int = 16) -> str:
    """XML of a mesh with texture coordinates before a camera; its texture is a cube."""
    rows, columns = np.divmod(np.arange(size * size), size)
    uv = np.stack([columns, rows], axis=1) / (size - 1)
    vertices = np.column_stack([uv - 0.5, -((uv - 0.5) ** 2).sum(axis=1)])
    corner = np.flatnonzero((rows < size - 1) & (columns < size - 1))
    faces = (corner[:, None, None] + np.array([[0, 1, size], [1, size + 1, size]])).reshape(-1, 3)
    values = [" ".join(map(str, array.ravel())) for array in (vertices, uv, faces)]
    return """<mujoco><visual><quality offsamples="4"/></visual><asset>
        <texture name="t" type="cube" builtin="checker" width="64" height="384" rgb1="1 0 0" rgb2="0 1 0"/>
        <material name="m" texture="t"/><mesh name="d" inertia="shell" vertex="{}" texcoord="{}" face="{}"/></asset>
        <worldbody><light pos="0 0 3" castshadow="false"/><camera name="c" pos="0 0 1.5"/>
        <geom type="mesh" mesh="d" material="m" group="1"/></worldbody></mujoco>""".format(*values)


def test_an_opengl_error_that_mujoco_leaves_behind_ends_no_drawing(
    env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mujoco
    from OpenGL import GL

    from experiments.robot.libero.simulator.rendering import Cameras

    skip_unless_software_draws(env)
    model = mujoco.MjModel.from_xml_string(dome())
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    cameras = Cameras(model, SIZE, "protocol")
    assert cameras._triangles is not None
    fewer = cameras.colors(data, ["c", "c"])
    cameras.close()
    monkeypatch.setattr(Cameras, "_triangle_filter", lambda cameras: None)
    cameras = Cameras(model, SIZE, "protocol")
    everything = cameras.colors(data, ["c"])[0]
    assert GL.glGetError() == GL.GL_INVALID_OPERATION
    cameras.close()
    assert all(np.array_equal(image, everything) for image in fewer) and everything.std() > 10


def test_cameras_that_are_freed_while_others_draw_change_no_pixel(
    env: LiberoEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the garbage collector may free them between any two lines."""
    from experiments.robot.libero.simulator import rendering

    env.reset(env.init_states[0])
    expected, depths = env.observe(), env.observe_geometry()
    find, calls = rendering.geoms_out_of_view, []

    def free_others(*arguments: object) -> np.ndarray:
        rendering.Cameras(env._model, SIZE, "protocol").close()
        calls.append(arguments)
        return find(*arguments)

    monkeypatch.setattr(rendering, "geoms_out_of_view", free_others)
    seen, views = env.observe(), env.observe_geometry()
    assert len(calls) == 4
    assert np.array_equal(seen.image, expected.image) and np.array_equal(seen.wrist_image, expected.wrist_image)
    for name, view in views.items():
        assert np.array_equal(view.depth, depths[name].depth)
        assert np.array_equal(view.segmentation, depths[name].segmentation)


def test_a_kept_kernel_follows_the_package_whose_kernels_it_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, caller = tmp_path / "inner_kernel.py", tmp_path / "caller.py"
    caller.write_text(
        "import importlib, inner_kernel\n"
        "from experiments.robot.libero.simulator.coverage import compile_kernel\n"
        "inner = importlib.reload(inner_kernel).inner\n"
        "def outer(x):\n    return inner(x)\n"
        "kernel = compile_kernel(outer, inner_kernel)\n"
        "results = kernel(2.0), sum(kernel.stats.cache_hits.values())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    results = []
    for factor in (10.0, 10.0, 100.0):
        package.write_text(f"import numba\n@numba.njit\ndef inner(x):\n    return x * {factor}\n")
        results.append(runpy.run_path(str(caller))["results"])
    assert results == [(20.0, 0), (20.0, 1), (200.0, 0)]


def test_the_wrist_camera_can_be_left_out(env: LiberoEnv) -> None:
    env.reset(env.init_states[0])
    both, one = env.observe(), env.observe(wrist=False)
    assert np.array_equal(both.image, one.image) and np.array_equal(both.state, one.state)
    assert both.wrist_image.any() and not one.wrist_image.any() and one.wrist_image.shape == both.wrist_image.shape


def test_geometry_is_metric_and_in_line_with_the_picture(env: LiberoEnv) -> None:
    """Pixels seen by both cameras meet in space: world points from depth lie on the object they are labelled as."""
    env.reset(env.init_states[0])
    model, data = env.domain.sim.model._model, env.domain.sim.data._data
    seen = 0
    for name, view in env.observe_geometry().items():
        assert view.depth.shape == (SIZE, SIZE) and view.segmentation.shape == (SIZE, SIZE, 2)
        camera = model.camera(name).id
        assert np.allclose(view.camera_to_world[:3, 3], data.cam_xpos[camera])
        rows, columns = np.mgrid[:SIZE, :SIZE] + 0.5
        rays = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ np.linalg.inv(view.intrinsics).T
        points = (rays * view.depth[..., None]) @ view.camera_to_world[:3, :3].T + view.camera_to_world[:3, 3]
        for item in env.domain.objects_dict.values():
            geoms = [g for g in range(model.ngeom) if model.body(model.geom_bodyid[g]).name.startswith(item.name)]
            mask = (view.segmentation[..., 1] == 5) & np.isin(view.segmentation[..., 0], geoms)
            if mask.sum() < 8:
                continue
            seen += 1
            center = np.median(points[mask], axis=0)
            assert np.linalg.norm(center - data.body(item.root_body).xpos) < 0.09, (name, item.name)
    assert seen >= 3


def test_fast_drawing_looks_alike_and_leaves_physics_alone(env: LiberoEnv, actions: np.ndarray) -> None:
    env.reset(env.init_states[0])
    for action in actions:
        env.step(action)
    slow = snapshot(env)
    with LiberoEnv(SUITE, TASK, image_size=SIZE, render="fast") as quick:
        quick.reset(quick.init_states[0])
        for action in actions:
            quick.step(action)
        fast = snapshot(quick)
        assert equal(slow[:4], fast[:4]) and equal(slow[6:], fast[6:])
        for index in (4, 5):
            difference = np.abs(slow[index].astype(float) - fast[index])
            assert 0 < difference.mean() < 12
        quick.close()
        quick.close()


def test_wrong_calls_are_refused(env: LiberoEnv) -> None:
    with pytest.raises(UsageError, match=r"init_state: .*shape \(\d+,\), got \(3,\)"):
        env.reset(np.zeros(3))
    with pytest.raises(ValueError, match="7 finite numbers"):
        env.step(np.full(7, np.nan))
    blind = copy.copy(env)
    blind.camera_depths = False
    with pytest.raises(UsageError, match="camera_depths=True"):
        blind.observe_geometry()
    assert set(env.observe_geometry()) == set(CAMERAS)
