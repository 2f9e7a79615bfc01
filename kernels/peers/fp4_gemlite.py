"""Peer ``gemlite`` of ``fp4_linear``: ``GemLiteLinearTriton`` around the op's own MXFP4 and absmax7_g128 weights.

What is called, and why (gemlite 0.6.0: helper.py, core.py, triton_kernels/):

* MXFP4 takes the op's bytes as they are, the first code in the low nibble, through ``A16W4_MXFP.from_packed_weights``;
  ``pack`` converts scales to E8M0 by value, so they are handed over as that type and not as bytes.
* Integers go to ``pack(codes, scales, 8)`` with the zero as an integer, which computes (q - 8) scale. The helper's
  tensor of zeros would compute q scale - 8 scale in x's dtype, with an error of 15 scales' rounding.
* A result split along k is added up by atomics in x's dtype, in any order.

NVFP4 is not offered: on sm_90 it does not compile (seen with 0.6.0.post2 on an H200, triton 3.6.0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.dense_linear import ACTIVATIONS
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

GROUPS = {"absmax7_g128": 128, "mxfp4": 32}
#: Zero of the op's integers.
ZERO = 8
#: Largest SPLIT_K among its configurations (gemm_splitK_kernels.py, gemv_*_kernels.py).
MOST_PARTS = 16
#: Each shape is tuned at its first launch, which takes longer than a check may.
MIN_WEIGHTS = 1 << 20
#: Blocks that its tiles divide evenly.
ROWS, COLUMNS = 128, 256


def _mxfp4(inputs: Mapping[str, Any], dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    from gemlite.helper import A16W4_MXFP

    codes, bias = inputs["codes"], inputs.get("bias")
    scale = inputs["scale"].view(torch.float8_e8m0fnu)
    made = A16W4_MXFP(device=codes.device, dtype=dtype).from_packed_weights(codes, scale, bias=bias)
    multiply: Callable[[torch.Tensor], torch.Tensor] = made.forward
    return multiply


def _integers(inputs: Mapping[str, Any], dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    from gemlite.core import TORCH_TO_DTYPE, GemLiteLinearTriton

    codes, bias = inputs["codes"], inputs.get("bias")
    n, half = codes.shape
    single = torch.stack((codes & 0xF, codes >> 4), dim=-1).reshape(n, 2 * half)
    made = GemLiteLinearTriton(
        4,
        group_size=GROUPS["absmax7_g128"],
        in_features=2 * half,
        out_features=n,
        input_dtype=TORCH_TO_DTYPE[dtype],
        output_dtype=TORCH_TO_DTYPE[dtype],
        scaled_activations=False,
    )
    made.pack(single, inputs["scale"].to(dtype), ZERO, bias=bias)
    multiply: Callable[[torch.Tensor], torch.Tensor] = made.forward
    return multiply


@dataclass(slots=True)
class GemliteLinear:
    """Its layer, bias included, then the activation."""

    fmt: str
    dtype: str
    act: str
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; the weight is packed and the shape tuned outside the clock."""
        x = inputs["x"]
        dtype = getattr(torch, TORCH_DTYPE_NAMES[self.dtype])
        multiply = (_mxfp4 if self.fmt == "mxfp4" else _integers)(inputs, dtype)
        activation = ACTIVATIONS.get(self.act)

        def launch() -> Mapping[str, Any]:
            y = multiply(x)
            return {"y": y if activation is None else activation(y)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``fp4_linear``.

    Raises:
        Unsupported: ``format_not_of_peer``; ``needs_half``: x is float32; ``gemlite_shape``: sizes its tiles do not
            divide; ``too_small_to_tune``.
    """
    fmt, x, act, n, k = case.text("fmt"), case.text("x"), case.text("act"), case.axis("n"), case.axis("k")
    if fmt not in GROUPS:
        raise Unsupported(
            "format_not_of_peer", f"fmt={fmt}: offered are {', '.join(GROUPS)}; its NVFP4 did not compile on sm_90"
        )
    if x == "fp32":
        raise Unsupported("needs_half", "x=fp32: it multiplies bfloat16 and float16; convert x")
    if n % ROWS or k % COLUMNS:
        raise Unsupported("gemlite_shape", f"n={n}, k={k}: taken in multiples of {ROWS} and {COLUMNS}; pad them")
    if n * k < MIN_WEIGHTS:
        raise Unsupported("too_small_to_tune", f"{n * k} weights; tuning a shape pays from {MIN_WEIGHTS}")
    # Integers: the scale, and its product with the code. MXFP4 is exact in bfloat16; float16 may round small products.
    decoded = (x, x) if fmt == "absmax7_g128" else () if x == "bf16" else (x,)
    # Each part of a sum over k is rounded, then every sum of parts; bias and activation read the rounded sum.
    stores = (x,) * (MOST_PARTS - 1 + case.axis("bias") + (act in ("gelu", "silu")))
    return GemliteLinear(fmt, x, act, Numerics("tensor_core", (*decoded, x), stores=stores))
