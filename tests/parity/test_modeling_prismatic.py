"""The student's forward, gradients, adapters and action prediction against recorded reference outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from prismatic.models.film_vit_wrapper import load_film_backbone
from prismatic.models.lora import load_lora
from prismatic.training.train_utils import get_all_actions_mask
from tests.helpers.student_helpers import assert_gradients_close, beneath, forward_inputs, load_heads, load_student

CLOSE = {"rtol": 0.0, "atol": 1e-4}


@pytest.fixture(scope="module")
def batch(golden_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(golden_dir / "forward_l1_discrete.safetensors")


@pytest.fixture
def vla(golden_dir: Path) -> Any:
    return load_student(golden_dir)


@pytest.fixture
def heads(golden_dir: Path) -> dict[str, Any]:
    return load_heads(golden_dir)


def actions_hidden(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Upstream's selection: text positions but the last, where the shifted labels are actions."""
    num_prefix = hidden.shape[1] - labels.shape[1]
    mask = get_all_actions_mask(labels[:, 1:])
    return hidden[:, num_prefix:-1][mask].reshape(len(labels), -1, hidden.shape[-1])


def check_gradients(golden: dict[str, torch.Tensor], prefix: str, modules: dict[str, torch.nn.Module]) -> None:
    """Every recorded gradient `prefix + name`, looked up in `modules` by the first part of the name, else in "vla"."""
    names = [name for name in golden if name.startswith(prefix)]
    assert names
    for name in names:
        owner, _, rest = name.removeprefix(prefix).partition(".")
        module = modules[owner] if owner in modules else modules["vla"]
        parameter = module.get_parameter(rest if owner in modules else name.removeprefix(prefix))
        assert_gradients_close(parameter.grad, golden[name])


def test_hidden_states_logits_and_loss(vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        output = vla(**forward_inputs(batch, heads), output_hidden_states=True)
    for index, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden, batch[f"hidden_states.{index}"], **CLOSE)
    assert len(output.hidden_states) == vla.config.text_config.num_hidden_layers + 1
    torch.testing.assert_close(output.last_hidden_state, output.hidden_states[-1])
    torch.testing.assert_close(output.projector_features, batch["projector_features"], **CLOSE)
    torch.testing.assert_close(output.logits[..., 31680:32064], batch["logits_cols_31680_32064"], **CLOSE)
    torch.testing.assert_close(output.logits.logsumexp(-1), batch["logits_logsumexp"], **CLOSE)
    torch.testing.assert_close(output.loss, batch["lm_loss"], **CLOSE)


def test_vision_features(vla: Any, batch: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        patches = vla.vision_backbone(batch["pixel_values"])
    torch.testing.assert_close(patches, batch["vision.patch_features"], **CLOSE)
    torch.testing.assert_close(patches[:, :16, :32], batch["vision.dino_image0"], **CLOSE)
    torch.testing.assert_close(patches[:, :16, 32:], batch["vision.siglip_image0"], **CLOSE)


def test_l1_loss_and_gradients_without_logits(vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    output = vla(**forward_inputs(batch, heads), output_hidden_states=True, compute_logits=False)
    assert output.logits is None and output.loss is None
    hidden = actions_hidden(output.hidden_states[-1], batch["labels"])
    torch.testing.assert_close(hidden, batch["l1.actions_hidden_states"], **CLOSE)
    predicted = heads["action_head_l1"].predict_action(hidden)
    torch.testing.assert_close(predicted, batch["l1.predicted_actions"], **CLOSE)
    loss = F.l1_loss(predicted, batch["actions"])
    torch.testing.assert_close(loss, batch["l1.loss"], **CLOSE)
    loss.backward()
    check_gradients(batch, "grad_l1.", {"vla": vla, **heads})


def test_language_model_loss_gradients(vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    vla(**forward_inputs(batch, heads)).loss.backward()
    check_gradients(batch, "grad_lm.", {"vla": vla})


def test_one_image_without_proprio(
    golden_dir: Path, vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]
) -> None:
    golden = load_file(golden_dir / "forward_1image_noproprio.safetensors")
    vla.vision_backbone.set_num_images_in_input(1)
    inputs = {**forward_inputs(batch), "pixel_values": batch["pixel_values"][:, :6]}
    with torch.no_grad():
        output = vla(**inputs)
        predicted = heads["action_head_l1"].predict_action(actions_hidden(output.last_hidden_state, batch["labels"]))
    torch.testing.assert_close(output.projector_features, golden["projector_features"], **CLOSE)
    torch.testing.assert_close(output.last_hidden_state, golden["hidden_states.last"], **CLOSE)
    torch.testing.assert_close(output.loss, golden["lm_loss"], **CLOSE)
    torch.testing.assert_close(predicted, golden["l1.predicted_actions"], **CLOSE)


def test_lora_and_merge(golden_dir: Path, vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]) -> None:
    golden = load_file(golden_dir / "align_inputs_features.safetensors")
    peft_model = load_lora(vla, golden_dir / "lora_adapter")
    with torch.no_grad():
        output = peft_model(**forward_inputs(batch, heads), output_hidden_states=True)
    for index, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden, golden[f"lora.hidden_states.{index}"], **CLOSE)
    torch.testing.assert_close(output.loss, golden["lora.lm_loss"], **CLOSE)

    golden = load_file(golden_dir / "lora_merged.safetensors")
    merged = peft_model.merge_and_unload()
    weights = merged.state_dict()
    for name in set(golden) - {"hidden_states.last", "lm_loss"}:
        torch.testing.assert_close(weights[name], golden[name], rtol=0, atol=1e-6)
    with torch.no_grad():
        output = merged(**forward_inputs(batch, heads))
    torch.testing.assert_close(output.last_hidden_state, golden["hidden_states.last"], **CLOSE)
    torch.testing.assert_close(output.loss, golden["lm_loss"], **CLOSE)


