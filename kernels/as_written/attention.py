"""The document's flash attention (section "Flash Attention algorithm" and "Float32 accumulation").

Variants
    low_precision        all of scores, output, l and m in the input's dtype: what the document says it had first
                         ("relative error 2.69"); row maxima.
    float32              its fix: ``Q.float() @ K.float().T``, output, l, m float32, cast at the end; row maxima.
    scalar_max_low,      the same two with ``m_new = max(m, scores.max())`` as literally written: one maximum for the
    scalar_max_float32   block of all batches, heads and rows. Any shift is right on paper; a row far below the shared
                         maximum underflows to l = 0.

Readings where it is silent
    No 1/sqrt(d) appears; taken as left out for brevity like ``.T`` and ``...``, and applied to the scores. Without it
    no line of the document could be compared with any attention.
    ``exp(scores - m_new).sum()`` is the sum over keys of each row: l has a shape, and one number for all rows would not
    be a softmax under any reading.
    BLOCK_SIZE is 64. The last block is shorter where N is no multiple.
Not in the document: causal masks, fewer key heads than query heads, the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

BLOCK_SIZE = 64

#: Parameters of a case the document has a word on, or that change no meaning.
PARAMETERS = ("dtype", "causal", "dist", "layout", "b", "hq", "hk", "sq", "sk", "d")


def flash_attention(q_BHSD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor, *, float32: bool, scalar_max: bool) -> Tensor:
    """out [b, h, sq, d] in q's dtype, by the document's block loop. k and v: [b, h, sk, d]."""
    kept = torch.float32 if float32 else q_BHSD.dtype
    b, h, sq, d = q_BHSD.shape
    q = q_BHSD.to(kept)
    output = torch.zeros(b, h, sq, d, dtype=kept, device=q.device)
    l = torch.zeros(b, h, sq, 1, dtype=kept, device=q.device)  # noqa: E741  the document's name
    m = torch.full((b, h, sq, 1), -torch.inf, dtype=kept, device=q.device)
    for j in range(0, k_BHSD.shape[2], BLOCK_SIZE):
        k_block = k_BHSD[:, :, j : j + BLOCK_SIZE].to(kept)
        v_block = v_BHSD[:, :, j : j + BLOCK_SIZE].to(kept)
        scores = (q @ k_block.transpose(-1, -2)) * d**-0.5
        block_max = scores.max() if scalar_max else scores.amax(dim=-1, keepdim=True)
        m_new = torch.maximum(m, block_max)
        output = output * torch.exp(m - m_new)
        l = l * torch.exp(m - m_new)  # noqa: E741
        exp_scores = torch.exp(scores - m_new)
        output = output + exp_scores @ v_block
        l = l + exp_scores.sum(dim=-1, keepdim=True)  # noqa: E741
        m = m_new
    return (output / l).to(q_BHSD.dtype)


@dataclass(slots=True)
class Attention:
    """``attention`` as written."""

    float32: bool
    scalar_max: bool
    numerics: Numerics
    produces: tuple[str, ...] = ("out",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        q, k, v = inputs["q"], inputs["k"], inputs["v"]

        def launch() -> Mapping[str, Tensor]:
            return {"out": flash_attention(q, k, v, float32=self.float32, scalar_max=self.scalar_max)}

        return launch


VARIANTS = {
    "low_precision": (False, False),
    "float32": (True, False),
    "scalar_max_low": (False, True),
    "scalar_max_float32": (True, True),
}


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported: ``parameter_not_taken``; ``unknown_variant``; ``not_in_document`` for a causal mask or
    hq != hk.

    The low variants declare what they are, sums and weights in the input's dtype: judged by that budget they may
    pass, judged by the float32 variants' they do not.
    """
    refuse_beyond(case, PARAMETERS)
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(VARIANTS)}")
    if case.text("causal") != "none":
        raise Unsupported("not_in_document", "the document writes no causal mask; use causal=none")
    if case.axis("hq") != case.axis("hk"):
        raise Unsupported("not_in_document", "hq != hk: the document writes no grouped heads; use hq = hk")
    float32, scalar_max = VARIANTS[variant]
    kept = "fp32" if float32 else case.text("dtype")
    return Attention(float32, scalar_max, Numerics(accumulate=kept, probabilities=kept))
