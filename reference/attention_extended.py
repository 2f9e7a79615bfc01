"""Meaning of ``attention_extended`` and of its backward: float64 from the rounded inputs, and the elementwise budgets.

Every feature is dense here: what may be seen is a bool matrix, ALiBi and mask are one float64 bias matrix. With
z = capped scaled scores + bias and s the sink (-inf without one), over what is visible:
  lse = ln(exp(s) + sum exp z), p = exp(z - lse), out = p v
  dsink = -sum_i exp(s - lse_i) (rowsum(out dout) - dlse)_i, the rest as in ``attention_backward.py``.
ALiBi: Press et al., 2022, with the distance from the causal diagonal; sinks: Xiao et al., 2023, as a logit a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vbench.reference.attention import ScoreRule, attention_inputs, lay_out
from vbench.reference.attention_backward import INDEPENDENT, _Bound
from vbench.reference.budget import LAMBDA, UNDERFLOW, UNIT_ROUNDOFF, sum_factor
from vbench.reference.ops.attention_extended import sequence_bounds
from vbench.reference.sampling import generator, sample_rows, torch_dtype
from vbench.spec import Case, Expected, Numerics

U32 = UNIT_ROUNDOFF["fp32"]
#: Smallest normal float32: weights and score gradients below it may be flushed to 0 (ex2.approx.ftz).
FLUSH = 2.0**-126


#: Why a trivial kernel may be right, see ``_alike``.
ALIKE = "one element, or a mask that leaves the sink all the weight: zeros or the mean are within the budget"


def _alike(case: Case, *outputs: tuple[Tensor, Tensor]) -> bool:
    """Whether (value, budget) of all outputs of a case with sinks admit zeros, or the mean everywhere.

    So it is where a mask leaves the sink all the weight, for a row of constant V, and for one element an output.
    """
    plain = case.text("mask") != "shifted" and case.text("dist") != "constant_v"
    if not case.axis("sinks") or (plain and any(v.numel() > 1 for v, _ in outputs)):
        return False
    return any(
        all(bool(((value - middle(value)).abs() <= bound).all()) for value, bound in outputs)
        for middle in (torch.zeros_like, lambda t: t.mean())
    )


def extended_inputs(case: Case, device: str) -> dict[str, Any]:
    """``q``, ``k``, ``v`` as of ``attention``, and what the features need.

    ``slopes`` fp32 [hq]: 2^(-8 (h + 1) / hq), the paper's. ``sink`` fp32 [hq]: standard normal, plus 1. ``mask``, see
    ``ops.attention_extended.EXTENDED_MASKS``, of the case's dtype. ``cu_q``, ``cu_k`` int32 [packed + 1].
    """
    inputs = attention_inputs(case, device)
    b, hq, sq, sk = (case.axis(name) for name in ("b", "hq", "sq", "sk"))
    if case.axis("alibi"):
        inputs["slopes"] = (2.0 ** (-8.0 * torch.arange(1, hq + 1) / hq)).to(device)
    if case.axis("sinks"):
        inputs["sink"] = (torch.randn(hq, generator=generator(case, "sink")) + 1).to(device)
    kind, axes = case.text("mask"), case.text("maskdims")
    if kind != "none":
        shape = (b if "b" in axes else 1, hq if "h" in axes else 1, sq, sk)
        gen = generator(case, "mask")
        if kind == "normal":
            mask = torch.randn(shape, generator=gen)
        elif kind == "shifted":
            mask = torch.full(shape, -100.0)
        else:
            mask = torch.where(torch.rand(shape, generator=gen) < 0.25, -torch.inf, 0.0)
            mask[:, :, 0] = -torch.inf
        inputs["mask"] = mask.to(torch_dtype(case.text("dtype"))).to(device)
    if case.axis("packed"):
        for of in "qk":
            bounds = torch.tensor(sequence_bounds(case, of), dtype=torch.int32)
            inputs[f"cu_{of}"] = bounds.to(device)
    return inputs


def extended_backward_inputs(case: Case, device: str) -> dict[str, Any]:
    """As ``attention_backward.backward_inputs``: a float64 forward's ``out``, ``lse``, rounded; ``dout``, ``dlse``."""
    inputs = extended_inputs(case, device)
    q, layout = inputs["q"], case.text("layout")
    out, lse = extended_float64(case, inputs)
    dout = torch.randn(q.shape, generator=generator(case, "dout")).to(q.dtype).to(device)
    inputs |= {"out": lay_out(out.to(q.dtype), layout), "lse": lse.float(), "dout": lay_out(dout, layout)}
    if case.axis("dlse"):
        inputs["dlse"] = torch.randn(lse.shape, generator=generator(case, "dlse")).to(device)
    return inputs


