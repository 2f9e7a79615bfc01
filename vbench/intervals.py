"""Intervals for medians of dependent samples, for means of few replicates and for rates. Pure; standard library only.

Samples of one process are dependent in time and no replicates of the process: ``median_interval`` says how well one
process knows its own median, ``student`` and ``sign_flip`` take one number a replicate.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vbench.errors import DataError
from vbench.student import incomplete_beta
from vbench.student import quantile as student_quantile

#: Up to this many values every subset's mean is formed (2^14 = 16384); above, as many subsets are drawn.
EXACT_SIGN_FLIP = 14
_DRAWN_SUBSETS = 1 << EXACT_SIGN_FLIP


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its interval, in the unit of the values."""

    value: float
    low: float
    high: float

    @property
    def relative_half_width(self) -> float:
        """Half the interval's length over the estimate."""
        return (self.high - self.low) / (2 * self.value)


def effective_size(samples: Sequence[float]) -> float:
    """How many independent samples a dependent series is worth when its median is asked for.

    The variance of a sample median follows the autocorrelation of "below the median or not", so that outliers weigh
    nothing here. Correlations are summed in pairs of lags while the pairs stay positive (initial positive sequence,
    Geyer 1992, Statistical Science 7(4)).

    Returns:
        between 1 and the number of samples; negative dependence is not credited.
    """
    n = len(samples)
    centre = statistics.median(samples)
    signs = [(x > centre) - (x < centre) for x in samples]
    power = sum(s * s for s in signs)
    if n < 4 or power == 0:
        return float(n)

    def correlation(lag: int) -> float:
        return sum(a * b for a, b in zip(signs, signs[lag:], strict=False)) / power

    total = 0.0
    for lag in range(0, n - 1, 2):
        pair = correlation(lag) + correlation(lag + 1)
        if pair <= 0:
            break
        total += pair
    # total holds lag 0 once: 1 + 2 * (sum over lags from 1) = 2 * total - 1.
    return min(float(n), max(1.0, n / max(2 * total - 1, 1e-9)))


@functools.lru_cache(maxsize=4096)
def _median_rank(n: int, level: float) -> int:
    """The largest r with P(the r-th smallest <= median <= the r-th largest) >= level; 0 if there is none."""
    allowed = (1 - level) / 2
    tail, rank = 0.0, 0
    for k in range(n // 2):
        tail += math.comb(n, k) / 2**n
        if tail > allowed:
            break
        rank = k + 1
    return rank


def median_interval(samples: Sequence[float], level: float = 0.95) -> Interval | None:
    """Median and its interval from order statistics (David & Nagaraja, Order Statistics, ch. 7), any distribution.

    With dependent samples the ranks of ``effective_size`` independent ones are taken at the same fractions.

    Returns:
        ``None`` where no two order statistics reach ``level`` (fewer than 6 effective samples at 0.95).
    """
    ordered = sorted(samples)
    n = len(ordered)
    size = math.floor(effective_size(samples))
    rank = _median_rank(size, level)
    if rank == 0:
        return None
    # Outwards: the fraction below the r-th of ``size`` is (r - 1) / size.
    scaled = math.floor((rank - 1) * n / size)
    return Interval(statistics.median(ordered), ordered[scaled], ordered[n - 1 - scaled])


def quantile(samples: Sequence[float], q: float) -> float:
    """The ``q`` quantile, linear between order statistics.

    Raises:
        DataError: fewer than 10 samples beyond it on its thin side: it would be the extreme sample under another name.
    """
    if not 0 < q < 1:
        raise DataError(f"quantile {q}: must lie between 0 and 1")
    needed = math.ceil(10 / (1 - max(q, 1 - q)) - 1e-9)
    if len(samples) < needed:
        raise DataError(f"quantile {q:g} needs at least {needed} samples, there are {len(samples)}; take more of them")
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def student(values: Sequence[float], one_sided: float) -> Interval:
    """Mean of at least two replicates, and Student's t bounds, each of one-sided confidence ``one_sided``."""
    mean = statistics.fmean(values)
    half = student_quantile(2 * one_sided - 1, len(values) - 1) * standard_error(values)
    return Interval(mean, mean - half, mean + half)


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean of at least two replicates."""
    return statistics.stdev(values) / math.sqrt(len(values))


def sign_flip(values: Sequence[float], one_sided: float, seed: int = 0) -> Interval:
    """Mean of replicates, and the bounds that a sign-flip test of each one-sided level would not reject.

    For values symmetric about their centre, flipping the signs of the deviations changes nothing; the test inverted
    gives order statistics of the means of all subsets (Hartigan 1969, JASA 64, "typical values"). No normality needed.
    Above EXACT_SIGN_FLIP values that many subsets are drawn with ``seed``.

    Returns:
        infinite ends where the values are too few for the level (below 7 at 0.99): nothing is rejected then.
    """
    n = len(values)
    if n <= EXACT_SIGN_FLIP:
        means = sorted(
            statistics.fmean(itertools.compress(values, mask))
            for mask in itertools.product((0, 1), repeat=n)
            if any(mask)
        )
    else:
        draw = random.Random(seed)
        masks = (draw.getrandbits(n) or 1 for _ in range(_DRAWN_SUBSETS - 1))
        means = sorted(statistics.fmean(v for i, v in enumerate(values) if mask >> i & 1) for mask in masks)
    # The observed signs count as one of the flips, so that the test is valid for drawn subsets too.
    rank = math.floor((1 - one_sided) * (len(means) + 1) + 1e-9)
    mean = statistics.fmean(values)
    if rank == 0:
        return Interval(mean, -math.inf, math.inf)
    return Interval(mean, means[rank - 1], means[-rank])


def rate(successes: int, trials: int, level: float = 0.95) -> Interval:
    """A rate and its two-sided interval (Clopper & Pearson 1934, Biometrika 26): exact, never too narrow.

    Args:
        successes, trials: counts, 0 <= successes <= trials, trials >= 1; trials must be independent.
    """
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else _beta_quantile(successes, trials - successes + 1, tail)
    high = 1.0 if successes == trials else _beta_quantile(successes + 1, trials - successes, 1 - tail)
    return Interval(successes / trials, low, high)


def _beta_quantile(a: float, b: float, p: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if incomplete_beta(a, b, middle) < p else (low, middle)
    return (low + high) / 2
