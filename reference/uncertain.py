"""Values in float64 with the statistical size of the error a finite-precision evaluation of them may have.

Each element of an ``Uncertain`` carries a variance proxy v: the error made so far is sub-Gaussian with parameter
sqrt(v), so that |error| <= LAMBDA sqrt(v) but for a chance of 2 exp(-LAMBDA^2 / 2), the model of
``vbench.reference.budget`` (Higham & Mary 2019: roundings independent, mean zero). The rules:
    rounding      an error bounded by a = u |value| is sub-Gaussian with parameter a (Hoeffding): v += (u value)^2
    linear map    independent errors add their squares times the squared coefficients: v' = v @ (W^2)^T
    function      first order, f'(value)^2 v, plus the largest second-order term at LAMBDA sqrt(v)
    sum of n      n u^2 (sum of magnitudes)^2, so that LAMBDA sqrt(v) is ``budget.sum_factor`` times the magnitudes
Errors of different elements that come from one source are taken as independent too; for weights of random sign the
cross terms have mean zero. That, and second orders of products, is what LAMBDA = 6 leaves room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vbench.reference.budget import LAMBDA, UNIT_ROUNDOFF, sum_factor
from vbench.spec import Numerics

U32 = UNIT_ROUNDOFF["fp32"]

#: fp32 evaluations of exp and its kin: a few units in the last place of a value no larger than |x|.
FUNCTION_ULPS = 8.0


@dataclass(frozen=True, slots=True)
class Uncertain:
    """``value`` float64 and ``variance`` (the proxy v above), of one shape."""

    value: Tensor
    variance: Tensor

    @staticmethod
    def exact(value: Tensor) -> Uncertain:
        """A number the kernel is given: no error."""
        wide = value.double()
        return Uncertain(wide, torch.zeros_like(wide))

    @property
    def bound(self) -> Tensor:
        """LAMBDA sqrt(v)."""
        return LAMBDA * self.variance.sqrt()

    def plus(self, variance: Tensor | float) -> Uncertain:
        """The same value with a further independent error."""
        return Uncertain(self.value, self.variance + variance)

    def rows(self, index: Tensor | None) -> Uncertain:
        """Some rows; ``None``: all."""
        return self if index is None else Uncertain(self.value[index], self.variance[index])


def rounded(t: Uncertain, names: tuple[str, ...]) -> Uncertain:
    """One rounding to each dtype of ``names``."""
    return t.plus(t.value.square() * sum(UNIT_ROUNDOFF[name] ** 2 for name in names))


def add(a: Uncertain, b: Uncertain) -> Uncertain:
    """a + b in float32."""
    value = a.value + b.value
    return Uncertain(value, a.variance + b.variance + (U32 * value).square())


def multiply(a: Uncertain, b: Uncertain) -> Uncertain:
    """a * b in float32, the product of both errors included."""
    value = a.value * b.value
    first = a.value.square() * b.variance + b.value.square() * a.variance
    return Uncertain(value, first + LAMBDA**2 * a.variance * b.variance + (U32 * value).square())


def product(a: Uncertain, w_NK: Tensor, numerics: Numerics) -> Uncertain:
    """a [m, k] @ w^T for an exact weight [n, k] in float64; operand roundings of the weight as declared."""
    w = w_NK.double()
    square = w.square()
    operand = sum(UNIT_ROUNDOFF[name] ** 2 for name in numerics.operand_roundings)
    variance = a.variance @ square.T
    if operand:
        variance = variance + operand * (a.value.square() @ square.T)
    unit = sum_factor(w.shape[1], numerics.accumulate) / LAMBDA
    variance = variance + (unit * (a.value.abs() @ w.abs().T)).square()
    return Uncertain(a.value @ w.T, variance)


def normalise(x: Uncertain, gain: Tensor, shift: Tensor | None, eps: float) -> Uncertain:
    """LayerNorm (``shift`` given) or RMSNorm of the last axis, evaluated in float32.

    With r = 1 / sqrt(variance + eps) and h the normalised value, d y_i = g_i r (d x_i - mean(d x) - h_i mean(h d x)),
    without the middle term in RMSNorm; the squares of its coefficients are expanded below.
    """
    n = x.value.shape[-1]
    centred = x.value - x.value.mean(dim=-1, keepdim=True) if shift is not None else x.value
    r = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    h, g = centred * r, gain.double()
    value = h * g
    v = x.variance
    spread = v * (1 - 2 * h.square() / n) + h.square() * (h.square() * v).mean(dim=-1, keepdim=True) / n
    own = (sum_factor(n, "fp32") / LAMBDA + FUNCTION_ULPS * U32) * h.abs()
    if shift is not None:
        cross = 2 * h * (h * v).mean(dim=-1, keepdim=True)
        spread = spread - 2 * v / n + (v.mean(dim=-1, keepdim=True) + cross) / n
        own = own + (sum_factor(n, "fp32") / LAMBDA + U32) * (x.value.abs().mean(dim=-1, keepdim=True) * r)
        own = own + 2 * U32 * (x.value.abs() * r)
        value = value + shift.double()
    variance = g.square() * (r.square() * spread.clamp(min=0.0) + own.square()) + (2 * U32 * value).square()
    return Uncertain(value, variance)


def rotate(x_SHD: Uncertain, cos_SD2: Tensor, sin_SD2: Tensor) -> Uncertain:
    """Rotary embedding, half-split: pairs (i, i + d/2) turned by the table's angle.

    x [s, heads, d]; tables [s, d/2].
    """
    cos, sin = cos_SD2.double()[:, None], sin_SD2.double()[:, None]
    half = x_SHD.value.shape[-1] // 2
    a, b = x_SHD.value[..., :half], x_SHD.value[..., half:]
    va, vb = x_SHD.variance[..., :half], x_SHD.variance[..., half:]
    value = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    variance = torch.cat((va * cos**2 + vb * sin**2, vb * cos**2 + va * sin**2), dim=-1)
    own = torch.cat(((a * cos).abs() + (b * sin).abs(), (b * cos).abs() + (a * sin).abs()), dim=-1)
    return Uncertain(value, variance + (2 * U32 * own).square())


def attend(q: Uncertain, k: Uncertain, v: Uncertain, rows: Tensor, numerics: Numerics) -> Uncertain:
    """One causal head: q [m, d] at positions ``rows``, k and v [s, d] -> [m, d].

    d out_i = sum_j p_ij (d z_ij) (v_j - out_i) + sum_j p_ij d v_j, with d z from both operands of the score, its own
    sum, and its rounding as an exponent; weights are rounded to ``numerics.probabilities`` before P V, and the product
    has its own sum.
    """
    d, s = q.value.shape[1], k.value.shape[0]
    scale = d**-0.5
    z = (q.value @ k.value.T) * scale
    mask = torch.arange(s, device=z.device)[None, :] <= rows[:, None].to(z.device)
    z = z.masked_fill(~mask, -torch.inf)
    largest = z.amax(dim=1, keepdim=True)
    p = torch.softmax(z, dim=1)
    visible = torch.where(mask, z, 0.0)
    magnitude = q.value.abs() @ k.value.abs().T
    of_score = scale**2 * (q.variance @ k.value.square().T + q.value.square() @ k.variance.T)
    of_score = of_score + (scale * sum_factor(d, numerics.accumulate) / LAMBDA * magnitude).square()
    of_score = of_score + (2 * U32 * ((visible - largest).abs() + largest.abs())).square() + 2.0**-44
    if numerics.probabilities not in ("fp32", "fp64"):
        of_score = of_score + UNIT_ROUNDOFF[numerics.probabilities] ** 2
    weighted = p.square() * of_score
    out = p @ v.value
    # sum_j a_j (v_j - out)^2, expanded
    variance = weighted @ v.value.square() - 2 * (weighted @ v.value) * out
    variance = (variance + weighted.sum(dim=1, keepdim=True) * out.square()).clamp(min=0.0)
    if numerics.probabilities not in ("fp32", "fp64"):
        # The normaliser sums unrounded weights, so that their rounding does not cancel.
        variance = variance + UNIT_ROUNDOFF[numerics.probabilities] ** 2 * (p.square() @ v.value.square())
    variance = variance + p.square() @ v.variance
    variance = variance + (sum_factor(s, numerics.accumulate) / LAMBDA * (p @ v.value.abs())).square()
    return Uncertain(out, variance + (2 * U32 * out).square())


def _function(x: Uncertain, value: Tensor, slope: Tensor, curvature: float) -> Uncertain:
    """value = f(x) with f' = ``slope`` and |f''| <= ``curvature``, evaluated in float32."""
    second = (0.5 * curvature * LAMBDA * x.variance).square()
    own = (FUNCTION_ULPS * U32 * x.value).square()
    return Uncertain(value, slope.square() * x.variance + second + own)


def silu(x: Uncertain) -> Uncertain:
    """x sigmoid(x); |f''| <= 1/2, its value at 0."""
    gate = torch.sigmoid(x.value)
    return _function(x, x.value * gate, gate * (1 + x.value * (1 - gate)), 0.5)


#: sqrt(2 / pi) and the cubic coefficient of the tanh form of gelu (Hendrycks & Gimpel 2016, section 2).
GELU_SCALE, GELU_CUBIC = 0.7978845608028654, 0.044715


def gelu_tanh(x: Uncertain) -> Uncertain:
    """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), GPT-2's gelu_new; |f''| <= 0.8, about its value at 0."""
    t = torch.tanh(GELU_SCALE * (x.value + GELU_CUBIC * x.value**3))
    inside = GELU_SCALE * (1 + 3 * GELU_CUBIC * x.value.square())
    return _function(x, 0.5 * x.value * (1 + t), 0.5 * (1 + t) + 0.5 * x.value * (1 - t * t) * inside, 0.8)
