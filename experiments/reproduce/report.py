"""The report: every table and figure with what was run, beside the paper's numbers, and what was not run.

Numbers come from the result files and from `published.py` alone; the text around them says what the scale can show.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from experiments.report import Table, percent, percent_range
from experiments.report.html import render
from experiments.reproduce.profiles import POLICIES, PROFILES, Profile, profile_of
from experiments.reproduce.published import PUBLISHED
from experiments.reproduce.records import (
    RESULTS,
    Outcome,
    Record,
    curve,
    final_values,
    late_rates,
    load_analyses,
    load_records,
    outcome,
    seconds_per_step,
)
from experiments.reproduce.seeds import paired_by_seed
from experiments.reproduce.studies import BASELINE, STUDIES, Arm, Study
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write

NOT_RUN = "not run"


@dataclass(frozen=True)
class Section:
    """One table or figure of the paper in a report.

    Attributes:
        pictures: names of the files to show.
        missing: what was not run.
        note: what is other than in the report's introduction.
    """

    name: str
    title: str
    tables: tuple[Table, ...]
    pictures: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    note: str = ""

    @property
    def heading(self) -> str:
        """As in "Table 8: projectors"."""
        kind = self.name.rstrip("0123456789")
        return f"{f'{kind.capitalize()} {self.name[len(kind) :]}'.strip()}: {self.title}"


@dataclass(frozen=True)
class Results:
    """Everything there is of one profile: policies, analyses, pictures drawn for studies."""

    profile: Profile
    records: Sequence[Record]
    analyses: Sequence[Record] = ()
    pictures: Mapping[str, str] = field(default_factory=dict)


def make_section(study: Study, results: Results) -> Section:
    """One study's section; it says what was not run."""
    tables, missing = [], []
    if study.name in PUBLISHED or not study.analyses:
        make_table = cost_table if study.name == "table7" else curve_table if study.curve else success_table
        tables.append(table := make_table(study, results))
        missing += [row[0] for row in table.rows if NOT_RUN in row]
        tables += [kinds] if study.plus and (kinds := kind_table(study, results)) else []
    pictures = [results.pictures[study.name]] if study.name in results.pictures else []
    for analysis in study.analyses:
        wanted = (study.name, analysis.name)
        records = [record for record in results.analyses if (record["study"], record["analysis"]) == wanted]
        if not records:
            missing.append(f"analysis {analysis.name}")
            continue
        tables.append(analysis_table(analysis.command, records))
        pictures += [record["picture"] for record in records if record.get("picture")]
    note = budget_text(results) if study.policy != "openvla" and results.records else ""
    return Section(study.name, study.title, tuple(tables), tuple(pictures), tuple(missing), note)


def success_table(study: Study, results: Results) -> Table:
    """Success of the study's arms with intervals, and the losses at the end of training."""
    profile, records = results.profile, results.records
    header = (
        "policy",
        "paper",
        "success",
        "95% of episodes",
        "episodes",
        "by seed",
        "95% of seeds",
        "difference paired by seed",
        "action loss",
        "alignment loss",
    )
    suites = (profile.plus_suite,) if study.plus else profile.suites
    rows = []
    for arm in study.arms(profile):
        result = outcome(records, arm.name, profile.final_step, suites)
        unaligned = outcome(records, _without_alignment(study, profile, arm), profile.final_step, suites)
        mixed = unaligned is not None and commits(records, arm.name) != commits(records, unaligned.arm)
        cells = _success_cells(result, unaligned, mixed=mixed) if result else (NOT_RUN, *[""] * 5)
        losses = (mean_text(final_values(records, arm.name, name)) for name in ("action_loss", "align_loss"))
        rows.append((arm.label, published_value(study.name, arm), *cells, *losses))
    return Table(header, tuple(rows))


def _without_alignment(study: Study, profile: Profile, arm: Arm) -> str:
    """The arm that differs from this one by the alignment alone: it sees the same part of the data."""
    for other in study.arms(profile):
        if other.flags["recipe"] == "baseline" and other.flags.get("data_fraction") == arm.flags.get("data_fraction"):
            return other.name
    return BASELINE.name


