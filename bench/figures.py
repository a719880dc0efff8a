"""How the benchmarks state a figure: the median of many, and how far to trust it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

N_RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A median with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """The median of `values`.

    The interval is that of the medians of samples drawn from them, with replacement.
    """
    rng = np.random.default_rng(0)
    samples = rng.choice(values, (N_RESAMPLES, len(values)))
    low, high = np.quantile(np.median(samples, axis=1), (0.025, 0.975))
    return Interval(float(np.median(values)), float(low), float(high))
