"""Building blocks of result pages: cards, sortable tables, bars with intervals, line charts, settings side by side.

    page = render("libero_results.html", title="...", ...)       a template of `templates/` that extends page.html

Templates get the blocks as macros (`{% import "blocks.html" as blocks %}`) and the functions of this module. Nothing is
fetched: style and script are in the page, videos and pictures are referred to by relative path. Text is escaped; what a
function here returns as Markup is HTML.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from markupsafe import Markup

from experiments.report import cell, markdown_table, percent, percent_range

if TYPE_CHECKING:
    from jinja2 import Environment

SERIES = 6  # colors of style.css; further series use them again


@dataclass(frozen=True)
class Rate:
    """A success rate to draw: `value` in [0, 1] (None without trials), its interval, and the counts behind it."""

    value: float | None
    low: float
    high: float
    successes: int
    trials: int
    errors: int = 0

    @classmethod
    def of(cls, counts: Mapping[str, Any]) -> Rate:
        """From what `experiments.robot.libero.results.summary.rate` returns."""
        low, high = counts["interval_95"]
        trials = counts["successes"] + counts["failures"]
        return cls(counts["success_rate"], low, high, counts["successes"], trials, counts["errors"])

    @property
    def label(self) -> str:
        """In words, for those who do not see the bar."""
        if self.value is None:
            return "no completed episodes"
        return f"{percent(self.value)}, 95% interval {self.interval}, {self.successes} of {self.trials}"

    @property
    def interval(self) -> str:
        return percent_range((self.low, self.high))


@dataclass(frozen=True)
class Line:
    """A line of a chart: points in the order of x. `series` numbers its color, from 0."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    series: int = 0


def color(series: int) -> str:
    """CSS class of a series' color."""
    return f"s{series % SERIES + 1}"


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> Markup:
    """An SVG chart of the lines with ticks and a legend; y includes 0, and points that are not finite are left out."""
    points = [[(x, y) for x, y in zip(line.xs, line.ys) if math.isfinite(x) and math.isfinite(y)] for line in lines]
    xs, ys = zip(*[point for line_points in points for point in line_points] or [(0.0, 0.0), (1.0, 1.0)])
    x_ticks, y_ticks = _ticks(xs), _ticks((0.0, *ys))
    edges = {"left": 56, "right": 546, "top": 34, "bottom": 256}

    def across(x: float) -> float:
        return edges["left"] + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (edges["right"] - edges["left"])

    def down(y: float) -> float:
        return edges["bottom"] - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (edges["bottom"] - edges["top"])

    paths = [" ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in line_points) for line_points in points]
    labels = {"title": title, "x_label": x_label, "y_label": y_label}
    ticks = {"x_ticks": [(x, across(x)) for x in x_ticks], "y_ticks": [(y, down(y)) for y in y_ticks]}
    return Markup(render("chart.html", lines=list(zip(lines, paths)), **labels, **ticks, **edges))


def link(file: Path, page: Path) -> str:
    """The address of a file on a page: relative, so that both can be moved together."""
    return quote(Path(os.path.relpath(file.resolve(), page.resolve().parent)).as_posix())


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that span the values."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("experiments.report"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(percent=percent, percent_range=percent_range, cell=cell)
    environment.filters["markdown_table"] = lambda table: "\n".join(markdown_table(*table))
    environment.globals.update(color=color)
    return environment


def render(template: str, **values: object) -> str:
    """A page from a template of this package."""
    return _environment().get_template(template).render(**values)


@dataclass(frozen=True)
class SettingRow:
    """One setting and its value in every run; "-" where a run does not have it."""

    name: str
    cells: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


def _flatten(content: object, prefix: str = "") -> dict[str, str]:
    """Nested settings as {"a.b": text}."""
    if isinstance(content, dict) and content:
        nested = (_flatten(value, f"{prefix}.{name}" if prefix else str(name)) for name, value in content.items())
        return {name: value for part in nested for name, value in part.items()}
    return {prefix: content if isinstance(content, str) else json.dumps(content)}


def setting_rows(records: Sequence[Mapping[str, object]]) -> list[SettingRow]:
    """A row for every setting of any record; those that differ come first."""
    settings = [_flatten(dict(record)) for record in records]
    names = dict.fromkeys(name for record in settings for name in record)
    rows = (SettingRow(name, tuple(record.get(name, "-") for record in settings)) for name in names)
    return sorted(rows, key=lambda row: not row.differs)
