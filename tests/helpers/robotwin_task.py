"""A stand-in for RoboTwin's tasks, after their published interface; its joints go where they are told."""

from __future__ import annotations

from typing import Any

import numpy as np

CAMERAS = ("head_camera", "left_camera", "right_camera")


class StandInTask:
    """Attributes and methods that RoboTwin's evaluation and its adapters use; `taken` are the actions."""

    def __init__(self, step_lim: int, instruction: str = "lift the pot") -> None:
        self.step_lim, self.take_action_cnt, self.eval_success = step_lim, 0, False
        self.joints = np.linspace(0, 0.9, 14)
        self.taken: list[np.ndarray] = []
        self.set_instruction(instruction)

    def setup_demo(self, *, seed: int, **_: Any) -> None:
        self.seed = seed

    def close_env(self, clear_cache: bool = False) -> None:
        """Nothing is open."""

    def set_instruction(self, instruction: str) -> None:
        self._instruction = instruction

    def get_instruction(self) -> str:
        return self._instruction

    def get_obs(self) -> dict[str, Any]:
        """Each camera sees a picture of its own, which moves with the joints."""
        rows, columns = np.mgrid[0:240, 0:320]
        views = {}
        for number, name in enumerate(CAMERAS):
            wave = np.sin(rows / (9 + 7 * number)) * np.cos(columns / 13 + self.joints.sum())
            views[name] = {
                "rgb": np.stack([wave * 100 + 128, wave * 50 + 60, 200 - wave * 50], axis=-1).astype(np.uint8)
            }
        left, right = self.joints[:7], self.joints[7:]
        arms = {"left_arm": left[:6], "left_gripper": left[6], "right_arm": right[:6], "right_gripper": right[6]}
        return {"observation": views, "joint_action": {**arms, "vector": self.joints.copy()}, "endpose": {}}

    def take_action(self, action: np.ndarray, action_type: str = "qpos") -> None:
        if self.take_action_cnt == self.step_lim or self.eval_success:
            return
        assert action_type == "qpos" and action.shape == (14,) and np.isfinite(action).all()
        assert (np.abs(action[[6, 13]] - 0.5) <= 0.5).all()
        self.take_action_cnt += 1
        self.taken.append(action.copy())
        self.joints = action.copy()

    def as_xpolicylab(self) -> dict[str, Any]:
        """The observation as XPolicyLab's environments send it, format v1.0."""
        raw = self.get_obs()
        names = ("cam_head", "cam_left_wrist", "cam_right_wrist")
        vision = {name: {"color": raw["observation"][camera]["rgb"]} for name, camera in zip(names, CAMERAS)}
        joints = raw["joint_action"]
        state = {f"{arm}_arm_joint_state": joints[f"{arm}_arm"] for arm in ("left", "right")}
        state |= {f"{arm}_ee_joint_state": np.array([joints[f"{arm}_gripper"]]) for arm in ("left", "right")}
        return {
            "data_format_version": "v1.0",
            "instruction": self._instruction,
            "instructions": [self._instruction],
            "env_idx": 0,
            "vision": vision,
            "state": state,
            "additional_info": {"frequency": 30},
        }
