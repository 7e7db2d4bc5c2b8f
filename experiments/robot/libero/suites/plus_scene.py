"""Perturbations of LIBERO-Plus put into a robosuite environment.

LIBERO's own code builds the scene for the kinds that need no further assets; camera and robot are then moved in the
compiled model. Light, background and added objects are drawn by LIBERO-Plus's own scene code, from its own assets.

Not obvious: LIBERO's initial states hold the robot's joints. The package sets such a state after the robot was placed,
so the arm is back at LIBERO's pose, and only the controller, which still aims at the perturbed pose, pulls it there
while objects settle: it is under way when the policy takes over (13 to 57% of the distance, six tasks measured). That
is `robot_start` "package". With "perturbed", the default, the perturbed joints replace those of the state
(:func:`with_robot_start`), and the arm rests in the pose that the task names.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import tempfile
import types
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.robot.libero.suites.perturbations import Perturbation, shifted_camera
from experiments.robot.libero.suites.plus import data_folder
from prismatic.util.errors import UsageError

if TYPE_CHECKING:
    from experiments.robot.libero.suites.tasks import TaskSpec

CAMERA = "agentview"


def apply_to_domain(domain: Any, perturbation: Perturbation) -> None:
    """Move the third-person camera and the robot's start pose; before the first reset, for good."""
    model = domain.sim.model._model
    camera = model.camera(CAMERA).id
    position, quat_wxyz = shifted_camera(model.cam_pos[camera], model.cam_quat[camera], perturbation.camera)
    model.cam_pos[camera], model.cam_quat[camera] = position, quat_wxyz
    if perturbation.robot_qpos is not None:
        domain.robots[0].init_qpos = np.array(perturbation.robot_qpos)


def with_robot_start(init_state: np.ndarray, domain: Any, perturbation: Perturbation) -> np.ndarray:
    """`init_state` (1 + nq + nv,) with the arm at rest in the perturbed pose, if there is one."""
    if perturbation.robot_qpos is None:
        return init_state
    robot, state = domain.robots[0], np.array(init_state, dtype=np.float64)
    state[1 + np.asarray(robot._ref_joint_pos_indexes)] = perturbation.robot_qpos
    state[1 + domain.sim.model._model.nq + np.asarray(robot._ref_joint_vel_indexes)] = 0.0
    return state


def build_own_scene(task: TaskSpec, **settings: Any) -> Any:
    """The task's robosuite environment from LIBERO-Plus's own code.

    Args:
        settings: as LIBERO's ControlEnv takes them.

    Raises:
        UsageError: its code cannot be imported, or an asset is missing.
    """
    import robosuite

    problems = _own_problems()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            details = importlib.import_module("liberoplus.liberoplus.envs.bddl_utils").get_problem_info(
                str(task.bddl_path)
            )
            return problems[details["problem_name"]](
                str(task.bddl_path),
                horizon_view=0,
                vertical_view=0,
                scale_factor=1.0,
                end_point_rot=0,
                end_point_vertical=0,
                init_state=0,
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                initialization_noise=None,
                **settings,
            )
    except (FileNotFoundError, KeyError) as error:
        raise UsageError(
            f"{task.suite} task {task.task_id}: LIBERO-Plus lacks a part of the scene ({error!r})"
        ) from error


def _own_problems() -> dict[str, Any]:
    """LIBERO-Plus's scene classes by name.

    Its `envs` package imports Wand, scikit-image and gym for things not needed here, so its modules are imported
    without it. On import it also writes a settings file into the home folder: a temporary one gets it.
    """
    if "liberoplus.liberoplus.envs" not in sys.modules:
        package = types.ModuleType("liberoplus.liberoplus.envs")
        package.__path__ = [str(data_folder() / "envs")]
        before = os.environ.get("LIBERO_CONFIG_PATH")
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                os.environ["LIBERO_CONFIG_PATH"] = folder
                importlib.import_module("liberoplus.liberoplus")
                sys.modules[package.__name__] = package
                importlib.import_module("liberoplus.liberoplus.envs.problems")
        except ImportError as error:
            sys.modules.pop(package.__name__, None)
            raise UsageError(
                f"LIBERO-Plus's scene code cannot be imported: {error}; pip install {error.name}"
            ) from error
        finally:
            os.environ.pop("LIBERO_CONFIG_PATH", None)
            if before is not None:
                os.environ["LIBERO_CONFIG_PATH"] = before
    return importlib.import_module("liberoplus.liberoplus.envs.bddl_base_domain").TASK_MAPPING
