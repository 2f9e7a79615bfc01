"""Backend ``as_written``: the pseudo-code of the document "virtual Blackwell" in plain torch, mistakes included.

The document's claims are judged against its own code too. Nothing here is repaired or tuned; where the document is
silent the plainest reading is taken and named in the module that takes it. What the document does not have at all
(NVFP4, causal masks, grouped heads) is refused with rule ``not_in_document``.
"""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="as_written",
    role="subject",
    summary="the document's own pseudo-code in plain torch, mistakes included",
    ops={
        "fp4_quantize": "vbench.kernels.as_written.codec:make_quantize",
        "fp4_dequantize": "vbench.kernels.as_written.codec:make_dequantize",
        "fp4_linear": "vbench.kernels.as_written.linear:make",
        "attention": "vbench.kernels.as_written.attention:make",
        "tier_stack": "vbench.kernels.as_written.vgpu_stack:make",
    },
    variants={
        "attention": ("low_precision", "float32", "scalar_max_low", "scalar_max_float32"),
        # Two readings of a full level: its LRU cache drops the oldest, or put() returns False.
        "tier_stack": ("", "refuse"),
    },
)
