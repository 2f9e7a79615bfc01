"""Definition of the gradients of attention under an additive mask. Imports no torch."""

from __future__ import annotations

from vbench.reference.ops.types import DTYPES, ITEMSIZE
from vbench.spec import Case, Op, Output, Param

#: ``zeros``; ``shift``, -100 on every score, which no softmax can see; ``random``, standard normal times 2;
#: ``padding``, -inf for the last third of the keys, else 0.
MASKS = ("zeros", "shift", "random", "padding")


def _reject(case: Case) -> tuple[str, str] | None:
    for name in ("b", "h", "sq", "sk", "d"):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: attention over nothing has no value; skip the call instead"
    return None


def _bytes(case: Case) -> int:
    b, h, sq, sk, d = (case.axis(name) for name in ("b", "h", "sq", "sk", "d"))
    return ITEMSIZE[case.text("dtype")] * (b * h * d * (3 * sq + 4 * sk) + sq * sk)


MASKED_BACKWARD = Op(
    name="attention_masked_backward",
    summary=(
        "from q, k, v, dout and an additive mask [sq, sk], all of one dtype: with p = softmax(q k^T / sqrt(d) + mask), "
        "out = p v and ds = p (dout v^T - rowsum(out dout)): dq = ds k / sqrt(d), dk = ds^T q / sqrt(d), dv = p^T dout"
    ),
    params=(
        Param("dtype", "choice", "dtype of all tensors", DTYPES, "bf16"),
        Param("mask", "choice", "what is added to the scores", MASKS, "zeros"),
        Param("b", "axis", "batch", default=1),
        Param("h", "axis", "heads"),
        Param("sq", "axis", "query length"),
        Param("sk", "axis", "key length"),
        Param("d", "axis", "head dim"),
    ),
    outputs=(
        Output("dq", "dtype", "b, h, sq, d"),
        Output("dk", "dtype", "b, h, sk, d"),
        Output("dv", "dtype", "b, h, sk, d"),
    ),
    inputs="vbench.reference.masked:masked_inputs",
    oracle="vbench.reference.masked:masked_oracle",
    reject=_reject,
    # Seven products of d: the forward's two, its scores again, dP, dV, dQ, dK.
    flops=lambda c: 14 * c.axis("b") * c.axis("h") * c.axis("sq") * c.axis("sk") * c.axis("d"),
    bytes=_bytes,
)

OPS: tuple[Op, ...] = (MASKED_BACKWARD,)
