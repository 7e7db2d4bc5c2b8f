"""A page about fine-tuning runs that a person would look at: one HTML file from their logs and evaluations.

    python -m experiments.reproduce.training_page runs/rocket runs/baseline [--eval runs/eval] [--out FILE]
        [--title TEXT] [--watch SECONDS] [--port PORT]

RUN is the folder with a run's metrics.jsonl; its checkpoints (RUN--STEP_chkpt) lie beside it. The page shows losses,
success by step with intervals, the alignment of every layer pair, the projector's widths, rollouts and configurations.
Videos are referred to by their path relative to the page, so keep it beside the runs. With --watch, the page is written
again while the runs go on, and a browser that shows it follows; with --port, this machine serves it, to itself alone.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

from experiments.report.html import Line, Rate, line_chart, link, render, setting_rows
from prismatic.checkpoint.layout import LOG_FILE, last_checkpoint, read_record, split_checkpoint_name
from prismatic.training.metrics import read_log
from prismatic.util.cli import CommandParser, exit_code, whole_number
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, refuse_no_file
from rocket_align.flags import recipe_of

MOST_VIDEOS = 24  # of a run: a browser opens each
_PAIR = re.compile(r"align_loss_pair_(\d+)")
_ALIGNMENT_LISTS = ("student_layers", "teacher_layers", "widths")
CHARTS = (
    ("action_loss", "Action loss", "L1, normalized actions"),
    ("align_loss", "Alignment loss", "1 - cosine, mean of pairs"),
    ("grad_norm", "Gradient norm", "before clipping"),
    ("learning_rate", "Learning rate", ""),
    ("samples_per_second", "Samples a second", ""),
)


@dataclass(frozen=True)
class Evaluation:
    """Success of one checkpoint in one suite."""

    step: int
    suite: str
    rate: Rate
    folder: Path


@dataclass(frozen=True)
class Run:
    """One fine-tuning run; `series` numbers it, and its color."""

    name: str
    folder: Path
    series: int
    rows: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    evaluations: tuple[Evaluation, ...] = field(default=())

    @property
    def last_step(self) -> int:
        return int(self.rows[-1]["step"])

    @property
    def success(self) -> Evaluation | None:
        """The evaluation of the latest checkpoint that has one."""
        return max(self.evaluations, key=lambda evaluation: evaluation.step, default=None)

    def curve(self, name: str) -> Line | None:
        """A metric over the steps; None when the run did not log it."""
        return _line(self.name, self.rows, name, self.series)

    @property
    def details(self) -> list[tuple[str, str]]:
        """The text of the run's card beside its success."""
        last = self.rows[-1]
        rows = [("steps", str(self.last_step)), ("action loss", _number(last.get("action_loss")))]
        if "align_loss" in last:
            rows.append(("alignment loss", _number(last["align_loss"])))
        rows += [("recipe", recipe_of(self.config)), ("seed", str(self.config.get("seed", "-")))]
        rows.append(("training time", _duration(sum(row.get("seconds", 0.0) for row in self.rows))))
        if last.get("seconds_left"):
            rows.append(("time left", _duration(last["seconds_left"])))
        if {"samples_per_second", "memory_gb"} <= last.keys():
            rows += [("samples/s", f"{last['samples_per_second']:.3g}"), ("memory", f"{last['memory_gb']:.3g} GB")]
        return rows


def _line(name: str, rows: Sequence[dict[str, Any]], metric: str, series: int) -> Line | None:
    points = [(row["step"], row[metric]) for row in rows if row.get(metric) is not None]
    return Line(name, [step for step, _ in points], [value for _, value in points], series) if points else None


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"


