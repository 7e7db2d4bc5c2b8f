"""The two scales a study runs at: models, data, budgets and protocol. Methods are defined elsewhere.

Table 3 is of pi0.5, which has models and budgets of its own at both scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Profile:
    """One scale.

    Attributes:
        vla_path, teacher_path: models.
        policy: the student's family.
        dataset_name: fine-tuned on.
        train: flags of every fine-tuning.
        final_step: the checkpoint that tables report.
        curve_steps: the checkpoints of Table 9 and Figure 3.
        seeds: fine-tuning seeds.
        suites: evaluated, one results folder each.
        evaluate: flags of every evaluation.
        plus_suite, plus: LIBERO-Plus suite of Figure 5, and the flags of its evaluation.
        pairs, selection_count: layer pairs compared in Table 4; layers chosen in Table 5.
        data_fractions: Table 6.
        collect: flags of the scripted expert's demonstrations, which are made first; empty: the data are given.
        analysis: flags of every analysis of the models on data; reach: of the analysis in the simulator.
    """

    name: str
    vla_path: str
    teacher_path: str
    dataset_name: str
    train: Mapping[str, object]
    final_step: int
    curve_steps: tuple[int, ...]
    seeds: tuple[int, ...]
    suites: tuple[str, ...]
    evaluate: Mapping[str, object]
    plus_suite: str
    plus: Mapping[str, object]
    pairs: tuple[int, ...]
    selection_count: int
    data_fractions: tuple[float, ...]
    collect: Mapping[str, object] = field(default_factory=dict)
    analysis: Mapping[str, object] = field(default_factory=dict)
    reach: Mapping[str, object] = field(default_factory=dict)
    policy: str = "openvla"


_FAST = {"env_img_res": 128, "render": "fast", "num_workers": 1}

MINI = Profile(
    name="mini",
    vla_path="experiments/mini/weights/student",
    teacher_path="experiments/mini/weights/teacher",
    dataset_name="libero_object_no_noops",
    train={
        "num_images_in_input": 2,
        "use_proprio": True,
        "batch_size": 16,
        "learning_rate": 2e-3,
        "scheduler": "CosineAnnealingLR",
        "lr_warmup_steps": 10,
        # With twice the steps every method solves nearly all episodes, which tells nothing.
        "max_steps": 100,
        "save_freq": 100,
        "max_grad_norm": 1.0,
        "num_workers": 0,
    },
    final_step=100,
    curve_steps=(25, 50, 75, 100),
    seeds=(0, 1, 2),
    suites=("libero_object",),
    evaluate={"task_ids": "7,9", "num_trials_per_task": 20, **_FAST},
    plus_suite="libero_plus_object",
    plus={
        "perturbations": "available",
        "base_task_ids": "7,9",
        "task_subset": 100,
        # The wording of the demonstrations; LIBERO-Plus's own differs in a word.
        "instruction_source": "base",
        **_FAST,
    },
    pairs=(2, 4, 6),
    selection_count=3,
    data_fractions=(0.1, 0.25, 1.0),
    collect={
        "suite": "libero_object",
        "tasks": "7,9",
        "episodes": 25,
        "seed": 1,
        "image_size": 128,
        "render": "fast",
        "workers": 2,
    },
    reach={"task_ids": "7,9", "env_img_res": 128, "render": "fast"},
)

PAPER = Profile(
    name="paper",
    vla_path="openvla/openvla-7b",
    teacher_path="facebook/VGGT-1B",
    dataset_name="libero_4_task_suites_no_noops",
    train={
        "num_images_in_input": 2,
        "use_proprio": True,
        "batch_size": 8,
        "learning_rate": 5e-4,
        "num_steps_before_decay": 10_000,
        "max_steps": 50_005,
        "save_freq": 5_000,
        "lora_rank": 32,
        "num_workers": 4,
        # Evaluation reads adapter and base; ten merged checkpoints of 15 GB a run would fill most disks.
        "merge_lora_during_training": False,
    },
    final_step=50_000,
    curve_steps=(10_000, 20_000, 30_000, 50_000),
    seeds=(42,),
    suites=("libero_spatial", "libero_object", "libero_goal", "libero_10"),
    evaluate={"num_trials_per_task": 50},
    plus_suite="libero_plus",
    plus={},
    pairs=(4, 8, 16, 24),
    selection_count=8,
    data_fractions=(0.01, 0.05, 0.1, 1.0),
)

PROFILES = {profile.name: profile for profile in (MINI, PAPER)}

_MINI_PI05 = replace(
    MINI,
    name="mini-pi05",
    policy="pi05",
    vla_path="experiments/mini/weights/pi05",
    # The state is no input, as in the published recipe. Data and tasks are those of the student's pretraining.
    train={
        **MINI.train,
        "use_proprio": False,
        "learning_rate": 5e-4,
        "max_steps": 150,
        "save_freq": 150,
        "image_aug": False,
        "repeated_diffusion_steps": 8,
    },
    final_step=150,
    curve_steps=(),
    evaluate={**MINI.evaluate, "task_ids": "1,2", "num_trials_per_task": 10, "use_proprio": False},
    collect={**MINI.collect, "tasks": "1,2", "episodes": 12, "seed": 0},
)

_PAPER_PI05 = replace(
    PAPER,
    name="paper-pi05",
    policy="pi05",
    vla_path="lerobot/pi05_base",
    train={
        "use_lora": False,
        "num_images_in_input": 2,
        "use_proprio": False,
        "batch_size": 16,
        "learning_rate": 2.5e-5,
        "lr_warmup_steps": 1_000,
        "scheduler": "CosineAnnealingLR",
        "final_learning_rate": 2.5e-6,
        "adam_beta2": 0.95,
        "weight_decay": 1e-10,
        "max_grad_norm": 1.0,
        "max_steps": 30_000,
        "save_freq": 5_000,
        "gradient_checkpointing": True,
        "num_workers": 4,
    },
    final_step=30_000,
    curve_steps=(),
    evaluate={**PAPER.evaluate, "use_proprio": False},
)

# The families that have studies; each has both scales.
POLICIES = {"openvla": PROFILES, "pi05": {"mini": _MINI_PI05, "paper": _PAPER_PI05}}


def profile_of(policy: str, scale: str) -> Profile:
    """The profile of a family of policies at a scale, "mini" or "paper"."""
    return POLICIES[policy][scale]
