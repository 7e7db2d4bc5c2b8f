"""Alignment in LeRobot's own training: `lerobot-train --policy.type=pi05|pi0|smolvla --rocket.teacher_path=...`.

    install()    takes the flags from the command line and lets lerobot-train align the policies that it makes

Not obvious:
- The policy keeps its type, and its checkpoints hold nothing of the alignment: stock LeRobot reads them. Projectors and
  settings lie beside them, in align_projectors.safetensors and rocket.json, which a resumed run reads.
- The teacher sees what the student sees, letterboxed by the policy's own preparation, without missing cameras.
  What the letterbox added is told by preparing white images, and does not count.
- The loss is a part of the policy's `forward`, so that DDP averages the projectors' gradients. Passes without gradients
  (the evaluation loss, rollouts) are the stock policy's.
- lerobot is imported by nothing here: its training script is in memory when it imports its plug-ins.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rocket_align.alignment import AlignOutput, MultiLayerAlignment
from rocket_align.config import AlignConfig
from rocket_align.layers import parse_layers, tap_names
from rocket_align.pooling import token_mask
from rocket_align.streams import find_stream
from rocket_align.taps import Taps, attach
from rocket_align.targets import check_range, present_views
from rocket_align.teacher.base import Teacher
from rocket_align.teacher.files import read_object, replacing
from rocket_align.teacher.registry import describe_teacher, load_teacher

RECORD, PROJECTORS = "rocket.json", "align_projectors.safetensors"
_PREFIX = "--rocket."


@dataclass(frozen=True)
class RocketFlags:
    """The flags, each given as --rocket.NAME=VALUE; defaults are the release's for pi0.5 and VGGT-1B."""

    teacher_path: str = ""  # Folder or hub id, see docs/teachers.md
    student_layers: str = "2,3,4,5,6,7,8,9,10,-1"  # As the release's PyTorch path counts them, or names of taps
    teacher_layers: str = "2,4,6,8,10,12,14,16,18,-1"  # Blocks, as many as student layers
    coeff: float = 0.5  # Weight of the alignment in the loss
    projector: str = "matryoshka"  # matryoshka | shared | independent

    @property
    def config(self) -> AlignConfig:
        """The alignment; its student layers are numbered by the taps' order."""
        teacher = parse_layers(self.teacher_layers)
        return AlignConfig(
            coeff=float(self.coeff),
            student_layers=tuple(range(len(self.student_layers.split(",")))),
            teacher_layers=teacher,
            projector=self.projector,  # type: ignore[arg-type]
            shift=False,
        )


def take_flags(arguments: Sequence[str]) -> tuple[RocketFlags | None, list[str]]:
    """Split the flags from the other arguments; None without any.

    Raises:
        ValueError: an unknown flag, or one without a value; one line.
    """
    known = {field.name: field.type for field in fields(RocketFlags)}
    values: dict[str, Any] = {}
    others: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if not argument.startswith(_PREFIX):
            others.append(argument)
            continue
        name, given, value = argument.removeprefix(_PREFIX).partition("=")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {_PREFIX}{close[0]}?)" if close else ""
            raise ValueError(f"{_PREFIX}{name}: unknown flag{hint}; accepted: {', '.join(known)}")
        if not given:
            if not pending:
                raise ValueError(f"{_PREFIX}{name}: no value found; accepted: {_PREFIX}{name}=VALUE")
            value = pending.pop(0)
        try:
            values[name] = float(value) if known[name] == "float" else value
        except ValueError:
            raise ValueError(f"{_PREFIX}{name}: found {value!r}; accepted: a number") from None
    if not values:
        return None, others
    if not values.get("teacher_path"):
        raise ValueError(f"{_PREFIX}teacher_path: empty; accepted: a teacher's folder or hub id")
    return RocketFlags(**values), others


