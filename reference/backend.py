"""Backend ``torch``: the oracle's arithmetic served as kernels, so that the harness runs with nothing but torch.

It proves the plumbing (an own backend whose only error is rounding) and is the slow baseline anyone can read.
"""

from __future__ import annotations

from vbench.backend import Availability, DeclaredBackend, Device


def probe(device: Device) -> Availability:
    """Usable on the CPU always, on ``cuda`` where torch finds a device."""
    import torch

    versions = {"torch": str(torch.__version__)}
    if device == "cuda" and not torch.cuda.is_available():
        return Availability(False, "none", "torch finds no CUDA device; run with --device cpu", versions)
    return Availability(True, "native", "", versions)


BACKEND = DeclaredBackend(
    name="torch",
    role="own",
    summary="the meaning itself in float64, rounded once: slow, obvious, any device",
    ops={
        "fp4_quantize": "vbench.reference.kernels:make_quantize",
        "fp4_dequantize": "vbench.reference.kernels:make_dequantize",
        "fp4_linear": "vbench.reference.kernels:make_linear",
        "attention": "vbench.reference.kernels:make_attention",
        "tier_stack": "vbench.reference.kernels:make_tier_stack",
    },
    probe_function="vbench.reference.backend:probe",
    timed=False,
)
