"""The policy that a rollout asks, and the flags of a checkpoint's. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from prismatic.util.flags import limited

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]
Render = Literal["protocol", "fast"]
Gripper = Literal["auto", "policy", "libero"]
ModelFamily = Literal["openvla"]
Array: TypeAlias = npt.NDArray[Any]


@dataclass
class PolicyFlags:
    """Flags that say what is loaded and how the policy was trained: those of OpenVLA-OFT, the last five ours."""

    pretrained_checkpoint: str = ""  # Checkpoint folder or hub id (owner/name)
    model_family: ModelFamily = "openvla"
    unnorm_key: str = ""  # Dataset whose statistics un-normalize actions
    num_images_in_input: int = limited(2, least=1)  # Camera views: the third-person one, then wrist cameras
    center_crop: bool = True  # The policy was trained with image augmentation
    use_proprio: bool = True  # The policy takes the robot's state
    use_film: bool = False  # The policy was trained with FiLM
    use_l1_regression: bool = True  # Continuous actions from the L1 head
    use_diffusion: bool = False  # Continuous actions from the diffusion head; neither: discrete action tokens
    num_diffusion_steps_train: int = limited(50, least=1)
    num_diffusion_steps_inference: int = limited(50, least=1)
    lora_rank: int = limited(32, least=1)  # Accepted for compatibility; the rank is read from the adapter
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    base_checkpoint: str = ""  # Base model of a checkpoint that holds only a LoRA adapter; default: what it says
    device: Device = "auto"  # auto, cpu or cuda
    dtype: DType = "auto"  # auto (bfloat16 on a GPU, float32 on CPU), float32 or bfloat16
    # Action numbers of openpi's and LeRobot's folders that count from the state, as openpi's make_bool_mask: 6,-1,6,-1
    delta_actions: str = ""
    verify: bool = False  # First ask the policy what its checkpoint recorded, and refuse another answer


@dataclass(frozen=True)
class Query:
    """One robot's question to the policy.

    Attributes:
        image: third-person camera, uint8 (H, W, 3), oriented as the training data are.
        wrist_image: wrist camera, likewise.
        state: (8,) end-effector position (m), orientation (axis-angle, rad), two finger positions (m).
        instruction: what to do, in words.
        seed: for policies that sample: the same query with the same seed must get the same answer.
        extra_images: further cameras, for policies of more than two views (a second wrist).
        prepared: images that have the policy's size are prepared already (upstream's ALOHA client resizes its own)
            and only cropped. Else every image takes the way of the evaluation: JPEG, resize, crop.
    """

    image: npt.NDArray[np.uint8]
    wrist_image: npt.NDArray[np.uint8]
    state: npt.NDArray[np.float64]
    instruction: str
    seed: int = 0
    extra_images: tuple[npt.NDArray[np.uint8], ...] = ()
    prepared: bool = False


class Policy(Protocol):
    """Answers several robots at once: B queries in, un-normalized action chunks (B, T, A) out, gripper 1 = open.

    A policy that can fail for one robot alone (a remote one) may return a list with an exception in that one's place.
    """

    def act(self, queries: Sequence[Query]) -> Array | Sequence[Array | Exception]: ...
