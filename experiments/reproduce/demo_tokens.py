"""The demo's part on what a policy's tokens tell: the regime of docs/confirmation.md, with one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.analysis.readout_pictures import DepthPictures
from experiments.report import Table
from experiments.reproduce.confirm import DEPTH, ERROR, POSE, REGIME, Measure, frames_job
from experiments.reproduce.jobs import ROOT, Chain, Job, JobRunner, as_arguments
from experiments.reproduce.records import Outcome, Record
from experiments.reproduce.stages import StudyPaths, collect_job, train_job
from experiments.reproduce.studies import BASELINE, ROCKET
from prismatic.checkpoint.layout import LOG_FILE
from prismatic.training.metrics import read_log
from prismatic.util.files import read_json

# Without alignment, with it; their runs lie beside those of the two tasks.
ARMS = (replace(BASELINE, name="moved-baseline"), replace(ROCKET, name="moved-rocket"))
LABELS = ("without alignment", ROCKET.label)
_FRAMES_DRAWN = 7
# Smaller differences, of R2 and in parts of the error, are what seeds do: twice the standard deviation that they have
# over the eight seeds of results/confirmation (0.029, 0.8%).
_DEPTH_MARGIN, _ERROR_MARGIN = 0.06, 0.016


def tokens_paths(out: Path, seed: int, episodes: int, steps: int, workers: int) -> StudyPaths:
    """Folders and budget of the part: `episodes` demonstrations, `steps` of training."""
    profile = replace(
        REGIME,
        vla_path=str(ROOT / REGIME.vla_path),
        teacher_path=str(ROOT / REGIME.teacher_path),
        train={**REGIME.train, "max_steps": steps, "save_freq": steps, "val_freq": steps},
        final_step=steps,
        curve_steps=(),
        seeds=(seed,),
        collect={**REGIME.collect, "episodes": episodes, "workers": workers},
    )
    return StudyPaths(profile, out, out / "data-moved")


def data_job(paths: StudyPaths) -> Job:
    """Demonstrations with the object anywhere on the table."""
    return replace(collect_job(paths), name="collect-moved")


def readout_job(paths: StudyPaths) -> Job:
    """Depth and camera pose read out of both policies' tokens."""
    checkpoints = [str(paths.checkpoint(arm, paths.profile.seeds[0], paths.profile.final_step)) for arm in ARMS]
    flags = {
        "checkpoint": ",".join(checkpoints),
        "frames_dir": paths.out / "frames",
        "pictures": _FRAMES_DRAWN,
        "out_dir": paths.out / "readout",
    }
    result = paths.out / "readout" / "readout.json"
    return Job("readout", ("vla-scripts/analyze.py", "readout", *as_arguments(flags)), result)


def run_tokens(paths: StudyPaths, runner: JobRunner, parallel: int) -> None:
    """Train both policies and read their tokens; raises JobFailed."""
    seed = paths.profile.seeds[0]
    frames = frames_job(paths, {"episodes": max(1, int(str(paths.profile.collect["episodes"])) // 3)})
    # The policy without alignment is ready first; the frames fill the gap.
    chains = [*(Chain((train_job(paths, arm, seed),)) for arm in ARMS), Chain((frames,))]
    failures = runner.run_chains(chains, parallel, keep_going=False)
    if failures:
        raise failures[0]
    runner.run([readout_job(paths)], 1)


@dataclass(frozen=True)
class TokenResults:
    """Measurements of both policies.

    Attributes:
        records: without alignment and with it, as the measures of the confirmation read them.
        pictures: depth of a few frames.
    """

    records: tuple[Record, ...]
    pictures: DepthPictures

    @property
    def depth_by_state(self) -> list[list[float]]:
        """R2 above the place of the third-person view, a list of states for each policy."""
        return [[views[0] for views in record["readout"]["depth"]] for record in self.records]

    def values(self, measure: Measure) -> tuple[float, float]:
        """A measure, without alignment and with it."""
        without, aligned = (measure.read(record) for record in self.records)
        assert without is not None and aligned is not None
        return without, aligned

    @property
    def table(self) -> Table:
        """Every measure of both policies."""
        rows = ((measure.name, *(f"{value:.3f}" for value in self.values(measure))) for measure in (DEPTH, POSE, ERROR))
        return Table(("measure", *LABELS), tuple(rows))


def read_tokens(paths: StudyPaths) -> TokenResults:
    """The results of :func:`run_tokens`."""
    subjects = read_json(readout_job(paths).result)["subjects"]
    logs = [read_log(paths.out / "runs" / paths.run_id(arm, paths.profile.seeds[0]) / LOG_FILE) for arm in ARMS]
    records = tuple(
        {"readout": subject, "validation": next(row for row in reversed(log) if "val/action_loss" in row)}
        for subject, log in zip(subjects, logs, strict=True)
    )
    pictures = DepthPictures.load(paths.out / "readout")
    return TokenResults(records, replace(pictures, labels=LABELS))


def statement(tokens: TokenResults, without: Outcome | None, aligned: Outcome | None) -> str:
    """Say what alignment changed in this run, and in what no difference is shown."""
    depths, errors = tokens.values(DEPTH), tokens.values(ERROR)
    measures = [
        (
            f"the depth in the policy's tokens (R2 above the place {depths[0]:.2f} without, {depths[1]:.2f} with)",
            # Below 0 the tokens tell no more than their place does, however far.
            abs(max(0.0, depths[1]) - max(0.0, depths[0])) >= _DEPTH_MARGIN,
        ),
        (
            f"the error of its actions ({errors[0]:.3f} without, {errors[1]:.3f} with)",
            abs(errors[1] / errors[0] - 1) >= _ERROR_MARGIN,
        ),
    ]
    if without and aligned:
        solved = (f"{outcome.successes}/{len(outcome.episodes)}" for outcome in (without, aligned))
        lows, highs = zip(without.interval, aligned.interval)
        measures.append(("the episodes that it solves ({} without, {} with)".format(*solved), max(lows) > min(highs)))
    changed, same = ([text for text, differs in measures if differs is wanted] for wanted in (True, False))
    sentences = [f"Alignment changed {_joined(changed)}."] if changed else []
    if same:
        sentences.append(f"No difference is shown in {_joined(same, 'or')}.")
    return " ".join(sentences)


def _joined(parts: Sequence[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
