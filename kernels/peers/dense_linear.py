"""Peers of ``fp4_linear``: a dense matrix product on the decoded weight.

Variants
    cublas_bf16, cublas_fp16, cublas_fp32: the weight is decoded once, outside the clock, to the dtype named, which
        must be x's: what a user without FP4 runs. cuBLAS on ``cuda``, torch's CPU library on ``cpu``.
    eager_dequant: the weight stays packed; every launch decodes it with eager torch and then multiplies, as torchao's
        weight-only NVFP4 does (nvfp4_tensor.py: ``dequantize()`` then ``F.linear``).
    torch_compile: ``eager_dequant`` and the activation through ``torch.compile`` (see compiled_linear.py).
Settings are torch's defaults, but for TF32, which is off. By default torch lets cuBLAS round split-K partial sums to
the half type ("Reduced Precision Reduction" in torch's numerical accuracy notes); the numerics say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers import compiled_linear
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

#: E2M1 values by code (OCP Microscaling v1.0), bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ABSMAX7 = tuple(float(code - 8) for code in range(16))
#: NormalFloat4 values by code (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes prints them.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
TABLES = {
    "absmax7_tensor": ABSMAX7,
    "absmax7_row": ABSMAX7,
    "absmax7_g128": ABSMAX7,
    "nvfp4": E2M1,
    "mxfp4": E2M1,
    "nf4": NF4,
}

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}

VARIANT_DTYPES = {"cublas_bf16": "bf16", "cublas_fp16": "fp16", "cublas_fp32": "fp32"}


def decode(table: Tensor, codes: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight [n, k] in ``dtype``: table value x scale x global scale in float32, rounded once.

    Args:
        table: float32 [16].
        codes: u8 [n, k/2], element 0 in the low nibble.
        scale: [1], [n] or [n, k/group], float32, float8_e4m3fn or float8_e8m0fnu.
        global_scale: float32 [1].
    """
    n, half = codes.shape
    values = table[torch.stack((codes & 0xF, codes >> 4), dim=-1).reshape(n, 2 * half).int()]
    s = scale.to(torch.float32)
    groups = s.shape[1] if s.dim() == 2 else 1
    product = values.reshape(n, groups, -1) * s.reshape(-1, groups, 1) * global_scale
    return product.reshape(n, 2 * half).to(dtype)


def decoder(fmt: str, device: Any) -> Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]:
    """``decode`` for weights of ``fmt`` on ``device``: (codes, scale, global_scale, dtype) -> weight [n, k]."""
    table = torch.tensor(TABLES[fmt], dtype=torch.float32, device=device)

    def run(codes: Tensor, scale: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Tensor:
        return decode(table, codes, scale.view(torch.float8_e8m0fnu) if fmt == "mxfp4" else scale, global_scale, dtype)

    return run


def whole_layer(fmt: str, act: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """(x, codes, scale, global_scale, bias) -> y: decode, ``F.linear``, activation, for ``torch.compile``."""
    table = TABLES[fmt]
    activation = ACTIVATIONS.get(act)

    def forward(x: Tensor, codes: Tensor, scale: Tensor, global_scale: Tensor, bias: Tensor | None) -> Tensor:
        values = torch.tensor(table, dtype=torch.float32, device=x.device)
        scale = scale.view(torch.float8_e8m0fnu) if fmt == "mxfp4" else scale
        y = torch.nn.functional.linear(x, decode(values, codes, scale, global_scale, dtype), bias)
        return y if activation is None else activation(y)

    return forward


@dataclass(slots=True)
class DenseLinear:
    """``F.linear`` then the activation.

    Args:
        each_launch: decode inside the launch instead of once in ``bind``.
    """

    fmt: str
    act: str
    dtype: torch.dtype
    each_launch: bool
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        x, bias = inputs["x"], inputs.get("bias")
        codes, scale, global_scale = inputs["codes"], inputs["scale"], inputs["global_scale"]
        activation = ACTIVATIONS.get(self.act)
        if x.device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
        decoded = decoder(self.fmt, x.device)
        dense = None if self.each_launch else decoded(codes, scale, global_scale, self.dtype)

        def launch() -> Mapping[str, Tensor]:
            w = decoded(codes, scale, global_scale, self.dtype) if dense is None else dense
            y = torch.nn.functional.linear(x, w, bias)
            return {"y": y if activation is None else activation(y)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported: ``unknown_variant``; ``unknown_format``; ``dtype_not_of_variant`` where x has another dtype
    than the variant; and ``compiled_linear.check``'s."""
    x, act = case.text("x"), case.text("act")
    if variant not in ("eager_dequant", "torch_compile", *VARIANT_DTYPES):
        known = ", ".join(("eager_dequant", "torch_compile", *VARIANT_DTYPES))
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {known}")
    if VARIANT_DTYPES.get(variant, x) != x:
        raise Unsupported("dtype_not_of_variant", f"{variant} multiplies {VARIANT_DTYPES[variant]}, x is {x}")
    if case.text("fmt") not in TABLES:
        raise Unsupported("unknown_format", f"fmt={case.text('fmt')} is not one of {', '.join(TABLES)}")
    # Grid weights (small integers or halves times powers of two), zeros and mxfp4's E2M1 times a power of two fit every
    # dtype; any other scale needs more bits than the decoded weight has.
    exact = case.text("dist") in ("grid", "zeros") or case.text("fmt") == "mxfp4"
    roundings: tuple[str, ...] = () if exact else ("fp32",) if x == "fp32" else ("fp32", x)
    if x != "fp32" and device == "cuda":
        roundings += (x,)  # split-K partial sums
    # F.linear's result is stored before the activation reads it; relu of a rounded number needs no second rounding
    stores = (x,) if act in ("gelu", "silu") else ()
    accumulate = "tensor_core" if device == "cuda" and x != "fp32" else "fp32"
    numerics = Numerics(accumulate, operand_roundings=roundings, stores=stores)
    dtype = getattr(torch, TORCH_DTYPE_NAMES[x])
    if variant == "torch_compile":
        compiled_linear.check(case, device)
        return compiled_linear.CompiledLinear(
            compiled_linear.compiled(whole_layer, case.text("fmt"), act, dtype), numerics
        )
    return DenseLinear(case.text("fmt"), act, dtype, variant == "eager_dequant", numerics)
