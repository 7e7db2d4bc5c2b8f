"""Analyses that choose and explain layer pairs."""

from __future__ import annotations