def commits(records: Sequence[Record], arm: str) -> dict[int, str]:
    """The code that trained each seed of an arm."""
    return {record["seed"]: record["code"].get("commit", "") for record in records if record["arm"] == arm}


def _success_cells(result: Outcome, unaligned: Outcome | None, *, mixed: bool) -> tuple[str, ...]:
    """Text of the columns; `mixed` says that the two arms' seeds were trained by different code."""
    paired = None
    if unaligned and unaligned.arm != result.arm:
        paired = paired_by_seed(result.by_seed, unaligned.by_seed)
    return (
        percent(result.rate),
        percent_range(result.interval),
        f"{result.successes}/{len(result.episodes)}" + (f" ({result.errors} errors)" if result.errors else ""),
        ", ".join(f"{100 * rate:.0f}" for rate in result.by_seed.values()),
        percent_range(result.seed_interval) if result.seed_interval else "",
        (paired.text(100) + (" (mixed)" if mixed else "")) if paired else "",
    )


def curve_table(study: Study, results: Results) -> Table:
    """Success at every checkpoint of the training, and the mean of the late ones, compared by seed."""
    profile = results.profile
    header = (
        "policy",
        *(f"step {step}" for step in profile.curve_steps),
        "last third",
        "difference paired by seed",
        "paper",
    )
    rows = []
    arguments = (profile.curve_steps, profile.suites)
    unaligned = late_rates(results.records, BASELINE.name, *arguments)
    for arm in study.arms(profile):
        late = late_rates(results.records, arm.name, *arguments)
        paired = paired_by_seed(late, unaligned) if arm != BASELINE else None
        mixed = commits(results.records, arm.name) != commits(results.records, BASELINE.name)
        outcomes = curve(results.records, arm.name, profile.curve_steps, profile.suites)
        cells = (
            f"{percent(step.rate)} ({step.successes}/{len(step.episodes)})" if step else NOT_RUN for step in outcomes
        )
        compared = paired.text(100) + (" (mixed)" if mixed else "") if paired else ""
        mean = percent(statistics.mean(late.values())) if late else NOT_RUN
        rows.append((arm.label, *cells, mean, compared, published_value(study.name, arm)))
    return Table(header, tuple(rows))


def cost_table(study: Study, results: Results) -> Table:
    """Samples seen, seconds a step beside the baseline's, and the success they bring."""
    profile, records = results.profile, results.records
    header = ("policy", "paper (GPUs, batch, thousand steps, success)", "batch x steps", "time of a step", "success")
    reference = seconds_per_step(records, BASELINE.name)
    rows = []
    for arm in study.arms(profile):
        seconds = seconds_per_step(records, arm.name)
        result = outcome(records, arm.name, profile.final_step, profile.suites)
        ratio = f"{seconds:.2f} s ({seconds / reference:.2f}x no alignment)" if seconds and reference else NOT_RUN
        budget = f"{profile.train['batch_size']} x {profile.train['max_steps']}"
        success = percent(result.rate) if result else NOT_RUN
        rows.append((arm.label, published_value(study.name, arm), budget, ratio, success))
    return Table(header, tuple(rows))


def kind_table(study: Study, results: Results) -> Table | None:
    """Success for every kind of perturbation; None when no result names one."""
    profile = results.profile
    rows: dict[str, dict[str, list[bool]]] = {}
    for record in results.records:
        for evaluation in record["evaluations"]:
            if evaluation["suite"] != profile.plus_suite or evaluation["step"] != profile.final_step:
                continue
            for task, _, status, *_ in evaluation["episodes"]:
                row = rows.setdefault(evaluation["kinds"][str(task)], {})
                if status != "error":
                    row.setdefault(record["arm"], []).append(status == "success")
    arms = study.arms(profile)
    cells = (
        (kind, *(f"{sum(solved)}/{len(solved)}" if (solved := row.get(arm.name)) else NOT_RUN for arm in arms))
        for kind, row in sorted(rows.items())
    )
    return Table(("kind of perturbation", *(arm.label for arm in arms)), tuple(cells)) if rows else None


