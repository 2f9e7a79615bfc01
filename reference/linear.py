"""Meaning of ``fp4_linear``: decode by table in float64, multiply in float64, activate, and the derived budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vbench.reference.budget import UNDERFLOW, UNIT_ROUNDOFF, sum_factor
from vbench.reference.fp4 import decode_float64, degenerate, packed_weight
from vbench.reference.sampling import generator, sample_rows, torch_dtype
from vbench.spec import Case, Expected, Numerics

#: Largest slope of each activation: how much it can magnify an error of its argument.
LIPSCHITZ = {"none": 1.0, "relu": 1.0, "gelu": 1.1290, "silu": 1.0999}

#: fp32 evaluations of gelu and silu: exp or erf to a few units in the last place of a value no larger than |x|.
ACTIVATION_ULPS = 8.0

#: Grid x: this many non-zeros a row at most keeps every partial sum below 2^24 in units of the last place.
GRID_NONZEROS = 48
#: fp16 ends at 65504: 30 products of at most 127 x 16, and a bias of 64, stay below it.
GRID_NONZEROS_FP16 = 30


def activate(act: str, x: Tensor) -> Tensor:
    """relu, gelu (erf form) or silu in x's dtype; ``none`` returns x."""
    if act == "relu":
        return torch.relu(x)
    if act == "gelu":
        return torch.nn.functional.gelu(x)
    if act == "silu":
        return torch.nn.functional.silu(x)
    return x


def linear_inputs(case: Case, device: str) -> dict[str, Any]:
    """``x`` [m, k], the packed weight (``codes``, ``scale``, ``global_scale``) and, with bias=1, ``bias`` [n].

    ``grid``: x holds a few integers a row, with 12 significant bits in float32 (7 in fp16, 8 in bf16), so that sums
    are exact in float32 in any order and need more bits than TF32 or half accumulation keeps.
    """
    m, n, k, dtype = case.axis("m"), case.axis("n"), case.axis("k"), torch_dtype(case.text("x"))
    gen = generator(case, "x")
    inputs = packed_weight(case, device)
    grid = case.text("dist") == "grid"
    if grid:
        top = {"fp32": 4095, "fp16": 127, "bf16": 255}[case.text("x")]
        x = torch.zeros(m, k)
        count = min(k, GRID_NONZEROS_FP16 if case.text("x") == "fp16" else GRID_NONZEROS)
        columns = torch.rand(m, k, generator=gen).argsort(dim=1)[:, :count]
        values = torch.randint(-(top // 2), top // 2 + 1, (m, count), generator=gen) * 2 + 1
        x.scatter_(1, columns, values.clamp(-top, top).to(torch.float32))
    else:
        x = torch.randn(m, k, generator=gen)
    inputs["x"] = x.to(dtype).to(device)
    if case.axis("bias"):
        bias = torch.randint(-64, 65, (n,), generator=gen).float() if grid else torch.randn(n, generator=gen)
        inputs["bias"] = bias.to(dtype).to(device)
    return inputs


def linear_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """y in float64 and its budget.

    Before the activation: (sum_factor(k) + operand roundings) S with S = |x| |W|^T, and three float32 roundings for
    scale, bias and store of the sum; the declared roundings of that sum on its way to the activation (``stores``);
    times the activation's slope; plus its own evaluation error; plus one rounding to the output's dtype. On grid inputs
    without gelu or silu the float32 sum is exact and the budget is zero.
    """
    fmt, act, out_name = case.text("fmt"), case.text("act"), case.text("x")
    m, n, k = case.axis("m"), case.axis("n"), case.axis("k")
    dtype = torch_dtype(out_name)
    rows = sample_rows(case, m, max_rows)
    x = inputs["x"] if rows is None else inputs["x"][rows.to(inputs["x"].device)]
    x64 = x.double()
    w64 = decode_float64(fmt, inputs)
    before = x64 @ w64.T
    bias = inputs.get("bias")
    if bias is not None:
        before = before + bias.double()
    value = activate(act, before)

    def take(t: Tensor) -> Tensor:
        return t if rows is None else t[rows.to(t.device)]

    shape = (m, n)
    why = degenerate(case, value.numel())
    if case.text("dist") == "grid" and act in ("none", "relu"):
        return {"y": Expected(value.to(dtype), None, dtype, shape, take, why)}
    magnitude = x64.abs() @ w64.abs().T
    operand = sum(UNIT_ROUNDOFF[name] for name in numerics.operand_roundings)
    total = magnitude if bias is None else magnitude + bias.double().abs()
    error = (sum_factor(k, numerics.accumulate) + operand) * magnitude + 3 * UNIT_ROUNDOFF["fp32"] * total
    for name in numerics.stores:
        error = error + UNIT_ROUNDOFF[name] * (before.abs() + error) + UNDERFLOW[name]
    error = LIPSCHITZ[act] * error
    if act in ("gelu", "silu"):
        error = error + ACTIVATION_ULPS * UNIT_ROUNDOFF["fp32"] * before.abs()
    budget = error + UNIT_ROUNDOFF[out_name] * (value.abs() + error) + UNDERFLOW[out_name]
    return {"y": Expected(value, budget, dtype, shape, take, why)}
