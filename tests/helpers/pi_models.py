"""The tiny pi0 and pi0.5 of the reference data: their sizes come from the records, never from here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from prismatic.models.pi.config import pi_config
from prismatic.models.pi.model import PiPolicy
from prismatic.models.pi.weights import published_name, published_names


class PiRecord:
    """A record of `shared/golden/pi0`: sizes, weights, inputs and outputs of one kind."""

    def __init__(self, golden: Path, kind: str) -> None:
        self.kind = kind
        self.facts: dict[str, Any] = json.loads((golden / "pi0" / f"{kind}.json").read_text())
        self.sizes: dict[str, Any] = self.facts["sizes"]
        self.tensors = load_file(golden / "pi0" / f"{kind}.safetensors")

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors below `prefix.`, by the rest of their names."""
        return {
            name.removeprefix(f"{prefix}."): value
            for name, value in self.tensors.items()
            if name.startswith(f"{prefix}.")
        }

    def config(self) -> Any:
        """The configuration of the model that the record is of."""
        size = self.sizes
        gemma = {"model_type": "gemma", "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"]}
        gemma |= {"num_key_value_heads": size["kv"], "head_dim": size["head_dim"], "vocab_size": size["vocab"]}
        vision = {
            "model_type": "siglip_vision_model",
            "hidden_size": size["v_hidden"],
            "intermediate_size": size["v_mlp"],
            "num_hidden_layers": size["v_layers"],
            "num_attention_heads": size["v_heads"],
            "image_size": size["image"],
            "patch_size": size["patch"],
            "vision_use_head": False,
        }
        return pi_config(
            self.kind,
            vlm_config={
                "model_type": "paligemma",
                "text_config": gemma | {"hidden_size": size["hidden"], "intermediate_size": size["mlp"]},
                "vision_config": vision,
                "projection_dim": size["hidden"],
                "image_token_index": size["vocab"],
            },
            dit_config=gemma | {"hidden_size": size["e_hidden"], "intermediate_size": size["e_mlp"]},
            chunk_size=size["chunk"],
            max_action_dim=size["adim"],
            max_state_dim=size["sdim"],
        )

    def policy(self) -> PiPolicy:
        """The model with the record's weights, in evaluation mode."""
        policy = PiPolicy(self.config())
        recorded = self.part("weights")
        stored = {published: recorded[name] for published, name in published_names(recorded).items()}
        policy.load_state_dict({name: stored[published_name(name)] for name in policy.state_dict()})
        return policy.eval()

    def observation(self) -> dict[str, torch.Tensor | None]:
        """The record's inputs without actions, by the policy's argument names."""
        inputs = self.part("inputs")
        return {
            "pixel_values": inputs["images"],
            "image_masks": inputs["image_masks"],
            "input_ids": inputs["lang_tokens"],
            "attention_mask": inputs["lang_masks"],
            "state": inputs["state"] if self.kind == "pi0" else None,
        }

    def batch(self) -> dict[str, torch.Tensor | None]:
        """All of the record's inputs, by the policy's argument names."""
        return self.observation() | {name: self.part("inputs")[name] for name in ("actions", "noise", "time")}
