"""Teachers: anything that turns images into patch features of some of its layers."""

from __future__ import annotations
