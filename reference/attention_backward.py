"""Meaning of ``attention_backward``: the gradients in float64 from the rounded inputs, and the elementwise budget.

Layout BHSD as in ``attention.py``. With scale = 1/sqrt(d), z = scale q k^T, and sums over what is visible:
  p = exp(z - lse), delta_i = sum_d out dout, t = dout v^T - delta + dlse, ds = p t
  dq = scale ds k, dk = scale ds^T q, dv = p^T dout
Capped scores z = c tanh(z' / c) multiply ds by the slope 1 - (z / c)^2.
(Dao et al., FlashAttention, 2022, appendix B.2; d lse_i / d z_ij = p_ij gives the dlse term.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.reference.attention import ScoreRule, attention_float64, attention_inputs, lay_out, row_slices
from vbench.reference.budget import LAMBDA, UNDERFLOW, UNIT_ROUNDOFF, sum_factor
from vbench.reference.sampling import generator, sample_rows, torch_dtype
from vbench.spec import Case, Expected, Numerics

#: Distributions whose elements are drawn independently, so that the roundings of weights and score gradients are too.
#: In the others whole rows of weights are equal, and so are their roundings.
INDEPENDENT = ("normal", "uniform", "large_logits")
U32 = UNIT_ROUNDOFF["fp32"]
#: Half the smallest subnormal of float16, to which weights and score gradients may be rounded.
FP16_FLOOR = UNDERFLOW["fp16"]
#: Smallest normal float32: weights and score gradients below it may be flushed to 0 (ex2.approx.ftz).
FLUSH = 2.0**-126


def backward_inputs(case: Case, device: str) -> dict[str, Any]:
    """``q``, ``k``, ``v`` as the forward's; ``out`` and ``lse`` of a float64 forward rounded once; ``dout``, ``dlse``.

    ``dout`` (dtype) and ``dlse`` (fp32, absent for dlse=0) are standard normal. All but lse and dlse lie in the case's
    layout.
    """
    inputs = attention_inputs(case, device)
    q, layout = inputs["q"], case.text("layout")
    out, lse = attention_float64(ScoreRule.of(case), q, inputs["k"], inputs["v"])
    dout = torch.randn(q.shape, generator=generator(case, "dout")).to(q.dtype).to(device)
    inputs |= {"out": lay_out(out.to(q.dtype), layout), "lse": lse.float(), "dout": lay_out(dout, layout)}
    if case.axis("dlse"):
        inputs["dlse"] = torch.randn(lse.shape, generator=generator(case, "dlse")).to(device)
    return inputs


@dataclass(frozen=True, slots=True)
class _Head:
    """A query head and its key head in float64; t = dout v^T - ``shift``; a masked row has ``lse`` +inf, so p = 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    dout: Tensor
    lse: Tensor
    shift: Tensor
    rule: ScoreRule

    @classmethod
    def of(cls, rule: ScoreRule, inputs: Mapping[str, Any], batch: int, head: int) -> _Head:
        hq, hk = inputs["q"].shape[1], inputs["k"].shape[1]
        kv_head = head // (hq // hk)
        q, out, dout, lse = (inputs[name][batch, head].double() for name in ("q", "out", "dout", "lse"))
        k, v = (inputs[name][batch, kv_head].double() for name in ("k", "v"))
        shift = (out * dout).sum(dim=1)
        if "dlse" in inputs:
            shift = shift - inputs["dlse"][batch, head].double()
        return cls(q, k, v, out, dout, torch.where(lse == -torch.inf, torch.inf, lse), shift, rule)

    def block(self, rows: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(seen, z, p, t), each [len(rows), len(keys)]; z and t are 0, not infinite, where nothing is seen."""
        seen = self.rule.seen(rows, len(self.q), len(self.k))[:, keys]
        z = self.rule.scores(self.q[rows], self.k[keys])
        p = torch.where(seen, torch.exp(z - self.lse[rows, None]), 0.0)
        t = torch.where(seen, self.dout[rows] @ self.v[keys].T - self.shift[rows, None], 0.0)
        return seen, torch.where(seen, z, 0.0), p, t


def backward_float64(rule: ScoreRule, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """dq [b, hq, sq, d], dk and dv [b, hk, sk, d] in float64, query rows in slices as in ``attention_float64``."""
    q, k = inputs["q"], inputs["k"]
    (b, hq, sq, d), (_, hk, sk, _) = q.shape, k.shape
    dq = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    dk, dv = (torch.zeros(k.shape, dtype=torch.float64, device=q.device) for _ in range(2))
    keys = torch.arange(sk, device=q.device)
    for i in range(b):
        for h in range(hq):
            head, kv_head = _Head.of(rule, inputs, i, h), h // (hq // hk)
            for rows in row_slices(sq, sk, q.device):
                _, z, p, t = head.block(rows, keys)
                ds = p * t * rule.slope(z)
                dq[i, h, rows] = (ds @ head.k) * d**-0.5
                dk[i, kv_head] += (ds.T @ head.q[rows]) * d**-0.5
                dv[i, kv_head] += p.T @ head.dout[rows]
    return {"dq": dq, "dk": dk, "dv": dv}


@dataclass(frozen=True, slots=True)
class _Bound:
    """The budget's ingredients for one set of declared numerics; ``_Head.block`` gives what they act on."""

    numerics: Numerics
    out_name: str
    independent: bool

    @property
    def u_p(self) -> float:
        """Relative rounding of weights and score gradients as operands of a product."""
        name = self.numerics.probabilities
        u = 0.0 if name == "fp32" else UNIT_ROUNDOFF[name]
        if self.numerics.accumulate == "tf32":
            u += 2 * UNIT_ROUNDOFF["tf32"]
        return u + sum(UNIT_ROUNDOFF[operand] for operand in self.numerics.operand_roundings)

    def roundings(self, u: float, weights: Tensor, operand: Tensor) -> Tensor:
        """Bound of sum_j r_j weights_j operand_j over roundings |r_j| <= u of the weights.

        u sum|weights||operand|, or, where the roundings are independent and of mean zero, LAMBDA u times the root of
        the sum of squares if that is less (Hoeffding's inequality, with the chance that goes with LAMBDA).
        """
        worst = weights.abs() @ operand.abs()
        if not self.independent:
            return u * worst
        return u * torch.minimum(worst, LAMBDA * (weights.square() @ operand.square()).sqrt())

    def products(self, terms: int, weights: Tensor, error: Tensor, seen: Tensor, operand: Tensor) -> Tensor:
        """Error of weights @ operand, a sum of ``terms``, where the weights carry ``error`` and are then rounded."""
        total = self.roundings(self.u_p, weights, operand) + error @ operand.abs()
        total = total + sum_factor(terms, self.numerics.accumulate) * (weights.abs() @ operand.abs())
        if self.numerics.probabilities == "fp16":
            total = total + self.roundings(FP16_FLOOR, seen.double(), operand)
        return total

    def stored(self, bound: Tensor, value: Tensor) -> Tensor:
        """``bound`` plus the last scaling and the rounding to the output's dtype."""
        return bound + (UNIT_ROUNDOFF[self.out_name] + 2 * U32) * value.abs() + UNDERFLOW[self.out_name]

    def row_worst(self, head: _Head) -> Tensor:
        """Largest error of a row's scores [sq]: what a normaliser of the kernel's own suffers; 0 for given lse."""
        sq, sk, d = len(head.q), len(head.k), head.q.shape[1]
        worst = torch.zeros(sq, dtype=torch.float64, device=head.q.device)
        if not self.numerics.own_forward:
            return worst
        for rows in row_slices(sq, sk, head.q.device):
            seen = head.rule.seen(rows, sq, sk)
            magnitude = (head.q[rows].abs() @ head.k.abs().T) * d**-0.5
            worst[rows] = sum_factor(d, self.numerics.accumulate) * torch.where(seen, magnitude, 0.0).amax(dim=1)
        return worst + head.rule.cap_error

    def errors(
        self, head: _Head, worst: Tensor, rows: Tensor, keys: Tensor, seen: Tensor, z: Tensor, p: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Errors of p and of ds before they are rounded as operands."""
        d, accumulate = head.q.shape[1], self.numerics.accumulate
        q, dout = head.q[rows].abs(), head.dout[rows].abs()
        lse = torch.where(head.lse[rows] == torch.inf, 0.0, head.lse[rows]).abs()[:, None]
        score = d**-0.5 * sum_factor(d, accumulate) * (q @ head.k[keys].abs().T) + 3 * U32 * (z.abs() + lse)
        score = score + head.rule.cap_error
        relative = torch.expm1(score + worst[rows, None]) + 2.0**-22
        delta = sum_factor(d, accumulate) * (head.out[rows].abs() * dout).sum(dim=1)
        if self.numerics.own_forward:
            # The errors of an own out are relative to sum_j p_j |v_j|, at most max |v|.
            own = UNIT_ROUNDOFF[self.out_name] + self.u_p + 2 * worst[rows]
            delta = delta + own * head.v.abs().amax() * dout.sum(dim=1)
        gradient = sum_factor(d, accumulate) * (dout @ head.v[keys].abs().T) + delta[:, None]
        gradient = gradient + 4 * U32 * (t.abs() + head.shift[rows].abs()[:, None])
        flushed = torch.where(seen, FLUSH, 0.0)
        p_error = p * relative + flushed
        ds_error = p_error * t.abs() + (p + p_error) * gradient
        if head.rule.softcap:
            # The slope is 1 - (z / cap)^2, at most 1.
            slope_error = 2 * (z / head.rule.softcap).abs() * score / head.rule.softcap + 2 * U32
            ds_error = ds_error + (p * t.abs() + ds_error) * slope_error
        return p_error, ds_error + flushed


def backward_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """dq, dk and dv in float64 with budgets; ``max_rows`` samples rows of dq and, apart, of dk and dv.

    With e the relative error of a weight, E that of t, and sums over what is visible:
      e  = exp(scale sum_factor(d) |q||k| + 3 u32 (|z| + |lse|)) - 1 + 2^-22                      (ex2.approx: 2^-22)
      E  = sum_factor(d) (|dout||v| + |out||dout|) + 4 u32 (|t| + |delta - dlse|)
      dv : R(u_P, p, dout) + p e |dout| + sum_factor(sq group) p |dout|                                  + u_out |dv|
      dq : scale (R(u_P, ds, k) + p (e |t| + (1 + e) E) |k| + sum_factor(sk) |ds||k|)                    + u_out |dq|
      dk : as dq with q for k, summed over sq group terms
    R(u, a, x) = u min(sum|a||x|, LAMBDA sqrt(sum a^2 x^2)): roundings of P and dS to the dtype declared as
    ``probabilities``, independent but where the distribution makes whole rows equal (then the first alone). fp16 adds
    R(2^-25, 1, x); p and ds may be flushed to 0 below 2^-126; capped scores add c 2^-20 to a score and the error of
    their slope to ds. out and lse are read as given, so their own rounding separates a kernel from this oracle only
    where it declares ``own_forward``: then e takes the row's worst score error too and E gains
    (u_out + u_P + 2 worst) max|v| sum|dout|.
    """
    b, hq, hk, sq, sk, d = (case.axis(name) for name in ("b", "hq", "hk", "sq", "sk", "d"))
    rule, out_name, group = ScoreRule.of(case), case.text("dtype"), hq // hk
    device = inputs["q"].device
    bound = _Bound(numerics, out_name, case.text("dist") in INDEPENDENT)
    picked_rows, picked_keys = (sample_rows(case, n, max_rows) for n in (sq, sk))
    all_rows, all_keys = torch.arange(sq, device=device), torch.arange(sk, device=device)
    rows = all_rows if picked_rows is None else picked_rows.to(device)
    keys = all_keys if picked_keys is None else picked_keys.to(device)

    def zeros(heads: int, length: int) -> Tensor:
        return torch.zeros(b, heads, length, d, dtype=torch.float64, device=device)

    dq, dq_bound = zeros(hq, len(rows)), zeros(hq, len(rows))
    dk, dk_bound, dv, dv_bound = (zeros(hk, len(keys)) for _ in range(4))
    scale, terms = d**-0.5, sq * group
    for i in range(b):
        for h in range(hq):
            kv_head = h // group
            head = _Head.of(rule, inputs, i, h)
            worst = bound.row_worst(head)
            seen, z, p, t = head.block(rows, all_keys)
            _, ds_error = bound.errors(head, worst, rows, all_keys, seen, z, p, t)
            ds = p * t * rule.slope(z)
            dq[i, h] = scale * (ds @ head.k)
            dq_bound[i, h] = bound.stored(scale * bound.products(sk, ds, ds_error, seen, head.k), dq[i, h])
            seen, z, p, t = head.block(all_rows, keys)
            p_error, ds_error = bound.errors(head, worst, all_rows, keys, seen, z, p, t)
            ds = p * t * rule.slope(z)
            dk[i, kv_head] += scale * (ds.T @ head.q)
            dv[i, kv_head] += p.T @ head.dout
            dk_bound[i, kv_head] += scale * bound.products(terms, ds.T, ds_error.T, seen.T, head.q)
            dv_bound[i, kv_head] += bound.products(terms, p.T, p_error.T, seen.T, head.dout)
    dk_bound, dv_bound = bound.stored(dk_bound, dk), bound.stored(dv_bound, dv)

    def taker(picked: Tensor | None) -> Any:
        return None if picked is None else lambda full: full[:, :, picked.to(full.device)]

    why = ""
    if not bool((inputs["lse"] > -torch.inf).any()):
        why = "every row is masked, so zeros are right"
    elif b * hk * sk * d == 1:
        why = "one key of one dimension: dv is its own mean, and dq and dk are 0"
    dtype = torch_dtype(out_name)
    of_q, of_k = (b, hq, sq, d), (b, hk, sk, d)
    return {
        "dq": Expected(dq, dq_bound, dtype, of_q, taker(picked_rows), why),
        "dk": Expected(dk, dk_bound, dtype, of_k, taker(picked_keys), why),
        "dv": Expected(dv, dv_bound, dtype, of_k, taker(picked_keys), why),
    }
