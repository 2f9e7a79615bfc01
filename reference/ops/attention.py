"""Definitions of softmax attention and of its backward. Imports no torch."""

from __future__ import annotations

from vbench.reference.ops.types import DTYPES, ITEMSIZE
from vbench.spec import Case, Op, Output, Param

ATTENTION_DISTRIBUTIONS = ("normal", "uniform", "grid", "constant_v", "large_logits", "equal_keys")


#: How the inputs lie in memory: contiguous [b, h, s, d]; the transposed view of a contiguous [b, s, h, d]; rows longer
#: than d (the next multiple of 8, and 8 more) that begin 8 elements into their storage. The innermost stride is 1.
LAYOUTS = ("bhsd", "bshd", "padded")


def _reject_attention(case: Case) -> tuple[str, str] | None:
    for name in ("b", "hq", "hk", "sq", "sk", "d"):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: attention over nothing has no value; skip the call instead"
    if case.axis("hq") % case.axis("hk"):
        return "heads_not_multiple", f"hq={case.axis('hq')} must be a multiple of hk={case.axis('hk')}"
    return None


def attended_pairs(causal: str, sq: int, sk: int, window: int = 0) -> int:
    """Query-key pairs that are not masked. top_left: key j <= query i; bottom_right: j <= i + sk - sq.

    ``window`` > 0 leaves the keys less than ``window`` away from that diagonal (from j = i without a causal mask).
    """
    if causal == "none" and not window:
        return sq * sk
    shift = sk - sq if causal == "bottom_right" else 0
    above = 1 if causal != "none" else window
    below = window - 1 if window else sq + sk
    return sum(max(min(i + shift + above, sk) - max(i + shift - below, 0), 0) for i in range(sq))


def forward_flops(case: Case) -> int:
    """Operations of the two products of a forward: 4 d a visible pair."""
    pairs = attended_pairs(case.text("causal"), case.axis("sq"), case.axis("sk"), case.axis("window"))
    return 4 * case.axis("b") * case.axis("hq") * case.axis("d") * pairs


def _tensor_bytes(case: Case, of_q: int, of_k: int, of_rows: int) -> int:
    """Bytes of so many tensors like q, like k, and fp32 values a query row."""
    rows = case.axis("b") * case.axis("hq") * case.axis("sq")
    elements = of_q * rows * case.axis("d")
    elements += of_k * case.axis("b") * case.axis("hk") * case.axis("sk") * case.axis("d")
    return elements * ITEMSIZE[case.text("dtype")] + 4 * of_rows * rows


_PARAMS = (
    Param("dtype", "choice", "dtype of all tensors but lse and dlse, which are fp32", DTYPES, "bf16"),
    Param(
        "causal",
        "choice",
        "top_left: key j visible to query i iff j <= i; bottom_right: iff j <= i + sk - sq",
        ("none", "top_left", "bottom_right"),
        "none",
    ),
    Param("dist", "choice", "distribution of the values", ATTENTION_DISTRIBUTIONS, "normal"),
    Param("layout", "choice", "how the inputs lie in memory; outputs are contiguous", LAYOUTS, "bhsd", quiet=True),
    Param(
        "window",
        "axis",
        "0: none; w: only keys less than w from the diagonal: |j - i| < w, for bottom_right |j - i - sk + sq| < w",
        default=0,
        quiet=True,
    ),
    Param(
        "softcap",
        "axis",
        "0: none; c: scaled scores z become c tanh(z / c) before they are masked",
        default=0,
        quiet=True,
    ),
    Param("b", "axis", "batch", default=1),
    Param("hq", "axis", "query heads"),
    Param("hk", "axis", "key and value heads"),
    Param("sq", "axis", "query length"),
    Param("sk", "axis", "key length"),
    Param("d", "axis", "head dim"),
)

ATTENTION = Op(
    name="attention",
    summary=(
        "out = softmax(q k^T / sqrt(d) + mask) v and lse = ln(sum(exp(q k^T / sqrt(d) + mask))) (natural log, fp32); "
        "query head h reads key head h // (hq/hk); a row with nothing to attend to gives out 0, lse -inf"
    ),
    params=_PARAMS,
    outputs=(Output("out", "dtype", "b, hq, sq, d"), Output("lse", "fp32", "b, hq, sq")),
    inputs="vbench.reference.attention:attention_inputs",
    oracle="vbench.reference.attention:attention_oracle",
    reject=_reject_attention,
    metrics="vbench.reference.attention:attention_metrics",
    flops=forward_flops,
    bytes=lambda c: _tensor_bytes(c, 2, 2, 1),
)

ATTENTION_BACKWARD = Op(
    name="attention_backward",
    summary=(
        "from q, k, v, dout, the forward's out and lse, and (dlse=1) the gradient dlse of lse: with "
        "p = exp(q k^T / sqrt(d) - lse) where visible, else 0, and ds = p (dout v^T - rowsum(out dout) + dlse): "
        "dq = ds k / sqrt(d), dk = ds^T q / sqrt(d), dv = p^T dout, dk and dv summed over the query heads of a key "
        "head; a row with nothing to attend to gives and receives zeros"
    ),
    params=(*_PARAMS, Param("dlse", "flag", "1: a gradient flows into lse, input dlse fp32 [b, hq, sq]", default=0)),
    outputs=(
        Output("dq", "dtype", "b, hq, sq, d"),
        Output("dk", "dtype", "b, hk, sk, d"),
        Output("dv", "dtype", "b, hk, sk, d"),
    ),
    inputs="vbench.reference.attention_backward:backward_inputs",
    oracle="vbench.reference.attention_backward:backward_oracle",
    reject=_reject_attention,
    # Five products of the forward's two: scores again, dP, dV, dQ, dK.
    flops=lambda c: forward_flops(c) * 5 // 2,
    bytes=lambda c: _tensor_bytes(c, 4, 4, 1 + c.axis("dlse")),
)

OPS: tuple[Op, ...] = (ATTENTION, ATTENTION_BACKWARD)
