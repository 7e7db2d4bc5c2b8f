"""The mini student: OpenVLA-OFT's own classes and file layout at a size that trains on two CPU cores.

4.5 M parameters, 3.1 M of them the (tied) word embeddings that keep Llama-2's ids; the blocks have 1.5 M.
84-pixel images and patch 14 give 36 tokens a view. Sequence length and width decide the time of a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.extern.hf.processing_prismatic import PrismaticProcessor

IMAGE_SIZE = 84
# depth n gives n - 1 useful blocks: the features are those of the second-to-last block, as in the real model.
DINO_OVERRIDES = {"embed_dim": 96, "depth": 3, "num_heads": 4}
SIGLIP_OVERRIDES = {"embed_dim": 64, "depth": 3, "num_heads": 4}
# pad_token_id 32000 and a vocabulary padded to a multiple of 64, as in OpenVLA.
TEXT_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "vocab_size": 32064,
    "pad_token_id": 32000,
    "tie_word_embeddings": True,
}
TIMM_MODEL_IDS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
STDS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))


def student_config() -> OpenVLAConfig:
    """The configuration; change a field of the result to try another size."""
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig

    inherited: dict[str, Any] = {"tie_word_embeddings": True}  # a field of transformers' base class
    return OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        arch_specifier="no-align+fused-gelu-mlp",
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        timm_model_ids=list(TIMM_MODEL_IDS),
        timm_override_act_layers=[None, None],
        timm_override_kwargs=[dict(DINO_OVERRIDES), dict(SIGLIP_OVERRIDES)],
        image_sizes=[IMAGE_SIZE, IMAGE_SIZE],
        text_config=dict(TEXT_CONFIG),
        pad_token_id=32000,
        norm_stats={},
        **inherited,
    )


def build_processor() -> PrismaticProcessor:
    """Tokenizer and image processor of the mini student."""
    from experiments.mini.make.make_tokenizer import build_tokenizer
    from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor

    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        input_sizes=[(3, IMAGE_SIZE, IMAGE_SIZE)] * 2,
        interpolations=["bicubic", "bicubic"],
        means=list(MEANS),
        stds=list(STDS),
    )
    return PrismaticProcessor(image_processor, build_tokenizer())


def build_student(seed: int) -> tuple[OpenVLAForActionPrediction, PrismaticProcessor]:
    """A randomly initialized mini student (float32, two views) and its processor; one seed, one set of weights."""
    import torch

    from experiments.mini.make.make_tokenizer import is_filler
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = OpenVLAForActionPrediction(student_config())
    model.vision_backbone.set_num_images_in_input(2)
    processor = build_processor()
    fillers = [token_id for token, token_id in processor.tokenizer.get_vocab().items() if is_filler(token)]
    with torch.no_grad():
        # No text reaches these rows, 97% of the table; as zeros they compress to nothing.
        embeddings = model.get_input_embeddings().weight
        embeddings[fillers] = 0
        embeddings[len(processor.tokenizer) :] = 0
    return model, processor
