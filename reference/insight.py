"""Meaning of ``svd`` and ``elementwise_chain``: LAPACK in float64, and a loop in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vbench.reference.budget import LAMBDA, UNIT_ROUNDOFF
from vbench.reference.sampling import generator
from vbench.spec import Case, Expected, Numerics

U32 = UNIT_ROUNDOFF["fp32"]


def svd_inputs(case: Case, device: str) -> dict[str, Any]:
    """``a`` float32 [m, n], standard normal."""
    return {"a": torch.randn(case.axis("m"), case.axis("n"), generator=generator(case, "a")).to(device)}


def svd_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """Singular values by LAPACK in float64 on the host.

    Backward stable algorithms give the values of a + e with |e| <= p(m, n) u sigma_1 (LAPACK Users' Guide, section
    4.9), and no value moves by more than |e| (Weyl). p is LAMBDA sqrt(m + n), as for sums: each value is the end of a
    chain of as many rotations.
    """
    value = torch.linalg.svdvals(inputs["a"].cpu().double())
    reach = LAMBDA * math.sqrt(case.axis("m") + case.axis("n")) * U32 * value[0]
    budget = torch.full_like(value, float(reach))
    why = "a single value is its own mean" if value.numel() == 1 else ""
    return {"values": Expected(value, budget, torch.float32, tuple(value.shape), degenerate=why)}


def chain_inputs(case: Case, device: str) -> dict[str, Any]:
    """``x`` float32 [n], standard normal."""
    return {"x": torch.randn(case.axis("n"), generator=generator(case, "x")).to(device)}


def chain_float64(x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """y and the error a float32 evaluation may have: halving is exact, the sum rounds once, errors halve each step."""
    wide = x.double()
    y, error = wide, torch.zeros_like(wide)
    for _ in range(steps):
        y = y / 2 + wide
        error = error / 2 + U32 * y.abs()
    return y, error


def chain_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """y in float64; the bound of ``chain_float64`` to first order, and half as much again for the second."""
    y, error = chain_float64(inputs["x"], case.axis("steps"))
    why = "a single element is its own mean" if y.numel() == 1 else ""
    return {"y": Expected(y, 1.5 * error, torch.float32, tuple(y.shape), degenerate=why)}
