"""Depth as a policy's tokens tell it, drawn beside the simulator's for a few test frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiments.analysis.report import DIVERGING, new_figure, save_figure
from prismatic.util.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

Array = npt.NDArray[Any]
FILE = "readout_depth.npz"


@dataclass(frozen=True)
class DepthPictures:
    """Frames of the third-person camera, and what is nearer or farther in them than usual.

    Maps are log-depths above the mean of their place over the frames that the probe was fitted on: -0.1 is 10% nearer.

    Attributes:
        images: uint8 (N, H, W, 3), the part of the camera's picture that the policies see.
        true: (N, h, w) of the simulator.
        read: (N, h, w) read out of the tokens, a policy each.
        labels: of the policies.
    """

    images: Array
    true: Array
    read: tuple[Array, ...]
    labels: tuple[str, ...]

    @classmethod
    def load(cls, folder: Path) -> DepthPictures:
        """Those that :func:`save_pictures` wrote into a folder."""
        with np.load(folder / FILE, allow_pickle=False) as archive:
            labels = tuple(archive["labels"].tolist())
            read = tuple(archive[f"read_{number}"] for number in range(len(labels)))
            return cls(archive["images"], archive["true"], read, labels)


def side_by_side(parts: Sequence[DepthPictures]) -> DepthPictures:
    """Pictures of the same frames by several policies, as one."""
    read, labels = (tuple(item for part in parts for item in getattr(part, name)) for name in ("read", "labels"))
    return replace(parts[0], read=read, labels=labels)


def draw_depth(figure: FigureBase, pictures: DepthPictures) -> None:
    """One column a frame: the camera's picture, the true map, and that of every policy, on one scale of colors."""
    maps = (pictures.true, *pictures.read)
    grid: Any = figure.subplots(1 + len(maps), len(pictures.images), squeeze=False)
    limit = float(np.quantile(np.abs(pictures.true), 0.98)) or 1.0
    for axes, image in zip(grid[0], pictures.images):
        axes.imshow(image)
    for axes, values in zip(grid[1:].ravel(), (values for part in maps for values in part)):
        shown = axes.imshow(values, cmap=DIVERGING, vmin=-limit, vmax=limit)
    for axes, label in zip(grid[:, 0], ("camera", "true depth", *pictures.labels)):
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, ax=grid[1:].ravel().tolist(), pad=0.01, shrink=0.8)
    bar.set_label("nearer | farther than usual here")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f}%" if value else "0%")


def save_pictures(pictures: DepthPictures, folder: Path) -> None:
    """Write readout_depth.npz and readout_depth.png."""
    arrays: dict[str, Any] = {f"read_{number}": values for number, values in enumerate(pictures.read)}
    with atomic_path(folder / FILE) as temporary:
        labels = np.array(pictures.labels)
        np.savez_compressed(temporary, images=pictures.images, true=pictures.true, labels=labels, **arrays)
    figure = new_figure(2 + 1.1 * len(pictures.images), 0.3 + 1.1 * (2 + len(pictures.read)))
    draw_depth(figure, pictures)
    save_figure(figure, (folder / FILE).with_suffix(".png"))