def load_runs(folders: Sequence[Path], eval_dir: Path | None = None) -> list[Run]:
    """Read the runs, in the order given. Raises UsageError for a folder without a log."""
    runs = []
    for series, folder in enumerate(folders):
        # Validation lines have no loss of a training step.
        rows = tuple(row for row in read_log(folder / LOG_FILE) if "loss" in row)
        if not rows:
            raise UsageError(f"{folder}: no {LOG_FILE} with training steps; accepted: the folder of a fine-tuning run")
        config = read_record(last_checkpoint(folder) or folder)
        evaluations = find_evaluations(folder.resolve().name, eval_dir) if eval_dir else ()
        runs.append(Run(folder.resolve().name, folder, series, rows, config, evaluations))
    return runs


def find_evaluations(run: str, eval_dir: Path) -> tuple[Evaluation, ...]:
    """Evaluations below a folder whose checkpoint is one of the run's."""
    from experiments.robot.libero.results import summary
    from experiments.robot.libero.results.run_folder import load_episodes, read_run_config

    evaluations = []
    for record in sorted(eval_dir.glob("*/config.json")):
        content = read_run_config(record.parent)
        checkpoint = Path(str(content.get("environment", {}).get("checkpoint", ""))).name
        evaluated, step = split_checkpoint_name(checkpoint)
        if evaluated == run and step is not None:
            rate = Rate.of(summary.rate(load_episodes(record.parent)))
            suite = str(content.get("identity", {}).get("suite", ""))
            evaluations.append(Evaluation(step, suite, rate, record.parent))
    return tuple(sorted(evaluations, key=lambda evaluation: evaluation.step))


def build_page(
    folders: Sequence[Path],
    out: Path,
    eval_dir: Path | None = None,
    title: str = "Fine-tuning",
    note: str = "",
    refresh: float = 0,
    picture: Mapping[str, str] | None = None,
) -> bool:
    """Write the page of some runs to `out`, `note` above the numbers, and tell whether a run still has steps to do.

    A `picture` has a "path" relative to the page and a "text", and comes first.
    While that is so, a browser loads the page again every `refresh` seconds, unless 0.
    Raises UsageError as :func:`load_runs`.
    """
    runs = load_runs(folders, eval_dir)
    goes_on = any(run.rows[-1].get("seconds_left") for run in runs)
    charts = [
        line_chart(lines, title=name, x_label="step", y_label=unit)
        for metric, name, unit in CHARTS
        if (lines := [line for run in runs if (line := run.curve(metric)) is not None])
    ]
    page = render(
        "training.html",
        title=title,
        subtitle=f"{len(runs)} run{'s' * (len(runs) > 1)}: {', '.join(run.name for run in runs)}",
        note=note,
        picture=picture,
        refresh=refresh if goes_on else 0,
        runs=runs,
        success=success_chart(runs),
        charts=charts,
        alignments=[alignment(run) for run in runs if run.curve("align_loss")],
        videos=[video for run in runs for video in videos(run, out)],
        configuration=setting_rows([run.config for run in runs]),
    )
    atomic_write(out, page)
    return goes_on


def serve(out: Path, port: int, eval_dir: Path | None = None) -> str:
    """Serve page and videos to this machine, in a thread that ends with the process; returns the page's address.

    Raises UsageError: the port is taken.
    """
    root = Path(os.path.commonpath([out.parent, *([eval_dir.resolve()] if eval_dir else [])]))
    handler = partial(_QuietHandler, directory=str(root))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UsageError(f"--port: {port} cannot be served ({error}); accepted: a free port, or 0 for any") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/{quote(str(out.relative_to(root)))}"


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def success_chart(runs: Sequence[Run]) -> Any:
    """Success by step, where runs have several evaluated checkpoints; else None."""
    lines = []
    for run in runs:
        percents: dict[int, list[float]] = {}
        for evaluation in run.evaluations:
            if evaluation.rate.value is not None:
                percents.setdefault(evaluation.step, []).append(100 * evaluation.rate.value)
        if len(percents) > 1:
            lines.append(Line(run.name, list(percents), list(map(statistics.fmean, percents.values())), run.series))
    return line_chart(lines, title="Success", x_label="step", y_label="percent") if lines else None


