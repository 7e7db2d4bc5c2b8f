"""Cases of `fuzz.py`: command lines with one thing wrong, and files with one thing damaged.

Wrong is what no command can take. After the exchange of one value in a file a command may end well, since it may not
need that value.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzz_commands import (
    ALOHA,
    ANALYZE,
    COLLECT,
    DEPLOY,
    EVALUATE,
    FINETUNE,
    HDF5,
    MERGE,
    PAGE,
    PI_FINETUNE,
    PUSH,
    REGENERATE,
    ROBOTWIN,
    SELECT,
    TEACHER,
    commands,
)
from benchmarks.fuzz_readings import needed_files
from prismatic.util.flags import choices_of, declared


@dataclass
class Case:
    kind: str
    words: list[str]
    file: Path | None = None  # The file that is exchanged while the command runs
    content: bytes | None = None  # None: the file is missing
    harmless: bool = False  # The command may end well

    def describe(self, work: Path) -> str:
        """The kind, the command and the file, without the place of the work folder."""
        beside = f" [{self.file}]" if self.file else ""
        return ascii(f"{self.kind}{beside}: {' '.join(self.words)}".replace(str(work), "WORK"))[1:-1][:600]

    @contextlib.contextmanager
    def applied(self, work: Path) -> Iterator[None]:
        """Exchange the file, which stays in `work` meanwhile, and put it back as it was."""
        if self.file is None:
            yield
            return
        aside = work / f"{self.file.name}.aside"
        self.file.rename(aside)
        try:
            if self.content is not None:
                self.file.write_bytes(self.content)
            yield
        finally:
            self.file.unlink(missing_ok=True)
            aside.rename(self.file)


# Pairs that exclude each other, by command.
CONTRADICTIONS: list[tuple[str, dict[str, str]]] = [
    (FINETUNE, {"use_l1_regression": "True", "use_diffusion": "True"}),
    (FINETUNE, {"val_fraction": "0.5"}),
    (FINETUNE, {"keep_best": "True"}),
    (FINETUNE, {"recipe": "rocket", "vla_layers_align": "1,2", "vggt_layers_align": "1"}),
    (FINETUNE, {"recipe": "rocket", "vla_layers_align": "99", "vggt_layers_align": "1"}),
    (FINETUNE, {"recipe": "rocket", "vggt_path": ""}),
    (FINETUNE, {"dataset_name": "bridge_orig"}),
    (FINETUNE, {"teacher_path": "x"}),
    (FINETUNE, {"num_images_in_input": "9"}),
    (FINETUNE, {"save_specific_steps": "1,x"}),
    (DEPLOY, {"use_l1_regression": "True", "use_diffusion": "True"}),
    (DEPLOY, {"load_in_8bit": "True", "load_in_4bit": "True"}),
    (DEPLOY, {"unnorm_key": "nowhere"}),
    (DEPLOY, {"host": "no.such.host.invalid"}),
    (DEPLOY, {"use_film": "True"}),
    (DEPLOY, {"use_diffusion": "True", "use_l1_regression": "False"}),
    (DEPLOY, {"device": "cuda:77"}),
    (MERGE, {"max_shard_size": "5XB"}),
    (MERGE, {"max_shard_size": "-5GB"}),
    (PUSH, {"repo_id": "a/b/c"}),
    (PUSH, {"repo_id": "a b"}),
    (PUSH, {"base_model": "a b"}),
    (SELECT, {"count": "99"}),
    (SELECT, {"strategy": "cka", "data_root_dir": "/nowhere"}),
    (SELECT, {"window": "99", "strategy": "sim_top"}),
    (EVALUATE, {"task_ids": "77"}),
    (EVALUATE, {"unnorm_key": "nowhere"}),
    (EVALUATE, {"use_l1_regression": "True", "use_diffusion": "True"}),
    (EVALUATE, {"policy": "no.module.of.this.name:x"}),
    (EVALUATE, {"policy": "http://127.0.0.1:1"}),
    (ALOHA, {}),  # A policy of one arm.
    (ALOHA, {"task_ids": "9"}),
    (FINETUNE, {"use_lora": "False", "use_dora": "True"}),
    (FINETUNE, {"use_lora": "False", "lora_targets": "q_proj"}),
    (FINETUNE, {"lora_targets": "nowhere"}),
    (FINETUNE, {"resume": "True", "resume_step": "5"}),
    (PI_FINETUNE, {"use_film": "True"}),
    (PI_FINETUNE, {"use_lora": "False", "lora_expert_rank": "2"}),
    (f"{ANALYZE} cka", {"estimator": "minibatch", "rows": "samples"}),
    (f"{ANALYZE} cka", {"estimator": "minibatch", "debiased": "False"}),
    (f"{ANALYZE} cka", {"rows": "samples"}),  # Of two samples.
    (f"{ANALYZE} gradients", {"block": "99"}),
    (f"{ANALYZE} projectors", {"recipe": "baseline"}),
    (f"{ANALYZE} static", {"recipe": "baseline"}),
    (f"{ANALYZE} theorem", {"vla_layers_align": "99", "vggt_layers_align": "1"}),
    (f"{ANALYZE} depth", {"layers": "99"}),
    (f"{ANALYZE} depth", {"test_tasks": "libero_object:99"}),
    (f"{ANALYZE} readout", {"test_tasks": "libero_object:0"}),
    (f"{ANALYZE} readout", {"unnorm_key": "nowhere"}),
    (f"{ANALYZE} reach", {"task_ids": "99"}),
    (f"{ANALYZE} reach", {"task_suite_name": "nonsense"}),
    (f"{ANALYZE} reach", {"device": "cuda"}),
    (SELECT, {"strategy": "cka", "teacher_strategy": "uniform"}),
    (COLLECT, {"tasks": "99"}),
    (COLLECT, {"suite": "nonsense"}),
    (COLLECT, {"suite": "gym_aloha", "scene": "moved"}),
    (REGENERATE, {"task_ids": "99"}),
    (REGENERATE, {"task_ids": "0-3"}),
    (HDF5, {"dataset_name": "n" * 300}),
    (ROBOTWIN, {"dataset_name": "a/../../b"}),
    (TEACHER, {"control": "True", "weights": "/tmp/nowhere"}),
    (TEACHER, {"train_tasks": "libero_object:7"}),
    (PAGE, {"port": "0"}),
]


def wrong_configurations(rng: random.Random, work: Path, count: int) -> list[Case]:
    """`count` cases: each kind in turn, on a command of chance."""
    makers = (_wrong_flag, _wrong_flag, _wrong_file, _wrong_reading, _wrong_reading, _wrong_writing, _contradiction)
    return [makers[number % len(makers)](rng, work) for number in range(count)]


def _wrong_flag(rng: random.Random, work: Path) -> Case:
    """One flag unknown, without a value, of another type, or beyond its limits."""
    script, command = rng.choice(list(commands(work).items()))
    flags = list(declared(command.config))
    if not flags:
        return Case("unknown flag or no value", [*command.words(script), f"--{rng.choice(('out_dir', 'x'))}", "1"])
    name, kind, declaration = rng.choice(flags)
    limits = declaration.metadata
    kinds = (kind, *getattr(kind, "__args__", ()))
    values = []
    if choices_of(kind) or limits.get("choices"):
        values += ["nonsense", "\u00e9", "True ", "-1e9"]
    elif bool in kinds or int in kinds or float in kinds or ("list" in limits and limits["list"] is int):
        values += ["nonsense", "1,,x", "0x", "\u0661x", "--", "1 2", "9" * 5000 + "x"]
        if "least" in limits or "above" in limits:
            values += [
                str(math.floor(limits.get("least", limits.get("above"))) - 1),
                "-inf" if float in kinds else "-99",
            ]
        if float in kinds and ({"least", "above", "most", "below"} & set(limits)):
            values.append("nan")
    if not values or rng.random() < 0.25:
        misspelled = name[:-1] + rng.choice("qxz") + name[-1]
        words = command.words(script) + rng.choice(
            ([f"--{misspelled}", "1"], [f"--{name}"], [misspelled], ["-" + name])
        )
        return Case("unknown flag or no value", words)
    return Case("wrong value", command.words(script, **{name: rng.choice(values)}))


def _wrong_file(rng: random.Random, work: Path) -> Case:
    """A configuration file that is none."""
    script = rng.choice([name for name, command in commands(work).items() if command.config.__name__ != "Flags"])
    path = work / "in" / rng.choice(("flags.yaml", "flags.json", "flags.toml"))
    contents = [
        b"a: [1",
        b"- a",
        b"\xff\xfe\x00",
        b"nonsense",
        b"7",
        b'{"a": 1}',
        b'{"seed": {"a": 1}}',
        b"seed: [1, 2]",
    ]
    contents += [b"seed: !!python/object:os.system x", b"seed: [1, 2]", b"seed: 2024-01-01", b"\x00", b"? [a, b]\n: c"]
    contents += [b"[" * 100_000, b'{"a":' * 50_000, b"[a]\nb = 1", b"seed = 1\nseed = 2", b"seed: &x\n  y: *x"]
    contents.append(bytes(rng.randrange(128, 256) for _ in range(300)))
    path.touch()
    words = commands(work)[script].words(script) + ["--config_path", str(path)]
    return Case("configuration file", words, path, rng.choice(contents))


def _odd_paths(work: Path) -> list[str]:
    """Paths at which nothing can be, for readers and writers alike."""
    inputs = work / "in"
    loop, dangling = inputs / "loop", inputs / "dangling"
    for link, target in ((loop, loop), (dangling, "/nowhere/at/all")):
        if not link.is_symlink():
            link.symlink_to(target)
    file = inputs / "layers.json"
    return [
        f"{file}/below",
        f"{inputs}/{'n' * 300}",
        str(loop),
        f"/proc/{os.getpid()}/nowhere/x",
        "/dev/null/x",
        f"{loop}/x",
    ]


def _wrong_reading(rng: random.Random, work: Path) -> Case:
    """A path to read that is missing, of another kind, or empty."""
    script = rng.choice([name for name, command in commands(work).items() if command.folders])
    command = commands(work)[script]
    name = rng.choice(command.folders + command.files)
    (work / "in" / "empty").mkdir(exist_ok=True)
    (work / "in" / "empty.json").touch()
    paths = [
        *_odd_paths(work),
        f"{work}/in/missing",
        f"{work}/in/dangling",
        f"{work}/in/empty.json",
        f"{work}/in/empty",
    ]
    paths += ["~nobody_at_all/x", "a\udcffb", "/dev/null"]
    paths.append(f"{work}/in/layers.json" if name in command.folders else f"{work}/in/student")
    return Case("path to read", command.words(script, **{name: rng.choice(paths)}))


def _wrong_writing(rng: random.Random, work: Path) -> Case:
    """A folder to write into that cannot be one."""
    script = rng.choice([name for name, command in commands(work).items() if command.written + command.written_files])
    command = commands(work)[script]
    name, paths = rng.choice(command.written + command.written_files), [*_odd_paths(work), "/proc/nowhere"]
    if name in command.written_files:
        paths.remove(f"{work}/in/loop")  # A file of that name takes the link's place.
    else:
        paths += [f"{work}/in/layers.json", f"{work}/in/empty.json", "/dev/null"]
    (work / "in" / "empty.json").touch()
    return Case("path to write", command.words(script, **{name: rng.choice(paths)}))


def _contradiction(rng: random.Random, work: Path) -> Case:
    script, flags = rng.choice(CONTRADICTIONS)
    return Case("contradiction", commands(work)[script].words(script, **flags))


def damaged_files(rng: random.Random, work: Path, count: int) -> list[Case]:
    """`count` cases: a file that a command reads, damaged so that it must see it, or a value within exchanged."""
    readings = list(needed_files(work))
    cases: list[Case] = []
    while len(cases) < count:
        words, pattern = readings[len(cases) % len(readings)]
        files = sorted((work / "in").glob(pattern))
        assert files, pattern
        file = rng.choice(files)
        serves = words[0] in (DEPLOY, EVALUATE)  # Which does not end where the value was not needed.
        exchanged = file.suffix in (".json", ".jsonl") and rng.random() < 0.5 and not serves
        content = _exchange(rng, file.read_bytes()) if exchanged else _damage(rng, file, sums="--resume" in words)
        if content != file.read_bytes():
            kind = file.suffix.removeprefix(".") if "." in file.name else file.name
            kind = "tfrecord" if "tfrecord" in file.name else kind
            cases.append(Case(f"{'exchanged' if exchanged else 'damaged'} {kind}", words, file, content, exchanged))
    return cases


class _Payload:
    """The content of an archive that would run code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (f"/tmp/fuzz_ran_{os.getpid()}",)