class Join:
    """A policy's taps, teacher and images of the present step; no module, so that none of it is saved or wrapped."""

    def __init__(self, policy: Any, flags: RocketFlags) -> None:
        self.flags = flags
        stream = find_stream(policy, "0", {})
        self.names = tap_names(flags.student_layers, stream.depth, convention="openpi-torch")
        norm: Any = stream.block_norm(0)
        info = describe_teacher(flags.teacher_path)
        self.alignment = MultiLayerAlignment(flags.config, len(norm.weight), info.channels // 2)
        self._teacher: Teacher | None = None
        self._taps: Taps | None = None
        self._content: dict[tuple[tuple[str, torch.Size], ...], Tensor] = {}
        self.images: tuple[list[Tensor], list[Tensor]] = ([], [])

    def begin(self, policy: Any, prepare: Callable[[Any], Any], batch: Any) -> None:
        """Before a forward pass: attach in the first one, when wrappers are in place and image sizes are known."""
        if self._taps is not None:
            self._taps.clear()
            return
        images, _ = prepare(batch)
        model = policy.model
        if getattr(model, "add_image_special_tokens", False):
            raise ValueError("--policy.add_image_special_tokens: True found; accepted with --rocket: False")
        embed = getattr(model, "paligemma_with_expert", None) or model.vlm_with_expert
        with torch.no_grad():
            count = embed.embed_image(images[0][:1]).shape[1]
        self.num_tokens = count * len(images)
        self._taps = attach(policy, self.names, range(self.num_tokens), strategy="norm")
        device = images[0].device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        config = self.flags.config
        with torch.random.fork_rng():  # A resumed run loads it at another step, and must draw the same noise.
            self._teacher = load_teacher(self.flags.teacher_path, config.teacher_layers, dtype=dtype, device=device)

    def content(self, prepare: Callable[[Any], Any], batch: Any, keys: Sequence[str]) -> Tensor:
        """(V, H, W) bool: False where the letterbox added pixels."""
        white = {key: torch.ones_like(batch[key][:1], dtype=torch.float32) for key in keys if key in batch}
        shapes = tuple((key, image.shape) for key, image in white.items())
        if shapes not in self._content:
            images, _ = prepare(white)
            self._content[shapes] = torch.cat(images).amin(dim=1) > 0
        return self._content[shapes]

    def loss(self, content_VHW: Tensor) -> AlignOutput:
        """The alignment of the forward pass that has just ended."""
        assert self._taps is not None and self._teacher is not None
        tokens = self._taps.take()
        images, cameras = torch.stack(self.images[0], dim=1), torch.stack(self.images[1], dim=1)
        images = (images.float() + 1) / 2
        check_range(images)
        features = present_views(self._teacher, images, cameras)
        mask = token_mask(cameras, self.num_tokens, content_VHW.expand(len(cameras), *content_VHW.shape))
        return self.alignment.align(tokens, features, mask)


class AlignedPolicy:
    """Put before a policy's own class by :func:`align_policy`."""

    rocket: Join
    align_projectors: MultiLayerAlignment

    def forward(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The policy's loss and, in passes with gradients, the alignment's."""
        policy: Any = super()
        if not torch.is_grad_enabled():
            return policy.forward(batch, *args, **kwargs)
        prepare = policy.prepare_images if hasattr(policy, "prepare_images") else policy._preprocess_images
        keys = list(self.config.image_features)  # type: ignore[attr-defined]
        try:
            content = self.rocket.content(prepare, batch, keys)
            self.rocket.begin(self, prepare, batch)
            loss, report = policy.forward(batch, *args, **kwargs)
            aligned = self.rocket.loss(content)
        except ValueError as error:
            _refuse(error)
        report = {**(report or {}), "align_loss": aligned.loss.item()}
        return loss + self.rocket.flags.coeff * aligned.loss, report

    def prepare_images(self, batch: Any) -> Any:
        """SmolVLA's, remembered."""
        self.rocket.images = super().prepare_images(batch)  # type: ignore[misc]
        return self.rocket.images

    def _preprocess_images(self, batch: Any) -> Any:
        self.rocket.images = super()._preprocess_images(batch)  # type: ignore[misc]
        return self.rocket.images

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The stock policy's."""
        states = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        prefix = f"{kwargs.get('prefix', '')}align_projectors."
        for key in [key for key in states if key.startswith(prefix)]:
            del states[key]
        return states

    def wrap_with_peft(self, *args: Any, **kwargs: Any) -> Any:
        """Adapt the stock policy; the projectors train whole."""
        modules = self._modules  # type: ignore[attr-defined]
        projectors = modules.pop("align_projectors")
        wrapped = super().wrap_with_peft(*args, **kwargs)  # type: ignore[misc]
        modules["align_projectors"] = projectors
        return wrapped


def align_policy(policy: Any, flags: RocketFlags) -> Any:
    """Make a policy of LeRobot align itself in training; it stays the same object, of a class of its own.

    Raises:
        ValueError: layers or a teacher that do not fit; one line.
    """
    # With the same seed, the policy without alignment draws the same noise.
    with torch.random.fork_rng():
        policy.rocket = Join(policy, flags)
    policy.align_projectors = policy.rocket.alignment.to(next(policy.parameters()).device)
    kind = type(policy)
    policy.__class__ = type(kind.__name__, (AlignedPolicy, kind), {"__module__": kind.__module__})
    return policy


def save_alignment(policy: nn.Module, folder: Path) -> None:
    """Write the projectors and the settings beside a checkpoint, where the policy is aligned."""
    aligned = next((module for module in policy.modules() if isinstance(module, AlignedPolicy)), None)
    if aligned is None:
        return
    # A shared projector stands in the state dict under every pair's number; safetensors keeps each tensor once.
    states = aligned.align_projectors.state_dict()
    tensors = {tensor.data_ptr(): name for name, tensor in reversed(states.items())}
    with replacing(folder / PROJECTORS) as file:
        save_file({name: states[name].contiguous() for name in tensors.values()}, file)
    with replacing(folder / RECORD) as file:
        file.write_text(json.dumps(asdict(aligned.rocket.flags), indent=2) + "\n", encoding="utf-8")


def _resumed(policy: Any, flags: RocketFlags | None, folder: Path) -> Any:
    """Align a policy of a checkpoint as it was aligned."""
    if not (folder / RECORD).is_file():
        if flags is None:
            return policy
        raise ValueError(f"--rocket.teacher_path: given, but {folder} was trained without; accepted: a run that aligns")
    try:
        recorded = RocketFlags(**read_object(folder / RECORD))
    except TypeError as error:
        raise ValueError(f"{folder / RECORD}: {error}; accepted: the flags of a run that aligned") from error
    for name, now in asdict(flags or recorded).items():
        before = getattr(recorded, name)
        if now != before and name not in ("teacher_path", "coeff"):
            raise ValueError(f"{_PREFIX}{name}: found {now}; accepted in a resumed run: {before}, of {folder / RECORD}")
    align_policy(policy, flags or recorded)
    try:
        policy.align_projectors.load_state_dict(load_file(folder / PROJECTORS))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder / PROJECTORS}: not this alignment's projectors ({reason})") from error
    return policy


def _refuse(error: ValueError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from error


def install() -> None:
    """Let the running lerobot-train align its policy, where flags or the checkpoint that it resumes say so."""
    scripts = [sys.modules.get(name) for name in ("__main__", "lerobot.scripts.lerobot_train")]
    scripts = [script for script in scripts if hasattr(script, "make_policy") and hasattr(script, "save_checkpoint")]
    if not scripts:
        return
    try:
        flags, sys.argv[1:] = take_flags(sys.argv[1:])
        if flags is not None:
            _ = flags.config
    except ValueError as error:
        _refuse(error)
    words = [argument.lower() for argument in sys.argv]
    resumes = "--resume=true" in words or any(
        word == "--resume" and (following.startswith("--") or following == "true")
        for word, following in zip(words, [*words[1:], "true"])
    )
    if flags is None and not resumes:
        return
    for script in scripts:
        _patch(script, flags, resumes)


def _patch(script: Any, flags: RocketFlags | None, resumes: bool) -> None:
    make_policy, save_checkpoint = script.make_policy, script.save_checkpoint

    def make_aligned(*args: Any, **kwargs: Any) -> Any:
        policy = make_policy(*args, **kwargs)
        try:
            if resumes:
                return _resumed(policy, flags, Path(str(policy.config.pretrained_path)))
            return policy if flags is None else align_policy(policy, flags)
        except ValueError as error:
            _refuse(error)

    def save_aligned(*args: Any, **kwargs: Any) -> None:
        save_checkpoint(*args, **kwargs)
        save_alignment(kwargs["policy"], Path(kwargs["checkpoint_dir"]) / "pretrained_model")

    script.make_policy, script.save_checkpoint = make_aligned, save_aligned
