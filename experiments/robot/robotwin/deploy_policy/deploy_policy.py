"""Functions that RoboTwin's script/eval_policy.py calls. The YAML file beside them lists the settings."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from experiments.robot.robotwin.policy import RoboTwinPolicy, from_raw


def get_model(usr_args: Mapping[str, Any]) -> RoboTwinPolicy:
    """Load the policy, once a run."""
    return RoboTwinPolicy(usr_args)


def reset_model(model: RoboTwinPolicy) -> None:
    """Begin an episode."""
    model.reset()


def eval(TASK_ENV: Any, model: RoboTwinPolicy, observation: Mapping[str, Any]) -> None:
    """Execute one chunk; RoboTwin calls again until the task is solved or its steps are used up."""
    (chunk,) = model.act([from_raw(observation, TASK_ENV.get_instruction())])
    for action in chunk:
        TASK_ENV.take_action(action, action_type="qpos")
        TASK_ENV.get_obs()  # The task films what was seen last.
