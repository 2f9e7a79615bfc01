"""The Triton backend's declaration. Imports no Triton and no torch."""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="triton",
    role="own",
    summary="Triton kernels: FP4 codecs, FP4 linear decoding in registers, attention and its backward, fetch, blocks",
    ops={
        "fp4_quantize": "vbench.kernels.triton.codec:make_quantize",
        "fp4_dequantize": "vbench.kernels.triton.codec:make_dequantize",
        "fp4_linear": "vbench.kernels.triton.linear:make",
        "attention": "vbench.kernels.triton.attention:make",
        "attention_backward": "vbench.kernels.triton.attention_backward:make",
        "attention_extended": "vbench.kernels.triton.attention_extended:make",
        "attention_extended_backward": "vbench.kernels.triton.attention_extended:make_backward",
        "tier_fetch": "vbench.kernels.triton.fetch:make",
        "decoder_block": "vbench.kernels.triton.block:make",
    },
    # "" takes every shape; "gluon" is for Hopper's copy engine and warp groups, and refuses what they do not take.
    variants={"attention": ("", "gluon"), "attention_backward": ("", "gluon", "gluon_deterministic")},
    options={"fp4_linear": ("num_warps", "num_stages")},
    probe_function="vbench.kernels.triton.probe:probe",
    environment={"cpu": {"TRITON_INTERPRET": "1"}, "compile": {"TRITON_INTERPRET": "0"}},
    configurations="vbench.kernels.triton.configurations:configurations",
)
