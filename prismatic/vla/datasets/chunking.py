"""Which frames of an episode may start a sample, and which actions belong to it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Chunks(NamedTuple):
    """Frame numbers within one episode, for its S usable start frames.

    observations: (S, window); the window's earlier frames, the first frame repeated before the episode begins.
    actions: (S, window - 1 + 1 + future); actions from the window's first frame to `future` frames ahead.
    observed: (S, window); False where the first frame was repeated.
    """

    observations: np.ndarray
    actions: np.ndarray
    observed: np.ndarray


def chunk_indices(length: int, window: int, future: int) -> Chunks:
    """Start frames t = 0 .. length - future - 1 with their observation window and action chunk.

    The last `future` frames of an episode start no sample: their chunk would need padding.
    Source: upstream's chunk_act_obs.
    """
    starts = np.arange(max(length - future, 0))[:, None]
    observations = starts + np.arange(1 - window, 1)[None, :]
    actions = starts + np.arange(1 - window, 1 + future)[None, :]
    return Chunks(np.maximum(observations, 0), np.maximum(actions, 0), observations >= 0)
