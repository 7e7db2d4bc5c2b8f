"""Results of episodes, the success rate of several, and what a person sees of both while episodes run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from rich.progress import Progress

STATUSES = ("success", "failure", "error")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class EpisodeResult:
    """End of one episode. `success` is None for an error; `steps` are policy steps; `wall_time` is in seconds.

    `seconds` says where the time went: creation, reset, physics, rendering, policy (its whole batch), waiting.
    """

    suite: str
    task_id: int
    task: str
    init_state: int
    seed: int
    status: str
    success: bool | None
    steps: int
    error: str | None
    wall_time: float
    attempts: int = 1
    seconds: Mapping[str, float] = field(default_factory=dict)
    kind: str | None = None  # of perturbation, with its level and the task's full name (LIBERO-Plus)
    level: int | None = None
    task_name: str | None = None

    def __post_init__(self) -> None:
        if (
            self.status not in STATUSES
            or self.success is not {"success": True, "failure": False, "error": None}[self.status]
        ):
            raise ValueError(f"status {self.status!r} with success={self.success!r}")
        whole = (self.task_id, self.init_state, self.seed, self.steps, self.attempts)
        measured = (self.wall_time, *self.seconds.values())
        if not (all(isinstance(n, Integral) for n in whole) and all(isinstance(n, Real) for n in measured)):
            raise ValueError("a number is of another type")
        texts = (self.suite, self.task, *(text for text in (self.error, self.kind, self.task_name) if text is not None))
        if not (all(isinstance(text, str) for text in texts) and isinstance(self.level, Integral | None)):
            raise ValueError("a text or the level is of another type")

    @property
    def key(self) -> tuple[str, int, int]:
        return (self.suite, self.task_id, self.init_state)


class Rate(TypedDict):
    """Success of some episodes; `success_rate` is None without completed ones, `interval_95` is (low, high)."""

    successes: int
    failures: int
    errors: int
    success_rate: float | None
    interval_95: list[float]


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson score interval of a success rate (Wilson 1927), without continuity correction; (0, 1) without trials."""
    from scipy.stats import binomtest  # A second of import, which most commands do without.

    if trials == 0:
        return (0.0, 1.0)
    interval = binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="wilson")
    return (float(interval.low), float(interval.high))


def rate(results: Iterable[EpisodeResult]) -> Rate:
    """Counts, success rate and interval of some episodes. Errors are counted beside the rate, not in it."""
    statuses = [result.status for result in results]
    successes, errors = statuses.count("success"), statuses.count("error")
    completed = len(statuses) - errors
    low, high = wilson_interval(successes, completed)
    return {
        "successes": successes,
        "failures": completed - successes,
        "errors": errors,
        "success_rate": successes / completed if completed else None,
        "interval_95": [low, high],
    }


class EvalProgress:
    """A live bar on a terminal, a plain line an episode elsewhere (log files, batch systems).

    Args:
        total: episodes this process will run.
        done: results from before, counted in the success rate but not in the speed.
    """

    def __init__(self, total: int, done: list[EpisodeResult]) -> None:
        self._total, self._finished = total, 0
        self._counts = {"success": 0, "failure": 0, "error": 0}
        for result in done:
            self._counts[result.status] += 1
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> EvalProgress:
        if sys.stderr.isatty():
            from prismatic.util.progress import progress_bar

            self._bar = progress_bar()
            self._bar.start()
            self._task = self._bar.add_task("episodes", total=self._total, info="loading environments")
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, result: EpisodeResult) -> None:
        """Count one finished episode and show it."""
        self._finished += 1
        self._counts[result.status] += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, info=self.describe())
            if result.status == "error":
                self._bar.console.print(f"{_name(result)}: error: {result.error}")
            return
        outcome = f"error: {result.error}" if result.status == "error" else f"{result.status} in {result.steps} steps"
        print(
            f"[{self._finished}/{self._total}] {_name(result)}: {outcome} | {self.describe()}",
            file=sys.stderr,
            flush=True,
        )

    def describe(self) -> str:
        """The current state in one line."""
        successes, completed = self._counts["success"], self._counts["success"] + self._counts["failure"]
        low, high = wilson_interval(successes, completed)
        parts = []
        if completed:
            interval = f"{100 * low:.0f}-{100 * high:.0f}"
            parts.append(f"success {successes}/{completed} = {100 * successes / completed:.1f}% ({interval}%)")
        if self._counts["error"]:
            parts.append(f"{self._counts['error']} errors")
        if self._finished:
            seconds = (time.monotonic() - self._started) / self._finished
            parts.append(f"{seconds:.1f} s/episode, {_clock(seconds * (self._total - self._finished))} left")
        return ", ".join(parts)


def _name(result: EpisodeResult) -> str:
    return f"{result.suite} task {result.task_id} init state {result.init_state}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
