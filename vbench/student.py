"""The incomplete beta function, and what follows from it: Student's t and its quantiles. Standard library only."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (Abramowitz & Stegun 26.5.8), by Lentz's method."""
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1.0)
    d = 1.0 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, 500):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1.0 + term * d
            d = 1.0 / (d if abs(d) > tiny else tiny)
            c = 1.0 + term / c
            c = c if abs(c) > tiny else tiny
            result *= c * d
        if abs(c * d - 1.0) < 1e-15:
            return result
    raise ArithmeticError(f"incomplete beta({a}, {b}, {x}) does not converge")


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b): P(X <= x) for X of the beta distribution, 0 <= x <= 1."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    # The fraction converges fast below the mean of the beta distribution, else its mirror does.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, 1 - x) / b


def upper_tail(t: float, df: int) -> float:
    """P(T > t) for ``df`` degrees of freedom."""
    half = incomplete_beta(df / 2, 0.5, df / (df + t * t)) / 2
    return half if t >= 0 else 1 - half


@functools.lru_cache(maxsize=4096)
def quantile(two_sided: float, df: int) -> float:
    """The t with P(|T| <= t) = ``two_sided``, 0 < two_sided < 1, df >= 1."""
    if not 0 < two_sided < 1 or df < 1:
        raise ValueError(f"no quantile at {two_sided} with {df} degrees of freedom")
    tail = (1 - two_sided) / 2
    low, high = 0.0, 1.0
    while upper_tail(high, df) > tail:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(middle, df) > tail else (low, middle)
    return (low + high) / 2


def log_interval(values: Sequence[float], level: float) -> tuple[float, float, float]:
    """Median, and the interval of ``level`` for the centre by Student's t on the logarithms.

    Args:
        values: at least two, all above zero: one replicate each.
        level: two-sided, e.g. 0.99.

    Returns:
        (median, low, high); the interval is widened to hold the median where skew puts it outside.
    """
    logs = [math.log(v) for v in values]
    half = quantile(level, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    centre, median = statistics.fmean(logs), statistics.median(values)
    # One replicate may be seconds and the half-width huge at one degree of freedom: stay within floats.
    low, high = math.exp(max(centre - half, -700.0)), math.exp(min(centre + half, 700.0))
    return median, min(low, median), max(high, median)
