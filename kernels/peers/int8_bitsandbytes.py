"""Peer ``bitsandbytes``: LLM.int8's functions on the op's integers, without outlier columns (threshold 0).

It documents float16 activations (``bitsandbytes.functional.int8_vectorwise_quant``) and keeps a row's absmax where the
op keeps absmax / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Availability, DeclaredBackend, Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics


def probe(device: Device) -> Availability:
    """See ``vbench.backend.Backend.probe``."""
    from vbench.kernels.peers.optional import probe_package

    return probe_package("bitsandbytes", device)


BACKEND = DeclaredBackend(
    name="bitsandbytes",
    role="peer",
    summary="bitsandbytes: LLM.int8's product of rounded activations and int8 weights; NF4 weights",
    ops={
        "int8_linear": "vbench.kernels.peers.int8_bitsandbytes:make",
        "fp4_linear": "vbench.kernels.peers.fp4_bitsandbytes:make",
    },
    probe_function="vbench.kernels.peers.int8_bitsandbytes:probe",
)


@dataclass(slots=True)
class LlmInt8:
    """Round, multiply, scale; what ``MatMul8bitLt`` calls where there are no outliers."""

    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; the weight's scales become absmax values outside the clock."""
        from bitsandbytes import functional

        x, codes, bias = inputs["x"], inputs["codes"], inputs.get("bias")
        absmax = inputs["scale"] * 127

        def launch() -> Mapping[str, Any]:
            q, row_absmax, _ = functional.int8_vectorwise_quant(x)
            sums = functional.int8_linear_matmul(q, codes)
            return {"y": functional.int8_mm_dequant(sums, row_absmax, absmax, bias=bias)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``int8_linear``.

    Raises:
        Unsupported: ``needs_fp16``; ``act_quant_not_of_peer``.
    """
    if case.text("x") != "fp16":
        raise Unsupported("needs_fp16", f"x={case.text('x')}: LLM.int8 takes float16 activations; convert them")
    if case.text("act_quant") != "row127":
        raise Unsupported("act_quant_not_of_peer", f"act_quant={case.text('act_quant')}: LLM.int8 rounds to absmax/127")
    # The sum times both scales and 1/127^2, and the weight's scale there and back: three roundings more than the op
    # has. Without a GPU it multiplies integers in float32, exact up to 2^24.
    exact = device == "cuda" or case.axis("k") * 127**2 <= 2**24
    return LlmInt8(Numerics("int32" if exact else "fp32", stores=("fp32",) * 3))
