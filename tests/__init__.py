"""Tests; a package, so that worker processes find its helpers before another distribution's `tests`."""