def published_value(study: str, arm: Arm) -> str:
    """The paper's numbers for an arm: the last column, or all of Tables 7 and 9; empty when it has none."""
    table = PUBLISHED.get(study)
    if table is None:
        return ""
    for label, name in table.ours.items():
        if name == arm.name and label in table.rows:
            values = table.rows[label] if study in ("table7", "table9", "figure3") else table.rows[label][-1:]
            return ", ".join(f"{value:g}" for value in values)
    return ""


def mean_text(values: Sequence[float], digits: int = 4) -> str:
    """Mean, and standard deviation of several seeds; empty without values."""
    if not values:
        return ""
    spread = f" (sd {statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def _all_blocks(subject: Mapping[str, Any]) -> dict[str, float]:
    group = subject["groups"]["all"]
    return {
        "cosine between pairs": group["mean_between_pairs"],
        "negative between pairs": group["negative_share_between_pairs"],
        "cosine of a pair with the action loss": group["mean_with_action"],
        "cosine of their sum with the action loss": group["alignment_with_action"],
    }


def _mean_of_layers(subject: Mapping[str, Any]) -> dict[str, float]:
    names = {"student": "student's states", "teacher": "teacher's layers", "projected": "behind the projectors"}
    measured = {words: subject[name]["within_samples"] for name, words in names.items() if subject.get(name)}
    return {f"cosine of tokens, {words}": statistics.mean(values) for words, values in measured.items() if values}


def _similarities(subject: Mapping[str, Any]) -> dict[str, float]:
    names = {"fc1": "weights, 1st layer", "fc2": "weights, 2nd layer", "same_input": "outputs, same input"}
    names["own_input"] = "outputs, own input"
    return {f"cosine, {words}": subject["mean_between_pairs"][name] for name, words in names.items()}


def _bound(subject: Mapping[str, Any]) -> dict[str, float]:
    return {
        "c": subject["c"],
        "eta": subject["eta"],
        "|Delta| / |v_a||v_b|": subject["mean_relative_delta"],
        "cos(v_a, v_b)": subject["mean_cosine"],
        "bound holds for all pairs": float(subject["holds_for_every_pair"]),
        "pairs with a bound above 0": subject["bound_above_zero_share"],
    }


def _reach(subject: Mapping[str, Any]) -> dict[str, float]:
    """Without the numbers of a policy whose hand never closed."""
    miss = subject["miss"]
    measured = {
        "beside the object (cm)": None if miss is None else 100 * miss,
        "within 2 cm": subject["near_share"],
        "task ignored": subject["task_ignored"],
    }
    return {name: value for name, value in measured.items() if value is not None}


# The numbers of one checkpoint that a report shows, by analysis.
_NUMBERS: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "gradients": _all_blocks,
    "cone": _mean_of_layers,
    "projectors": _similarities,
    "cka": lambda subject: {"CKA of the matched layers": subject["matched_mean"]},
    "theorem": _bound,
    "reach": _reach,
}


def analysis_table(command: str, records: Sequence[Record]) -> Table:
    """An analysis's numbers, averaged over seeds; a row a policy and step, or a row a teacher layer."""
    if command == "depth":
        result = records[0]["result"]
        rows = [(f"layer {name}", errors) for name, errors in result["layers"].items()]
        rows.append(("place alone, no picture", result["control"]))
        cells = ((name, f"{errors['abs_rel']:.3f}", f"{errors['delta1']:.3f}") for name, errors in rows)
        return Table(("teacher", "AbsRel", "within 25%"), tuple(cells))
    values: dict[tuple[str, int], dict[str, list[float]]] = {}
    for record in records:
        for subject in record["result"]["subjects"]:
            row = values.setdefault((subject["label"].partition("-seed")[0], subject["step"]), {})
            for name, value in _NUMBERS[command](subject).items():
                row.setdefault(name, []).append(value)
    names = tuple(dict.fromkeys(name for row in values.values() for name in row))
    rows_of_text = (
        (f"{arm}, step {step}", *(mean_text(row.get(name, []), 3) for name in names))
        for (arm, step), row in values.items()
    )
    return Table((f"policy ({len(records)} seeds)", *names), tuple(rows_of_text))


