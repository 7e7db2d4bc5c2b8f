"""The report: every table and figure with what was run, beside the paper's numbers, and what was not run.

Numbers come from the result files and from `published.py` alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.reproduce.arms import BASELINE, Arm
from experiments.reproduce.outcomes import (
    Outcome,
    Record,
    final_values,
    load_records,
    outcome,
    paired_test,
    seconds_per_step,
)
from experiments.reproduce.profiles import PROFILES, Profile
from experiments.reproduce.published import PUBLISHED
from experiments.reproduce.records import RESULTS
from experiments.reproduce.studies import STUDIES, Study
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write

Rows = list[list[str]]
NOT_RUN = "not run"


def write_report(profile_name: str, out: Path | None = None, results: Path = RESULTS) -> Path:
    """Write report.md and its pictures; returns the Markdown file's path. Raises UsageError."""
    from experiments.reproduce.pictures import draw_pictures

    if profile_name not in PROFILES:
        raise UsageError(f"--profile: {profile_name!r} found; accepted: {', '.join(PROFILES)}")
    profile = PROFILES[profile_name]
    records = load_records(results / profile_name)
    folder = out or results / profile_name
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(records, profile, folder)
    text = "\n".join(report_lines(records, profile, pictures)) + "\n"
    atomic_write(folder / "report.md", text)
    return folder / "report.md"


def report_lines(records: Sequence[Record], profile: Profile, pictures: dict[str, Path]) -> list[str]:
    """The report as Markdown."""
    lines = [f"# Results, {profile.name} profile", "", *_introduction(records, profile), ""]
    for study in STUDIES.values():
        lines += [f"## {study.name.capitalize().replace('table', 'Table ')}: {study.title}", ""]
        lines += study_lines(study, records, profile)
        if study.name in pictures:
            lines += [f"![{study.title}]({pictures[study.name].name})", ""]
    return lines


def _introduction(records: Sequence[Record], profile: Profile) -> list[str]:
    commits = sorted({record["code"].get("commit", "unknown")[:10] for record in records})
    versions = [record["versions"] for record in records]
    machines = sorted({f"{version['cores']} cores, torch {version['torch']}" for version in versions})
    train = ", ".join(f"{name} {value}" for name, value in profile.train.items())
    scale = (
        "The paper's numbers are of OpenVLA-7B and VGGT-1B in all of LIBERO, ours of mini models in "
        f"{', '.join(profile.suites)}, tasks {profile.evaluate['task_ids']}: compare the order of rows, not the values."
        if profile.collects
        else "Both the paper's numbers and ours are of OpenVLA-7B and VGGT-1B."
    )
    return [
        f"{len(records)} fine-tuned policies; code {', '.join(commits)}; {'; '.join(machines)}. All were trained with "
        f"the same budget ({train}). Rates are over the episodes of all seeds, with Wilson's 95% interval; p is of an "
        "exact paired test against the policy without alignment, on equal seeds, tasks and initial states.",
        "",
        scale,
    ]


def study_lines(study: Study, records: Sequence[Record], profile: Profile) -> list[str]:
    """A study's table; says so when nothing was run."""
    if study.unsupported:
        return [f"Not run: {study.unsupported}.", "", *published_lines(study.name)]
    if study.curve:
        header, rows = curve_table(study, records, profile)
    elif study.name == "table7":
        header, rows = cost_table(study, records, profile)
    else:
        header, rows = success_table(study, records, profile)
    lines = markdown_table(header, rows)
    missing = [row[0] for row in rows if NOT_RUN in row]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    return [*lines, ""]


def success_table(study: Study, records: Sequence[Record], profile: Profile) -> tuple[list[str], Rows]:
    """Success of the study's arms with intervals, and the losses at the end of training."""
    header = ["policy", "paper", "success", "95% interval", "episodes", "by seed", "p", "action loss", "alignment loss"]
    suites = ("libero_plus",) if study.plus else profile.suites
    baseline = outcome(records, BASELINE.name, profile.final_step, suites)
    rows: Rows = []
    for arm in study.arms(profile):
        found = outcome(records, arm.name, profile.final_step, suites)
        cells = _success_cells(found, baseline) if found else [NOT_RUN, "", "", "", ""]
        losses = [_mean(final_values(records, arm.name, name)) for name in ("action_loss", "align_loss")]
        rows.append([arm.label, published_value(study.name, arm), *cells, *losses])
    return header, rows


def _success_cells(found: Outcome, baseline: Outcome | None) -> list[str]:
    low, high = found.interval
    test = paired_test(baseline, found) if baseline and found.arm != BASELINE.name else None
    return [
        f"{100 * found.rate:.1f}%",
        f"{100 * low:.0f} to {100 * high:.0f}%",
        f"{found.successes}/{len(found.episodes)}" + (f" ({found.errors} errors)" if found.errors else ""),
        ", ".join(f"{100 * rate:.0f}" for rate in found.by_seed.values()),
        f"{test.p_value:.2g}" if test else "",
    ]


def curve_table(study: Study, records: Sequence[Record], profile: Profile) -> tuple[list[str], Rows]:
    """Success at every checkpoint of the training."""
    header = ["policy", *(f"step {step}" for step in profile.curve_steps), "paper"]
    rows: Rows = []
    for arm in study.arms(profile):
        found = [outcome(records, arm.name, step, profile.suites) for step in profile.curve_steps]
        cells = [f"{100 * one.rate:.1f}% ({one.successes}/{len(one.episodes)})" if one else NOT_RUN for one in found]
        rows.append([arm.label, *cells, published_value(study.name, arm)])
    return header, rows


def cost_table(study: Study, records: Sequence[Record], profile: Profile) -> tuple[list[str], Rows]:
    """Samples seen, seconds a step beside the baseline's, and the success they bring."""
    header = ["policy", "paper (GPUs, batch, thousand steps, success)", "batch x steps", "time of a step", "success"]
    reference = seconds_per_step(records, BASELINE.name)
    rows: Rows = []
    for arm in study.arms(profile):
        seconds = seconds_per_step(records, arm.name)
        found = outcome(records, arm.name, profile.final_step, profile.suites)
        ratio = f"{seconds:.2f} s ({seconds / reference:.2f}x no alignment)" if seconds and reference else NOT_RUN
        budget = f"{profile.train['batch_size']} x {profile.train['max_steps']}"
        rows.append(
            [
                arm.label,
                published_value(study.name, arm),
                budget,
                ratio,
                f"{100 * found.rate:.1f}%" if found else NOT_RUN,
            ]
        )
    return header, rows


def published_value(study: str, arm: Arm) -> str:
    """The paper's numbers for an arm: the last column, or all of Tables 7 and 9; empty when it has none."""
    table = PUBLISHED.get(study)
    if table is None:
        return ""
    for label, name in table.ours.items():
        if name == arm.name:
            values = table.rows[label] if study in ("table7", "table9", "figure3") else table.rows[label][-1:]
            return ", ".join(f"{value:g}" for value in values)
    return ""


def published_lines(study: str) -> list[str]:
    """The paper's whole table."""
    table = PUBLISHED[study]
    rows = [[label, *(f"{value:g}" for value in values)] for label, values in table.rows.items()]
    return [*markdown_table(["paper", *table.columns], rows), ""]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column is text and whose others are numbers."""
    ruler = ["---", *("---:" for _ in header[1:])]
    return [f"| {' | '.join(row)} |" for row in (header, ruler, *rows)]


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" (sd {statistics.stdev(values):.4f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"
