"""Meaning of ``attention``: softmax in float64 from the rounded inputs, and the elementwise budget.

The backward is in ``attention_backward.py``.

Layout BHSD: q [b, hq, sq, d], k and v [b, hk, sk, d]. Query head h reads key head h // (hq / hk).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.reference.budget import LAMBDA, UNDERFLOW, UNIT_ROUNDOFF, sum_factor
from vbench.reference.sampling import generator, sample_rows, torch_dtype
from vbench.spec import Case, Expected, Numerics


def visible(causal: str, rows: Tensor, sq: int, sk: int, window: int = 0) -> Tensor:
    """bool [len(rows), sk]: may query ``rows[i]`` attend to key j."""
    shift = sk - sq if causal == "bottom_right" else 0
    above = torch.arange(sk, device=rows.device)[None, :] - rows[:, None] - shift
    seen = above <= 0 if causal != "none" else torch.ones_like(above, dtype=torch.bool)
    return seen & (above.abs() < window) if window else seen


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """What becomes of q k^T: scaled by 1/sqrt(d), capped, masked."""

    causal: str
    window: int = 0
    softcap: int = 0

    @classmethod
    def of(cls, case: Case) -> ScoreRule:
        return cls(case.text("causal"), case.axis("window"), case.axis("softcap"))

    def seen(self, rows: Tensor, sq: int, sk: int) -> Tensor:
        """bool [len(rows), sk], see ``visible``."""
        return visible(self.causal, rows, sq, sk, self.window)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled and capped scores of q [m, d] and k [n, d], not masked."""
        z = (q @ k.T) * q.shape[1] ** -0.5
        return self.softcap * torch.tanh(z / self.softcap) if self.softcap else z

    def slope(self, z: Tensor) -> Tensor:
        """d capped / d scaled, at capped scores ``z``."""
        return 1 - (z / self.softcap) ** 2 if self.softcap else torch.ones_like(z)

    @property
    def cap_error(self) -> float:
        """Absolute error of a capped score besides that of the product, which tanh does not enlarge.

        tanh y = 1 - 2 / (1 + exp(2 y)): 2 times (2^-22 of ex2.approx and as much of the division), times the cap.
        """
        return self.softcap * 2.0**-20


#: Scores of one slice of query rows, in elements: 128 MiB of float64 bounds what long sequences allocate at once.
SCORE_ELEMENTS = 1 << 24


