"""Actions and states of a dataset as the policy learns them: standardized, in chunks, normalized."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from prismatic.util.errors import UsageError
from prismatic.vla.datasets.episodes import EpisodeData
from prismatic.vla.datasets.specs import DatasetSpec
from prismatic.vla.datasets.statistics import normalize
from prismatic.vla.platforms import OpenPINormalization, Platform


def transitions(spec: DatasetSpec, index: EpisodeData) -> tuple[np.ndarray, np.ndarray]:
    """(actions, proprios) of a split, standardized episode by episode."""
    pairs = [
        spec.standardize(index.action[first:last], index.state[first:last])
        for first, last in itertools.pairwise(index.episode_start)
    ]
    return np.concatenate([action for action, _ in pairs]), np.concatenate([proprio for _, proprio in pairs])


def check_transitions(
    name: str, transitions: tuple[np.ndarray, np.ndarray], rows: int, platform: Platform, with_proprio: bool
) -> None:
    """Refuse what a `standardize` has made of the wrong width or number of steps."""
    wanted = [("actions", transitions[0], platform.action_dim)]
    wanted += [("states", transitions[1], platform.proprio_dim)] if with_proprio else []
    for what, vectors, width in wanted:
        if vectors.shape != (rows, width):
            raise UsageError(
                f"dataset {name!r}: standardize gives {what} of shape {vectors.shape}; "
                f"accepted for platform {platform.name!r}: ({rows}, {width})"
            )


def chunk_starts(length: int, future: int) -> np.ndarray:
    """The frames of an episode whose action chunk (its own action and `future` more) lies inside; others need padding.

    Source: upstream's chunk_act_obs.
    """
    return np.arange(max(length - future, 0))


def sample_starts(
    spec: DatasetSpec, index: EpisodeData, action_FA: np.ndarray, episode: int, future: int
) -> np.ndarray:
    """The frames of an episode that start a sample: those with a whole chunk, in an episode with an instruction."""
    first, last = (int(bound) for bound in index.episode_start[episode : episode + 2])
    if not any(index.instructions[number] for number in set(index.language[first:last].tolist())):
        return np.zeros(0, np.int64)
    starts = first + chunk_starts(last - first, future)
    if not spec.skips_stillness:
        return starts
    arm = slice(None) if spec.action_mask is None else np.array(spec.action_mask)
    moves = np.count_nonzero(action_FA[:, arm], axis=1) > 0
    return starts[[moves[start : start + future + 1].any() for start in starts]]


def all_starts(tables: Iterable[EpisodeData], future: int) -> np.ndarray:
    """The frames of all splits, one after the other, that have a whole chunk."""
    starts, first = [], 0
    for table in tables:
        for begin, end in itertools.pairwise(table.episode_start.tolist()):
            starts.append(first + begin + chunk_starts(end - begin, future))
        first += table.num_frames
    return np.concatenate(starts)


def deltas(name: str, spec: DatasetSpec, platform: Platform, with_proprio: bool) -> tuple[bool, ...] | None:
    """Say which action numbers count from the state: for pi0 and pi0.5 those that the dataset names, else none.

    Raises UsageError: there are such numbers, but the policy does not see the state, or it has not one for each.
    """
    if spec.delta is None or not isinstance(platform.normalization, OpenPINormalization):
        return None
    if not with_proprio:
        raise UsageError(
            f"--use_proprio: False found, but actions of dataset {name!r} count from the state; accepted: True, "
            "or a --dataset_file that describes it without delta"
        )
    check_deltas(f"dataset {name!r}", spec.delta, platform)
    return spec.delta


def check_deltas(place: str, delta: Sequence[bool], platform: Platform) -> None:
    """Raise UsageError, which begins with `place`, unless the robot has as many actions and states as `delta` says."""
    if not len(delta) == platform.action_dim == platform.proprio_dim:
        raise UsageError(
            f"{place}: delta of {len(delta)} numbers found for platform {platform.name!r} of {platform.action_dim} "
            f"action and {platform.proprio_dim} state numbers; accepted: as many of each, number by number"
        )


class ActionChunks:
    """Normalized action chunks of one dataset.

    Args:
        action_FA, state_FP: of all frames, not normalized.
        statistics: of the actions; its "delta" says which of them count from the state at the chunk's start.
    """

    def __init__(
        self,
        action_FA: np.ndarray,
        state_FP: np.ndarray,
        statistics: Mapping[str, Sequence[float]],
        platform: Platform,
    ) -> None:
        self._statistics, self._platform, self._base_FA = statistics, platform, None
        if "delta" in statistics:
            self._base_FA = np.where(statistics["delta"], state_FP, 0)
        self._action_FA = action_FA if "delta" in statistics else self._normalize(action_FA)

    def __getitem__(self, start: int) -> np.ndarray:
        """The chunk (T, A) that begins at a frame."""
        chunk_TA = self._action_FA[start : start + self._platform.chunk]
        return chunk_TA if self._base_FA is None else self._normalize(chunk_TA - self._base_FA[start])

    def _normalize(self, values: np.ndarray) -> np.ndarray:
        return normalize(values, self._statistics, self._platform.normalization)
