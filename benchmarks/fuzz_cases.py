"""Cases of `fuzz.py`: command lines with one thing wrong, and files with one thing damaged.

Wrong is what no command can take. After the exchange of one value in a file a command may end well, since it may not
need that value.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from prismatic.util.flags import choices_of, declared

FINETUNE, STORE, DEPLOY = "vla-scripts/finetune.py", "vla-scripts/build_feature_store.py", "vla-scripts/deploy.py"
MERGE, PUSH = "vla-scripts/merge_lora_weights_and_save.py", "vla-scripts/push_to_hub.py"
SELECT, EVALUATE = "vla-scripts/select_layers.py", "experiments/robot/libero/run_libero_eval.py"
RESULTS = "experiments.robot.libero.results"


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


@dataclass(frozen=True)
class Command:
    """A command's configuration, flags with which it works, and the flags that are paths."""

    config: type
    flags: dict[str, str]
    folders: tuple[str, ...] = ()  # Read
    files: tuple[str, ...] = ()  # Read
    written: tuple[str, ...] = ()  # Folders to write into

    def words(self, script: str, **changed: str) -> list[str]:
        return [script, *(word for name, value in (self.flags | changed).items() for word in (f"--{name}", value))]


@cache
def commands(work: Path) -> dict[str, Command]:
    """Every command that is tried, set up for the inputs in `work`."""
    root = Path(__file__).resolve().parents[1]

    def config(script: str, name: str) -> type:
        spec = importlib.util.spec_from_file_location(f"fuzzed_{Path(script).stem}", root / script)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    inputs, out = work / "in", work / "out"
    checkpoint = f"{inputs}/runs/run--2_chkpt"
    acting = {"num_images_in_input": "2", "use_proprio": "True"}
    models = {"vla_path": f"{inputs}/student", "vggt_path": f"{inputs}/teacher", "data_root_dir": f"{inputs}/data"}
    training = {**models, **acting, "num_workers": "0", "max_steps": "2", "batch_size": "1", "trackers": "none"}
    training |= {"run_root_dir": f"{out}/runs", "run_id_override": "run", "lora_rank": "2"}
    select = {"strategy": "uniform", "count": "2", "checkpoint": f"{inputs}/student", "vggt_path": f"{inputs}/teacher"}
    push = {"checkpoint": checkpoint, "repo_id": "me/policy", "license": "mit", "base_model": "me/base"}
    merge = {"base_checkpoint": f"{inputs}/student", "lora_finetuned_checkpoint_dir": checkpoint}
    evaluation = {"pretrained_checkpoint": checkpoint, "local_log_dir": f"{out}/eval", "num_trials_per_task": "1"}
    reads = ("vla_path", "vggt_path", "data_root_dir")
    return {
        FINETUNE: Command(
            config(FINETUNE, "FinetuneConfig"), training, reads, ("align_layers_file",), ("run_root_dir",)
        ),
        STORE: Command(
            config(STORE, "StoreConfig"),
            {**models, **acting, "num_workers": "0", "feature_store": f"{out}/store", "fit_frames": "4"},
            reads,
            ("align_layers_file",),
            ("feature_store",),
        ),
        DEPLOY: Command(
            config(DEPLOY, "DeployConfig"),
            {"pretrained_checkpoint": checkpoint, "port": "0", **acting},
            ("pretrained_checkpoint",),
            ("token_file",),
        ),
        MERGE: Command(
            config(MERGE, "ConvertConfig"),
            {**merge, "output_dir": f"{out}/merged"},
            ("base_checkpoint", "lora_finetuned_checkpoint_dir"),
            (),
            ("output_dir",),
        ),
        PUSH: Command(
            config(PUSH, "PushConfig"), {**push, "dry_run": f"{out}/hub"}, ("checkpoint",), ("results",), ("dry_run",)
        ),
        SELECT: Command(
            config(SELECT, "SelectConfig"), {**select, "out": f"{out}/layers.json"}, ("checkpoint", "vggt_path")
        ),
        EVALUATE: Command(
            config(EVALUATE, "GenerateConfig"),
            {**evaluation, **acting},
            ("pretrained_checkpoint",),
            ("initial_states_path",),
        ),
    }


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
    (SELECT, {"strategy": "cka"}),
    (SELECT, {"window": "99", "strategy": "sim_top"}),
    (EVALUATE, {"task_ids": "77"}),
    (EVALUATE, {"unnorm_key": "nowhere"}),
    (EVALUATE, {"use_l1_regression": "True", "use_diffusion": "True"}),
]


