"""Meaning of ``int8_linear``: integers times scales in float64, the rounding of x included, and the derived budget.

Weights: scale = max(absmax(row) / 127, 2^-126) in float32, code = clamp(round-half-even(w / scale), -127, 127):
"vector-wise" quantisation of LLM.int8 (Dettmers et al. 2022, section 3.1), without its outlier columns.
x, where it is rounded: scale = max(absmax(row) / steps, 2^-126), code = clamp(round-half-even(x / scale), lowest, 127),
with 127 and -127 for LLM.int8, 127.5 and -128 for torchao, whose scale is moreover rounded to x's dtype
(choose_qparams_affine, symmetric: half of quant_max - quant_min, divided in the dtype of the input).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vbench.reference.budget import UNDERFLOW, UNIT_ROUNDOFF, sum_factor
from vbench.reference.fp4 import MIN_NORMAL, degenerate, make_weight
from vbench.reference.ops.int8 import ACT_QUANTS
from vbench.reference.sampling import generator, sample_rows, torch_dtype
from vbench.spec import Case, Expected, Numerics

#: A quotient this close to a tie, in units of its own float32 rounding, may go to either side: a reciprocal and a
#: product round three times where a division rounds once, and the scale once more.
TIE_ULPS = 4.0


def integers(t: Tensor, rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of t [rows, k] as integers, by a rule of ACT_QUANTS.

    Returns:
        codes float32 [rows, k] (whole numbers), scale float32 [rows, 1], and where the quotient is so near a tie that
        an honest float32 evaluation may round it to the other side (bool).
    """
    steps, lowest = ACT_QUANTS[rule]
    t32 = t.to(torch.float32)
    scale = torch.clamp(t32.abs().amax(dim=1, keepdim=True) / torch.full_like(t32[:1, :1], steps), min=MIN_NORMAL)
    if rule == "row127h":
        scale = scale.to(t.dtype).to(torch.float32)
    quotient = t32 / scale
    away = (quotient.abs() % 1.0 - 0.5).abs()
    near = away <= TIE_ULPS * UNIT_ROUNDOFF["fp32"] * quotient.abs().clamp(min=1.0)
    return torch.clamp(torch.round(quotient), lowest, 127), scale, near


def int8_inputs(case: Case, device: str) -> dict[str, Any]:
    """``x`` [m, k], ``codes`` int8 [n, k], ``scale`` float32 [n] and, with bias=1, ``bias`` [n] in x's dtype."""
    dtype, gen = torch_dtype(case.text("x")), generator(case, "x")
    codes, scale, _ = integers(make_weight(case, torch.float32, device), "row127")
    x = torch.randn(case.axis("m"), case.axis("k"), generator=gen)
    inputs: dict[str, Any] = {"x": x.to(dtype).to(device), "codes": codes.to(torch.int8), "scale": scale.reshape(-1)}
    if case.axis("bias"):
        inputs["bias"] = torch.randn(case.axis("n"), generator=gen).to(dtype).to(device)
    return inputs


def weight_float64(inputs: dict[str, Any]) -> Tensor:
    """The decoded weight [n, k], exact."""
    exact: Tensor = inputs["codes"].double() * inputs["scale"].double()[:, None]
    return exact


def operand(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """x' [m, k] in float64, and by how much it may honestly differ where x lies on a tie."""
    rule = case.text("act_quant")
    if rule == "none":
        return x.double(), torch.zeros((), dtype=torch.float64, device=x.device)
    codes, scale, near = integers(x, rule)
    return codes.double() * scale.double(), near.double() * scale.double()


def int8_float64(case: Case, inputs: dict[str, Any]) -> Tensor:
    """y [m, n] in float64."""
    y = operand(case, inputs["x"])[0] @ weight_float64(inputs).T
    return y + inputs["bias"].double() if "bias" in inputs else y


def int8_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """y in float64 and its budget.

    (sum_factor(k) + operand roundings) S with S = |x'| |W|^T (``int32`` sums are exact); four float32 roundings for the
    sum as a float, its two scales and the bias; the declared stores between them; one code of x wherever x lies on a
    tie; and the rounding to x's dtype.
    """
    m, n, k, name = case.axis("m"), case.axis("n"), case.axis("k"), case.text("x")
    rows = sample_rows(case, m, max_rows)
    x = inputs["x"] if rows is None else inputs["x"][rows.to(inputs["x"].device)]
    x64, slack = operand(case, x)
    w64 = weight_float64(inputs)
    value = x64 @ w64.T
    total = value.abs()
    if "bias" in inputs:
        value = value + inputs["bias"].double()
        total = total + inputs["bias"].double().abs()
    magnitude = x64.abs() @ w64.abs().T
    roundings = sum(UNIT_ROUNDOFF[name] for name in numerics.operand_roundings)
    error = (sum_factor(k, numerics.accumulate) + roundings) * magnitude + 4 * UNIT_ROUNDOFF["fp32"] * total
    if slack.dim():
        error = error + slack @ w64.abs().T
    for store in numerics.stores:
        error = error + UNIT_ROUNDOFF[store] * (total + error) + UNDERFLOW[store]
    budget = error + UNIT_ROUNDOFF[name] * (value.abs() + error) + UNDERFLOW[name]

    def take(t: Tensor) -> Tensor:
        return t if rows is None else t[rows.to(t.device)]

    why = degenerate(case, value.numel())
    return {"y": Expected(value, budget, torch_dtype(name), (m, n), take, why)}


def int8_metrics(
    case: Case, inputs: dict[str, Any], outputs: dict[str, Any], expected: dict[str, Expected]
) -> dict[str, float]:
    """Accuracy in the measures of ``fp4_quantize``: of the decoded weight against the unquantised one (rel_frobenius,
    one_minus_rel_frobenius), and of y against the product of unquantised weight and x (output_rel_frobenius)."""
    w = make_weight(case, torch.float32, str(inputs["codes"].device)).double()
    norm = float(w.norm())
    if norm == 0:
        return {}
    relative = float((weight_float64(inputs) - w).norm()) / norm
    plain = inputs["x"].double() @ w.T
    y = outputs["y"].double()
    if "bias" in inputs:
        y = y - inputs["bias"].double()
    return {
        "rel_frobenius": relative,
        "one_minus_rel_frobenius": 1 - relative,
        "output_rel_frobenius": float((y - plain).norm() / plain.norm()),
    }
