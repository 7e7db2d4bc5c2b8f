"""The mini student, and its pretraining by behavior cloning with the fine-tuning script itself.

    python -m experiments.mini.make.pretrain_student --data_root_dir DATA --work runs/mini_student

OpenVLA-OFT's own classes and file layout at a size that trains on two CPU cores: 4.5 M parameters, 3.1 M of them the
(tied) word embeddings that keep Llama-2's ids; the blocks have 1.5 M. 84-pixel images and patch 14 give 36 tokens a
view. Sequence length and width decide the time of a step.

All weights train (no LoRA, no alignment). The run is resumable: the same command goes on at its last checkpoint. The
export is what the repository ships: weights rounded to bfloat16, heads, processor, statistics and a card.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.reproduce.jobs import as_arguments
from prismatic.checkpoint.layout import last_checkpoint
from prismatic.util.cli import run
from prismatic.util.errors import UsageError
from prismatic.util.files import atomic_path, atomic_write
from prismatic.util.flags import limited

if TYPE_CHECKING:
    from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
    from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
    from prismatic.extern.hf.processing_prismatic import PrismaticProcessor

ROOT = Path(__file__).resolve().parents[3]
RUN_ID = "student"
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


@dataclass
class PretrainConfig:
    """The settings that made the shipped weights are the defaults."""

    data_root_dir: Path = Path("data/pretrain")  # Folder of the demonstrations (RLDS)
    dataset_name: str = "libero_object_no_noops"  # Datasets, comma list
    work: Path = Path("runs/mini_student")  # Initial weights, checkpoints and logs
    out: Path = ROOT / "experiments" / "mini" / "weights" / "student"  # The exported model
    max_steps: int = limited(3000, least=1)  # Optimizer steps
    batch_size: int = limited(32, least=1)  # Samples per step
    learning_rate: float = limited(1e-3, above=0)  # Peak learning rate
    weight_decay: float = limited(0.05, least=0)  # AdamW weight decay
    seed: int = limited(0, least=0)  # Initialization, shuffling and augmentation
    save_freq: int = limited(500, least=1)  # Steps between checkpoints


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


def initialize(config: PretrainConfig) -> Path:
    """A randomly initialized student on disk."""
    folder = config.work / "init"
    if not (folder / "tokenizer.json").is_file():
        model, processor = build_student(config.seed)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def training_flags(config: PretrainConfig, start: Path, further: Mapping[str, object] | None = None) -> list[str]:
    """The fine-tuning script's flags from the model `start`; an unfinished run goes on at its last checkpoint."""
    values = {
        "recipe": "baseline",
        "use_lora": False,
        "vla_path": start,
        "resume": True,
        "data_root_dir": config.data_root_dir,
        "dataset_name": config.dataset_name,
        "run_root_dir": config.work,
        "run_id_override": RUN_ID,
        "num_images_in_input": 2,
        "use_proprio": True,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "scheduler": "CosineAnnealingLR",
        "lr_warmup_steps": 100,
        "max_grad_norm": 1.0,
        "max_steps": config.max_steps,
        "save_freq": config.save_freq,
        "seed": config.seed,
        "num_workers": 1,
        "wandb_log_freq": 50,
        **(further or {}),
    }
    return list(as_arguments(values))


def export(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint's model, rounded to bfloat16, heads, processor and statistics; no training state."""
    import torch
    from safetensors.torch import load_file, save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {key: value.to(torch.bfloat16) for key, value in load_file(checkpoint / "model.safetensors").items()}
    with atomic_path(out / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    for old in out.glob("*_checkpoint.pt"):
        old.unlink()
    names = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "dataset_statistics.json")
    copied = [checkpoint / name for name in names if (checkpoint / name).is_file()]
    for source in copied + sorted(checkpoint.glob("*_checkpoint.pt")):
        shutil.copyfile(source, out / source.name)
    model = json.loads((checkpoint / "config.json").read_text())
    atomic_write(out / "config.json", json.dumps({**model, "dtype": "bfloat16"}, indent=2) + "\n")


def refuse_missing_data(config: PretrainConfig) -> None:
    """Raises UsageError: the demonstrations' folder is missing."""
    if not config.data_root_dir.is_dir():
        raise UsageError(f"--data_root_dir: no such folder: {config.data_root_dir}")


def pretrain(config: PretrainConfig, flags: Sequence[str]) -> int:
    """Train (or go on) and export; returns the training script's exit code."""
    finished = last_checkpoint(config.work / RUN_ID)
    if finished is None or f"--{config.max_steps}_" not in finished.name:
        command = [sys.executable, "vla-scripts/finetune.py", *flags]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code != 0:
            return code
    checkpoint = last_checkpoint(config.work / RUN_ID)
    assert checkpoint is not None
    export(checkpoint, config.out)
    print(f"exported {checkpoint} to {config.out}")
    return 0


def main(config: PretrainConfig) -> int:
    """Pretrain the mini student."""
    refuse_missing_data(config)
    return pretrain(config, training_flags(config, initialize(config)))


if __name__ == "__main__":
    run(PretrainConfig, main)
