"""The alignment loss, under its earlier name."""

from rocket_align.alignment import cosine_loss  # noqa: F401
