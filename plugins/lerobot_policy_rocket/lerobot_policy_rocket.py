"""LeRobot's plug-in of ROCKET: `lerobot-train ... --rocket.teacher_path=...` (see docs/lerobot.md)."""

from rocket_align.lerobot import install

install()
