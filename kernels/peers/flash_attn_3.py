"""Backend ``flash_attn_3``: FlashAttention-3 (folder ``hopper`` of Dao-AILab/flash-attention)."""

from __future__ import annotations

from vbench.backend import Availability, DeclaredBackend, Device

#: Its kernels are for Hopper (README of Dao-AILab/flash-attention).
CAPABILITY = (9, 0)


def probe(device: Device) -> Availability:
    """See ``vbench.backend.Backend.probe``."""
    from vbench.kernels.peers.flash_probe import probe_flash

    install = "install flash-attn-3 from PyTorch's wheel index, or build the folder hopper of Dao-AILab/flash-attention"
    return probe_flash(device, "flash_attn_interface", install, CAPABILITY, ("flash-attn-3",))


BACKEND = DeclaredBackend(
    name="flash_attn_3",
    role="peer",
    summary="FlashAttention-3: forward and backward, packed sequences; on Hopper",
    ops={
        "attention": "vbench.kernels.peers.flash:make_3",
        "attention_backward": "vbench.kernels.peers.flash:make_3_backward",
        "attention_extended": "vbench.kernels.peers.flash:make_3",
        "attention_extended_backward": "vbench.kernels.peers.flash:make_3_backward",
    },
    variants={
        "attention_backward": ("default", "deterministic"),
        "attention_extended_backward": ("default", "deterministic"),
    },
    probe_function="vbench.kernels.peers.flash_attn_3:probe",
)
