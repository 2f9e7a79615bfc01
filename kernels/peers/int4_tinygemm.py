"""Peer ``tinygemm``: torch's built-in INT4 weight-only product, on absmax7_g128's own integers.

``torch._weight_int4pack_mm`` (aten/native/cuda/int4mm.cu) computes with (q - 8) scale + zero, q in 0..15, which is the
op's absmax7 code; scale and zero are bfloat16, so the op's float32 scale is rounded to it, and zero is 0. Its packing
takes two codes a byte, the first in the high nibble, on CUDA, and one code an int32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.dense_linear import ACTIVATIONS
from vbench.spec import Case, Numerics

GROUP = 128
#: Tiles of 16 along k that a packed block holds; torchao packs with this number.
INNER_K_TILES = 8


@dataclass(slots=True)
class TinyGemm:
    """The product, then bias and activation."""

    act: str
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; the weight is repacked outside the clock."""
        x, codes, bias = inputs["x"], inputs["codes"], inputs.get("bias")
        scale = inputs["scale"].to(torch.bfloat16)
        scale_and_zero = torch.stack((scale, torch.zeros_like(scale)), dim=-1).transpose(0, 1).contiguous()
        if x.is_cuda:
            swapped = (codes << 4) | (codes >> 4)
            packed = torch._convert_weight_to_int4pack(swapped, INNER_K_TILES)
            multiply = torch._weight_int4pack_mm
        else:
            single = torch.stack((codes & 0xF, codes >> 4), dim=-1).reshape(codes.shape[0], -1)
            packed = torch._convert_weight_to_int4pack_for_cpu(single.int(), 1)
            multiply = torch._weight_int4pack_mm_for_cpu
        activation = ACTIVATIONS.get(self.act)

        def launch() -> Mapping[str, Any]:
            y = multiply(x, packed, GROUP, scale_and_zero)
            y = y if bias is None else y + bias
            return {"y": y if activation is None else activation(y)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``fp4_linear``.

    Raises:
        Unsupported: ``format_not_of_peer``; ``needs_bf16``; ``tinygemm_shape``: sizes its packing does not take.
    """
    x, act, n, k = case.text("x"), case.text("act"), case.axis("n"), case.axis("k")
    if case.text("fmt") != "absmax7_g128":
        raise Unsupported("format_not_of_peer", f"fmt={case.text('fmt')}: tinygemm has grouped integers: absmax7_g128")
    if x != "bf16":
        raise Unsupported("needs_bf16", f"x={x}: tinygemm multiplies bfloat16; convert x")
    rows = 8 if device == "cuda" else 16
    if n % rows or k % (16 * INNER_K_TILES):
        raise Unsupported("tinygemm_shape", f"n={n}, k={k}: its packing takes multiples of {rows} and of 128; pad them")
    # The scale, the decoded weight; the sum before the bias, and with it before the activation.
    stores = ("bf16",) * (case.axis("bias") + (act in ("gelu", "silu")))
    accumulate = "tensor_core" if device == "cuda" else "fp32"
    return TinyGemm(act, Numerics(accumulate, ("bf16", "bf16"), stores=stores))
