"""The large-m rival: decode some rows of the weight into scratch memory, multiply with the vendor's GEMM, repeat.

A chunk's scratch fits L2, is overwritten by the next chunk and so mostly never reaches device memory: the price of
decoding is then the 4-bit read and a pass through L2, not a 16-bit write and read of the whole weight.

What is exact and what is not: with nvfp4 the scratch holds E2M1 x E4M3, with mxfp4 E2M1 x E8M0 (scales that
``packing.has_wide_scales`` finds are the caller's to keep away) and with absmax7_tensor the integers, all exact in 16
bits, and the one remaining scale is the GEMM's float32 ``alpha``. Row and group scales and nf4's values have no place
in the vendor's epilogue, so they are multiplied in before rounding to bfloat16: ``operand_roundings`` says so. float16
has not the range for that and is not taken here. Nor is a bias: as the GEMM's C operand it came out rounded more than
once (exact sums on grid inputs differed in 11 % of elements), and adding it after y would round twice too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vbench.backend import Launch
from vbench.kernels.triton.codec import decode_launcher
from vbench.kernels.triton.probe import INTERPRETED

#: (format, x) -> operand roundings; pairs left out are not taken.
OPERAND_ROUNDINGS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("nvfp4", "bf16"): (),
    ("nvfp4", "fp16"): (),
    ("absmax7_tensor", "bf16"): (),
    ("absmax7_tensor", "fp16"): (),
    ("absmax7_row", "bf16"): ("bf16",),
    ("absmax7_g128", "bf16"): ("bf16",),
    ("mxfp4", "bf16"): (),
    ("nf4", "bf16"): ("bf16",),
}
#: Activations that commute with the rounding of y, so that applying them after it changes nothing.
ACTIVATIONS = ("none", "relu")


def takes(fmt: str, x: str, act: str, bias: bool) -> bool:
    """Whether this path computes the case within the numerics it declares."""
    return (fmt, x) in OPERAND_ROUNDINGS and act in ACTIVATIONS and not bias


def bind_dequant(fmt: str, inputs: Mapping[str, Any], x: Any, y: Any, x_name: str, act: str, chunk: int) -> Launch:
    """A launch that writes y [m, n]. Scratch memory: chunk x k in x's dtype.

    The scalar scale is read back from the device here, outside the clock.
    """
    n, k = inputs["codes"].shape[0], x.shape[1]
    codes, scale, one = inputs["codes"].contiguous(), inputs["scale"].contiguous(), torch.ones(1, device=x.device)
    alpha = 1.0
    if fmt == "nvfp4":
        alpha = float(inputs["global_scale"])
    elif fmt == "absmax7_tensor":
        alpha, scale = float(scale), one
    scratch = torch.empty(min(chunk, n), k, dtype=x.dtype, device=x.device)
    steps: list[tuple[Launch, Any, Any]] = []
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        part = {
            "codes": codes[start:stop],
            "scale": scale if scale.shape[0] == 1 and n > 1 else scale[start:stop],
            "global_scale": one,
        }
        rows = scratch[: stop - start]
        target = rows.view(torch.int16) if INTERPRETED and x_name == "bf16" else rows
        steps.append((decode_launcher(fmt, x_name, part, target, stop - start, k), rows.T, y[:, start:stop]))

    def launch() -> None:
        # Sums of a split GEMM may otherwise be rounded to 16 bits between the parts.
        matmul = torch.backends.cuda.matmul
        before = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
        matmul.allow_bf16_reduced_precision_reduction = matmul.allow_fp16_reduced_precision_reduction = False
        try:
            for decode, weight_t, part_y in steps:
                decode()
                part_y.addmm_(x, weight_t, beta=0.0, alpha=alpha)
        finally:
            matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction = before
        if act == "relu":
            torch.relu_(y)

    return launch
