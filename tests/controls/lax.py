"""An operation whose oracle is wrong on purpose: a constant tolerance wider than its output (KernelBench issue 165)."""

from __future__ import annotations

from typing import Any

import torch

from vbench.reference.budget import UNIT_ROUNDOFF, sum_factor
from vbench.reference.sampling import generator
from vbench.spec import Case, Expected, Numerics, Op, Output, Param

#: As in the harnesses that have it; the outputs here are smaller.
TOLERANCE = 1e-2
SCALE = 1e-4


def lax_inputs(case: Case, device: str) -> dict[str, Any]:
    """``x`` [m, k] and ``w`` [n, k] in float32."""
    gen = generator(case, "lax")
    shapes = {"x": (case.axis("m"), case.axis("k")), "w": (case.axis("n"), case.axis("k"))}
    return {name: (torch.randn(shape, generator=gen) * SCALE).to(device) for name, shape in shapes.items()}


def lax_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """y under a constant tolerance, or (lax=0, for the honest twin) under the derived one."""
    x, w = inputs["x"].double(), inputs["w"].double()
    y = x @ w.T
    if case.axis("lax"):
        budget = torch.full_like(y, TOLERANCE)
    else:
        budget = (sum_factor(case.axis("k"), numerics.accumulate) + UNIT_ROUNDOFF["fp32"]) * (x.abs() @ w.abs().T)
    return {"y": Expected(y, budget, torch.float32, tuple(y.shape))}


LAX_LINEAR = Op(
    name="lax_linear",
    summary="y[m,n] = x[m,k] @ w[n,k]^T with a tolerance that lets zeros through",
    params=(
        Param("lax", "flag", "1: constant tolerance, 0: derived"),
        Param("m", "axis", "tokens"),
        Param("n", "axis", "output features"),
        Param("k", "axis", "input features"),
    ),
    outputs=(Output("y", "fp32", "m, n"),),
    inputs="vbench.controls.lax:lax_inputs",
    oracle="vbench.controls.lax:lax_oracle",
)
