"""Statistics over fine-tuning seeds: a method is compared with another by what it does seed by seed.

Episodes of one trained policy say how well that policy acts, not how well its method trains policies: seeds move a run
by as much as methods do, so that a test over pooled episodes finds differences where there are none.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Paired:
    """Differences of one arm to another, paired by seed.

    Attributes:
        differences: seed -> value of the arm minus value of the other.
        interval: Student's 95% interval of the mean difference.
        p_value: two-sided, of the sign-flip test: had the arms no difference, each seed's sign would be a coin's.
    """

    differences: Mapping[int, float]
    interval: tuple[float, float]
    p_value: float

    @property
    def mean(self) -> float:
        """Mean difference over seeds."""
        return statistics.mean(self.differences.values())

    @property
    def deviation(self) -> float:
        """Standard deviation of the differences."""
        return statistics.stdev(self.differences.values())

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """As in "+1.8 (-2.4 to 6.0), p 0.35, 8 seeds"."""
        low, high = (scale * end for end in self.interval)
        return (
            f"{scale * self.mean:+.{digits}f} ({low:.{digits}f} to {high:.{digits}f}), p {self.p_value:.2g}, "
            f"{len(self.differences)} seeds"
        )


def paired_by_seed(values: Mapping[int, float], reference: Mapping[int, float]) -> Paired | None:
    """Compare an arm with another on the seeds that both have; None for fewer than two.

    The smallest possible p of n seeds is 2 / 2**n: with fewer than six it cannot reach 0.05.
    """
    from scipy.stats import permutation_test, t

    seeds = sorted(values.keys() & reference.keys())
    if len(seeds) < 2:
        return None
    differences = {seed: values[seed] - reference[seed] for seed in seeds}
    sample = np.array(list(differences.values()))
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(sample) - 1)) * sample.std(ddof=1) / len(sample) ** 0.5
    # Exact: all 2**n sign flips, some thousand at a time.
    test = permutation_test((sample,), np.mean, permutation_type="samples", n_resamples=np.inf, batch=8192)
    return Paired(differences, (float(sample.mean() - half), float(sample.mean() + half)), float(test.pvalue))