def _visible(case: Case, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(seen bool, distance from the diagonal float64), each [sq, sk]."""
    rule, (sq, sk) = ScoreRule.of(case), (case.axis("sq"), case.axis("sk"))
    device = inputs["q"].device
    seen = torch.zeros(sq, sk, dtype=torch.bool, device=device)
    distance = torch.zeros(sq, sk, dtype=torch.float64, device=device)
    of_q, of_k = ((0, sq), (0, sk))
    if case.axis("packed"):
        of_q, of_k = (tuple(inputs[f"cu_{of}"].tolist()) for of in "qk")
    for (q0, q1), (k0, k1) in zip(pairwise(of_q), pairwise(of_k), strict=True):
        rows = torch.arange(q1 - q0, device=device)
        seen[q0:q1, k0:k1] = rule.seen(rows, q1 - q0, k1 - k0)
        shift = (k1 - k0) - (q1 - q0) if rule.causal == "bottom_right" else 0
        keys = torch.arange(k1 - k0, device=device)
        distance[q0:q1, k0:k1] = (keys[None, :] - rows[:, None] - shift).abs().double()
    return seen, distance


@dataclass(frozen=True, slots=True)
class _Scores:
    """One query head's scores, [sq, sk] but ``sink``: ``capped`` before and ``z`` after the bias, 0 where not seen.

    ``size`` is |capped| + |bias|, on which the roundings of their sum act.
    """

    seen: Tensor
    capped: Tensor
    z: Tensor
    size: Tensor
    magnitude: Tensor
    sink: float

    @classmethod
    def of(
        cls, case: Case, inputs: Mapping[str, Any], batch: int, head: int, seen: Tensor, distance: Tensor
    ) -> _Scores:
        rule, group = ScoreRule.of(case), case.axis("hq") // case.axis("hk")
        q, k = inputs["q"][batch, head].double(), inputs["k"][batch, head // group].double()
        bias = torch.zeros_like(distance)
        if "slopes" in inputs:
            bias = bias - inputs["slopes"][head].double() * distance
        if "mask" in inputs:
            mask = inputs["mask"]
            own = mask[batch if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0].double()
            seen, bias = seen & (own > -torch.inf), bias + torch.where(own > -torch.inf, own, 0.0)
        capped = torch.where(seen, rule.scores(q, k), 0.0)
        bias = torch.where(seen, bias, 0.0)
        magnitude = torch.where(seen, (q.abs() @ k.abs().T) * q.shape[1] ** -0.5, 0.0)
        sink = float(inputs["sink"][head]) if "sink" in inputs else -torch.inf
        return cls(seen, capped, capped + bias, capped.abs() + bias.abs(), magnitude, sink)

    def log_sum(self) -> Tensor:
        """lse [sq]; -inf where nothing is seen and there is no sink."""
        z = self.z.masked_fill(~self.seen, -torch.inf)
        return torch.logsumexp(torch.cat((z, torch.full_like(z[:, :1], self.sink)), dim=1), dim=1)

    def weights(self, lse: Tensor) -> Tensor:
        """p [sq, sk], 0 where nothing is seen."""
        shift = torch.where(lse == -torch.inf, 0.0, lse)
        return torch.where(self.seen, torch.exp(self.z - shift[:, None]), 0.0)

    def error(self, rule: ScoreRule, d: int, accumulate: str) -> Tensor:
        """Bound of a score's error: the product's, the cap's, and four roundings of score and bias.

        Those are slope times distance and each addend's conversion to base 2 (3), and the sum (1).
        """
        return sum_factor(d, accumulate) * self.magnitude + rule.cap_error + 4 * U32 * self.size


def extended_float64(case: Case, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """out [b, hq, sq, d] and lse [b, hq, sq] in float64."""
    q = inputs["q"]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device)
    seen, distance = _visible(case, inputs)
    group = case.axis("hq") // case.axis("hk")
    for i in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = _Scores.of(case, inputs, i, h, seen, distance)
            lse[i, h] = scores.log_sum()
            out[i, h] = scores.weights(lse[i, h]) @ inputs["v"][i, h // group].double()
    return out, lse


def _taker(picked: Tensor | None) -> Any:
    return None if picked is None else lambda full: full[:, :, picked.to(full.device)]


def extended_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """out and lse in float64 with the budgets of ``attention.attention_oracle``.

    What the features add: a score's error gains 4 u32 (|score| + |bias|), see ``_Scores.error``; the row maximum m is
    that of scores and sink; the normaliser, and so the sum's error, has a term more.
    """
    b, hq, sq, sk, d = (case.axis(name) for name in ("b", "hq", "sq", "sk", "d"))
    rule, out_name, group = ScoreRule.of(case), case.text("dtype"), hq // case.axis("hk")
    bound = _Bound(numerics, out_name, False)
    u_out = UNIT_ROUNDOFF[out_name]
    u_acc = UNIT_ROUNDOFF["fp32" if numerics.accumulate == "tf32" else numerics.accumulate]
    sum_error = min(LAMBDA * (sk + 1) ** 0.5, float(sk + 1)) * u_acc
    out, lse = extended_float64(case, inputs)
    out_budget, lse_budget = torch.zeros_like(out), torch.zeros_like(lse)
    seen, distance = _visible(case, inputs)
    lone = True
    for i in range(b):
        for h in range(hq):
            scores = _Scores.of(case, inputs, i, h, seen, distance)
            lone = lone and int(scores.seen.sum(dim=1).amax()) <= 1 and scores.sink == -torch.inf
            p, v = scores.weights(lse[i, h]), inputs["v"][i, h // group].double()
            alive = lse[i, h] > -torch.inf
            peak = scores.z.masked_fill(~scores.seen, -torch.inf).amax(dim=1).clamp(min=scores.sink)
            m = torch.where(alive, peak, 0.0)
            below = torch.where(scores.seen, m[:, None] - scores.z, torch.inf)
            delta = scores.error(rule, d, numerics.accumulate)
            delta = delta + 2 * U32 * (torch.where(scores.seen, below, 0.0) + m.abs()[:, None])
            worst = torch.where(below < 42.0, delta, 0.0).amax(dim=1)
            if scores.sink > -torch.inf:
                worst = worst + 2 * U32 * (abs(scores.sink) + m.abs() + (m - scores.sink).abs())
            e = 2 * worst + 2.0**-22
            tail = scores.seen.sum(dim=1).double() * 2.0**-60 * v.abs().amax()
            own = (bound.u_p + e + sum_error)[:, None] * (p @ v.abs()) + (e + u_out)[:, None] * out[i, h].abs()
            own = own + tail[:, None] + UNDERFLOW[out_name]
            if numerics.probabilities == "fp16":
                # The normaliser, relative to the largest weight, is at least 1.
                own = own + (scores.seen.double() @ v.abs()) * 2.0**-25
            out_budget[i, h] = torch.where(alive[:, None], own, 0.0)
            finite = torch.where(alive, lse[i, h], 0.0)
            around = worst + 2.0**-22 + LAMBDA * (sk + 1) ** 0.5 * U32 + 4 * U32 * (1 + finite.abs())
            lse_budget[i, h] = torch.where(alive, around, 0.0)
    picked = sample_rows(case, sq, max_rows)
    take = _taker(picked)
    if take is not None:
        out, out_budget, lse, lse_budget = (take(t) for t in (out, out_budget, lse, lse_budget))
    why = ""
    if not bool((out_budget > UNDERFLOW[out_name]).any()):
        why = "no row sees a key, so zeros are right"
    elif lone:
        why = "no row sees more than one key: the output is V"
    elif case.text("dist") == "constant_v" and not case.axis("sinks"):
        why = "constant V: any convex combination is right"
    elif _alike(case, (out, out_budget), (lse, lse_budget)):
        why = ALIKE
    dtype = torch_dtype(out_name)
    alive_any = bool((lse > -torch.inf).any())
    return {
        "out": Expected(out, out_budget, dtype, (b, hq, sq, d), take, why),
        "lse": Expected(lse, lse_budget, torch.float32, (b, hq, sq), take, "" if alive_any else "every row is masked"),
    }


def extended_backward_float64(case: Case, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """dq, dk, dv and dsink in float64, from the given ``out`` and ``lse``."""
    found = extended_backward_oracle(case, dict(inputs), Numerics(accumulate="fp64", probabilities="fp32"), None)
    return {name: expected.value for name, expected in found.items()}


def extended_backward_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """dq, dk, dv and dsink in float64 with the budgets of ``attention_backward.backward_oracle``.

    The error of a weight's exponent takes ``_Scores.error``, which knows the bias; capped scores enter the slope
    without it. With r = exp(sink - lse) and e_r = 3 u32 (|sink| + |lse|) + 2^-22: dsink = -sum r shift, and its error
    sum r (e_r |shift| + (1 + e_r) E_shift) + sum_factor(b sq) sum r |shift| + 2 u32 |dsink|, and FLUSH (1 + |shift|) a
    row, since r and r shift may be flushed.
    An own forward's delta and lse are bounded as there.
    """
    b, hq, hk, sq, sk, d = (case.axis(name) for name in ("b", "hq", "hk", "sq", "sk", "d"))
    rule, out_name, group = ScoreRule.of(case), case.text("dtype"), hq // hk
    bound = _Bound(numerics, out_name, case.text("dist") in INDEPENDENT)
    accumulate, device = numerics.accumulate, inputs["q"].device
    seen_all, distance = _visible(case, inputs)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    dq, dq_bound = (zeros(b, hq, sq, d) for _ in range(2))
    dk, dk_bound, dv, dv_bound = (zeros(b, hk, sk, d) for _ in range(4))
    dsink, dsink_bound, dsink_size = (zeros(hq) for _ in range(3))
    scale, terms = d**-0.5, sq * group
    for i in range(b):
        for h in range(hq):
            q, out, dout = (inputs[name][i, h].double() for name in ("q", "out", "dout"))
            k, v = (inputs[name][i, h // group].double() for name in ("k", "v"))
            lse = inputs["lse"][i, h].double()
            shift = (out * dout).sum(dim=1)
            if "dlse" in inputs:
                shift = shift - inputs["dlse"][i, h].double()
            scores = _Scores.of(case, inputs, i, h, seen_all, distance)
            seen, p = scores.seen, scores.weights(lse)
            t = torch.where(seen, dout @ v.T - shift[:, None], 0.0)
            ds = p * t * rule.slope(scores.capped)

            finite = torch.where(lse == -torch.inf, 0.0, lse).abs()[:, None]
            of_score = torch.where(seen, scores.error(rule, d, accumulate), 0.0)
            worst = of_score.amax(dim=1) if numerics.own_forward else torch.zeros_like(shift)
            exponent = of_score + 3 * U32 * (scores.z.abs() + finite) + worst[:, None]
            of_p = p * (torch.expm1(exponent) + 2.0**-22) + torch.where(seen, FLUSH, 0.0)
            of_delta = sum_factor(d, accumulate) * (out.abs() * dout.abs()).sum(dim=1)
            if numerics.own_forward:
                own = UNIT_ROUNDOFF[out_name] + bound.u_p + 2 * worst
                of_delta = of_delta + own * v.abs().amax() * dout.abs().sum(dim=1)
            of_t = sum_factor(d, accumulate) * (dout.abs() @ v.abs().T) + of_delta[:, None]
            of_t = of_t + 4 * U32 * (t.abs() + shift.abs()[:, None])
            of_ds = of_p * t.abs() + (p + of_p) * of_t
            if rule.softcap:
                # The slope is 1 - (capped / cap)^2, at most 1.
                of_slope = 2 * (scores.capped / rule.softcap).abs() * of_score / rule.softcap + 2 * U32
                of_ds = of_ds + (p * t.abs() + of_ds) * of_slope
            of_ds = torch.where(seen, of_ds + FLUSH, 0.0)

            kv = h // group
            dq[i, h] = scale * (ds @ k)
            dq_bound[i, h] = bound.stored(scale * bound.products(sk, ds, of_ds, seen, k), dq[i, h])
            dk[i, kv] += scale * (ds.T @ q)
            dv[i, kv] += p.T @ dout
            dk_bound[i, kv] += scale * bound.products(terms, ds.T, of_ds.T, seen.T, q)
            dv_bound[i, kv] += bound.products(terms, p.T, of_p.T, seen.T, dout)
            if scores.sink > -torch.inf:
                r = torch.exp(scores.sink - lse)
                of_r = 3 * U32 * (abs(scores.sink) + finite[:, 0]) + worst + 2.0**-22
                dsink[h] -= (r * shift).sum()
                dsink_size[h] += (r * shift.abs()).sum()
                # In float32 r may be flushed below the least normal number, and its product with the shift again.
                dsink_bound[h] += ((1 + shift.abs()) * FLUSH).sum()
                dsink_bound[h] += (r * (of_r * shift.abs() + (1 + of_r) * (of_delta + 2 * U32 * shift.abs()))).sum()
    dk_bound, dv_bound = bound.stored(dk_bound, dk), bound.stored(dv_bound, dv)
    # Statistics of rows are summed in float32 whatever multiplies matrices.
    dsink_bound = dsink_bound + sum_factor(b * sq, "fp32") * dsink_size + 2 * U32 * dsink.abs()

    picked_rows, picked_keys = (sample_rows(case, n, max_rows) for n in (sq, sk))
    of_rows, of_keys = _taker(picked_rows), _taker(picked_keys)
    if of_rows is not None:
        dq, dq_bound = of_rows(dq), of_rows(dq_bound)
    if of_keys is not None:
        dk, dk_bound, dv, dv_bound = (of_keys(t) for t in (dk, dk_bound, dv, dv_bound))
    why = "" if bool(dv.abs().amax() > 0) else "no row sees a key, so zeros are right"
    if not why and _alike(case, (dq, dq_bound), (dk, dk_bound), (dv, dv_bound), (dsink, dsink_bound)):
        why = ALIKE
    dtype = torch_dtype(out_name)
    no_sink = "" if case.axis("sinks") else "no sinks: their gradient is 0"
    return {
        "dq": Expected(dq, dq_bound, dtype, (b, hq, sq, d), of_rows, why),
        "dk": Expected(dk, dk_bound, dtype, (b, hk, sk, d), of_keys, why),
        "dv": Expected(dv, dv_bound, dtype, (b, hk, sk, d), of_keys, why),
        "dsink": Expected(dsink, dsink_bound, torch.float32, (hq,), None, no_sink),
    }
