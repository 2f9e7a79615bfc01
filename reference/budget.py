"""The constants every error budget is derived from, and the sum bound. One table; nothing here is tuned to a kernel."""

from __future__ import annotations

import math

#: Unit roundoff (half the spacing at 1) of each type; ``tensor_core`` stands for fp32 sums whose adder aligns and
#: truncates, taken as two bits worse than IEEE fp32 until calibrated on the device; ``tf32`` keeps 11 significant bits;
#: ``int32`` sums of products of 8-bit integers are exact up to k = 2^17.
UNIT_ROUNDOFF = {
    "bf16": 2.0**-8,
    "fp16": 2.0**-11,
    "fp32": 2.0**-24,
    "fp64": 2.0**-53,
    "tensor_core": 2.0**-22,
    "tf32": 2.0**-11,
    "int32": 0.0,
}

#: Half the smallest subnormal: absolute rounding error near zero.
UNDERFLOW = {"bf16": 2.0**-134, "fp16": 2.0**-25, "fp32": 2.0**-150, "fp64": 0.0}

#: Higham & Mary, "A New Approach to Probabilistic Rounding Error Analysis" (SIAM J. Sci. Comput. 41(5), 2019):
#: with independent mean-zero roundings |error| <= LAMBDA sqrt(n) u sum|x_i||y_i|, but for a chance of
#: 2 exp(-LAMBDA^2 / 2).
LAMBDA = 6.0


def sum_factor(terms: int, accumulate: str) -> float:
    """Relative (to the sum of magnitudes) error bound of a sum of ``terms`` products, in any order.

    min(LAMBDA sqrt(n), n) u: for short sums the worst case n u is the smaller of the two. ``tf32`` adds the rounding
    of both operands to the fp32 sum.
    """
    u = UNIT_ROUNDOFF["fp32" if accumulate == "tf32" else accumulate]
    factor = min(LAMBDA * math.sqrt(terms), float(terms)) * u
    if accumulate == "tf32":
        factor += 2 * UNIT_ROUNDOFF["tf32"]
    return factor
