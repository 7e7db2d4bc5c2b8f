"""Run the paper's tables and figures, and report what there is.

    python -m experiments.reproduce list
    python -m experiments.reproduce run table8 [--profile mini|paper] [--out DIR] [--dry_run] ...
    python -m experiments.reproduce report [--profile mini|paper]
    python -m experiments.reproduce confirm [--out DIR] [--dry_run] ...

What is done is skipped: run again after an interruption, and run one table after another, since they share policies.
Exit codes: 0 done, 1 a command failed (its log is named), 2 wrong flags, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.reproduce.jobs import Chain, JobFailed, JobRunner
from experiments.reproduce.profiles import POLICIES, PROFILES, Profile, profile_of
from experiments.reproduce.stages import StudyPaths, analysis_job, arm_jobs, collect_job, preparation_jobs
from experiments.reproduce.studies import STUDIES, Analysis, Arm, Study
from prismatic.util.cli import CommandParser, exit_code, whole_number
from prismatic.util.errors import UsageError
from prismatic.util.files import refuse_no_folder
from prismatic.util.flags import split_names, split_numbers


def make_parser() -> CommandParser:
    count = whole_number(0)
    parser = CommandParser(prog="python -m experiments.reproduce", description="The paper's experiments.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name the tables and figures")
    run = commands.add_parser("run", help="run what a table or figure needs")
    run.add_argument("study", nargs="+", help="table2 ... figure8, see list")
    run.add_argument(
        "--profile", default="mini", choices=PROFILES, help="mini: shipped models on a CPU; paper: published settings"
    )
    run.add_argument("--out", type=Path, help="datasets, runs and logs (default: runs/reproduce/PROFILE)")
    run.add_argument("--vla_path", default="", help="base model instead of the profile's")
    run.add_argument("--teacher_path", default="", help="teacher instead of the profile's")
    run.add_argument("--data_root_dir", type=Path, help="RLDS data (the mini profile makes its own)")
    run.add_argument("--seeds", default="", help="fine-tuning seeds, comma list, instead of the profile's")
    run.add_argument("--arms", default="", help="only these arms, comma list")
    run.add_argument("--processes", type=count, default=0, help="GPUs of one command (default: 1 mini, 4 paper)")
    run.add_argument("--parallel", type=count, default=0, help="commands side by side (default: cores; paper 1)")
    run.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    confirm = commands.add_parser("confirm", help="run the registered confirmation, docs/confirmation.md")
    confirm.add_argument("--out", type=Path, help="datasets, runs and logs (default: runs/reproduce/confirmation)")
    confirm.add_argument("--seeds", default="", help="comma list, to try it out or to share the registered ones out")
    confirm.add_argument("--parallel", type=count, default=0, help="commands side by side (default: cores)")
    confirm.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    report = commands.add_parser("report", help="write report.md and report.html from the result files")
    report.add_argument("--profile", default="mini", choices=PROFILES)
    report.add_argument("--out", type=Path, help="folder of the report (default: beside the result files)")
    return parser


def chosen_seeds(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The seeds of `--seeds`. Raises UsageError: something else than whole numbers from 0 on."""
    seeds = split_numbers("--seeds", arguments.seeds)
    if seeds and min(seeds) < 0:
        raise UsageError(f"--seeds: {min(seeds)} found; accepted: 0 or more")
    return seeds


def make_paths(arguments: argparse.Namespace, policy: str = "openvla") -> StudyPaths:
    """Profile and folders from the flags, for studies of that family of policies; raises UsageError."""
    profile = profile_of(policy, arguments.profile)
    seeds = chosen_seeds(arguments) or profile.seeds
    profile = replace(
        profile,
        vla_path=arguments.vla_path or profile.vla_path,
        teacher_path=arguments.teacher_path or profile.teacher_path,
        seeds=seeds,
    )
    out = (arguments.out or Path("runs/reproduce") / arguments.profile).resolve()
    # Arms of two policies have the same names, and so have their demonstrations.
    own = out if policy == "openvla" else out / policy
    data = arguments.data_root_dir
    if data is None:
        if not profile.collect:
            raise UsageError("--data_root_dir: missing; accepted: the folder that holds the RLDS datasets")
        data = own / "data"
    return StudyPaths(profile, own, data.resolve(), processes=arguments.processes or (1 if profile.collect else 4))


def choose_studies(names: Sequence[str]) -> tuple[Study, ...]:
    """The studies of these names ("all": every one); raises UsageError."""
    if list(names) == ["all"]:
        return tuple(STUDIES.values())
    for name in names:
        if name not in STUDIES:
            raise UsageError(f"study: {name!r} found; accepted: all, {', '.join(STUDIES)}")
    return tuple(STUDIES[name] for name in names)


def chosen_arms(studies: Sequence[Study], profile: Profile, wanted: frozenset[str] = frozenset()) -> tuple[Arm, ...]:
    """The arms of the studies, each once; of those only the `wanted` ones, if any are named."""
    arms = {arm.name: arm for study in studies for arm in study.arms(profile)}
    return tuple(arm for arm in arms.values() if not wanted or arm.name in wanted)


