"""Building blocks of result pages: cards, sortable tables, bars with intervals, line charts, settings side by side.

    page = render("libero_results.html", title="...", ...)       a template of `templates/` that extends page.html

Templates get the blocks as macros (`{% import "blocks.html" as blocks %}`) and the functions of this module. Nothing is
fetched: style and script are in the page, videos and pictures are referred to by relative path. Text is escaped; what a
function here returns as Markup is HTML.
"""

from __future__ import annotations

import functools
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from experiments.report import percent, percent_range

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
        """The interval as text."""
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


def line_chart(lines: Sequence[Line], *, title: str, x_label: str, y_label: str, from_zero: bool = True) -> Markup:
    """An SVG chart of the lines with axes, ticks and a legend; points that are not finite are left out.

    Args:
        from_zero: the y axis includes 0.
    """
    width, height, left, bottom, top, right = 560, 300, 56, 44, 34, 14
    points = [[(x, y) for x, y in zip(line.xs, line.ys) if math.isfinite(x) and math.isfinite(y)] for line in lines]
    flat = [point for line_points in points for point in line_points] or [(0.0, 0.0), (1.0, 1.0)]
    x_ticks = _ticks([x for x, _ in flat])
    y_ticks = _ticks([y for _, y in flat] + ([0.0] if from_zero else []))

    def position(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (width - left - right), height - bottom - up * (height - bottom - top)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    parts.append(f'<text class="chart-title" x="{left}" y="18">{html.escape(title)}</text>')
    for y in y_ticks:
        _, row = position(x_ticks[0], y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{row + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        column, _ = position(x, y_ticks[0])
        parts.append(
            f'<text class="tick" x="{column:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text class="axis" transform="translate(13 {(height - bottom + top) / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for line, line_points in zip(lines, points):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (position(*point) for point in line_points))
        name = f"<title>{html.escape(line.name)}</title>"
        parts.append(f'<polyline class="line {color(line.series)}" points="{path}">{name}</polyline>')
    parts.append("</svg>")
    legend = "".join(
        f'<li><span class="swatch {color(line.series)}"></span>{html.escape(line.name)}</li>' for line in lines
    )
    return Markup(f'<figure>{"".join(parts)}<ul class="legend">{legend}</ul></figure>')


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers that span the values."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return [float(tick) for tick in MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("experiments.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.globals.update(color=color, line_chart=line_chart)
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