def _damage(rng: random.Random, file: Path, *, sums: bool) -> bytes | None:
    """Content that no reader can take for the file; None: no file. `sums`: checksums of weights are compared."""
    content = file.read_bytes()
    garbage = bytes(rng.randrange(256) for _ in range(500))
    options: list[bytes | None] = [b"", garbage, content[: len(content) // rng.randint(2, 9)], b"\0" * len(content)]
    if file.suffix == ".jsonl":  # A last line without an end may be cut off, as by a kill.
        options = [
            line + b"\n" + content for line in (b"\xff", b"[" * 100_000, b"7", b"<html>404</html>", b"{}", content[:30])
        ]
    elif file.suffix == ".json":
        options += [b"\xff" + content, b"[" * 100_000, b"7\n", b"<html>404</html>", content + b"}"]
    else:
        options += [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", pickle.dumps(_Payload())]
        middle = rng.randrange(len(content) // 2)
        if "tfrecord" in file.name or (file.suffix == ".pt" and sums):
            options += [content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]] * 3
        if file.suffix == ".safetensors":
            options += [
                b"\xff" * 8 + content[8:],
                content[:8] + b"{" + content[9:].replace(b":", b";", 3),
                content[:-1],
            ]
    return rng.choice(options)


def _exchange(rng: random.Random, content: bytes) -> bytes:
    """The same JSON with one value removed or replaced by one of another type or out of range."""
    lines = content.decode().splitlines()
    try:
        value = json.loads(content)
        whole = True
    except ValueError:
        number, whole = rng.randrange(len(lines)), False
        value = json.loads(lines[number])
    places = list(_places(value))
    if not places:
        return b"{}"
    holder, key = rng.choice(places)
    if rng.random() < 0.25:
        del holder[key]
    else:
        holder[key] = rng.choice(
            [None, "x", -1, 1e308, [], {}, [None], {"x": 1}, True, "../../x", float("nan"), 10**30]
        )
    if whole:
        return json.dumps(value, indent=2).encode() + b"\n"
    return "\n".join([*lines[:number], json.dumps(value), *lines[number + 1 :]]).encode() + b"\n"


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every value within."""
    entries: Sequence[Any] = (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in entries:
        yield value, key
        yield from _places(value[key])
