"""The demo's report: one table, one picture, and where everything lies. Numbers come from result files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.robot.libero.results.summary import wilson_interval
from prismatic.training.metrics import read_log
from prismatic.util.files import atomic_path, atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

    from experiments.reproduce.demo import DemoConfig

COLORS = {"untouched": "#8a8f98", "baseline": "#3f7cac", "rocket": "#d1495b"}
LABELS = {"untouched": "before fine-tuning", "baseline": "without alignment", "rocket": "ROCKET"}
FRAMES = 8


@dataclass(frozen=True)
class Outcome:
    """Success of one policy, or of several seeds of one method together."""

    method: str
    seeds: tuple[int, ...]
    per_task: dict[str, tuple[int, int]]

    @property
    def successes(self) -> int:
        return sum(successes for successes, _ in self.per_task.values())

    @property
    def episodes(self) -> int:
        return sum(episodes for _, episodes in self.per_task.values())


def read_outcome(config: DemoConfig, method: str, seeds: Sequence[int]) -> Outcome:
    """Add up the summaries of a method's runs."""
    runs = [method] if method == "untouched" else [f"{method}-seed{seed}" for seed in seeds]
    per_task: dict[str, tuple[int, int]] = {}
    for run in runs:
        summary = json.loads((config.out / "eval" / run / "summary.json").read_text())
        for suite in summary["suites"].values():
            for task in suite["tasks"].values():
                successes, episodes = per_task.get(task["task"], (0, 0))
                completed = task["successes"] + task["failures"]
                per_task[task["task"]] = (successes + task["successes"], episodes + completed)
    return Outcome(method, tuple(seeds) if method != "untouched" else (), per_task)


