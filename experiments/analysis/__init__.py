"""Layer selection and analyses on checkpoints and demonstrations: the commands behind vla-scripts/analyze.py."""

from __future__ import annotations