def test_diffusion_loss_and_gradients(
    golden_dir: Path, vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]
) -> None:
    golden, head = load_file(golden_dir / "forward_diffusion.safetensors"), heads["action_head_diffusion"]
    torch.testing.assert_close(head.noise_scheduler.alphas_cumprod, golden["scheduler.alphas_cumprod"])
    noisy = head.noise_scheduler.add_noise(batch["actions"], golden["noise"], golden["timesteps"])
    torch.testing.assert_close(noisy, golden["noisy_actions"])
    time_tokens = head.embed_timesteps(golden["timesteps"], torch.float32)
    torch.testing.assert_close(time_tokens, golden["diffusion_timestep_embeddings"])
    output = vla(
        **forward_inputs(batch, heads),
        noisy_actions=noisy,
        noisy_action_projector=heads["noisy_action_projector"],
        diffusion_timestep_embeddings=time_tokens,
        output_hidden_states=True,
        compute_logits=False,
    )
    torch.testing.assert_close(output.projector_features, golden["projector_features"], **CLOSE)
    torch.testing.assert_close(output.hidden_states[0], golden["hidden_states.0"], **CLOSE)
    torch.testing.assert_close(output.hidden_states[-1], golden["hidden_states.last"], **CLOSE)
    predicted = head.predict_noise(actions_hidden(output.last_hidden_state, batch["labels"]))
    torch.testing.assert_close(predicted, golden["noise_pred"], **CLOSE)
    loss = F.mse_loss(predicted, golden["noise"])
    torch.testing.assert_close(loss, golden["loss"], **CLOSE)
    loss.backward()
    check_gradients(golden, "grad.", {"vla": vla, **heads})


def test_film_forward_and_gradients(
    golden_dir: Path, vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]
) -> None:
    golden = load_file(golden_dir / "forward_film.safetensors")
    weights = beneath(golden, "weights.")
    load_film_backbone(vla, weights)
    assert set(vla.vision_backbone.state_dict()) == set(weights)
    text = vla.get_input_embeddings()(batch["input_ids"])
    actions = get_all_actions_mask(batch["labels"])
    language = vla._film_language(text, batch["attention_mask"], actions, use_film=True)
    torch.testing.assert_close(language, golden["average_language_embedding"], **CLOSE)
    with torch.no_grad():
        patches = vla.vision_backbone(batch["pixel_values"], language)
    torch.testing.assert_close(patches, golden["patch_features"], **CLOSE)

    output = vla(**forward_inputs(batch, heads), use_film=True)
    torch.testing.assert_close(output.projector_features, golden["projector_features"], **CLOSE)
    torch.testing.assert_close(output.last_hidden_state, golden["hidden_states.last"], **CLOSE)
    torch.testing.assert_close(output.loss, golden["lm_loss"], **CLOSE)
    predicted = heads["action_head_l1"].predict_action(actions_hidden(output.last_hidden_state, batch["labels"]))
    torch.testing.assert_close(predicted, golden["l1.predicted_actions"], **CLOSE)
    F.l1_loss(predicted, batch["actions"]).backward()
    # The wrapper holds the backbone under its own `vision_backbone`, so recorded names are below the model's.
    for name in (key for key in golden if key.startswith("grad.")):
        assert_gradients_close(vla.vision_backbone.get_parameter(name.removeprefix("grad.")).grad, golden[name])


