"""Episodes that a run was to have, and a check that each of them is there exactly once.

Every process of a run writes the whole run's plan beside its results (`plan*.json`: suite -> task -> initial states),
so that a process that never started is noticed too. A run that was extended (more tasks, more states) has the union.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json

Key = tuple[str, int, int]  # suite, task, initial state


def write_plan(folder: Path, shard: str, keys: Iterable[Key], *, anew: bool = False) -> None:
    """Add episodes to the plan in `folder` (`anew`: replace it), in the file of this process."""
    file = folder / f"plan{shard}.json"
    planned = set() if anew or not file.is_file() else _read_plan(file)
    planned |= set(keys)
    content: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for suite, task_id, init_state in sorted(planned):
        content[suite][str(task_id)].append(init_state)
    atomic_write(file, json.dumps(content) + "\n")


def planned_episodes(folder: Path) -> set[Key]:
    """Episodes that the runs into `folder` were to have; empty where no plan was written."""
    return {key for file in folder.glob("plan*.json") for key in _read_plan(file)}


def _read_plan(file: Path) -> set[Key]:
    try:
        return {
            (suite, int(task_id), int(init_state))
            for suite, tasks in read_json(file).items()
            for task_id, init_states in tasks.items()
            for init_state in init_states
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: not a plan of episodes ({error})") from error


@dataclass(frozen=True)
class Completeness:
    """Comparison of the episodes there with those planned; each list is sorted.

    Attributes:
        planned: number of episodes that were to run.
        missing: planned, and no process has a line of it.
        doubled: finished (as success or failure) more than once, in one file or in several.
        errors: tried, and never anything but an error.
        unplanned: there, though no plan has it.
    """

    planned: int
    missing: list[Key]
    doubled: list[Key]
    errors: list[Key]
    unplanned: list[Key]

    @property
    def ok(self) -> bool:
        """Every planned episode is there exactly once (possibly as an error)."""
        return not (self.missing or self.doubled)


def check(planned: set[Key], lines: Sequence[tuple[Key, str]]) -> Completeness:
    """Compare a plan with all lines of all files: (episode, status) each."""
    finished: dict[Key, int] = defaultdict(int)
    for key, status in lines:
        finished[key] += status != "error"
    return Completeness(
        planned=len(planned),
        missing=sorted(planned - finished.keys()),
        doubled=sorted(key for key, count in finished.items() if count > 1),
        errors=sorted(key for key, count in finished.items() if count == 0),
        unplanned=sorted(finished.keys() - planned),
    )


def describe(keys: Sequence[Key], most: int = 20) -> str:
    """Episodes in words, task by task: "libero_goal task 3: 0-4, 7; task 4: 0"; at most `most` tasks."""
    by_task: dict[tuple[str, int], list[int]] = defaultdict(list)
    for suite, task_id, init_state in keys:
        by_task[suite, task_id].append(init_state)
    words, last_suite = [], ""
    for suite, task_id in list(by_task)[:most]:
        name = f"task {task_id}" if suite == last_suite else f"{suite} task {task_id}"
        words.append(f"{name}: {_ranges(by_task[suite, task_id])}")
        last_suite = suite
    more = len(by_task) - most
    return "; ".join(words) + (f"; and {more} more tasks" if more > 0 else "")


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
