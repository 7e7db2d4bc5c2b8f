"""What a rollout needs from a policy: two lines, so that scripted, remote and learned policies are interchangeable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


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

    def act(self, queries: Sequence[Query]) -> npt.NDArray[Any] | Sequence[npt.NDArray[Any] | Exception]: ...
