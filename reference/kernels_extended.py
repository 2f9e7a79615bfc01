"""Backend ``torch`` of the extended attention ops. Apart from ``kernels.py``, which the digest of every op covers."""

from __future__ import annotations

from vbench.backend import Device, Kernel
from vbench.errors import Unsupported
from vbench.reference.attention_extended import extended_backward_float64, extended_float64
from vbench.reference.kernels import OracleKernel
from vbench.spec import Case


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Inputs of ``attention_extended`` -> out in their dtype and lse float32, one rounding each."""
    _only_default(variant)
    return OracleKernel(
        lambda inputs: dict(zip(("out", "lse"), extended_float64(case, inputs), strict=True)), ("out", "lse")
    )


def make_backward(case: Case, variant: str, device: Device) -> Kernel:
    """Inputs of ``attention_extended_backward`` -> dq, dk, dv in their dtype and dsink float32, one rounding each."""
    _only_default(variant)
    return OracleKernel(lambda inputs: extended_backward_float64(case, inputs), ("dq", "dk", "dv", "dsink"))


def _only_default(variant: str) -> None:
    if variant:
        raise Unsupported("unknown_variant", f"backend torch has a single variant, not {variant!r}")
