"""Definitions of what the document names as unfit for a GPU: singular values, and work that leaves the device.

Imports no torch.
"""

from __future__ import annotations

from vbench.spec import Case, Op, Output, Param


def _reject(case: Case) -> tuple[str, str] | None:
    for param, value in case.params:
        if value == 0:
            return "zero_size", f"{param}=0: nothing to compute"
    return None


def _bidiagonal_flops(case: Case) -> int:
    """Reduction to bidiagonal form (Golub & Van Loan, Matrix Computations, 4th ed., section 5.4.8), leading terms."""
    short, long = sorted((case.axis("m"), case.axis("n")))
    return 4 * short**2 * long - 4 * short**3 // 3


SVD = Op(
    name="svd",
    summary="values[min(m,n)] = singular values of a[m,n], float32, in descending order",
    params=(Param("m", "axis", "rows"), Param("n", "axis", "columns")),
    outputs=(Output("values", "fp32", "min(m, n)"),),
    inputs="vbench.reference.insight:svd_inputs",
    oracle="vbench.reference.insight:svd_oracle",
    reject=_reject,
    flops=_bidiagonal_flops,
    bytes=lambda c: 4 * (c.axis("m") * c.axis("n") + min(c.axis("m"), c.axis("n"))),
)

CHAIN = Op(
    name="elementwise_chain",
    summary="y[n] after ``steps`` times y = y / 2 + x, float32, from y = x: a chain, every step its own operation",
    params=(Param("n", "axis", "elements"), Param("steps", "axis", "operations, one after another")),
    outputs=(Output("y", "fp32", "n"),),
    inputs="vbench.reference.insight:chain_inputs",
    oracle="vbench.reference.insight:chain_oracle",
    reject=_reject,
    flops=lambda c: 2 * c.axis("n") * c.axis("steps"),
    bytes=lambda c: 8 * c.axis("n"),
)

OPS: tuple[Op, ...] = (SVD, CHAIN)
