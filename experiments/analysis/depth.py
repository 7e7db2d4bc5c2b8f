"""Depth read out of every teacher layer by ridge regression, against the simulator's depth (the paper's Figure 2)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from experiments.analysis.config import DepthConfig
from experiments.analysis.report import SEQUENTIAL, Report, new_figure, save_figure, subfigures, write_json
from experiments.mini.make.teacher_data import TeacherDataConfig, parse_tasks, read_shard
from experiments.mini.make.teacher_data import main as render_frames
from prismatic.training.precision import resolve_precision
from prismatic.util.errors import UsageError
from rocket_align.analysis.depth_probe import DepthErrors, LinearReadout, RidgeProbe, depth_map, patch_depths
from rocket_align.layers import resolve_layers
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.registry import describe_teacher, load_teacher

# Beyond this the simulator sees background only.
MAX_DEPTH = 20.0
# As many columns as fit a page.
_DRAWN_LAYERS = 5


class Frames:
    """Shards of `experiments.mini.make.teacher_data`, one a task, read a few frames at a time.

    Args:
        config: says where they lie. Those missing are rendered in the simulator; a folder that the user names may
            hold frames of any origin.
        tasks: in the form of `parse_tasks`.

    Raises:
        UsageError: there are frames made with other flags.
    """

    def __init__(self, config: DepthConfig, tasks: str) -> None:
        folder = config.frames_dir or config.out_dir / "frames"
        self._shards = [folder / f"{suite}-{task}.npz" for suite, task in parse_tasks("tasks", tasks)]
        if config.frames_dir is None or not all(shard.is_file() for shard in self._shards):
            render_frames(
                TeacherDataConfig(
                    folder,
                    tasks=tasks,
                    episodes=config.episodes,
                    frames=config.frames,
                    image_size=config.image_size,
                    seed=config.seed,
                )
            )
        self._batch_size = config.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of images (B, V, 3, H, W) in [0, 1] and depths (B, V, H, W) in meters."""
        for shard in self._shards:
            images, depths = read_shard(shard, ("images", "depths")).values()
            for first in range(0, len(images), self._batch_size):
                part = slice(first, first + self._batch_size)
                pixels = torch.from_numpy(images[part]).movedim(-1, 2).float() / 255
                yield pixels, torch.from_numpy(depths[part]).float().clamp(max=MAX_DEPTH)


