"""Files that commands of `fuzz.py` cannot do without, for its cases of damage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.fuzz_commands import (
    ANALYZE,
    DEPLOY,
    EVALUATE,
    FINETUNE,
    HDF5,
    MERGE,
    PAGE,
    PI_FINETUNE,
    PUSH,
    REGENERATE,
    RESULTS,
    ROBOTWIN,
    SELECT,
    STORE,
    TEACHER,
    commands,
)


def needed_files(work: Path) -> Iterator[tuple[list[str], str]]:
    """(command, pattern of files that it cannot do without), an old one and a new one in turn."""
    yield from _policy_files(work)
    yield from _other_files(work)


def _policy_files(work: Path) -> Iterator[tuple[list[str], str]]:
    """Files of training, storing, merging, publishing, serving, evaluating, and their results."""
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


def _other_files(work: Path) -> Iterator[tuple[list[str], str]]:
    """Files of analyses, converters, other policies and other layouts of data."""
    setup, inputs = commands(work), work / "in"
    checkpoint, pi = "runs/run--2_chkpt", "runs/pi--1_chkpt"

    def words(command: str, **flags: str) -> list[str]:
        return setup[command].words(command, **flags)

    analyses = [words(f"{ANALYZE} {name}") for name in ("cka", "gradients", "projectors", "cone", "theorem", "static")]
    lerobot = [
        words(FINETUNE, data_root_dir=f"{inputs}/{version}", dataset_name="libero_goal_no_noops", recipe="baseline")
        for version in ("lerobot3", "lerobot2")
    ]
    serve_pi = words(DEPLOY, pretrained_checkpoint=f"{inputs}/{pi}")
    resume_pi = words(PI_FINETUNE, vla_path=f"{inputs}/{pi}", resume="True", recipe="baseline")
    for command, patterns in (
        *(
            (analysis, (f"{checkpoint}/lora_adapter/adapter*", f"{checkpoint}/run_config.json"))
            for analysis in analyses[:2]
        ),
        (analyses[2], (f"{checkpoint}/align_projectors*", "student/model.safetensors")),
        (analyses[3], (f"{checkpoint}/align_projectors*", "teacher/config.json")),
        (analyses[4], ("teacher/model.safetensors", "data/*/*/*tfrecord*")),
        (analyses[5], ("teacher/model.safetensors", "data/*/*/features.json")),
        (words(f"{ANALYZE} depth"), ("frames/*.npz", "frames/*.npz", "teacher/model.safetensors")),
        (words(f"{ANALYZE} readout"), ("frames/*.npz", "frames/*.npz", f"{checkpoint}/dataset_statistics.json")),
        (words(f"{ANALYZE} reach"), (f"{checkpoint}/config.json", f"{checkpoint}/dataset_statistics.json")),
        (words(SELECT, strategy="sim_top"), ("student/model.safetensors", "teacher/config.json")),
        (words(TEACHER), ("frames/*.npz", "frames/*.npz")),
        (words(HDF5), ("hdf5/*.hdf5",) * 3),
        (words(REGENERATE), ("hdf5/*.hdf5",) * 2),
        (words(ROBOTWIN), ("robotwin/*/*/data/*.hdf5",) * 4 + ("robotwin/*/*/instructions/*.json",) * 2),
        *((command, ("lerobot3/*/data/*/*.parquet", "lerobot3/*/meta/*.json")) for command in lerobot[:1]),
        (lerobot[0], ("lerobot3/*/meta/*/*/*.parquet", "lerobot3/*/meta/*.parquet")),
        (lerobot[1], ("lerobot2/*/data/*/*.parquet", "lerobot2/*/meta/*.json", "lerobot2/*/meta/*.jsonl")),
        (words(PI_FINETUNE), ("pi05/config.json", "pi05/model.safetensors", "pi05/tokenizer.json")),
        (resume_pi, (f"{pi}/lora_adapter/adapter*", f"{pi}/training_state/*")),
        (serve_pi, (f"{pi}/dataset_statistics.json", f"{pi}/config.json", f"{pi}/model.safetensors")),
        (words(DEPLOY, verify="True"), (f"{checkpoint}/probe.safetensors",)),
        (words(EVALUATE, initial_states_path=f"{inputs}/states.json"), ("states.json", "states.json")),
        (words(PAGE), (f"{checkpoint}/run_config.json",)),
        (words(PAGE, eval=f"{inputs}"), ("results/episodes.jsonl", "results/config.json")),
    ):
        for pattern in patterns:
            yield command, pattern