def alignment(run: Run) -> dict[str, Any]:
    """A run's alignment: the loss of every pair over the steps, and the hidden units that each uses.

    Raises UsageError: the record of the run holds something else there.
    """
    described = run.config.get("alignment") or {}
    try:
        students, teachers, widths = ([*(described.get(name) or ())] for name in _ALIGNMENT_LISTS)
        parts = [100 * width / max(widths) for width in widths]
    except (AttributeError, TypeError):
        wanted = "lists of layers and widths"
        raise UsageError(f"{run.folder}: alignment: {described!r} in its record; accepted: {wanted}") from None
    numbers = sorted({int(match[1]) for row in run.rows for key in row if (match := _PAIR.fullmatch(key))})

    def name(pair: int) -> str:
        return f"{students[pair]} : {teachers[pair]}" if pair < len(students) else f"pair {pair}"

    curves = (_line(name(pair), run.rows, f"align_loss_pair_{pair}", pair) for pair in numbers)
    lines = [line for line in curves if line is not None]
    chart = line_chart(lines, title="Alignment loss of every pair", x_label="step", y_label="1 - cosine")
    bars = [{"name": name(pair), "width": widths[pair], "part": part} for pair, part in enumerate(parts)]
    return {"run": run, "chart": chart, "widths": bars, "projector": described.get("projector", "")}


def videos(run: Run, out: Path) -> list[dict[str, Any]]:
    """Rollouts of the latest evaluated checkpoint that has videos, failures first."""
    for evaluation in sorted(run.evaluations, key=lambda evaluation: -evaluation.step):
        files = sorted((evaluation.folder / "videos").glob("*.mp4"), key=lambda file: "--failure" not in file.name)
        if files:
            return [
                {
                    "path": link(file, out),
                    "status": file.stem.rpartition("--")[2],
                    "name": file.stem.rpartition("--")[0].replace("--", ", "),
                    "run": run,
                    "step": evaluation.step,
                }
                for file in files[:MOST_VIDEOS]
            ]
    return []


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    parser = CommandParser(
        prog="python -m experiments.reproduce.training_page", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a fine-tuning run")
    parser.add_argument("--eval", type=Path, dest="eval_dir", help="folder that holds evaluations (--local_log_dir)")
    parser.add_argument("--out", type=Path, help="page to write; default: training.html in the first run's folder")
    parser.add_argument("--title", default="Fine-tuning")
    parser.add_argument("--watch", type=_seconds, default=0, help="write the page again every so many seconds")
    parser.add_argument(
        "--port", type=whole_number(0, 2**16 - 1), help="serve it to this machine, with --watch; 0: any free port"
    )
    arguments = parser.parse_args(argv)
    if (eval_dir := arguments.eval_dir) is not None and not eval_dir.is_dir():
        if eval_dir.exists():
            raise UsageError(f"--eval: {eval_dir} is not a folder; accepted: the folder of evaluations")
        if not arguments.watch:  # The first evaluation of a run in training makes the folder.
            raise UsageError(f"--eval: no such folder: {eval_dir}")
    if arguments.port is not None and not arguments.watch:
        raise UsageError(f"--port: {arguments.port} without --watch; accepted: both of them")
    out: Path = (arguments.out or arguments.runs[0] / "training.html").resolve()
    refuse_no_file("--out" if arguments.out else "RUN", out)
    write = partial(build_page, arguments.runs, out, arguments.eval_dir, arguments.title, refresh=arguments.watch)
    goes_on = write()
    print(f"page: {out if arguments.port is None else serve(out, arguments.port, arguments.eval_dir)}", flush=True)
    while arguments.watch and goes_on:
        time.sleep(arguments.watch)
        goes_on = write()
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 3600:
        raise ArgumentTypeError(f"{text!r} found; accepted: 1 to 3600 seconds")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