def wrong_configurations(rng: random.Random, work: Path, count: int) -> list[Case]:
    """`count` cases: each kind in turn, on a command of chance."""
    makers = (_wrong_flag, _wrong_flag, _wrong_file, _wrong_reading, _wrong_reading, _wrong_writing, _contradiction)
    return [makers[number % len(makers)](rng, work) for number in range(count)]


def _wrong_flag(rng: random.Random, work: Path) -> Case:
    """One flag unknown, without a value, of another type, or beyond its limits."""
    script, command = rng.choice(list(commands(work).items()))
    name, kind, declaration = rng.choice(list(declared(command.config)))
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
    script = rng.choice(list(commands(work)))
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
    script = rng.choice([name for name, command in commands(work).items() if command.written])
    command = commands(work)[script]
    paths = [*_odd_paths(work), f"{work}/in/layers.json", f"{work}/in/empty.json", "/proc/nowhere", "/dev/null"]
    (work / "in" / "empty.json").touch()
    return Case("path to write", command.words(script, **{rng.choice(command.written): rng.choice(paths)}))


def _contradiction(rng: random.Random, work: Path) -> Case:
    script, flags = rng.choice(CONTRADICTIONS)
    return Case("contradiction", commands(work)[script].words(script, **flags))


def damaged_files(rng: random.Random, work: Path, count: int) -> list[Case]:
    """`count` cases: a file that a command reads, damaged so that it must see it, or a value within exchanged."""
    readings = list(_readings(work))
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


def _readings(work: Path) -> Iterator[tuple[list[str], str]]:
    """(command, pattern of files that it cannot do without)."""
    setup, inputs = commands(work), work / "in"
    checkpoint, data = "runs/run--2_chkpt", "data/libero_spatial_no_noops/1.0.0"
    resume = setup[FINETUNE].words(
        FINETUNE, vla_path=f"{inputs}/{checkpoint}", resume="True", max_steps="3", run_root_dir=f"{work}/out/runs"
    )
    stored = setup[FINETUNE].words(FINETUNE, feature_store=f"{inputs}/store", vggt_path="", recipe="rocket")
    verify = setup[STORE].words(STORE, feature_store=f"{inputs}/store", verify="True")
    build, merge = setup[STORE].words(STORE), setup[MERGE].words(MERGE)
    serve, evaluate = setup[DEPLOY].words(DEPLOY), setup[EVALUATE].words(EVALUATE)
    for words, patterns in (
        (
            setup[FINETUNE].words(FINETUNE),
            ("student/config.json", "student/model.safetensors", "student/tokenizer.json"),
        ),
        (
            setup[FINETUNE].words(FINETUNE),
            ("teacher/config.json", "teacher/model.safetensors", f"{data}/features.json"),
        ),
        (setup[FINETUNE].words(FINETUNE), ("student/preprocessor_config.json", f"{data}/dataset_info.json")),
        (build, (f"{data}/*tfrecord*", f"{data}/*tfrecord*", f"{data}/*tfrecord*")),
        (resume, (f"{checkpoint}/*.pt", f"{checkpoint}/lora_adapter/adapter*", f"{checkpoint}/training_state/*")),
        (resume, (f"{checkpoint}/run_config.json",)),
        (merge, (f"{checkpoint}/lora_adapter/adapter*", "student/model.safetensors", "student/config.json")),
        (serve, (f"{checkpoint}/dataset_statistics.json", f"{checkpoint}/action_head*", f"{checkpoint}/config.json")),
        (serve, (f"{checkpoint}/model.safetensors",)),
        (evaluate, (f"{checkpoint}/dataset_statistics.json",)),
        (verify, ("store/*.json", "store/*/*", "store/*/*")),
        (stored, ("store/*.json",)),
        ([RESULTS, "report", f"{inputs}/results"], ("results/episodes.jsonl", "results/config.json")),
        ([RESULTS, "compare", f"{inputs}/results", f"{inputs}/results"], ("results/episodes.jsonl",)),
        ([RESULTS, "merge", f"{inputs}/results", "--out", f"{work}/out/merged"], ("results/config.json",)),
        ([RESULTS, "page", f"{inputs}/results", "--out", f"{work}/out/page.html"], ("results/episodes.jsonl",)),
        (setup[PUSH].words(PUSH, results=f"{inputs}/results/summary.json"), ("results/summary.json",)),
        (setup[FINETUNE].words(FINETUNE, align_layers_file=f"{inputs}/layers.json"), ("layers.json",)),
    ):
        for pattern in patterns:
            yield words, pattern


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
