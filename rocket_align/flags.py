"""The released command-line flags of the alignment and what they mean as an :class:`AlignConfig`.

A flag left at None takes the recipe's value, so a recipe and a hand-set flag combine as one expects. Imports no torch.
Annotations are not postponed here: draccus 0.8, which OpenVLA-OFT pins, cannot read postponed ones of a base class.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rocket_align.config import RECIPES, AlignConfig, for_openpi
from rocket_align.layers import LayerConvention, layers_for_models, read_layer_file, resolve_layers

POOLING = ("bilinear", "random")
CENTER_MODES = ("none", "dataset", "task")
TEACHER_TYPES = ("auto", "vggt", "depth_anything", "dinov2", "timm", "transformers", "openvla")


def recipe_of(flags: Mapping[str, Any]) -> str:
    """The recipe that a run's flags mean: the named one, else rocket where there is a teacher."""
    teacher = any(flags.get(name) for name in ("teacher_path", "vggt_path", "feature_store"))
    return flags.get("recipe") or ("rocket" if teacher else "baseline")


def parse_schedule(text: str) -> tuple[tuple[int, float], ...]:
    """(step, factor) points of `--align_schedule`, as in "0:0,500:1"; empty: none.

    Raises:
        ValueError: other text, steps that do not ascend, or factors below 0.
    """
    refusal = f"--align_schedule: {text!r} found; accepted: STEP:FACTOR with ascending steps, as in 0:0,500:1"
    try:
        pairs = [part.split(":") for part in str(text).strip("[]() ").split(",") if part.strip()]
        points = tuple((int(step), float(factor)) for step, factor in pairs)
    except ValueError:
        raise ValueError(refusal) from None
    steps = [step for step, _ in points]
    if steps != sorted({*steps}) or not all(step >= 0 and 0 <= factor < math.inf for step, factor in points):
        raise ValueError(refusal)
    return points