def write_report(config: DemoConfig, seeds: tuple[int, ...], *, minutes: float, console: Console) -> Path:
    """Write report.md, .png and .html below `config.out`, print the table, and return report.md's path."""
    from rich.table import Table

    from experiments.reproduce.report.training_page import build_page

    outcomes = [read_outcome(config, method, seeds) for method in LABELS]
    table = Table(title=f"{config.suite}, tasks {config.tasks}, {config.trials} unseen initial states each")
    for column in ("policy", "success", "95% interval", "episodes", "seeds"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for outcome in outcomes:
        table.add_row(*_row(outcome))
    draw_picture(config, seeds, outcomes, config.out / "report.png")
    report = config.out / "report.md"
    atomic_write(report, _markdown(config, seeds, outcomes, minutes))
    runs = [config.out / "runs" / f"{method}-seed{seed}" for seed in seeds for method in ("baseline", "rocket")]
    build_page(runs, config.out / "report.html", config.out / "eval", "Demo: fine-tuning with and without ROCKET")
    console.print(table)
    for name, place in _places(config).items():
        console.print(f"{name}: {place}", highlight=False, soft_wrap=True)
    return report


def _row(outcome: Outcome) -> tuple[str, ...]:
    low, high = wilson_interval(outcome.successes, outcome.episodes)
    return (
        LABELS[outcome.method],
        f"{100 * outcome.successes / max(1, outcome.episodes):.0f}%",
        f"{100 * low:.0f} to {100 * high:.0f}%",
        f"{outcome.successes}/{outcome.episodes}",
        ", ".join(map(str, outcome.seeds)) or "-",
    )


def _places(config: DemoConfig) -> dict[str, Path]:
    return {
        "report": config.out / "report.md",
        "picture": config.out / "report.png",
        "page to look at": config.out / "report.html",
        "demonstrations": config.out / "data",
        "checkpoints and loss logs": config.out / "runs",
        "results, one line an episode": config.out / "eval",
        "videos": config.out / "eval" / "video-rocket-seed0" / "videos",
        "logs of every command": config.out / "logs",
    }


def _markdown(config: DemoConfig, seeds: tuple[int, ...], outcomes: list[Outcome], minutes: float) -> str:
    lines = [
        "# Demo report",
        "",
        f"{config.suite}, tasks {config.tasks}: {config.episodes} scripted demonstrations a task, {config.max_steps} "
        f"LoRA steps of batch {config.batch_size}, seeds {', '.join(map(str, seeds))}; {config.trials} official "
        f"initial states a task, none of them in the demonstrations; fast rendering at 128 pixels. This run took "
        f"{minutes:.1f} minutes.",
        "",
        "| policy | success | 95% interval | episodes | seeds |",
        "|---|---:|---:|---:|---:|",
        *(f"| {' | '.join(_row(outcome))} |" for outcome in outcomes),
        "",
        "| task | " + " | ".join(LABELS[outcome.method] for outcome in outcomes) + " |",
        "|---|" + "---:|" * len(outcomes),
    ]
    for task in outcomes[0].per_task:
        cells = [f"{outcome.per_task[task][0]}/{outcome.per_task[task][1]}" for outcome in outcomes]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    lines += ["", "![losses, success and a rollout](report.png)", ""]
    lines += [f"- {name}: `{place}`" for name, place in _places(config).items()]
    lines += ["", "A mini model on two tasks shows that the parts work together; it does not rank the methods.", ""]
    return "\n".join(lines)


def draw_picture(config: DemoConfig, seeds: Sequence[int], outcomes: Sequence[Outcome], path: Path) -> None:
    """Losses of every run, success with intervals, and frames of one rollout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(10, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1.15, 1))
    _draw_losses(figure.add_subplot(grid[0, 0]), config, seeds, "action_loss", "action loss (L1, normalized)")
    _draw_losses(figure.add_subplot(grid[0, 1]), config, seeds, "align_loss", "alignment loss (1 - cosine)")
    _draw_success(figure.add_subplot(grid[0, 2]), outcomes)
    _draw_frames(figure.add_subplot(grid[1, :]), config, seeds)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def _draw_losses(axes: Axes, config: DemoConfig, seeds: Sequence[int], name: str, title: str) -> None:
    for method in ("baseline", "rocket"):
        for seed in seeds:
            rows = read_log(config.out / "runs" / f"{method}-seed{seed}" / "metrics.jsonl")
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                steps, values = np.array(points).T
                label = LABELS[method] if seed == seeds[0] else None
                axes.plot(steps, values, color=COLORS[method], alpha=0.9, linewidth=1.4, label=label)
    axes.set(title=title, xlabel="step", ylim=(0, None))
    axes.legend(frameon=False)


def _draw_success(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    for position, outcome in enumerate(outcomes):
        rate = outcome.successes / max(1, outcome.episodes)
        low, high = wilson_interval(outcome.successes, outcome.episodes)
        axes.bar(position, rate, color=COLORS[outcome.method], width=0.65)
        axes.errorbar(position, rate, [[rate - low], [high - rate]], color="black", capsize=4, linewidth=1)
        axes.text(position, 1.04, f"{outcome.successes}/{outcome.episodes}", ha="center")
    axes.set_xticks(range(len(outcomes)), [LABELS[outcome.method].replace(" ", "\n", 1) for outcome in outcomes])
    axes.set(title="success on unseen initial states", ylim=(0, 1.12), yticks=np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")


def _draw_frames(axes: Axes, config: DemoConfig, seeds: Sequence[int]) -> None:
    axes.set_axis_off()
    videos = sorted((config.out / "eval" / f"video-rocket-seed{seeds[0]}" / "videos").glob("*.mp4"))
    chosen = next((video for video in videos if "success" in video.name), videos[0] if videos else None)
    if chosen is None:
        axes.set_title("no video")
        return
    frames = _frames(chosen)
    # A frame shows both cameras side by side; here the third-person views stand above the wrist's.
    views = [np.concatenate(np.split(frame, 2, axis=1), axis=0) for frame in frames]
    axes.imshow(np.concatenate(views, axis=1), interpolation="bilinear")
    outcome = "success" if "success" in chosen.name else "failure"
    axes.set_title(f"a rollout of the ROCKET policy, both cameras, start to end ({outcome})")


def _frames(video: Path) -> list[Any]:
    import imageio.v3 as iio

    frames = iio.imread(video, plugin="FFMPEG")
    return [frames[index] for index in np.linspace(0, len(frames) - 1, FRAMES).astype(int)]
