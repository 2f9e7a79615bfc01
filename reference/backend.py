"""Backend ``torch``: the oracle's arithmetic served as kernels, so that the harness runs with nothing but torch.

It proves the plumbing (an own backend whose only error is rounding) and is the slow baseline anyone can read.
"""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="torch",
    role="own",
    summary="the meaning itself in float64, rounded once: slow, obvious, any device",
    ops={
        "fp4_quantize": "vbench.reference.kernels:make_quantize",
        "fp4_dequantize": "vbench.reference.kernels:make_dequantize",
        "fp4_linear": "vbench.reference.kernels:make_linear",
        "attention": "vbench.reference.kernels:make_attention",
        "attention_backward": "vbench.reference.kernels:make_attention_backward",
        "attention_extended": "vbench.reference.kernels_extended:make",
        "attention_extended_backward": "vbench.reference.kernels_extended:make_backward",
        "tier_stack": "vbench.reference.kernels:make_tier_stack",
        "tier_fetch": "vbench.reference.kernels:make_tier_fetch",
        "offload_pass": "vbench.reference.kernels:make_offload_pass",
        "decoder_block": "vbench.reference.kernels:make_decoder_block",
        "int8_linear": "vbench.reference.kernels:make_int8_linear",
        "svd": "vbench.reference.kernels:make_svd",
        "elementwise_chain": "vbench.reference.kernels:make_chain",
        "train_step": "vbench.reference.model_kernels:make",
        "generate": "vbench.reference.model_kernels:make",
    },
    timed=False,
)
