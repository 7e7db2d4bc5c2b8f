"""Every head with and without FiLM under every alignment recipe: two real optimizer steps on the smallest model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from prismatic.checkpoint.folder import resolve_checkpoint
from prismatic.checkpoint.load import PolicyParts, build_parts, wrap_film
from prismatic.models.lora import add_lora
from prismatic.training.config import TrainConfig
from prismatic.training.module import TrainableVLA
from prismatic.training.objectives import make_objective
from prismatic.training.precision import base_weights_dtype
from prismatic.util.errors import UsageError
from prismatic.vla.platforms import BRIDGE, LIBERO, NormalizationType, Platform
from rocket_align import MultiLayerAlignment, VGGTConfig, VGGTTeacher
from rocket_align.config import RECIPES
from rocket_align.pooling import sine_position_embedding
from rocket_align.teacher.base import TeacherFeatures
from rocket_align.teacher.preprocess import unnormalize_views
from tests.helpers.student_helpers import tiny_config, tiny_student

DEPTH, TEACHER_DEPTH, TEACHER_DIM = 4, 4, 8
HEADS: dict[str, dict[str, Any]] = {
    "l1": {},
    "diffusion": {"use_l1_regression": False, "use_diffusion": True, "num_diffusion_steps_train": 5},
    "discrete": {"use_l1_regression": False},
}
TOKENIZER: Any = SimpleNamespace(vocab_size=32000)
TEACHER = VGGTConfig(
    image_size=42, embed_dim=TEACHER_DIM, depth=TEACHER_DEPTH, num_heads=2, vit_depth=2, vit_num_heads=2
)


def _config(**flags: Any) -> TrainConfig:
    return TrainConfig(**{"lora_rank": 2, "use_proprio": True, "num_images_in_input": 2, **flags})


def _module(config: TrainConfig, recipe: str = "rocket", platform: Platform = LIBERO) -> TrainableVLA:
    """What the fine-tuning script builds, around the smallest student."""
    text = {**tiny_config().text_config.to_dict(), "num_hidden_layers": DEPTH}
    vla: Any = tiny_student(num_images=config.num_images_in_input, text_config=text)
    vla.config.platform = platform.to_dict()
    torch.manual_seed(0)
    vla = add_lora(vla, config.lora_rank)
    if config.use_film:
        wrap_film(vla)
    parts: PolicyParts = build_parts(config, SimpleNamespace(checkpoint=None), vla, platform)  # type: ignore[arg-type]
    align = RECIPES[recipe](DEPTH, TEACHER_DEPTH)
    alignment = MultiLayerAlignment(align, vla.llm_dim, TEACHER_DIM)
    objective = make_objective(config, platform, TOKENIZER)
    return TrainableVLA(parts, objective, alignment, auxiliary_coeff=align.coeff, use_film=config.use_film)


def _batch(config: TrainConfig, platform: Platform, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(3, 1000, (batch, 5), generator=generator)
    prompt[:, 0] = 1
    tokens = torch.randint(31744, 32000, (batch, platform.num_action_tokens), generator=generator)
    ids = torch.cat([prompt, tokens, torch.full((batch, 1), 2)], dim=1)
    labels = ids.clone()
    labels[:, :5] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids, dtype=torch.bool),
        "labels": labels,
        "pixel_values": torch.randn(batch, 6 * config.num_images_in_input, 28, 28, generator=generator),
        "actions": torch.rand(batch, platform.chunk, platform.action_dim, generator=generator) * 2 - 1,
        "proprio": torch.rand(batch, platform.proprio_dim, generator=generator) * 2 - 1,
    }


def _targets(config: TrainConfig, recipe: str, batch: int = 2) -> TeacherFeatures:
    generator = torch.Generator().manual_seed(2)
    views = config.num_images_in_input
    count = RECIPES[recipe](DEPTH, TEACHER_DEPTH).num_pairs
    layers = tuple(torch.randn(batch, views, 9, 2 * TEACHER_DIM, generator=generator) for _ in range(count))
    return TeacherFeatures(layers, (3, 3), (42, 42))


def _train(module: TrainableVLA, batch: dict[str, Any], targets: Any, steps: int = 2) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=1e-2)
    rows = []
    for _ in range(steps):
        output = module(dict(batch), targets)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.append({name: float(value) for name, value in output.metrics.items()})
    return rows


def _trained(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
@pytest.mark.parametrize("head", HEADS)
def test_two_steps(head: str, film: bool, recipe: str) -> None:
    config = _config(use_film=film, **HEADS[head])
    module = _module(config, recipe)
    before = _trained(module)
    rows = _train(module, _batch(config, LIBERO), _targets(config, recipe))
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    pairs = RECIPES[recipe](DEPTH, TEACHER_DEPTH).num_pairs
    assert sum(name.startswith("align_loss_pair") for name in rows[0]) == pairs
    changed = {name for name, value in _trained(module).items() if not torch.equal(before[name], value)}
    parts = ["lora_A", "lora_B", "proprio_projector"]
    parts += ["action_head"] if head != "discrete" else []
    parts += ["noisy_action_projector"] if head == "diffusion" else []
    parts += [".scale.", ".shift."] if film else []
    parts += ["align_projectors"] if pairs else []
    for part in parts:
        assert any(part in name for name in changed), part
    if head == "discrete":
        assert 0 <= rows[0]["curr_action_accuracy"] <= 1


@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
def test_padding_changes_nothing(film: bool) -> None:
    config = _config(use_film=film)
    module = _module(config, "baseline").eval()
    batch = _batch(config, LIBERO)
    fills = {"input_ids": 32000, "attention_mask": False, "labels": -100}
    padded = {
        name: torch.cat([batch[name], torch.full_like(batch[name][:, :3], fill)], 1) for name, fill in fills.items()
    }
    losses = [module(one, None).loss.item() for one in (batch, batch | padded)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class _HostCopies(TorchDispatchMode):
    """Counts the copies from the host to the device, for each of which a step would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("device") is not None:
            self.count += args[0].device.type == "cpu" and torch.device(kwargs["device"]).type == "cuda"
        return func(*args, **(kwargs or {}))


