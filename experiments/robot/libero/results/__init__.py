"""Result folders: reading, checking, merging, comparing, reporting."""

from experiments.robot.libero.results.run_folder import RunFolder, load_episodes
from experiments.robot.libero.rollouts.result import EpisodeResult

__all__ = ["EpisodeResult", "RunFolder", "load_episodes"]
