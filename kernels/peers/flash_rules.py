"""Which cases FlashAttention-3 and -4 take on Hopper, and the arguments they take them with. No launch, no package.

Sources: hopper/flash_attn_interface.py and flash_attn/cute/interface.py of Dao-AILab/flash-attention (the latter as in
flash-attn-4 4.0.0b36). Both align causal masks and windows bottom right: query i sees keys from i + sk - sq - left to
i + sk - sq + right.
"""

from __future__ import annotations

from dataclasses import dataclass

from vbench.backend import Device, refuse_beyond
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

PARAMETERS = (
    *("dtype", "causal", "dist", "layout", "dlse", "window", "softcap", "b", "hq", "hk", "sq", "sk", "d"),
    *("alibi", "sinks", "mask", "maskdims", "packed"),
)
VARIANTS = ("", "default", "deterministic")
MAX_HEAD_DIM, HEAD_DIM_STEP = 256, 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How a case is asked for.

    Args:
        left, right: keys seen on either side of the diagonal; ``None``: all.
        softcap: 0.0 for none.
        scale: factor of the products before the softmax.
    """

    causal: bool
    left: int | None
    right: int | None
    softcap: float
    scale: float
    deterministic: bool


def plan(case: Case, variant: str, device: Device, *, sinks: bool, dlse: bool) -> Plan:
    """Of the attention ops.

    Args:
        sinks: the package takes sinks.
        dlse: its backward takes a gradient of the log-sum-exp.

    Raises:
        Unsupported: ``parameter_not_taken``; ``unknown_variant``; ``needs_cuda``; ``dtype``; ``head_dim``;
            ``alignment_not_offered``; ``no_alibi``; ``no_mask``; ``no_sinks``; ``no_lse_gradient``.
    """
    refuse_beyond(case, PARAMETERS)
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(VARIANTS[1:])}")
    if device != "cuda":
        raise Unsupported("needs_cuda", "FlashAttention's kernels run on CUDA devices only")
    values = dict(case.params)
    causal, window, d = case.text("causal"), case.axis("window"), case.axis("d")
    if case.text("dtype") == "fp32":
        raise Unsupported("dtype", "fp32: FlashAttention takes bf16 and fp16")
    if d > MAX_HEAD_DIM or d % HEAD_DIM_STEP:
        raise Unsupported("head_dim", f"d={d}: heads are at most {MAX_HEAD_DIM} and a multiple of {HEAD_DIM_STEP}")
    if values.get("alibi"):
        raise Unsupported("no_alibi", "alibi=1: FlashAttention-3 and -4 take no slopes")
    if values.get("mask", "none") != "none":
        raise Unsupported("no_mask", f"mask={values['mask']}: FlashAttention takes no additive mask")
    if values.get("sinks") and not sinks:
        raise Unsupported("no_sinks", "sinks=1: FlashAttention-3 takes no sink")
    if values.get("dlse") and not dlse:
        raise Unsupported("no_lse_gradient", "dlse=1: FlashAttention-3 gives lse no gradient")
    # Of packed sequences, which have lengths of their own, only the inputs tell whether they are square.
    square = case.axis("sq") == case.axis("sk") and not values.get("packed")
    if not square and (causal == "top_left" or (causal == "none" and window)):
        detail = f"causal={causal}, window={window}: FlashAttention counts from the bottom right corner"
        raise Unsupported("alignment_not_offered", detail)
    left = window - 1 if window else None
    right = left if causal == "none" else 0
    return Plan(causal != "none", left, right, float(case.axis("softcap")), d**-0.5, variant == "deterministic")


def numerics(case: Case) -> Numerics:
    """Tensor-core sums, weights and score gradients rounded to the tensors' dtype; the given out and lse are read."""
    return Numerics("tensor_core", probabilities=case.text("dtype"))