def make_chains(studies: Sequence[Study], paths: StudyPaths, wanted: frozenset[str]) -> tuple[Chain, ...]:
    """The commands of every arm and seed; studies that share an arm share its commands.

    Seed by seed, so that a run that is cut short has compared all arms on the first seeds.
    """
    from experiments.reproduce.records import write_record

    def chain(arm: Arm, seed: int) -> Chain:
        having = [study for study in studies if arm in study.arms(paths.profile)]
        jobs = {job.name: job for study in having for job in arm_jobs(paths, study, arm, seed)}
        commands = tuple(jobs.values())
        return Chain(commands, lambda: write_record(paths, arm, seed, commands))

    arms = chosen_arms(studies, paths.profile, wanted)
    return tuple(chain(arm, seed) for seed in paths.profile.seeds for arm in arms)


def make_preparations(studies: Sequence[Study], paths: StudyPaths, wanted: frozenset[str]) -> tuple[Chain, ...]:
    """Jobs of what seeds share: they would get in each other's way if each did."""
    jobs = (preparation_jobs(paths, arm) for arm in chosen_arms(studies, paths.profile, wanted))
    return tuple(Chain(commands) for commands in jobs if commands)


def make_analysis_chains(studies: Sequence[Study], paths: StudyPaths) -> tuple[Chain, ...]:
    """The analyses of the studies; they need the checkpoints of all their arms."""
    from experiments.reproduce.records import write_analysis_record

    def chain(study: Study, analysis: Analysis, seed: int) -> Chain:
        job = analysis_job(paths, analysis, seed)
        return Chain((job,), lambda: write_analysis_record(paths, study, analysis, seed, job))

    return tuple(
        chain(study, analysis, seed)
        for study in studies
        for analysis in study.analyses
        for seed in (paths.profile.seeds if analysis.arms else paths.profile.seeds[:1])
    )


def choose_arms(text: str, studies: Sequence[Study], profile: Profile) -> frozenset[str]:
    """Arm names from `--arms`; raises UsageError for one that no chosen study has."""
    wanted = frozenset(split_names(text))
    known = {arm.name for arm in chosen_arms(studies, profile)}
    if wanted - known:
        raise UsageError(f"--arms: {', '.join(sorted(wanted - known))} found; accepted: {', '.join(sorted(known))}")
    return wanted


def run_studies(arguments: argparse.Namespace) -> int:
    """Run (or print) the commands of the chosen studies, one policy's after the other's; returns the exit code."""
    chosen = choose_studies(arguments.study)
    groups = {policy: [study for study in chosen if study.policy == policy] for policy in POLICIES}
    planned = [(studies, make_paths(arguments, policy)) for policy, studies in groups.items() if studies]
    choose_arms(arguments.arms, chosen, planned[0][1].profile)
    return max(run_planned(arguments, studies, paths) for studies, paths in planned)


def run_planned(arguments: argparse.Namespace, studies: Sequence[Study], paths: StudyPaths) -> int:
    """Run (or print) the commands of studies of one policy; returns the exit code."""
    wanted = frozenset(split_names(arguments.arms))
    chains = make_chains(studies, paths, wanted)
    # Analyses compare arms: with a part of them, there is nothing to compare.
    analyses = () if wanted else make_analysis_chains(studies, paths)
    makes_data = paths.profile.collect and arguments.data_root_dir is None
    collection = (Chain((collect_job(paths),)),) if makes_data else ()
    return run_stages((collection, make_preparations(studies, paths, wanted), chains, analyses), paths, arguments)


def run_confirmation(arguments: argparse.Namespace) -> int:
    """Run (or print) the commands of the confirmation and write its verdict; returns the exit code."""
    from experiments.report import markdown_table
    from experiments.reproduce import confirm

    out = arguments.out or Path("runs/reproduce") / confirm.REGIME.name
    paths = confirm.make_paths(out, chosen_seeds(arguments))
    # Results of seeds that are not registered stay out of the repository's.
    registered = set(paths.profile.seeds) <= set(confirm.REGIME.seeds)
    results = confirm.RESULTS if registered else paths.out / "results"
    code = run_stages(confirm.make_stages(paths, results), paths, arguments)
    if not arguments.dry_run and (table := confirm.write_verdict(results)):
        print("\n".join(markdown_table(*table)))
    return code


def run_stages(stages: Sequence[Sequence[Chain]], paths: StudyPaths, arguments: argparse.Namespace) -> int:
    """Run the stages one after the other, or print their commands; returns the exit code."""
    from rich.console import Console

    console = Console()
    if arguments.dry_run:
        jobs = {job.name: job for stage in stages for chain in stage for job in chain.jobs}
        for job in jobs.values():
            console.print(f"python {shlex.join(job.arguments)}", highlight=False, soft_wrap=True, markup=False)
        return 0
    refuse_no_folder("--out", paths.out)
    runner = JobRunner(paths.logs, console)
    parallel = arguments.parallel or (min(4, os.cpu_count() or 1) if paths.processes == 1 else 1)
    failures: list[JobFailed] = []
    for stage in stages:
        failures += [] if failures else runner.run_chains(stage, parallel)
    for failure in failures:
        Console(stderr=True).print(str(failure), style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


@exit_code
def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    if arguments.command == "list":
        for study in STUDIES.values():
            print(f"{study.name:8} {study.title}")
        return 0
    if arguments.command == "run":
        return run_studies(arguments)
    if arguments.command == "confirm":
        return run_confirmation(arguments)
    from experiments.reproduce.report import write_report

    if arguments.out is not None:
        refuse_no_folder("--out", arguments.out)
    print(f"report: {write_report(arguments.profile, arguments.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
