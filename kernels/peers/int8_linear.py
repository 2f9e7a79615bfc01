"""Peers of ``int8_linear`` in plain torch.

Variants
    int_mm: rounds x in eager torch, multiplies by ``torch._int_mm`` (cuBLAS int8 on ``cuda``, exact int32 sums), then
        scales; the decomposition that torchao and LLM.int8 share.
    eager_dequant: act_quant none: decodes the weight to x's dtype in each launch and multiplies it by ``F.linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

VARIANTS = ("int_mm", "eager_dequant")
#: act_quant -> (steps of half a range that absmax spans, lowest code)
STEPS = {"row127": (127.0, -127), "row127h": (127.5, -128)}
MIN_NORMAL = 2.0**-126
#: ``torch._int_mm`` on CUDA wants more than 16 rows, and sizes that are multiples of 8 (its own argument checks).
MIN_ROWS, MULTIPLE = 17, 8


@dataclass(slots=True)
class IntMm:
    """Round x by rows, multiply integers, scale.

    Args:
        steps, lowest: see STEPS.
        half_scale: the scale of x is computed in x's dtype.
    """

    steps: float
    lowest: int
    half_scale: bool
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``. Few tokens are padded to what the product takes, as its users must."""
        x, scale, bias = inputs["x"], inputs["scale"], inputs.get("bias")
        codes_t = inputs["codes"].t()
        m = x.shape[0]
        pad = max(0, MIN_ROWS - m) if x.is_cuda else 0

        def launch() -> Mapping[str, Tensor]:
            x32 = x.to(torch.float32)
            absmax = (x if self.half_scale else x32).abs().amax(dim=1, keepdim=True)
            step = (absmax / self.steps).to(torch.float32).clamp(min=MIN_NORMAL)
            q = torch.round(x32 / step).clamp(self.lowest, 127).to(torch.int8)
            if pad:
                q = torch.nn.functional.pad(q, (0, 0, 0, pad))
            y = torch._int_mm(q, codes_t)[:m].to(torch.float32) * step * scale
            return {"y": (y if bias is None else y + bias).to(x.dtype)}

        return launch


@dataclass(slots=True)
class EagerDequant:
    """Decode in each launch, then ``F.linear``."""

    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        x, codes, scale, bias = inputs["x"], inputs["codes"], inputs["scale"], inputs.get("bias")
        if x.is_cuda:
            torch.set_float32_matmul_precision("highest")

        def launch() -> Mapping[str, Tensor]:
            w = (codes.to(torch.float32) * scale[:, None]).to(x.dtype)
            return {"y": torch.nn.functional.linear(x, w, bias)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``int8_linear``.

    Raises:
        Unsupported: ``unknown_variant``; ``act_quant_not_of_variant``; ``int_mm_shape``: sizes ``torch._int_mm`` does
            not take.
    """
    x, quant = case.text("x"), case.text("act_quant")
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(VARIANTS)}")
    if (quant == "none") != (variant == "eager_dequant"):
        raise Unsupported("act_quant_not_of_variant", f"{variant} does not compute act_quant={quant}")
    if variant == "eager_dequant":
        roundings: tuple[str, ...] = ("fp32",) if x == "fp32" else ("fp32", x)
        if x != "fp32" and device == "cuda":
            roundings += (x,)  # split-K partial sums
        return EagerDequant(Numerics("tensor_core" if device == "cuda" and x != "fp32" else "fp32", roundings))
    n, k = case.axis("n"), case.axis("k")
    if device == "cuda" and (n % MULTIPLE or k % MULTIPLE):
        raise Unsupported(
            "int_mm_shape", f"n={n}, k={k}: torch._int_mm takes multiples of {MULTIPLE} on CUDA; pad them"
        )
    return IntMm(*STEPS[quant], quant == "row127h", Numerics("int32"))