def row_slices(sq: int, sk: int, device: torch.device) -> Iterator[Tensor]:
    """Indices of the query rows, a slice at a time, each of at most SCORE_ELEMENTS scores (but one row at least)."""
    step = max(1, SCORE_ELEMENTS // sk)
    for first in range(0, sq, step):
        yield torch.arange(first, min(first + step, sq), device=device)


def lay_out(t_BHSD: Tensor, layout: str) -> Tensor:
    """The same values in the memory layout ``layout`` of ``reference.ops.attention.LAYOUTS``.

    What lies between the rows of ``padded``, and before the first, is NaN, so that reading it shows.
    """
    if layout == "bshd":
        return t_BHSD.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "padded":
        b, h, s, d = t_BHSD.shape
        row = -(-d // 8) * 8 + 8
        storage = torch.full((b * h * s * row + 8,), torch.nan, dtype=t_BHSD.dtype, device=t_BHSD.device)
        return storage[8:].view(b, h, s, row)[..., :d].copy_(t_BHSD)
    return t_BHSD.contiguous()


def attention_float64(rule: ScoreRule, q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
    """out [b, hq, sq, d] and lse [b, hq, sq] in float64; a row with nothing to attend to gives 0 and -inf.

    Query rows go in slices, one head at a time, so that scores of a long sequence fit memory.
    """
    b, hq, sq, d = q_BHSD.shape
    hk, sk = k_BHSD.shape[1:3]
    out = torch.zeros(b, hq, sq, d, dtype=torch.float64, device=q_BHSD.device)
    lse = torch.full((b, hq, sq), -torch.inf, dtype=torch.float64, device=q_BHSD.device)
    for i in range(b):
        for h in range(hq):
            k, v = (t[i, h // (hq // hk)].double() for t in (k_BHSD, v_BHSD))
            for rows in row_slices(sq, sk, q_BHSD.device):
                z = rule.scores(q_BHSD[i, h, rows].double(), k)
                z = z.masked_fill(~rule.seen(rows, sq, sk), -torch.inf)
                lse[i, h, rows] = torch.logsumexp(z, dim=1)
                weights = torch.softmax(z, dim=1)
                # softmax over nothing is 0/0; the op defines that row as 0.
                out[i, h, rows] = torch.where(z.amax(dim=1, keepdim=True) > -torch.inf, weights, 0.0) @ v
    return out, lse


def attention_inputs(case: Case, device: str) -> dict[str, Any]:
    """``q``, ``k``, ``v`` in the case's layout.

    normal, uniform; grid: small multiples of 1/4; constant_v: each head's V is one value; large_logits: q scaled so
    that logits reach about +-1e3; equal_keys: all keys of a head alike, so that the weights are uniform.
    """
    b, hq, hk, sq, sk, d = (case.axis(name) for name in ("b", "hq", "hk", "sq", "sk", "d"))
    dist, dtype = case.text("dist"), torch_dtype(case.text("dtype"))
    gen = generator(case, "qkv")

    def draw(heads: int, length: int) -> Tensor:
        shape = (b, heads, length, d)
        if dist == "uniform":
            return torch.rand(shape, generator=gen) * 2 - 1
        if dist == "grid":
            return torch.randint(-4, 5, shape, generator=gen).to(torch.float32) / 4
        return torch.randn(shape, generator=gen)

    q, k, v = draw(hq, sq), draw(hk, sk), draw(hk, sk)
    if dist == "large_logits":
        q = q * 256
    elif dist == "constant_v":
        v = v[:, :, :1, :1].expand(b, hk, sk, d).clone()
    elif dist == "equal_keys":
        k = k[:, :, :1].expand(b, hk, sk, d).clone()
    layout = case.text("layout")
    return {name: lay_out(t.to(dtype).to(device), layout) for name, t in (("q", q), ("k", k), ("v", v))}


def attention_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """out and lse in float64 with budgets.

    With z = scaled scores, m their row maximum, P the weights and A = P |V|:
      delta = scale sum_factor(d) |q||k| + 2 u32 (|z - m| + |m|)     error of a score as the exponent sees it,
              + softcap 2^-20 where scores are capped
      e     = 2 max delta + 2^-22                                    relative error of a weight (ex2.approx: 2^-22)
      out   : (u_P + e + LAMBDA sqrt(sk) u_acc) A + e |out| + u_out |out|
      lse   : max delta + 2^-22 + LAMBDA sqrt(sk) u32 + 4 u32 (1 + |lse|)
    u_P is the rounding of P before P V; it does not cancel, since the normaliser sums unrounded weights. fp16 P adds
    its subnormal floor 2^-25 sum |V|, the normaliser being at least 1.
    """
    b, hq, hk, sq, sk, d = (case.axis(name) for name in ("b", "hq", "hk", "sq", "sk", "d"))
    rule, out_name = ScoreRule.of(case), case.text("dtype")
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    device = q.device
    picked = sample_rows(case, sq, max_rows)
    rows = torch.arange(sq) if picked is None else picked
    rows = rows.to(device)
    mask = rule.seen(rows, sq, sk)
    scale = d**-0.5
    u32, u_p, u_out = UNIT_ROUNDOFF["fp32"], UNIT_ROUNDOFF[numerics.probabilities], UNIT_ROUNDOFF[out_name]
    u_acc = UNIT_ROUNDOFF["fp32" if numerics.accumulate == "tf32" else numerics.accumulate]
    u_p = 0.0 if numerics.probabilities == "fp32" else u_p
    if numerics.accumulate == "tf32":
        u_p += 2 * UNIT_ROUNDOFF["tf32"]
    u_p += sum(UNIT_ROUNDOFF[name] for name in numerics.operand_roundings)
    sum_error = min(LAMBDA * sk**0.5, float(sk)) * u_acc

    shape = (b, hq, len(rows), d)
    out = torch.zeros(shape, dtype=torch.float64, device=device)
    out_budget = torch.zeros_like(out)
    lse = torch.full(shape[:3], -torch.inf, dtype=torch.float64, device=device)
    lse_budget = torch.zeros_like(lse)
    alive = mask.any(dim=1)
    for i in range(b):
        for h in range(hq):
            kv = h // (hq // hk)
            q64, k64, v64 = q[i, h][rows].double(), k[i, kv].double(), v[i, kv].double()
            z = rule.scores(q64, k64)
            z = z.masked_fill(~mask, -torch.inf)
            m = torch.where(alive, z.amax(dim=1), 0.0)
            p = torch.exp(z - m[:, None])
            total = p.sum(dim=1)
            p = p / total.clamp(min=1e-300)[:, None]
            delta = scale * sum_factor(d, numerics.accumulate) * (q64.abs() @ k64.abs().T)
            delta = delta + rule.cap_error + 2 * u32 * ((z - m[:, None]).abs() + m.abs()[:, None])
            # A weight below 2^-60 of the row's largest cannot move the output by one part in 2^50 of the budget's
            # other terms, however wrong its exponent is relatively; leaving it out keeps far-off keys from widening e.
            worst = torch.where(mask & (z - m[:, None] > -42.0), delta, 0.0).amax(dim=1)
            e = 2 * worst + 2.0**-22
            o = p @ v64
            spread = p @ v64.abs()
            out[i, h] = o
            tail = mask.sum(dim=1).double() * 2.0**-60
            largest_v = v64.abs().amax()
            bound = (u_p + e + sum_error)[:, None] * spread + (e + u_out)[:, None] * o.abs()
            bound = bound + (tail * largest_v)[:, None] + UNDERFLOW[out_name]
            if numerics.probabilities == "fp16":
                bound = bound + (mask.double() @ v64.abs()) * 2.0**-25 / total.clamp(min=1.0)[:, None]
            out_budget[i, h] = torch.where(alive[:, None], bound, 0.0)
            lse[i, h] = torch.where(alive, m + torch.log(total.clamp(min=1e-300)), -torch.inf)
            around = worst + 2.0**-22 + LAMBDA * sk**0.5 * u32 + 4 * u32 * (1 + lse[i, h].abs())
            lse_budget[i, h] = torch.where(alive, around, 0.0)

    def take(t: Tensor) -> Tensor:
        return t if picked is None else t[:, :, rows.to(t.device)]

    why_out = ""
    if not bool(alive.any()):
        why_out = "every row is masked, so zeros are right"
    elif int(mask.sum(dim=1).amax()) == 1:
        why_out = "no row sees more than one key: the output is V"
    elif case.text("dist") == "constant_v":
        why_out = "constant V: any convex combination is right"
    return {
        "out": Expected(out, out_budget, torch_dtype(out_name), (b, hq, sq, d), take, why_out),
        "lse": Expected(
            lse, lse_budget, torch.float32, (b, hq, sq), take, "" if bool(alive.any()) else "every row is masked"
        ),
    }


def attention_metrics(
    case: Case, inputs: dict[str, Any], outputs: dict[str, Any], expected: dict[str, Expected]
) -> dict[str, float]:
    """Error of ``out`` against float64: largest absolute, largest and mean relative (over |oracle| > 0)."""
    want = expected["out"]
    got = outputs["out"].double() if want.take is None else want.take(outputs["out"]).double()
    error = (got - want.value).abs()
    nonzero = want.value != 0
    metrics = {"max_abs_error": float(error.max())}
    if bool(nonzero.any()):
        relative = error[nonzero] / want.value[nonzero].abs()
        metrics |= {"max_rel_error": float(relative.max()), "mean_rel_error": float(relative.mean())}
        metrics["rel_frobenius"] = float(error.norm() / want.value.norm())
    return metrics