def predict(golden: dict[str, torch.Tensor], vla: Any, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = {k: golden[k] for k in ("input_ids", "attention_mask", "pixel_values")}
    actions, hidden = vla.predict_action(**inputs, **{"unnorm_key": "libero_tiny", **changes})
    assert actions.shape == (1, 8, 7)
    return torch.from_numpy(actions[0]), hidden


# Ten steps of sampling amplify rounding. Largest differences from the record with AVX-512, AVX2, AVX, SSE4.2 and the
# plainest kernels: 1.0e-3 in actions, 4.4e-3 in hidden states; in single steps 4.4e-6. Initial noise that is changed by
# 1e-6 gives 4.1e-3 and 1.3e-2.
FREE_ACTIONS = {"rtol": 0.0, "atol": 5e-3}
FREE_HIDDEN = {"rtol": 0.0, "atol": 2e-2}


@pytest.mark.parametrize("name", ["l1", "discrete", "l1_noproprio_other_key"])
def test_predict_action(name: str, golden_dir: Path, vla: Any, heads: dict[str, Any]) -> None:
    golden = load_file(golden_dir / "predict_action.safetensors")
    changes: dict[str, Any] = {"proprio": golden["proprio"], "proprio_projector": heads["proprio_projector"]}
    if name == "l1_noproprio_other_key":
        changes = {"unnorm_key": "other_tiny"}
    if name.startswith("l1"):
        changes["action_head"] = heads["action_head_l1"]
    actions, hidden = predict(golden, vla, **changes)
    torch.testing.assert_close(actions, golden[f"{name}.actions"], **CLOSE)
    torch.testing.assert_close(hidden, golden[f"{name}.hidden"], **CLOSE)


def _diffusion(golden: dict[str, torch.Tensor], heads: dict[str, Any]) -> dict[str, Any]:
    """Arguments of predict_action for the recorded diffusion case."""
    head = heads["action_head_diffusion"]
    head.noise_scheduler.set_timesteps(10)
    return {
        "proprio": golden["proprio"],
        "proprio_projector": heads["proprio_projector"],
        "action_head": head,
        "noisy_action_projector": heads["noisy_action_projector"],
        "initial_noise": golden["diffusion.initial_noise"],
    }


def test_every_step_of_diffusion_from_the_recorded_state(
    golden_dir: Path, vla: Any, heads: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = load_file(golden_dir / "predict_action.safetensors")
    arguments, own = _diffusion(golden, heads), []
    head = arguments["action_head"]
    predict_noise = head.predict_noise

    def recorded(hidden: torch.Tensor) -> torch.Tensor:
        own.append(predict_noise(hidden))
        return golden["diffusion.noise_preds"][len(own) - 1]  # so that the next step starts from the recorded state

    monkeypatch.setattr(head, "predict_noise", recorded)
    actions, hidden = predict(golden, vla, **arguments)
    torch.testing.assert_close(torch.stack(own), golden["diffusion.noise_preds"], rtol=0, atol=2e-5)
    torch.testing.assert_close(actions, golden["diffusion.actions"], rtol=0, atol=2e-5)
    torch.testing.assert_close(hidden, golden["diffusion.hidden"], rtol=0, atol=2e-5)


def test_diffusion_that_runs_freely(golden_dir: Path, vla: Any, heads: dict[str, Any]) -> None:
    golden = load_file(golden_dir / "predict_action.safetensors")
    actions, hidden = predict(golden, vla, **_diffusion(golden, heads))
    torch.testing.assert_close(actions, golden["diffusion.actions"], **FREE_ACTIONS)
    torch.testing.assert_close(hidden, golden["diffusion.hidden"], **FREE_HIDDEN)


def test_predict_action_with_film(golden_dir: Path, vla: Any, heads: dict[str, Any]) -> None:
    film, golden = (load_file(golden_dir / f"{name}.safetensors") for name in ("forward_film", "predict_action"))
    load_film_backbone(vla, {f"module.{name}": value for name, value in beneath(film, "weights.").items()})
    changes = {"proprio": golden["proprio"].numpy(), "proprio_projector": heads["proprio_projector"]}
    actions, hidden = predict(golden, vla, **changes, action_head=heads["action_head_l1"], use_film=True)
    torch.testing.assert_close(actions, film["predict_action.actions"], **CLOSE)
    torch.testing.assert_close(hidden, film["predict_action.hidden"], **CLOSE)


def test_diffusion_sampling_of_a_batch(
    golden_dir: Path, vla: Any, heads: dict[str, Any], batch: dict[str, torch.Tensor]
) -> None:
    golden, head = load_file(golden_dir / "forward_diffusion.safetensors"), heads["action_head_diffusion"]
    head.noise_scheduler.set_timesteps(10)
    # The prompts are what stands before the first label.
    prompt = batch["labels"].ne(-100).cumsum(dim=1).eq(0) & batch["attention_mask"]
    width = int(prompt.sum(dim=1).max())
    vla.norm_stats = {"normalized": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [False] * 7}}}
    parts = {name: heads[name] for name in ("proprio_projector", "noisy_action_projector")} | {"action_head": head}
    given = {"proprio": batch["proprio"], "initial_noise": golden["sampling.initial_noise"], **parts}
    inputs = batch["input_ids"][:, :width], prompt[:, :width], batch["pixel_values"]
    actions, _ = vla.predict_action(*inputs, **given)
    # The same instruction sets gave up to 1.2e-4 here.
    torch.testing.assert_close(torch.from_numpy(actions).float(), golden["sampling.actions"], **FREE_ACTIONS)
