"""The report's pictures: success with intervals, training curves, alignment of every layer pair, projector widths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.analysis.readout_pictures import draw_depth
from experiments.analysis.report import new_figure, save_figure, subfigures
from experiments.report import percent
from experiments.reproduce.confirm import ERROR
from experiments.reproduce.profiles import Profile
from experiments.reproduce.records import Outcome, Record, curve, outcome
from experiments.reproduce.studies import BASELINE, METHODS, NAIVE_NARROW, ROCKET, STUDIES, Arm, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from experiments.reproduce.demo_tokens import TokenResults

# Okabe and Ito's colors, told apart with every kind of color vision.
COLORS = {
    "untouched": "#bbbbbb",
    "baseline": "#7f7f7f",
    "spatial_forcing": "#e69f00",
    "naive": "#0072b2",
    "shared": "#009e73",
    "rocket": "#d55e00",
    "naive-width20": "#56b4e9",
    "spatial_forcing-width20": "#f0c75e",
}
_OTHER = "#d55e00"
DPI = 160
FRAMES = 8


def draw_pictures(
    records: Sequence[Record], profile: Profile, folder: Path, analyses: Sequence[Record] = ()
) -> dict[str, Path]:
    """Draw what there are results for; returns the file of every study that has one, and of "training"."""
    studies = {name: study for name, study in STUDIES.items() if study.policy == profile.policy}
    figures = {name: _draw_study(study, records, profile) for name, study in studies.items()}
    if reach := [record for record in analyses if record["analysis"] == "reach"]:
        figures["reach"] = draw_reach(reach, records, profile)
    if profile.policy == "openvla" and any(record["training"] for record in records):
        figures["training"] = draw_training(records)
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png", DPI)
    return {name: folder / f"{name}.png" for name in drawn}


def _draw_study(study: Study, records: Sequence[Record], profile: Profile) -> Figure | None:
    """A study's success; None when nothing of it was run."""
    if study.analyses or study.name == "table7":
        return None
    if study.curve:
        before = [(arm.name, step) for arm in study.arms(profile) for step in profile.curve_steps[:-1]]
        drawn = any(outcome(records, arm, step, profile.suites) for arm, step in before)
        return draw_curves(study, records, profile) if drawn else None
    suites = (profile.plus_suite,) if study.plus else profile.suites
    outcomes = [outcome(records, arm.name, profile.final_step, suites) for arm in study.arms(profile)]
    evaluated = [result for result in outcomes if result]
    return draw_success(evaluated) if evaluated else None


def draw_success(outcomes: Sequence[Outcome]) -> Figure:
    """One line an arm: rate and interval over all seeds, and a small mark for every seed."""
    figure = new_figure(6.2, 0.9 + 0.42 * len(outcomes))
    _draw_rates(figure.subplots(), outcomes)
    return figure


