"""Building blocks of result pages: cards, sortable tables, bars with intervals, line charts; one file a page.

    page = render("libero_results.html", title="...", ...)       a template of `templates/` that extends page.html

Templates get the blocks as macros (`{% import "blocks.html" as blocks %}`) and the functions of this module. Nothing is
fetched: style and script are in the page, videos and pictures are referred to by relative path. Text is escaped; what a
function here returns as Markup is HTML.
"""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

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
    def of(cls, counts: dict[str, Any]) -> Rate:
        """From what `experiments.robot.libero.results.summary.rate` returns."""
        low, high = counts["interval_95"]
        trials = counts["successes"] + counts["failures"]
        return cls(counts["success_rate"], low, high, counts["successes"], trials, counts["errors"])

    @property
    def label(self) -> str:
        """In words, for those who do not see the bar."""
        if self.value is None:
            return "no completed episodes"
        interval = f"{100 * self.low:.0f} to {100 * self.high:.0f}%"
        return f"{percent(self.value)}, 95% interval {interval}, {self.successes} of {self.trials}"


@dataclass(frozen=True)
class Line:
    """A line of a chart: points in the order of x. `series` numbers its color, from 0."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    series: int = 0


def percent(value: float | None, digits: int = 1) -> str:
    """A rate in [0, 1] for people; "-" for None."""
    return "-" if value is None else f"{100 * value:.{digits}f}%"


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
    flat = [point for of_line in points for point in of_line] or [(0.0, 0.0), (1.0, 1.0)]
    x_ticks = _ticks([x for x, _ in flat])
    y_ticks = _ticks([y for _, y in flat] + ([0.0] if from_zero else []))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (width - left - right), height - bottom - up * (height - bottom - top)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    parts.append(f'<text class="chart-title" x="{left}" y="18">{html.escape(title)}</text>')
    for y in y_ticks:
        _, row = place(x_ticks[0], y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{row:.1f}" y2="{row:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{row + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        column, _ = place(x, y_ticks[0])
        parts.append(
            f'<text class="tick" x="{column:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{height - 6}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text class="axis" transform="translate(13 {(height - bottom + top) / 2}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_label)}</text>'
    )
    for line, of_line in zip(lines, points):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in of_line))
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


def render(template: str, **values: Any) -> str:
    """A page from a template of this package."""
    return _environment().get_template(template).render(**values)