def write_report(profile_name: str, out: Path | None = None, results: Path = RESULTS) -> Path:
    """Write report.md, report.html and the pictures; returns the Markdown file's path. Raises UsageError.

    A file `findings.md` beside the result files, written by people, is put at the top.
    """
    if profile_name not in PROFILES:
        raise UsageError(f"--profile: {profile_name!r} found; accepted: {', '.join(PROFILES)}")
    source = results / profile_name
    folder = out or source
    folder.mkdir(parents=True, exist_ok=True)
    parts = {policy: gather(profile_of(policy, profile_name), results, folder) for policy in POLICIES}
    main = parts["openvla"]
    findings = (source / "findings.md").read_text().strip() if (source / "findings.md").is_file() else ""
    subtitle, note = introduction(main)
    content = {
        "title": f"ROCKET: results, {profile_name} profile",
        "profile": profile_name,
        "subtitle": subtitle,
        "note": note,
        "training": main.pictures.get("training", ""),
        "sections": [make_section(study, parts[study.policy]) for study in STUDIES.values()],
    }
    atomic_write(folder / "report.md", render("reproduce.md", findings=findings, **content))
    shown = Markup(MarkdownIt("js-default").render(findings))
    atomic_write(folder / "report.html", render("reproduce.html", findings=shown, **content))
    return folder / "report.md"


def gather(profile: Profile, results: Path, folder: Path) -> Results:
    """Load a profile's results and draw their pictures into `folder`; raises UsageError without OpenVLA's results."""
    from experiments.reproduce.pictures import draw_pictures

    source = results / profile.name
    if profile.policy != "openvla" and not source.is_dir():
        return Results(profile, ())
    records, analyses = load_records(source), load_analyses(source, folder)
    drawn = draw_pictures(records, profile, folder, analyses)
    return Results(profile, records, analyses, {name: path.name for name, path in drawn.items()})


def budget_text(results: Results) -> str:
    """Say how many policies were trained, by which code, where, and with which flags."""
    commits = sorted({record["code"].get("commit", "unknown")[:10] for record in results.records})
    versions = [record["versions"] for record in results.records]
    machines = sorted({f"{version['cores']} cores, torch {version['torch']}" for version in versions})
    train = ", ".join(f"{name} {value}" for name, value in results.profile.train.items())
    counted = f"{len(results.records)} fine-tuned policies"
    where = f"; code {', '.join(commits)}; {'; '.join(machines)}" if commits else ""
    return f"{counted}{where}. All were trained with the same budget ({train})."


def introduction(results: Results) -> tuple[str, str]:
    """Say what was run, where, and what may be compared."""
    profile = results.profile
    scale = (
        "The paper's numbers are of OpenVLA-7B and VGGT-1B in all of LIBERO, ours of mini models in "
        f"{', '.join(profile.suites)}, tasks {profile.evaluate['task_ids']}: compare the order of rows, not the values."
        if profile.collect
        else "Both the paper's numbers and ours are of OpenVLA-7B and VGGT-1B."
    )
    return (
        f"{budget_text(results)} Rates are over the episodes of all seeds. Two intervals of 95%: Wilson's over the "
        "episodes, of these trained policies; Student's over the seeds' rates, of the method. The difference to the "
        "policies without alignment, in points of success, is paired by seed: mean, Student's interval, and p of the "
        "exact sign-flip test, which three seeds cannot bring below 0.25. Mixed: other code trained one of the two.",
        scale,
    )
