"""Numbers as text, the same on the terminal, in Markdown and on pages: rates, intervals, tables. Pages: `html`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """Text cells: a header and rows of the same length."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def percent(rate: float | None, digits: int = 1) -> str:
    """A rate in [0, 1] as in "57.5%"; "-" for None."""
    return "-" if rate is None else f"{100 * rate:.{digits}f}%"


def percent_range(interval: Sequence[float], digits: int = 0) -> str:
    """An interval in [0, 1] as in "49 to 94%"."""
    low, high = interval
    return f"{100 * low:.{digits}f} to {100 * high:.{digits}f}%"


def cell(value: object) -> str:
    """A value as a cell of a Markdown table."""
    return str(value).replace("|", "\\|")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> list[str]:
    """The lines of a Markdown table; columns after the first `text_columns` hold numbers and are set to the right."""
    ruler = ["---" if column < text_columns else "---:" for column in range(len(header))]
    return [f"| {' | '.join(map(cell, row))} |" for row in (header, ruler, *rows)]
