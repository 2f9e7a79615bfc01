"""Attention with what brings inputs of its own: ALiBi slopes, sinks, an additive mask, packed sequences. No torch.

Ops apart from ``attention`` (docs/adr/0021): what needs no input (windows, capped scores, layouts)
is a parameter of both families.
"""

from __future__ import annotations

import random
from itertools import pairwise

from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD, attended_pairs
from vbench.reference.ops.types import ITEMSIZE
from vbench.spec import Case, Op, Output, Param

#: What an additive mask holds. normal: standard normal values; blocked: -inf for each pair with chance 1/4 and in the
#: whole first row, else 0; shifted: -100 everywhere, which moves lse below ln of the smallest normal float32.
EXTENDED_MASKS = ("none", "normal", "blocked", "shifted")
#: Which axes of [b, hq, sq, sk] the mask has; the others have length 1.
MASK_AXES = ("qk", "hqk", "bqk", "bhqk")


def sequence_bounds(case: Case, of: str) -> tuple[int, ...]:
    """First rows of the packed sequences, and the end: ``packed`` + 1 ascending numbers from 0 to the length.

    Args:
        of: ``q`` (length sq) or ``k`` (sk). Drawn from the case's id; a sequence may be empty.
    """
    total, count = case.axis(f"s{of}"), case.axis("packed")
    rng = random.Random(f"{case.id}|{case.seed}|{of}")
    return (0, *sorted(rng.randint(0, total) for _ in range(count - 1)), total)


def _reject(case: Case) -> tuple[str, str] | None:
    rejected = ATTENTION.reject(case)
    if rejected is None and case.axis("packed") and case.axis("b") != 1:
        return "packed_batch", f"b={case.axis('b')}: packed sequences lie end to end in a batch of 1"
    return rejected


def _pairs(case: Case) -> int:
    """Query-key pairs of one head and batch element that causal mask, window and packing leave."""
    causal, window = case.text("causal"), case.axis("window")
    if not case.axis("packed"):
        return attended_pairs(causal, case.axis("sq"), case.axis("sk"), window)
    of_q, of_k = (pairwise(sequence_bounds(case, of)) for of in "qk")
    return sum(attended_pairs(causal, b - a, d - c, window) for (a, b), (c, d) in zip(of_q, of_k, strict=True))


def _flops(case: Case) -> int:
    return 4 * case.axis("b") * case.axis("hq") * case.axis("d") * _pairs(case)


def _extra_bytes(case: Case) -> int:
    """Bytes of the inputs that op ``attention`` does not have."""
    mask = 0
    if case.text("mask") != "none":
        axes = case.text("maskdims")
        mask = case.axis("sq") * case.axis("sk") * ITEMSIZE[case.text("dtype")]
        mask *= (case.axis("b") if "b" in axes else 1) * (case.axis("hq") if "h" in axes else 1)
    vectors = 4 * case.axis("hq") * (case.axis("alibi") + case.axis("sinks"))
    return mask + vectors + (8 * (case.axis("packed") + 1) if case.axis("packed") else 0)


def _bytes_beside(plain: Op, case: Case) -> int:
    """Bytes of the plain op of the same shape, and of what this family adds."""
    assert plain.bytes is not None
    return plain.bytes(case) + _extra_bytes(case)


_FEATURES = (
    Param(
        "alibi",
        "flag",
        "1: input slopes fp32 [hq]; a score loses slope times its distance from the diagonal",
        default=0,
    ),
    Param("sinks", "flag", "1: input sink fp32 [hq]; exp(sink) joins each row's denominator, with no value", default=0),
    Param(
        "mask",
        "choice",
        "input mask, of the case's dtype, added to the scaled (and capped) scores",
        EXTENDED_MASKS,
        "none",
    ),
    Param("maskdims", "choice", "axes of the mask; those left out have length 1", MASK_AXES, "qk", quiet=True),
    Param(
        "packed",
        "axis",
        "0: none; n: n sequences end to end in a batch of 1, inputs cu_q and cu_k int32 [n + 1]; causal masks, windows "
        "and distances are each sequence's own",
        default=0,
    ),
)

ATTENTION_EXTENDED = Op(
    name="attention_extended",
    summary=(
        "as attention, with z = q k^T / sqrt(d) (capped) - slope |j - i - shift| + mask, rows and keys of one "
        "sequence, and lse = ln(exp(sink) + sum(exp(z))); shift = sk - sq for bottom_right, else 0; a row with "
        "nothing to attend to gives out 0 and lse sink (-inf without one)"
    ),
    params=(*ATTENTION.params, *_FEATURES),
    outputs=ATTENTION.outputs,
    inputs="vbench.reference.attention_extended:extended_inputs",
    oracle="vbench.reference.attention_extended:extended_oracle",
    reject=_reject,
    flops=_flops,
    bytes=lambda c: _bytes_beside(ATTENTION, c),
)

ATTENTION_EXTENDED_BACKWARD = Op(
    name="attention_extended_backward",
    summary=(
        "as attention_backward, of attention_extended: p = exp(z - lse); dsink = -sum(exp(sink - lse) (rowsum(out "
        "dout) - dlse)) over batch and rows, 0 without sinks; slopes and mask get no gradient"
    ),
    params=(*ATTENTION_BACKWARD.params, *_FEATURES),
    outputs=(*ATTENTION_BACKWARD.outputs, Output("dsink", "fp32", "hq")),
    inputs="vbench.reference.attention_extended:extended_backward_inputs",
    oracle="vbench.reference.attention_extended:extended_backward_oracle",
    reject=_reject,
    flops=lambda c: _flops(c) * 5 // 2,
    bytes=lambda c: _bytes_beside(ATTENTION_BACKWARD, c),
)

OPS: tuple[Op, ...] = (ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD)
