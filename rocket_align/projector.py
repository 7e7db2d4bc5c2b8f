"""The projector, under its earlier name."""

from rocket_align.alignment import AlignmentProjector, matryoshka_widths  # noqa: F401
