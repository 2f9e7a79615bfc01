"""Definition of softmax attention. Imports no torch."""

from __future__ import annotations

from vbench.reference.ops.types import DTYPES, ITEMSIZE
from vbench.spec import Case, Op, Output, Param

ATTENTION_DISTRIBUTIONS = ("normal", "uniform", "grid", "constant_v", "large_logits", "equal_keys")


def _reject_attention(case: Case) -> tuple[str, str] | None:
    for name in ("b", "hq", "hk", "sq", "sk", "d"):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: attention over nothing has no value; skip the call instead"
    if case.axis("hq") % case.axis("hk"):
        return "heads_not_multiple", f"hq={case.axis('hq')} must be a multiple of hk={case.axis('hk')}"
    return None


def attended_pairs(causal: str, sq: int, sk: int) -> int:
    """Query-key pairs that are not masked. top_left: key j <= query i; bottom_right: j <= i + sk - sq."""
    if causal == "none":
        return sq * sk
    shift = 0 if causal == "top_left" else sk - sq
    return sum(min(max(i + shift + 1, 0), sk) for i in range(sq))


ATTENTION = Op(
    name="attention",
    summary=(
        "out = softmax(q k^T / sqrt(d) + mask) v and lse = ln(sum(exp(q k^T / sqrt(d) + mask))) (natural log, fp32); "
        "query head h reads key head h // (hq/hk); a row with nothing to attend to gives out 0, lse -inf"
    ),
    params=(
        Param("dtype", "choice", "dtype of q, k, v and out", DTYPES, "bf16"),
        Param(
            "causal",
            "choice",
            "top_left: key j visible to query i iff j <= i; bottom_right: iff j <= i + sk - sq",
            ("none", "top_left", "bottom_right"),
            "none",
        ),
        Param("dist", "choice", "distribution of the values", ATTENTION_DISTRIBUTIONS, "normal"),
        Param("b", "axis", "batch", default=1),
        Param("hq", "axis", "query heads"),
        Param("hk", "axis", "key and value heads"),
        Param("sq", "axis", "query length"),
        Param("sk", "axis", "key length"),
        Param("d", "axis", "head dim"),
    ),
    outputs=(Output("out", "dtype", "b, hq, sq, d"), Output("lse", "fp32", "b, hq, sq")),
    inputs="vbench.reference.attention:attention_inputs",
    oracle="vbench.reference.attention:attention_oracle",
    reject=_reject_attention,
    metrics="vbench.reference.attention:attention_metrics",
    flops=lambda c: (
        4 * c.axis("b") * c.axis("hq") * c.axis("d") * attended_pairs(c.text("causal"), c.axis("sq"), c.axis("sk"))
    ),
    bytes=lambda c: (
        c.axis("b")
        * c.axis("d")
        * ITEMSIZE[c.text("dtype")]
        * (2 * c.axis("hq") * c.axis("sq") + 2 * c.axis("hk") * c.axis("sk"))
        + 4 * c.axis("b") * c.axis("hq") * c.axis("sq")
    ),
)

OPS: tuple[Op, ...] = (ATTENTION,)
