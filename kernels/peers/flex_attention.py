"""Backend ``flex_attention``: ``torch.nn.attention.flex_attention`` under ``torch.compile``.

Torch's own tiles unless a variant says otherwise; ``OPTIONS`` is what a variant asks of the kernel template, recorded
among the versions.
"""

from __future__ import annotations

from collections.abc import Mapping

from vbench.backend import Availability, DeclaredBackend, Device

#: Variant -> ``kernel_options`` of ``flex_attention`` (torch: FlexKernelOptions). On CUDA, TMA is off unless asked for.
OPTIONS: Mapping[str, Mapping[str, bool]] = {
    "default": {},
    "tma": {"USE_TMA": True},
    "max_autotune": {},
}


def probe(device: Device) -> Availability:
    """Usable where torch has the device and flex attention's ``AuxRequest``; records what each variant asks for."""
    import torch

    versions = {"torch": str(torch.__version__)}
    try:
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401  # only whether it is there
    except ImportError as error:
        return Availability(False, "none", f"flex_attention gives its lse from torch 2.9 on ({error})", versions)
    if device == "cuda" and not torch.cuda.is_available():
        return Availability(False, "none", "torch finds no CUDA device; run with --device cpu", versions)
    asked = {
        f"flex_attention[{variant}]": ", ".join(f"{k}={v}" for k, v in options.items()) or "torch's own options"
        for variant, options in OPTIONS.items()
    }
    return Availability(True, "native", "", {**versions, **asked})


BACKEND = DeclaredBackend(
    name="flex_attention",
    role="peer",
    summary="torch's FlexAttention, compiled: masks and scores as functions; with and without TMA",
    ops={
        "attention": "vbench.kernels.peers.flex:make",
        "attention_backward": "vbench.kernels.peers.flex:make_backward",
        "attention_extended": "vbench.kernels.peers.flex:make",
        "attention_extended_backward": "vbench.kernels.peers.flex:make_backward",
    },
    variants={
        "attention": ("default", "tma", "max_autotune"),
        "attention_backward": ("default", "tma"),
        "attention_extended": ("default",),
        "attention_extended_backward": ("default",),
    },
    probe_function="vbench.kernels.peers.flex_attention:probe",
)
