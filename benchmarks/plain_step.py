"""The plain step that step.py compares with: what the released training loop does, written as plainly as it can be.

The teacher runs in float32 on images resized to its size; the features of all its layers are kept. Pairs are pooled,
projected and compared one after another, with a wait for each loss; adapters are PEFT's; the language model's head and
the cross-entropy of all text tokens are computed, though the L1 loss does not use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from step_models import Case, fill, fill_adapters, make_batch, make_heads, make_student, make_teacher, teacher_depth
from torch import Tensor

from rocket_align import matmul


def build_plain_step(case: Case) -> dict[str, Callable[[], object]]:
    """The whole step, and the teacher with its pooling alone."""
    from peft import get_peft_model

    from prismatic.models.lora import lora_config
    from rocket_align import MultiLayerAlignment, recipes

    matmul._USABLE = False  # torch's own products
    base = make_student(case.models)
    batch = make_batch(base, case.batch_size)
    adapted = get_peft_model(base, lora_config(base))
    fill_adapters(adapted)
    head, proprio = make_heads(base.llm_dim)
    depth = teacher_depth(case.models)
    config = recipes.rocket(base.config.text_config.num_hidden_layers, depth)
    teacher = make_teacher(case.models, range(depth))
    alignment = MultiLayerAlignment(config, base.llm_dim, teacher.embed_dim)
    fill(alignment)
    modules = (base, head, proprio, alignment)
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)

    def step() -> float:
        features = teacher_features(teacher, batch["pixel_values"])
        hidden_states, text_start = run_student(base, proprio, batch)
        hidden = hidden_states[-1][:, text_start:-1]
        action_states = hidden[batch["labels"][:, 1:] > 31743].view(case.batch_size, -1, hidden.shape[-1])
        loss = F.l1_loss(head.predict_action(action_states), batch["actions"])
        tokens = 2 * base.vision_backbone.get_num_patches()
        loss = loss + config.coeff * align(alignment, hidden_states, features, tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {"step": step, "targets": lambda: teacher_features(teacher, batch["pixel_values"])}


@torch.no_grad()
def teacher_features(teacher: Any, pixels: Tensor) -> Any:
    """Features of every layer for the student's images, un-normalized."""
    mean, std = ((torch.tensor(v).view(3, 1, 1)) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return teacher(pixels.unflatten(1, (2, 6))[:, :, :3] * std + mean)


def run_student(vla: Any, proprio: Any, batch: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], int]:
    """All hidden states, and where the text begins in them; logits and their loss are computed and thrown away."""
    text = vla.get_input_embeddings()(batch["input_ids"])
    is_action = (batch["labels"] > 31743)[..., None]
    patches = vla.projector(vla.vision_backbone(batch["pixel_values"]))
    state = proprio(batch["proprio"])[:, None]
    sequence = torch.cat([text[:, :1], patches, state, (text * ~is_action)[:, 1:]], dim=1)
    prefix = sequence.shape[1] - text.shape[1]
    kept = F.pad(batch["attention_mask"], (prefix, 0), value=True)[:, None, None]
    output = vla.language_model(
        inputs_embeds=sequence,
        attention_mask=kept.expand(-1, 1, kept.shape[-1], -1),
        output_hidden_states=True,
        use_cache=False,
    )
    labels = F.pad(batch["labels"], (prefix, 0), value=-100)
    F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return output.hidden_states, prefix


def align(alignment: Any, hidden_states: Any, features: Any, tokens: int) -> Tensor:
    """Mean loss of the pairs, one after another, over so many vision tokens."""
    from rocket_align import pool_teacher, resolve_layers

    config, losses = alignment.config, []
    students = resolve_layers(config.student_layers, len(hidden_states) - 1, convention="released")
    for pair, (student, layer) in enumerate(zip(students, config.teacher_layers, strict=True)):
        grid, image = features.grid_hw, features.image_hw
        target = pool_teacher(features.layers[layer], grid, image, tokens, mode="bilinear", position_embedding=True)
        projected = alignment.project_pair(hidden_states[student][:, 2 : 2 + tokens], pair)
        losses.append((1 - F.cosine_similarity(projected, target, dim=-1)).mean())
        losses[-1].item()  # the release logs every pair of every step
    return torch.stack(losses).mean()
