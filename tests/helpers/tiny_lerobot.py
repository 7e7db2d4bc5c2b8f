"""LeRobot's own training program on tiny sizes: `python tiny_lerobot.py FOLDER ARGUMENTS...` with LeRobot's Python.

Only sizes are changed. Dataset and tokenizer lie in FOLDER, which stands for the hub's cache.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

WIDTH, DEPTH, VOCABULARY = 64, 4, 300


def tokenizer(**extra: str) -> Any:
    """A tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<bos>", "<eos>", *extra.values(), *map(str, range(256)), "Task:", "State:", "put"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special, extra_special_tokens=extra)


def make_tokenizer(folder: Path) -> None:
    """The tokenizer, in the cache's place of PaliGemma's."""
    snapshot = folder / "hub" / "models--google--paligemma-3b-pt-224" / "snapshots" / "1"
    tokenizer().save_pretrained(snapshot)
    (snapshot / "config.json").write_text('{"model_type": "gemma"}')
    (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
    (snapshot.parents[1] / "refs" / "main").write_text("1")


def make_smolvlm(folder: Path) -> None:
    """SmolVLM's configuration and processor."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    depth = {"num_hidden_layers": DEPTH, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": 80, "vocab_size": VOCABULARY, **depth}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"vision_config": {**vision, "image_size": 64, "patch_size": 8}, "text_config": text}
    SmolVLMConfig(**sizes, scale_factor=2, image_token_id=VOCABULARY - 1).save_pretrained(folder)
    words = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    SmolVLMProcessor(SmolVLMImageProcessor(), words, SmolVLMVideoProcessor()).save_pretrained(folder)


def make_dataset(folder: Path) -> None:
    """Two episodes of two cameras, one of them wide."""
    import numpy as np
    from lerobot.datasets import LeRobotDataset

    names = ["height", "width", "channels"]
    features = {
        "observation.images.front": {"dtype": "image", "shape": (40, 60, 3), "names": names},
        "observation.images.wrist": {"dtype": "image", "shape": (48, 48, 3), "names": names},
        "observation.state": {"dtype": "float32", "shape": (6,), "names": None},
        "action": {"dtype": "float32", "shape": (6,), "names": None},
    }
    dataset = LeRobotDataset.create("local/tiny", fps=10, features=features, root=folder / "data", use_videos=False)
    rng = np.random.default_rng(0)
    for _ in range(2):
        for _ in range(8):
            frame: dict[str, Any] = {
                name: rng.integers(0, 255, feature["shape"], dtype=np.uint8)
                if feature["dtype"] == "image"
                else rng.normal(size=feature["shape"]).astype(np.float32)
                for name, feature in features.items()
            }
            dataset.add_frame({**frame, "task": "put"})
        dataset.save_episode()
    dataset.finalize()


def shrink(module: Any) -> None:
    """Give pi0's or pi0.5's classes tiny sizes."""
    stock = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def paligemma(config: Any) -> Any:
        config.text_config.vocab_size = config._vocab_size = VOCABULARY
        config.image_token_index = config.image_token_id = VOCABULARY - 1
        vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
        for name, value in {**vision, "projection_dim": WIDTH}.items():
            setattr(config.vision_config, name, value)
        return stock[0](config=config)

    def expert(config: Any) -> Any:
        config.vocab_size = VOCABULARY
        return stock[1](config=config)

    def sizes(variant: str) -> Any:
        width = WIDTH if variant == "gemma_2b" else WIDTH // 2
        return module.GemmaConfig(width=width, depth=DEPTH, mlp_dim=80, num_heads=8, num_kv_heads=1, head_dim=8)

    module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM = paligemma, expert
    module.get_gemma_config = sizes


def main(folder: Path, arguments: list[str]) -> None:
    """Make what is missing, then run lerobot-train's own main, or load a checkpoint with the stock class (--load)."""
    os.environ |= {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "HF_LEROBOT_HOME": str(folder / "lerobot")}
    if not (folder / "data").exists():
        make_tokenizer(folder)
        make_smolvlm(folder / "smolvlm")
        make_dataset(folder)
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05
    from lerobot.scripts import lerobot_train

    shrink(modeling_pi0)
    shrink(modeling_pi05)
    if arguments[0] == "--load":
        policy = modeling_pi05.PI05Policy.from_pretrained(arguments[1], strict=True)
        assert type(policy) is modeling_pi05.PI05Policy and "align" not in " ".join(policy.state_dict())
        return
    sys.argv = ["lerobot-train", *arguments]
    lerobot_train.main()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
