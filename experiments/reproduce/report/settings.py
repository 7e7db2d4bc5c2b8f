"""Configurations side by side, what differs first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SettingRow:
    """One setting and its value in every run; "-" where a run does not have it."""

    name: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


def flatten(content: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as {"a.b": text}."""
    if isinstance(content, dict) and content:
        nested = (flatten(value, f"{prefix}.{name}" if prefix else str(name)) for name, value in content.items())
        return {name: value for part in nested for name, value in part.items()}
    return {prefix: content if isinstance(content, str) else json.dumps(content)}


def setting_rows(records: Sequence[Any]) -> list[SettingRow]:
    """A row for every setting of any record; those that differ come first."""
    flat = [flatten(record) for record in records]
    names = dict.fromkeys(name for of_run in flat for name in of_run)
    rows = (SettingRow(name, tuple(of_run.get(name, "-") for of_run in flat)) for name in names)
    return sorted(rows, key=lambda row: not row.differs)