@contextmanager
def _gpu_autocast(enabled: bool) -> Iterator[None]:
    """`torch.autocast("cuda", torch.bfloat16, enabled)`, which turns itself off on a machine without a GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", enabled)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()


def _empty_gpu_copies(module: nn.Module, frozen: torch.dtype) -> None:
    """Every tensor of `module` becomes a fake one on a GPU; parameters that do not train get the type `frozen`."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            dtype = value.dtype if value.requires_grad else frozen
            fake = torch.empty(value.shape, dtype=dtype, device="cuda")
            setattr(part, name, nn.Parameter(fake, requires_grad=value.requires_grad))
        for name, value in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty(value.shape, dtype=value.dtype, device="cuda"))


@pytest.mark.parametrize("arithmetic", [torch.bfloat16, torch.float32], ids=["bf16", "no"])
@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
@pytest.mark.parametrize("head", HEADS)
def test_a_step_with_the_types_and_devices_of_a_gpu(head: str, film: bool, arithmetic: torch.dtype) -> None:
    """On tensors without values, so no GPU is needed, with the types and the autocast of `TrainingRun`.

    Fails on tensors of two devices, on types that an operator does not take together, and on reading a value back,
    for which the host would wait.
    """
    config = _config(use_film=film, **HEADS[head])
    module = _module(config)
    teacher = VGGTTeacher(TEACHER, RECIPES["rocket"](DEPTH, TEACHER_DEPTH).teacher_layers)
    batch = _batch(config, LIBERO)
    # The noise schedule is a host tensor until it is first used.
    with FakeTensorMode(allow_non_fake_inputs=True), _HostCopies() as copies:
        _empty_gpu_copies(module, base_weights_dtype(arithmetic, torch.device("cuda"), frozen=True))
        _empty_gpu_copies(teacher, arithmetic)
        batch = {name: torch.empty(value.shape, dtype=value.dtype, device="cuda") for name, value in batch.items()}
        with _gpu_autocast(arithmetic == torch.bfloat16):
            targets = teacher(unnormalize_views(batch["pixel_values"]))
            output = module(batch, targets)
    sine_position_embedding.cache_clear()  # of the ones without values
    assert (output.loss.device.type, output.loss.dtype) == ("cuda", torch.float32)
    assert targets.layers[0].dtype == arithmetic
    assert copies.count == (head == "diffusion")


