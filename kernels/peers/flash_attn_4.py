"""Backend ``flash_attn_4``: FlashAttention-4 in CuTe DSL (package ``flash-attn-4``, module ``flash_attn.cute``)."""

from __future__ import annotations

from vbench.backend import Availability, DeclaredBackend, Device

#: What flash_attn/cute/interface.py (4.0.0b36) has kernels for and the rules in ``flash_rules.py`` were read for.
CAPABILITY = (9, 0)


def probe(device: Device) -> Availability:
    """See ``vbench.backend.Backend.probe``."""
    from vbench.kernels.peers.flash_probe import probe_flash

    install = "install it: pip install 'vbench-kernels[flash4]'"
    return probe_flash(device, "flash_attn.cute", install, CAPABILITY, ("flash-attn-4", "nvidia-cutlass-dsl"))


BACKEND = DeclaredBackend(
    name="flash_attn_4",
    role="peer",
    summary="FlashAttention-4 (CuTe DSL): forward and backward, packed sequences, sinks; on Hopper",
    ops={
        "attention": "vbench.kernels.peers.flash:make_4",
        "attention_backward": "vbench.kernels.peers.flash:make_4_backward",
        "attention_extended": "vbench.kernels.peers.flash:make_4",
        "attention_extended_backward": "vbench.kernels.peers.flash:make_4_backward",
    },
    variants={
        "attention_backward": ("default", "deterministic"),
        "attention_extended_backward": ("default", "deterministic"),
    },
    probe_function="vbench.kernels.peers.flash_attn_4:probe",
)
