"""Flags of a checkpoint's policy, the same for the evaluation and the server. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class PolicyFlags:
    """What is loaded, and how the policy was trained: flags of OpenVLA-OFT, the last three ours."""

    pretrained_checkpoint: str = ""  # Checkpoint folder or hub id (owner/name)
    model_family: str = "openvla"
    unnorm_key: str = ""  # Dataset whose statistics un-normalize actions
    num_images_in_input: int = 2  # Camera views: the third-person one, then wrist cameras
    center_crop: bool = True  # The policy was trained with image augmentation
    use_proprio: bool = True  # The policy takes the robot's state
    use_film: bool = False  # The policy was trained with FiLM
    use_l1_regression: bool = True  # Continuous actions from the L1 head
    use_diffusion: bool = False  # Continuous actions from the diffusion head; neither: discrete action tokens
    num_diffusion_steps_train: int = 50
    num_diffusion_steps_inference: int = 50
    lora_rank: int = 32  # Accepted for compatibility; the rank is read from the adapter
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    base_checkpoint: str = ""  # Base model of a checkpoint that holds only a LoRA adapter; default: what it says
    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto (bfloat16 on a GPU, float32 on CPU), float32 or bfloat16
