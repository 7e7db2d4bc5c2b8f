"""The report: every table and figure with what was run, beside the paper's numbers, and what was not run.

Numbers come from the result files and from `published.py` alone; the text around them says what the scale can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt
from markupsafe import Markup

from experiments.report import markdown_table
from experiments.report.html import render
from experiments.reproduce.profiles import PROFILES, Profile
from experiments.reproduce.records import RESULTS, Record, load_analyses, load_records
from experiments.reproduce.sections import Results, Section, make_sections
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write


def write_report(profile_name: str, out: Path | None = None, results: Path = RESULTS) -> Path:
    """Write report.md, report.html and the pictures; returns the Markdown file's path. Raises UsageError.

    A file `findings.md` beside the result files, written by people, is put at the top.
    """
    from experiments.reproduce.pictures import draw_pictures

    if profile_name not in PROFILES:
        raise UsageError(f"--profile: {profile_name!r} found; accepted: {', '.join(PROFILES)}")
    profile, source = PROFILES[profile_name], results / profile_name
    records = load_records(source)
    folder = out or source
    folder.mkdir(parents=True, exist_ok=True)
    analyses = load_analyses(source, folder)
    drawn = draw_pictures(records, profile, folder, analyses)
    everything = Results(profile, records, analyses, {name: path.name for name, path in drawn.items()})
    introduction = introduction_lines(records, profile)
    findings = (source / "findings.md").read_text().strip() if (source / "findings.md").is_file() else ""
    sections = make_sections(everything)
    training = drawn["training"].name if "training" in drawn else ""
    lines = [f"# Results, {profile.name} profile", "", *introduction, ""]
    lines += [findings, ""] if findings else []
    lines += ["## Training", "", f"![losses, pairs and widths]({training})", ""] if training else []
    for section in sections:
        lines += markdown_section(section)
    atomic_write(folder / "report.md", "\n".join(lines) + "\n")
    page = render(
        "reproduce.html",
        title=f"ROCKET: results, {profile.name} profile",
        subtitle=introduction[0],
        note=introduction[-1],
        findings=Markup(MarkdownIt("js-default").render(findings)),
        training=training,
        sections=sections,
    )
    atomic_write(folder / "report.html", page)
    return folder / "report.md"


def introduction_lines(records: Sequence[Record], profile: Profile) -> list[str]:
    """Say what was run, where, and what may be compared."""
    commits = sorted({record["code"].get("commit", "unknown")[:10] for record in records})
    versions = [record["versions"] for record in records]
    machines = sorted({f"{version['cores']} cores, torch {version['torch']}" for version in versions})
    train = ", ".join(f"{name} {value}" for name, value in profile.train.items())
    scale = (
        "The paper's numbers are of OpenVLA-7B and VGGT-1B in all of LIBERO, ours of mini models in "
        f"{', '.join(profile.suites)}, tasks {profile.evaluate['task_ids']}: compare the order of rows, not the values."
        if profile.collect
        else "Both the paper's numbers and ours are of OpenVLA-7B and VGGT-1B."
    )
    return [
        f"{len(records)} fine-tuned policies; code {', '.join(commits)}; {'; '.join(machines)}. All were trained with "
        f"the same budget ({train}). Rates are over the episodes of all seeds. Two intervals of 95%: Wilson's over the "
        "episodes, of these trained policies; Student's over the seeds' rates, of the method. p is of an exact paired "
        "test against the policies without alignment on equal data, seeds, tasks and initial states; it too is of "
        "these policies: where seeds differ much, only the interval over seeds says something of a method.",
        "",
        scale,
    ]


def markdown_section(section: Section) -> list[str]:
    """A section as Markdown."""
    lines = [f"## {section.heading}", ""]
    if section.reason:
        lines += [f"Not run: {section.reason}.", ""]
    for table in section.tables:
        lines += [*markdown_table(*table), ""]
    if section.missing:
        lines += [f"Not run: {', '.join(section.missing)}.", ""]
    for picture in section.pictures:
        lines += [f"![{section.title}]({picture})", ""]
    return lines