@pytest.mark.parametrize("num_images", [1, 2, 3])
@pytest.mark.parametrize("proprio", [False, True], ids=["blind", "proprio"])
def test_views_and_proprio(num_images: int, proprio: bool) -> None:
    config = _config(num_images_in_input=num_images, use_proprio=proprio)
    small = Platform("small", chunk=3, action_dim=4, proprio_dim=5, normalization=NormalizationType.BOUNDS)
    for platform in (small, BRIDGE):
        module = _module(config, "rocket", platform)
        rows = _train(module, _batch(config, platform), _targets(config, "rocket"), steps=1)
        assert torch.isfinite(torch.tensor(rows[0]["loss"]))


@pytest.mark.parametrize("film", [False, True], ids=["plain", "film"])
def test_sampled_chunks_are_those_the_policy_would_predict(film: bool) -> None:
    config = _config(use_film=film, **HEADS["diffusion"])
    module = _module(config).eval()
    _train(module, _batch(config, LIBERO), _targets(config, "rocket"))
    batch = _batch(config, LIBERO)
    noise = torch.randn(batch["actions"].shape, generator=torch.Generator().manual_seed(11))
    policy = module.vla.get_base_model()
    module.action_head.noise_scheduler.set_timesteps(5)
    policy.config.film_exclude_padding = True
    policy.norm_stats = {"data": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}
    expected, _ = policy.predict_action(
        input_ids=torch.cat([batch["input_ids"][:, :5], torch.full((2, 1), 29871)], dim=1),
        pixel_values=batch["pixel_values"],
        proprio=batch["proprio"],
        proprio_projector=module.proprio_projector,
        action_head=module.action_head,
        noisy_action_projector=module.noisy_action_projector,
        use_film=film,
        initial_noise=noise,
    )
    with_empty = {
        name: torch.cat([batch[name][:, :5], torch.full((2, 1), fill), batch[name][:, 5:]], dim=1)
        for name, fill in (("input_ids", 29871), ("labels", -100))
    }
    batch |= {**with_empty, "attention_mask": torch.ones_like(with_empty["input_ids"], dtype=torch.bool)}
    errors = module.sampled_errors(batch, seed=11)
    difference = (torch.as_tensor(expected).float() - batch["actions"]).abs()
    assert errors["curr_action_l1_loss"] == pytest.approx(float(difference[:, 0].mean()), abs=1e-4)
    assert errors["next_actions_l1_loss"] == pytest.approx(float(difference[:, 1:].mean()), abs=1e-4)
    assert module.sampled_errors(batch, seed=12) != errors


@pytest.mark.parametrize(
    ("holds", "flags", "words"),
    [
        (["action_head"], {"use_l1_regression": False}, r"--use_l1_regression, .*: False found, but .* holds a"),
        ([], {}, r"--use_l1_regression, --use_diffusion: True found, but .* holds no action_head; accepted: False"),
        (["action_head"], {"use_l1_regression": False, "use_diffusion": True}, "--use_diffusion: True found"),
        (["action_head"], {"use_proprio": True}, "--use_proprio: True found, but .* holds no proprio_projector"),
        (["action_head", "proprio_projector"], {}, "--use_proprio: False found, but .* holds a proprio_projector"),
        (["action_head"], {"use_film": True}, "--use_film: True found, but .* holds no vision_backbone"),
        (["action_head", "vision_backbone"], {}, "--use_film: False found, but .* holds a vision_backbone"),
    ],
)
def test_a_resume_with_other_parts_is_refused(
    holds: list[str], flags: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for name in holds:
        (tmp_path / f"{name}--7_checkpoint.pt").touch()
    config = TrainConfig(vla_path=str(tmp_path), resume=True, resume_step=7, **flags)
    with pytest.raises(UsageError, match=words):
        resolve_checkpoint(config)
    if flags == {} and "vision_backbone" in holds:
        with pytest.raises(UsageError, match="--use_film"):
            resolve_checkpoint(dataclasses.replace(config, resume=False))
