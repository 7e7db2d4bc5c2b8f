"""Episode results on disk: one JSON line an episode, safe against kills, never mixed between configurations.

A run folder holds
    config.json            `identity` (everything that influences the numbers) and `environment` (recorded only)
    plan*.json             suite -> task -> initial states there are to be; every process writes the whole run's, so
                           that one that never started is noticed too, and a run that was extended has the union
    episodes*.jsonl        a line per finished episode, flushed and synced; one file per process of a distributed run
    summary.json, .md      success rates with intervals, rewritten at the end
    videos/                on request

An episode is "success", "failure" or "error" (the simulator or the policy raised); an error is not counted as a
failure. When an episode occurs twice (errors are repeated on resume) the later line counts. A half-written last line
of a killed run is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from experiments.robot.libero.results.summary import Report, summarize, to_markdown
from experiments.robot.libero.rollouts.protocol import Episode, protocol_deviations
from experiments.robot.libero.rollouts.result import EpisodeResult
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_write, read_json

Key = tuple[str, int, int]  # suite, task, initial state
# Entries of the identity that records of earlier versions lack: nothing is known against those.
_UNKNOWN_BEFORE = ("task_files",)
_DERIVED = "standard_protocol"  # Follows from the others.
# Of the identity: what changes an episode beside its protocol.
_CONDITIONS = ("initial_states", "instruction_source", "robot_start", "renderer")


class RunFolder:
    """The results of one run; appends episodes and knows which are done.

    Args:
        folder: created when missing.
        identity: everything that influences the numbers; a folder with another identity is refused.
        environment: versions and machine, written along.
        overwrite: throw away what is there.
        shard: ".rank{r}-of-{n}" for one of n processes of a distributed run, "" otherwise.

    Raises:
        UsageError: the folder belongs to another configuration, or another process is writing to it.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, object],
        environment: Mapping[str, object],
        *,
        overwrite: bool = False,
        shard: str = "",
    ) -> None:
        self.folder = folder
        self._shard, self._overwritten = shard, overwrite
        self._identity, self._environment = _plain(identity), _plain(environment)
        if not overwrite:
            self._refuse_other_identity()
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = _open_locked(folder / f"episodes{shard}.jsonl")
        if self._overwritten:
            self._discard(shard)
        record = {"identity": self._identity, "environment": self._environment}
        atomic_write(folder / "config.json", json.dumps(record, indent=2) + "\n")

    def _discard(self, shard: str) -> None:
        """Drop all episodes but those that other processes of this same distributed run are writing now."""
        self._stream.truncate(0)
        world = shard.partition("-of-")[2]
        for file in (*self.folder.glob("episodes*.jsonl"), *self.folder.glob("plan*.json")):
            current = bool(world) and file.stem.endswith(f"-of-{world}")
            if file.name != f"episodes{shard}.jsonl" and not current:
                file.unlink(missing_ok=True)

    def _refuse_other_identity(self) -> None:
        file = self.folder / "config.json"
        empty = not any(lines.stat().st_size for lines in self.folder.glob("episodes*.jsonl"))
        if not file.is_file():
            if not empty:
                raise UsageError(f"--run_name: {self.folder} holds episodes but no config.json; use another --run_name")
            return
        before = read_run_config(self.folder).get("identity", {})
        unknown = [*(key for key in _UNKNOWN_BEFORE if key not in before), _DERIVED]
        compared = ({k: v for k, v in record.items() if k not in unknown} for record in (before, self._identity))
        differing = differing_values(*compared)
        if differing and empty:  # Of a run that stopped before its first episode.
            self._overwritten = True
        elif differing:
            raise UsageError(
                f"--run_name: {self.folder} holds results of another configuration ({'; '.join(differing[:4])}); "
                "use another --run_name, or --overwrite true to discard them"
            )

    def plan(self, episodes: Iterable[Episode]) -> None:
        """Note all episodes that the run is to have, those of its other processes included."""
        write_plan(self.folder, self._shard, (episode.key for episode in episodes), anew=self._overwritten)

    def append(self, result: EpisodeResult) -> None:
        """Write one episode; it is on disk when this returns."""
        line = {**asdict(result), "identity": self._identity, "environment": self._environment}
        self._stream.write((json.dumps(line) + "\n").encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def finished(self) -> list[EpisodeResult]:
        """All episodes on disk, of every process, the last line of each."""
        return load_episodes(self.folder)

    def write_summary(self) -> Report:
        """Write summary.json and summary.md from what is on disk and return the former."""
        with (self.folder / ".summary.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # Whichever process comes last has read all the others' episodes.
            results, planned = self.finished(), planned_episodes(self.folder)
            missing = len(planned - {result.key for result in results})
            report = {**summarize(results), "planned": len(planned), "missing": missing}
            report["deviations"] = protocol_deviations(self._identity)
            content = {**report, "identity": self._identity}
            atomic_write(self.folder / "summary.json", json.dumps(content, indent=2) + "\n")
            atomic_write(self.folder / "summary.md", to_markdown(report))
        return report

    def close(self) -> None:
        self._stream.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


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


def load_episodes(folder: Path) -> list[EpisodeResult]:
    """Episodes of a run folder by (suite, task, init state); raises UsageError for none, or an unreadable line."""
    files = sorted(folder.glob("episodes*.jsonl"))
    if not files:
        raise UsageError(
            f"{folder}: no episodes*.jsonl in this folder; accepted: a folder written by run_libero_eval.py"
        )
    episodes: dict[tuple[str, int, int], EpisodeResult] = {}
    for file in files:
        for result, _ in read_episode_lines(file):
            episodes[result.key] = later_unless_error(episodes.get(result.key), result)
    return [episodes[key] for key in sorted(episodes)]


def later_unless_error(earlier: EpisodeResult | None, later: EpisodeResult) -> EpisodeResult:
    """Choose between two lines of an episode: the later one, but a finished episode goes before an error."""
    return later if earlier is None or earlier.status == "error" or later.status != "error" else earlier


def differing_values(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """List what tells two identities apart, a line an entry."""
    return [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(set(before) | set(now))
        if before.get(key) != now.get(key)
    ]


def differing_conditions(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """List differences of two runs in how episodes of the same key were run; [] where a run has no record of it."""
    conditions = []
    for identity in (first, second):
        known = {name: identity[name] for name in _CONDITIONS if name in identity and name in first and name in second}
        protocol = identity.get("protocol")
        conditions.append({**(protocol if isinstance(protocol, Mapping) else {}), **known})
    return differing_values(*conditions) if first.get("protocol") and second.get("protocol") else []


def read_run_config(folder: Path, *, needed: bool = False) -> dict[str, Any]:
    """The contents of a run folder's config.json, {} where there is none and none is `needed`.

    Raises UsageError: it is missing, damaged, or of another form.
    """
    file = folder / "config.json"
    content = read_json(file) if needed or file.is_file() else {}
    for name in ("identity", "environment"):
        if not isinstance(content.get(name, {}), dict):
            raise UsageError(f"{file}: {name} is {content[name]!r:.40}; accepted: an object")
    return content


def read_identity(run: Path) -> Mapping[str, object]:
    """Read the identity of a run: what influences its numbers, as far as it is recorded."""
    return read_run_config(run).get("identity", {})


def read_episode_lines(file: Path) -> Iterator[tuple[EpisodeResult, bytes]]:
    """Yield every whole line of a results file, parsed and as it is; raises UsageError for one that is no episode."""
    names = {entry.name for entry in fields(EpisodeResult)}
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # What follows the last newline was not finished.
        try:
            content = json.loads(line)
            yield EpisodeResult(**{key: value for key, value in content.items() if key in names}), line
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"{file}: line {number} is not an episode ({error})") from error


def _open_locked(file: Path) -> IO[bytes]:
    """Open for appending, alone, with a half-written last line cut off."""
    stream = file.open("ab+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise UsageError(f"--run_name: another process is writing to {file}; use another --run_name") from None
    stream.seek(0)
    content = stream.read()
    if content and not content.endswith(b"\n"):
        stream.truncate(content.rfind(b"\n") + 1)
    stream.seek(0, os.SEEK_END)
    return stream


def _plain(values: Mapping[str, object]) -> dict[str, object]:
    """`values` as they look after a round trip through JSON, so that comparison with a file is exact."""
    return json.loads(json.dumps(dict(values), default=str))
