"""The student's side of the alignment, under its earlier name."""

from rocket_align.alignment import vision_tokens  # noqa: F401