class DepthStudy:
    """The teacher, and one probe per layer."""

    def __init__(self, config: DepthConfig) -> None:
        if not config.vggt_path:
            raise UsageError("--vggt_path: empty; accepted: the teacher's folder, weights file or hub id")
        self.config = config
        try:
            blocks = describe_teacher(config.vggt_path).depth
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            half = resolve_precision(config.mixed_precision) == "bf16"
            layers = resolve_layers(config.layers or tuple(range(blocks)), blocks, convention="python")
            self.teacher = load_teacher(
                config.vggt_path,
                sorted(set(layers)),
                dtype=torch.bfloat16 if half else torch.float32,
                device=self.device,
            )
        except ValueError as error:
            raise UsageError(f"--vggt_path, --layers: {error}") from error
        self.layers: tuple[int, ...] = self.teacher.layers

    def see(self, images: Tensor, depths: Tensor) -> tuple[TeacherFeatures, Tensor]:
        """Features of a batch, and its log-depth (B, V, P, cells * cells)."""
        features: TeacherFeatures = self.teacher(images.to(self.device))
        return features, patch_depths(depths.to(self.device), features.grid_hw, self.config.cells)

    def fit(self, frames: Frames) -> tuple[list[LinearReadout], LinearReadout]:
        """One readout a layer, and the control that knows a patch's view and place but no picture."""
        probes = [RidgeProbe(self.config.ridge) for _ in self.layers]
        control = RidgeProbe(1e-6)
        for images, depths in frames:
            seen, targets = self.see(images, depths)
            for probe, features in zip(probes, seen.layers, strict=True):
                probe.update(features.flatten(0, 2), targets.flatten(0, 2))
            control.update(_places(targets), targets.flatten(0, 2))
        return [probe.solve() for probe in probes], control.solve()

    def score(self, frames: Frames, readouts: list[LinearReadout], control: LinearReadout) -> Report:
        """Errors of every layer and of the control on other frames, and the first few of these frames."""
        errors = [DepthErrors() for _ in (*readouts, control)]
        drawn: list[Report] = []
        frames_seen = 0
        for images, depths in frames:
            seen, targets = self.see(images, depths)
            predicted = [
                readout(features.flatten(0, 2)).reshape(targets.shape)
                for readout, features in zip(readouts, seen.layers, strict=True)
            ]
            predicted.append(control(_places(targets)).reshape(targets.shape))
            for error, values in zip(errors, predicted):
                error.update(values.exp(), targets.exp())
            frames_seen += len(images)
            maps = [depth_map(values.exp(), seen.grid_hw, self.config.cells) for values in (*predicted, targets)]
            drawn += [
                {"image": image.numpy(), "maps": [values[row].cpu().numpy() for values in maps]}
                for row, image in enumerate(images)
            ]
            # Spread over the whole test set, without keeping more than twice as many as are drawn.
            if len(drawn) > 2 * self.config.pictures:
                drawn = drawn[:: len(drawn) // self.config.pictures][: self.config.pictures]
        return {
            "layers": {str(layer): error.result() for layer, error in zip(self.layers, errors)},
            "control": errors[-1].result(),
            "test_frames": frames_seen,
            "pictures": drawn[: self.config.pictures],
        }


def _places(targets_BVPK: Tensor) -> Tensor:
    """One-hot view and patch of every row of the flattened targets."""
    batch, views, patches, _ = targets_BVPK.shape
    return torch.eye(views * patches, device=targets_BVPK.device).repeat(batch, 1)


def depth(config: DepthConfig) -> int:
    """Fit, score, write depth.json and depth.png."""
    tested = parse_tasks("--test_tasks", config.test_tasks)
    overlap = set(parse_tasks("--train_tasks", config.train_tasks)).intersection(tested)
    if overlap:
        raise UsageError(f"--test_tasks: {sorted(overlap)} found in --train_tasks too; accepted: other tasks")
    study = DepthStudy(config)
    readouts, control = study.fit(Frames(config, config.train_tasks))
    scores = study.score(Frames(config, config.test_tasks), readouts, control)
    pictures = scores.pop("pictures")
    settings = {
        name: getattr(config, name) for name in ("vggt_path", "train_tasks", "test_tasks", "cells", "ridge", "seed")
    }
    write_json(config.out_dir / "depth.json", {"analysis": "depth", **settings, **scores})
    draw(config, scores, pictures)
    for name, errors in (*scores["layers"].items(), ("place alone", scores["control"])):
        label = f"layer {name}" if name.isdigit() else name
        print(f"{label}: AbsRel {errors['abs_rel']:.3f}, delta < 1.25 {errors['delta1']:.3f}")
    return 0


def draw(config: DepthConfig, scores: Report, pictures: list[Report]) -> None:
    """Above: pictures, depth read out of a few layers, and the true depth. Below: the errors by layer."""
    layers = list(scores["layers"])
    chosen = sorted({round(index) for index in np.linspace(0, len(layers) - 1, min(_DRAWN_LAYERS, len(layers)))})
    columns = len(chosen) + 2
    figure = new_figure(1.05 * columns + 0.7, 1.05 * len(pictures) + 2.5)
    above, below = subfigures(figure, 2, 1, height_ratios=[1.05 * len(pictures) + 0.3, 2.2])
    grid = above.subplots(len(pictures), columns, squeeze=False)
    for row, picture in zip(grid, pictures):
        truth = picture["maps"][-1][0]
        limits = {"vmin": float(truth.min()), "vmax": float(truth.max())}
        row[0].imshow(picture["image"][0].transpose(1, 2, 0))
        for axes, index in zip(row[1:], chosen):
            axes.imshow(picture["maps"][index][0], cmap=SEQUENTIAL, **limits)
        image = row[-1].imshow(truth, cmap=SEQUENTIAL, **limits)
        above.colorbar(image, ax=list(row), label="depth (m)", pad=0.01)
    titles = ["image", *(f"layer {layers[index]}" for index in chosen), "simulator"]
    for axes, title in zip(grid[0], titles):
        axes.set_title(title)
    for axes in grid.ravel():
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, name, label in zip(
        below.subplots(1, 2), ("abs_rel", "delta1"), ("AbsRel (lower is better)", r"share within 25% ($\delta_1$)")
    ):
        values = [errors[name] for errors in scores["layers"].values()]
        axes.plot([int(layer) for layer in layers], values, color="#0072B2", marker="o", markersize=4, label="probe")
        axes.axhline(scores["control"][name], color="0.5", ls="--", lw=1, label="place alone, no picture")
        axes.set(xlabel="teacher layer", ylabel=label)
        axes.locator_params(axis="x", integer=True)
        axes.legend(frameon=False)
    save_figure(figure, config.out_dir / "depth.png")