@dataclass
class AlignFlags:
    vggt_path: str = ""  # The 3D teacher: a folder, a weights file, or a hub id; empty: no alignment
    teacher_path: str = ""  # Another teacher, by --teacher_type: a folder or a hub id; given instead of --vggt_path
    # auto (told by its config.json) | vggt | depth_anything | dinov2 | timm | transformers | openvla
    teacher_type: str = field(default="auto", metadata={"choices": TEACHER_TYPES})
    feature_store: str = ""  # Teacher features of the data set that build_feature_store.py wrote: no teacher runs
    # rocket | shared | naive | spatial_forcing | baseline; rocket when there is a teacher
    recipe: str | None = field(default=None, metadata={"choices": tuple(RECIPES)})
    vla_layers_align: str | None = None  # Student layers, comma list; -1 is the last state but one, as released
    vggt_layers_align: str | None = None  # Teacher blocks as a comma list, in any order; -1 is the last block
    align_layers_file: str = ""  # Both lists from a file that select_layers.py wrote
    # Distance between student and teacher features: cosine
    align_loss_type: str = field(default="cosine", metadata={"choices": ("cosine",)})
    # Weight of the alignment in the total loss
    align_loss_coeff: float | None = field(default=None, metadata={"least": 0, "below": math.inf})
    # Teacher grid to student grid: bilinear | random
    pooling_func: str | None = field(default=None, metadata={"choices": POOLING})
    use_vlm_norm: bool | None = None  # LayerNorm on the student's features
    use_vggt_pe: bool | None = None  # Position embedding on the teacher's features
    gain_feat_1move: bool | None = None  # Shift the student's slice one token to the right
    share_projector: bool | None = None  # One projector for all layer pairs
    # Projectors per pair whose losses are averaged
    ensemble_size: int | None = field(default=None, metadata={"least": 1})
    use_matryoshka: bool | None = None  # Nested widths (with independent projectors: the released fifth of the width)
    projector_width_ratios: str | None = None  # Width ratios of the pairs as a comma list
    projector_shallow_to_deep_increase: bool | None = None  # Deeper pairs are wider
    # Subtract the targets' mean of each pair and place before the cosine: none | dataset | task (means of each task)
    align_center: str | None = field(default=None, metadata={"choices": CENTER_MODES})
    # Samples that the means are taken of before training, with its augmentation; 0: as many as there are frames
    align_center_samples: int = field(default=1024, metadata={"least": 0})
    align_pair_weights: str | None = None  # Weights of the pairs in the mean loss, comma list; only ratios count
    # Factor of align_loss_coeff as STEP:FACTOR points, linear in between: 0:0,1000:1,30000:1,40000:0
    align_schedule: str | None = None
    use_vggt_cache: bool = False  # Cache of the released code; not offered
    generate_vggt_cache: bool = False  # See use_vggt_cache
    vggt_cache_dir: str = ""  # See use_vggt_cache

    @property
    def teacher(self) -> str:
        """Path or hub id of the teacher; empty for none, or when only its stored features are given."""
        return self.teacher_path or self.vggt_path

    @property
    def recipe_name(self) -> str:
        """The recipe in force."""
        return recipe_of(vars(self))

    @property
    def aligns(self) -> bool:
        """Tell whether training needs the teacher."""
        return self.recipe_name != "baseline" and self.align_loss_coeff != 0

    def validate_alignment(self) -> None:
        """Refuse wrong values before anything is loaded.

        Raises ValueError: one line that names the flag, what was found and what is accepted.
        """
        for limited in fields(AlignFlags):
            value, choices = getattr(self, limited.name), limited.metadata.get("choices")
            if choices and value and value not in choices:
                raise ValueError(f"--{limited.name}: unknown value {value!r}; accepted: {', '.join(choices)}")
        if self.use_vggt_cache or self.generate_vggt_cache:
            raise ValueError(
                "--use_vggt_cache: True found; accepted: False (it never hits with augmentation); "
                "use --feature_store PATH, which vla-scripts/build_feature_store.py makes"
            )
        if self.ensemble_size is not None and self.ensemble_size < 1:
            raise ValueError(f"--ensemble_size: {self.ensemble_size} found; accepted: 1 or more")
        if self.align_loss_coeff is not None and not 0 <= self.align_loss_coeff < math.inf:
            raise ValueError(f"--align_loss_coeff: {self.align_loss_coeff} found; accepted: 0 or more")
        if self.align_center_samples < 0:
            raise ValueError(f"--align_center_samples: {self.align_center_samples} found; accepted: 0 or more")
        if self.align_center not in (None, "none") and self.pooling_func == "random":
            raise ValueError("--align_center: given with --pooling_func random, which mixes places; accepted: none")
        if self.align_schedule is not None:
            parse_schedule(self.align_schedule)
        self._validate_layers_file()
        self._validate_teacher()

    def _validate_teacher(self) -> None:
        flag = "--teacher_path" if self.teacher_path else "--vggt_path"
        if self.teacher_path and self.vggt_path:
            raise ValueError("--teacher_path: given beside --vggt_path; accepted: one of them")
        if self.aligns and not self.teacher and not self.feature_store:
            raise ValueError(f"--vggt_path: empty, but --recipe {self.recipe_name} needs a teacher")
        if self.aligns and self.teacher.startswith((".", "/")) and not Path(self.teacher).exists():
            raise ValueError(f"{flag}: no such folder or file: {self.teacher}")
        if self.feature_store and self.pooling_func == "random":
            raise ValueError("--pooling_func: random found; accepted with --feature_store: bilinear")

    def _validate_layers_file(self) -> None:
        if not self.align_layers_file:
            return
        given = [f"--{name}" for name in ("vla_layers_align", "vggt_layers_align") if getattr(self, name) is not None]
        if given:
            raise ValueError(f"--align_layers_file: {' and '.join(given)} given too; accepted: the file or the lists")
        try:
            read_layer_file(self.align_layers_file)
        except ValueError as error:
            raise ValueError(f"--align_layers_file: {error}") from None

    def align_config(
        self, num_student_layers: int, num_teacher_layers: int, *, indexing: str = "openvla"
    ) -> AlignConfig:
        """The recipe for models of these depths, with the flags that were given put over it.

        `indexing` is the student's: "openvla", or "openpi-torch" for pi0 and pi0.5, whose -1 is the final norm.

        Raises ValueError: layers out of range or out of order, or a combination :class:`AlignConfig` refuses.
        """
        if not self.aligns:
            return RECIPES["baseline"]()
        base = RECIPES[self.recipe_name](num_student_layers, num_teacher_layers)
        if indexing != "openvla":
            if self.gain_feat_1move:
                raise ValueError(
                    "--gain_feat_1move: True found; accepted for pi0 and pi0.5: False, none of it is causal"
                )
            base = for_openpi(base, num_student_layers, num_teacher_layers)
        changes: dict[str, Any] = {
            "coeff": self.align_loss_coeff,
            "pooling": self.pooling_func,
            "student_norm": self.use_vlm_norm,
            "teacher_pe": self.use_vggt_pe,
            "shift": self.gain_feat_1move,
            "ensemble_size": self.ensemble_size,
            "widths_increase_with_depth": self.projector_shallow_to_deep_increase,
            "projector": self._projector(base.projector),
        }
        if self.vla_layers_align is not None:
            changes["student_layers"] = self._layers(
                "vla_layers_align", num_student_layers, "released" if indexing == "openvla" else "states"
            )
        if self.vggt_layers_align is not None:
            changes["teacher_layers"] = self._layers("vggt_layers_align", num_teacher_layers, "python")
        if self.align_layers_file:
            pairs = self._layers_of_file(num_student_layers, num_teacher_layers)
            changes["student_layers"], changes["teacher_layers"] = pairs
        if self.projector_width_ratios is not None:
            changes["width_ratios"] = self._numbers("projector_width_ratios")
        changes["center"] = self.align_center
        if self.align_pair_weights is not None:
            changes["pair_weights"] = self._numbers("align_pair_weights")
        if self.align_schedule is not None:
            changes["schedule"] = parse_schedule(self.align_schedule)
        if changes["projector"] == "independent" and self.use_matryoshka:
            changes["released_independent_width"] = True
        return replace(base, **{name: value for name, value in changes.items() if value is not None})

    def _layers(self, flag: str, num_layers: int, convention: LayerConvention) -> tuple[int, ...]:
        try:
            layers = resolve_layers(str(getattr(self, flag)).strip("[]() "), num_layers, convention=convention)
        except ValueError as error:
            raise ValueError(f"--{flag}: {error}") from None
        if not layers:
            raise ValueError(f"--{flag}: no layer found; accepted: one or more, or --recipe baseline to align none")
        return layers

    def _layers_of_file(self, num_student_layers: int, num_teacher_layers: int) -> tuple[tuple[int, ...], ...]:
        try:
            return layers_for_models(self.align_layers_file, num_student_layers, num_teacher_layers)
        except ValueError as error:
            raise ValueError(f"--align_layers_file: {error}") from None

    def _numbers(self, flag: str) -> tuple[float, ...]:
        text = getattr(self, flag)
        try:
            return tuple(float(part) for part in str(text).strip("[]() ").split(","))
        except ValueError:
            raise ValueError(f"--{flag}: {text!r} found; accepted: numbers as in 0.2,0.6,1") from None

    def _projector(self, recipe_value: str) -> str:
        shares = recipe_value != "independent" if self.share_projector is None else self.share_projector
        if not shares:
            return "independent"
        nested = recipe_value != "shared" if self.use_matryoshka is None else self.use_matryoshka
        return "matryoshka" if nested else "shared"
