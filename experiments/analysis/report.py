"""The two files of an analysis: JSON and a picture, each written whole or not at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismatic.util.files import atomic_path, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# A JSON object.
Report = dict[str, Any]
DPI = 300
# Okabe and Ito's palette, told apart by people with any kind of color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"
_LARGEST_LABELED = 12
# Tones of the two color maps between which black letters are readable, and above which.
_DARK, _BRIGHT = 0.2, 0.55


def to_json_values(value: Any) -> Any:
    """Tensors and tuples as lists, numbers rounded to 6 significant digits, NaN as null."""
    if isinstance(value, dict):
        return {str(key): to_json_values(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        return to_json_values(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json_values(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, content: Report) -> None:
    """Write `content`, as plain JSON values."""
    atomic_write(path, json.dumps(to_json_values(content), indent=1) + "\n")


def new_figure(width: float, height: float) -> Figure:
    """A figure of that many inches, with fonts readable at that size in a paper."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "legend.fontsize": 8,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return plt.figure(figsize=(width, height), layout="constrained")


def subfigures(figure: Figure, rows: int, columns: int, **ratios: Any) -> list[SubFigure]:
    """Parts of a figure, row by row; `height_ratios` and `width_ratios` as in matplotlib."""
    return figure.subfigures(rows, columns, squeeze=False, **ratios).ravel().tolist()


def save_figure(figure: Figure, path: Path, dpi: int = DPI) -> None:
    """Write a PNG, of 300 dpi as papers want it, and close the figure."""
    from matplotlib import pyplot as plt

    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    plt.close(figure)


def heatmap(
    axes: Axes,
    values: Any,
    *,
    limits: tuple[float, float],
    rows: list[str],
    columns: list[str],
    diverging: bool = False,
) -> Any:
    """A matrix with its values written in where they fit; NaN is left gray. Returns the image, for a colorbar."""
    import matplotlib
    import numpy as np

    matrix = np.ma.masked_invalid(np.asarray(values, dtype=float))
    colors = matplotlib.colormaps[DIVERGING if diverging else SEQUENTIAL].with_extremes(bad="#cccccc")
    image = axes.imshow(matrix, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="equal")
    for axis, labels in ((axes.xaxis, columns), (axes.yaxis, rows)):
        every = max(1, math.ceil(len(labels) / _LARGEST_LABELED))
        axis.set_ticks(range(0, len(labels), every), labels[::every])
    axes.spines[:].set_visible(False)
    if max(matrix.shape) <= _LARGEST_LABELED:
        for (row, column), value in np.ndenumerate(matrix.filled(np.nan)):
            if math.isfinite(value):
                tone = (value - limits[0]) / (limits[1] - limits[0])
                dark = not _DARK < tone < 1 - _DARK if diverging else tone < _BRIGHT
                text = f"{value:.2f}".replace("-0.00", "0.00")
                axes.text(column, row, text, ha="center", va="center", fontsize=6, color="w" if dark else "k")
    return image


def line_style(number: int) -> dict[str, Any]:
    """Color and marker of the n-th line of a plot."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
