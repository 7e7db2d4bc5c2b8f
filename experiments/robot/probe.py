"""Records what a policy in training answers, the way evaluation asks it, and asks a loaded one again (`--verify`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from experiments.robot.openvla_utils import OpenVLAPolicy, set_diffusion_steps
from experiments.robot.pi_policy import PiActingPolicy
from experiments.robot.policy import PolicyFlags, Query
from prismatic.checkpoint.folder import Checkpoint
from prismatic.checkpoint.layout import POLICY_FLAGS
from prismatic.checkpoint.probe import Probe, accepted_deviation
from prismatic.util.errors import UsageError, one_line

if TYPE_CHECKING:
    from prismatic.training.module import TrainablePolicy
    from prismatic.training.run import TrainingRun

_INSTRUCTION = "put the black bowl on the plate"
_IMAGE_HW = (240, 320)  # Not square: a wrong way of resizing shows.
AnyPolicy = OpenVLAPolicy | PiActingPolicy


def record_probe(training: TrainingRun, module: TrainablePolicy) -> Probe | None:
    """Ask the policy in training, in evaluation mode; returns question and answer, or None where it cannot answer.

    Random states, modes and weights stay as they are. All processes of a sharded run ask; there an error while weights
    are gathered is raised, since the other processes wait for this one.
    """
    statistics: dict[str, Any] = training.dataset.dataset_statistics
    dataset = sorted(statistics)[0]
    views = training.config.num_images_in_input
    images = np.stack([_picture(view) for view in range(views)])
    state = np.asarray(statistics[dataset].get("proprio", {"mean": np.zeros(8)})["mean"], np.float64)
    modes = {part: part.training for part in module.modules()}
    model = module.vla.get_base_model() if hasattr(module.vla, "get_base_model") else module.vla
    own = getattr(model, "norm_stats", None)
    try:
        module.eval()
        model.norm_stats = statistics
        policy = _same_verdict(training, lambda: _acting(training, module, model, dataset))
        devices = [training.device] if training.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), training.accelerator.autocast():
            (actions,) = module.run_whole(lambda: policy.act([_query(images, state, _INSTRUCTION)]))
    except Exception as error:  # A checkpoint without a probe is better than none.
        if training.engine.sharded and not isinstance(error, _NoPolicyError):
            raise
        reason = "" if isinstance(error, _NoPolicyError) else f"{type(error).__name__}: "
        training.accelerator.print(f"no probe in the checkpoint: {reason}{one_line(error)}")
        return None
    finally:
        model.norm_stats = own
        for part, mode in modes.items():
            part.training = mode
    precision = str(training.compute_dtype).removeprefix("torch.")
    return Probe(images, state, np.asarray(actions), _INSTRUCTION, dataset, precision)


def verify_probe(checkpoint: Checkpoint, policy: AnyPolicy) -> None:
    """Ask a loaded policy what its checkpoint's probe asked, and print how far the answers are apart.

    Raises:
        UsageError: no probe, or another answer than rounding explains.
    """
    probe = Probe.read(checkpoint.path)
    if probe.dataset not in policy.statistics:
        raise UsageError(
            f"--verify: statistics of {', '.join(policy.statistics)} found; accepted: of {probe.dataset}, as recorded"
        )
    (actions,) = policy.act([_query(probe.images, probe.state, probe.instruction)], probe.dataset)
    deviation = probe.deviation(np.asarray(actions), policy.statistics[probe.dataset]["action"])
    most = accepted_deviation(probe.precision, _precision(policy.vla))
    if not deviation <= most:
        raise UsageError(
            f"--verify: actions {deviation:.3g} of their range away from the recorded ones found; accepted: {most:g} "
            f"(weights, flags or packages are others than when {checkpoint.path} was written)"
        )
    print(f"probe: the recorded actions, but for {deviation:.2g} of their range (accepted: {most:g})")


class _NoPolicyError(Exception):
    """No process asks, since not all of them can."""


def _same_verdict(training: TrainingRun, prepare: Callable[[], AnyPolicy]) -> AnyPolicy:
    """The prepared policy. Raises _NoPolicyError, on every process of a sharded run, if it fails on any of them."""
    policy, reason = None, ""
    try:
        policy = prepare()
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
    reasons = gather_object([reason]) if training.engine.sharded else [reason]
    if policy is None or any(reasons):
        raise _NoPolicyError(next(filter(None, reasons)))
    return policy


def _acting(training: TrainingRun, module: TrainablePolicy, model: nn.Module, dataset: str) -> AnyPolicy:
    """The policy in training with the interface of a loaded one."""
    config: Any = training.config
    flags = PolicyFlags(
        **{name: getattr(config, name) for name in POLICY_FLAGS},
        center_crop=config.image_aug,
        num_diffusion_steps_train=config.num_diffusion_steps_train,
        num_diffusion_steps_inference=config.num_diffusion_steps_train,
    )
    vla, processor = cast(Any, model), cast(Any, training.processor)
    if training.family.name == "openvla":
        heads = module.parts.heads
        if "action_head" in heads:
            set_diffusion_steps(heads["action_head"], flags)
        return OpenVLAPolicy(vla, processor, heads, flags, dataset)
    return PiActingPolicy(vla, processor, training.dataset.dataset_statistics, training.platform, flags, dataset)


def _precision(model: nn.Module) -> str:
    types = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return "float32" if types == {"float32"} else "bfloat16"


def _picture(view: int) -> np.ndarray:
    """A smooth picture with edges, another for each view: uint8 (H, W, 3)."""
    rows, columns = np.mgrid[0 : _IMAGE_HW[0], 0 : _IMAGE_HW[1]]
    waves = [
        np.sin(rows / (17 + 5 * view + 3 * channel)) * np.cos(columns / (23 - 4 * channel)) for channel in range(3)
    ]
    picture = np.stack(waves, axis=-1) * 100 + 127
    picture[60 + 20 * view : 120, 100:180] = (200, 40, 30 + 60 * view % 200)
    return picture.astype(np.uint8)


def _query(images: np.ndarray, state: np.ndarray, instruction: str) -> Query:
    first, *others = images
    wrist = others[0] if others else first
    return Query(first, wrist, state, instruction, seed=0, extra_images=tuple(others[1:]))