def _draw_rates(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    for row, result in enumerate(outcomes):
        low, high = result.interval
        color = COLORS.get(result.arm, _OTHER)
        axes.plot([low, high], [row, row], color=color, linewidth=2.2, solid_capstyle="round")
        axes.plot(list(result.by_seed.values()), [row] * len(result.by_seed), "|", color=color, markersize=11)
        axes.plot(result.rate, row, "o", color=color, markersize=7)
        text = f"{result.successes}/{len(result.episodes)}"
        axes.text(1.04, row, text, va="center", transform=axes.get_yaxis_transform())
    axes.set_yticks(range(len(outcomes)), [result.label for result in outcomes])
    axes.set_xlim(-0.02, 1.02)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("success rate, 95% interval; ticks: single seeds")
    axes.xaxis.set_major_formatter(lambda value, _: percent(value, 0))


def draw_demo(tokens: TokenResults, outcomes: Sequence[Outcome], videos: Path, path: Path) -> None:
    """The demo's picture: what alignment changes and what not, depth in the tokens, a rollout from `videos`."""
    figure = new_figure(10, 10.4)
    above, middle, below = subfigures(figure, 3, 1, height_ratios=(2.5, 4.7, 3.2))
    depth, error, success = above.subplots(1, 3)
    colors = [COLORS[name] for name in (BASELINE.name, ROCKET.name)]
    for label, color, values in zip(tokens.pictures.labels, colors, tokens.depth_by_state):
        depth.plot(range(len(values)), values, color=color, marker="o", label=label)
    depth.axhline(0, color="gray", lw=0.6)
    depth.set(title="depth in the policy's tokens", xlabel="layer", ylabel="R2 above the place")
    depth.legend(frameon=False)
    bars = error.bar(tokens.pictures.labels, tokens.values(ERROR), color=colors, width=0.5)
    error.bar_label(bars, fmt="%.3f")
    error.set(title="action error, unseen demonstrations", ylabel="L1, normalized")
    error.margins(y=0.15)
    _draw_rates(success, outcomes)
    success.set(title="episodes solved, two tasks", xlabel="95% interval; ticks: seeds")
    success.margins(y=0.2)
    success.set_yticks(range(len(outcomes)), [result.label.replace(" ", "\n", 1) for result in outcomes])
    draw_depth(middle, tokens.pictures)
    title = (
        "depth read out of the policy's own tokens, in a task that the probe has not seen: nearer or farther than usual"
    )
    middle.suptitle(title, fontsize=9)
    _draw_frames(below.subplots(), videos)
    save_figure(figure, path, DPI)


def _draw_frames(axes: Axes, videos: Path) -> None:
    """Frames of a success, where there is one."""
    axes.set_axis_off()
    files = sorted(videos.glob("*.mp4"), key=lambda file: "success" not in file.name)
    if not files:
        axes.set_title("no video")
        return
    import imageio.v3 as iio

    frames = iio.imread(files[0], plugin="FFMPEG")
    chosen = [frames[index] for index in np.linspace(0, len(frames) - 1, FRAMES).astype(int)]
    # A frame shows both cameras side by side; here the third-person views stand above the wrist's.
    views = [np.concatenate(np.split(frame, 2, axis=1), axis=0) for frame in chosen]
    axes.imshow(np.concatenate(views, axis=1), interpolation="bilinear")
    ending = "success" if "success" in files[0].name else "failure"
    axes.set_title(f"a rollout of the ROCKET policy, both cameras, start to end ({ending})")


def draw_curves(study: Study, records: Sequence[Record], profile: Profile) -> Figure:
    """Success at the checkpoints of the training."""
    figure = new_figure(5.4, 3.4)
    axes = figure.subplots()
    arms = study.arms(profile)
    for number, arm in enumerate(arms):
        results = curve(records, arm.name, profile.curve_steps, profile.suites)
        shown = [(step, result) for step, result in zip(profile.curve_steps, results, strict=True) if result]
        if not shown:
            continue
        # A little to the side, or the intervals hide one another.
        shift = (number - (len(arms) - 1) / 2) * 0.008 * profile.final_step
        rates = np.array([result.rate for _, result in shown])
        bars = np.abs(np.array([result.interval for _, result in shown]).T - rates)
        steps = np.array([step for step, _ in shown]) + shift
        axes.errorbar(steps, rates, bars, color=COLORS[arm.name], marker="o", capsize=2, linewidth=1.5, label=arm.label)
    axes.set(xlabel="training step", ylabel="success rate", ylim=(0, 1.03), xlim=(0, None))
    axes.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
    axes.legend(frameon=False)
    return figure


def draw_reach(analyses: Sequence[Record], records: Sequence[Record], profile: Profile) -> Figure:
    """Draw how far beside the object the hand closes: along the training, and what it means for success at the end."""
    figure = new_figure(9, 3.3)
    left, right = figure.subplots(1, 2)
    for arm in METHODS:
        color, misses_cm = COLORS[arm.name], _misses_cm(analyses, arm)
        steps = sorted({step for _, step in misses_cm})
        seeds_cm = [[miss for (_, step), miss in misses_cm.items() if step == wanted] for wanted in steps]
        left.plot(steps, list(map(np.mean, seeds_cm)), color=color, marker="o", linewidth=1.5, label=arm.label)
        left.fill_between(
            steps, list(map(min, seeds_cm)), list(map(max, seeds_cm)), color=color, alpha=0.12, linewidth=0
        )
        result = outcome(records, arm.name, profile.final_step, profile.suites)
        for seed, rate in result.by_seed.items() if result else ():
            if (seed, profile.final_step) in misses_cm:
                right.plot(misses_cm[seed, profile.final_step], rate, "o", color=color, markersize=6, alpha=0.8)
    left.set(title="during training; mean and range of seeds", xlabel="step", ylabel="hand beside the object (cm)")
    left.legend(frameon=False, fontsize=8)
    right.set(
        title=f"step {profile.final_step}, every seed", xlabel="hand beside the object (cm)", ylabel="success rate"
    )
    right.set_ylim(-0.03, 1.03)
    right.yaxis.set_major_formatter(lambda value, _: percent(value, 0))
    for axes in (left, right):
        axes.set_xlim(0, None)
    left.set_ylim(0, None)
    return figure


def _misses_cm(analyses: Sequence[Record], arm: Arm) -> dict[tuple[int, int], float]:
    """(seed, step) -> distance in cm between hand and object; without policies whose hand never closed."""
    return {
        (record["seed"], subject["step"]): 100 * subject["miss"]
        for record in analyses
        for subject in record["result"]["subjects"]
        if subject["label"].partition("-seed")[0] == arm.name and subject["miss"] is not None
    }


def draw_training(records: Sequence[Record]) -> Figure:
    """Losses of the methods, ROCKET's alignment pair by pair, and the widths of its projector."""
    figure = new_figure(9, 6)
    axes = figure.subplots(2, 2)
    _draw_metric(axes[0, 0], records, "action_loss", "action loss (L1, normalized); mean and range of seeds")
    _draw_metric(axes[0, 1], records, "align_loss", "alignment loss (1 - cosine); mean and range of seeds")
    _draw_pairs(axes[1, 0], records)
    _draw_widths(axes[1, 1], records)
    return figure


def _curves(records: Sequence[Record], arm: str, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(steps, values of every seed) of a metric; seeds are cut to the shortest log."""
    logs = [record["training"] for record in records if record["arm"] == arm and name in record["training"]]
    if not logs:
        return None
    length = min(len(log["step"]) for log in logs)
    return np.array(logs[0]["step"][:length]), np.array([log[name][:length] for log in logs])


def _draw_metric(axes: Axes, records: Sequence[Record], name: str, title: str) -> None:
    for arm in (*METHODS, NAIVE_NARROW):
        curves = _curves(records, arm.name, name)
        if curves is None or not np.any(curves[1] > 0):
            continue
        steps, values = curves
        label = next(record["label"] for record in records if record["arm"] == arm.name)
        axes.plot(steps, values.mean(0), color=COLORS[arm.name], linewidth=1.5, label=label)
        axes.fill_between(steps, values.min(0), values.max(0), color=COLORS[arm.name], alpha=0.15, linewidth=0)
    axes.set(title=title, xlabel="step", ylim=(0, None))
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def _draw_pairs(axes: Axes, records: Sequence[Record]) -> None:
    import matplotlib

    names = sorted(
        {name for record in records if record["arm"] == ROCKET.name for name in record["training"] if "_pair_" in name},
        key=lambda name: int(name.rpartition("_")[2]),
    )
    shades = matplotlib.colormaps["viridis"](np.linspace(0.05, 0.9, max(1, len(names))))
    for number, (name, shade) in enumerate(zip(names, shades, strict=False)):
        curves = _curves(records, ROCKET.name, name)
        if curves is not None:
            axes.plot(curves[0], curves[1].mean(0), color=shade, linewidth=1.5, label=f"pair {number}")
    axes.set(title="ROCKET: alignment loss of every pair, shallow to deep", xlabel="step", ylim=(0, None))
    if names:
        axes.legend(frameon=False, fontsize=8)


def _draw_widths(axes: Axes, records: Sequence[Record]) -> None:
    """Hidden channels that each pair of ROCKET's projector uses."""
    alignment = next(
        (record["alignment"] for record in records if record["arm"] == ROCKET.name and record.get("alignment")), None
    )
    if alignment is None:
        axes.set_axis_off()
        return
    widths, pairs = alignment["widths"], zip(alignment["student_layers"], alignment["teacher_layers"], strict=True)
    axes.bar(range(len(widths)), [max(widths)] * len(widths), color="#eeeeee", width=0.7)
    axes.bar(range(len(widths)), widths, color=COLORS["rocket"], width=0.7)
    for position, width in enumerate(widths):
        axes.text(position, width, str(width), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(widths)), [f"{student} : {teacher}" for student, teacher in pairs])
    axes.set(title="ROCKET: hidden channels in use", xlabel="student layer : teacher block")
