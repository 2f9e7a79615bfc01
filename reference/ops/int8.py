"""Definition of the linear layer on 8-bit integer weights, the rival of the 4-bit one. Imports no torch."""

from __future__ import annotations

from vbench.reference.ops.types import DTYPES, ITEMSIZE
from vbench.spec import Case, Op, Output, Param

#: how x is rounded to integers before the product -> (steps of half a range that a row's absmax spans, lowest code)
ACT_QUANTS = {"none": (0.0, 0), "row127": (127.0, -127), "row127h": (127.5, -128)}
INT8_DISTRIBUTIONS = ("normal", "uniform", "laplace", "student5", "zeros", "outlier")


def _reject(case: Case) -> tuple[str, str] | None:
    for name in ("m", "n", "k"):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: nothing to multiply; skip the layer instead"
    return None


INT8_LINEAR = Op(
    name="int8_linear",
    summary=(
        "y[m,n] = x'[m,k] @ (scale[n] codes[n,k])^T + bias[n], y in x's dtype; x' is x, or x rounded to multiples of "
        "its row's absmax/127 (row127, as LLM.int8) or absmax/127.5 in x's dtype (row127h, as torchao), ties to even"
    ),
    params=(
        Param("x", "choice", "dtype of x, bias and y", DTYPES, "bf16"),
        Param("act_quant", "choice", "rounding of x, made anew in each launch", tuple(ACT_QUANTS), "none"),
        Param("bias", "flag", "1 adds a bias", default=0),
        Param("dist", "choice", "distribution of the weights", INT8_DISTRIBUTIONS, "normal"),
        Param("m", "axis", "tokens"),
        Param("n", "axis", "output features"),
        Param("k", "axis", "input features"),
    ),
    outputs=(Output("y", "x", "m, n"),),
    inputs="vbench.reference.int8:int8_inputs",
    oracle="vbench.reference.int8:int8_oracle",
    reject=_reject,
    metrics="vbench.reference.int8:int8_metrics",
    operands="8bit",
    flops=lambda c: 2 * c.axis("m") * c.axis("n") * c.axis("k"),
    bytes=lambda c: (
        c.axis("n") * (c.axis("k") + 4)
        + (c.axis("m") * (c.axis("n") + c.axis("k")) + c.axis("bias") * c.axis("n")) * ITEMSIZE[c.text("x")]
    ),
)

OPS: tuple[Op, ...] = (INT8_LINEAR,)
