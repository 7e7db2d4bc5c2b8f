"""The recipes, under their earlier name."""

from rocket_align.config import RECIPES, baseline, naive, paper_pairs, rocket, shared, spatial_forcing  # noqa: F401
