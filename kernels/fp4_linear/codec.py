"""Encoder and decoder of a weight in plain torch, any device, in slices of rows. Bit for bit what the formats define.

Canonical weight: ``codes`` u8 [n, k/2] (low nibble first), ``scale`` as the format says, ``global_scale`` float32 [1].
E2M1 and E8M0 are OCP Microscaling v1.0's (mxfp4 with its floor rule); nvfp4's scales are torchao's formula; nf4 is
QLoRA's table (arXiv 2305.14314, appendix E), ties to the lower value; absmax7 is an integer -7..7 times absmax / 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from vbench.errors import Unsupported
from vbench.kernels.triton.packing import BYTE_SCALES, GROUPS, e8m0_float

FIELDS = ("codes", "scale", "global_scale")
#: Weights that are worked on at a time; temporaries take some 30 bytes each.
SLICE = 1 << 23
MIN_NORMAL = 2.0**-126
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def table(fmt: str) -> tuple[float, ...]:
    """Value of each of the 16 codes, before scaling."""
    if fmt == "nf4":
        return _NF4
    return (*_E2M1, *(-v for v in _E2M1)) if fmt in BYTE_SCALES else tuple(float(c - 8) for c in range(16))


def _boundaries(fmt: str) -> Tensor:
    """Ascending float32: a value's code (of its magnitude, for E2M1) is the number of these strictly below it.

    An E2M1 tie goes to the even code, so a midpoint below an even code is lowered to the number before it.
    """
    values = _NF4 if fmt == "nf4" else _E2M1
    middle = torch.tensor([(a + b) / 2 for a, b in pairwise(values)], dtype=torch.float64).to(torch.float32)
    if fmt != "nf4":
        middle[1::2] = torch.nextafter(middle[1::2], torch.zeros(()))
    return middle


def slices(n: int, k: int, step: int = 1) -> list[tuple[int, int]]:
    """Row ranges of about SLICE weights, each (but the last) a multiple of ``step`` rows."""
    rows = max(1, SLICE // (k * step)) * step
    return [(start, min(start + rows, n)) for start in range(0, n, rows)]


def check_shape(fmt: str, n: int, k: int) -> None:
    """Raises Unsupported: ``unknown_format``, ``zero_size``, ``k_odd``, ``k_not_multiple_of_block``."""
    if fmt not in GROUPS:
        raise Unsupported("unknown_format", f"format {fmt!r} is not one of {', '.join(GROUPS)}")
    if n < 1 or k < 1:
        raise Unsupported("zero_size", f"n={n}, k={k}: a weight needs at least one element; leave the layer out")
    if k % 2:
        raise Unsupported("k_odd", f"k={k}: two codes share a byte; pad in_features to an even number")
    group = GROUPS[fmt]
    if group > 0 and k % group:
        raise Unsupported("k_not_multiple_of_block", f"k={k} is no multiple of {fmt}'s block of {group}; pad it")


def encode(fmt: str, w: Tensor) -> dict[str, Tensor]:
    """w [n, k] in bf16, fp16 or fp32 -> its canonical weight on w's device.

    Raises:
        Unsupported: ``check_shape``'s, ``weight_dtype``, ``nonfinite_weight``.
    """
    n, k = w.shape
    check_shape(fmt, n, k)
    if w.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise Unsupported("weight_dtype", f"the weight is {w.dtype}; bf16, fp16 and fp32 are encoded")
    parts = slices(n, k)
    whole = torch.stack([w[a:b].abs().amax() for a, b in parts]).amax().float().reshape(1)
    # A maximum passes NaN on, so one number tells of every NaN and infinity.
    if not bool(torch.isfinite(whole)):
        raise Unsupported("nonfinite_weight", "the weight holds NaN or Inf and FP4 has no code for them; clean it")
    global_scale = torch.ones_like(whole)
    if fmt == "nvfp4":
        global_scale = (whole / torch.full_like(whole, 2688.0)).clamp(min=MIN_NORMAL)
    codes, scales = [], []
    for a, b in parts:
        code, scale = _encode_rows(fmt, w[a:b].float(), whole, global_scale)
        codes.append(code[:, 0::2] | (code[:, 1::2] << 4))
        scales.append(scale)
    scale = scales[0] if GROUPS[fmt] == 0 else torch.cat(scales)
    return {"codes": torch.cat(codes), "scale": scale, "global_scale": global_scale}


def _encode_rows(fmt: str, w: Tensor, whole: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes u8 [rows, k] and scales of some rows. Divisors are tensors: a number may become its reciprocal."""
    rows, k = w.shape
    group = GROUPS[fmt]
    blocks = w if group <= 0 else w.reshape(rows, k // group, group)
    absmax = whole if group == 0 else blocks.abs().amax(dim=-1)
    if fmt.startswith("absmax7"):
        scale = (absmax / torch.full_like(absmax, 7.0)).clamp(min=MIN_NORMAL)
        quotient = torch.round(blocks / scale.unsqueeze(-1)).clamp(-7, 7)
        return (quotient + 8).to(torch.uint8).reshape(rows, k), scale
    if fmt == "nf4":
        scale = step = absmax.clamp(min=MIN_NORMAL)
    elif fmt == "mxfp4":
        scale = ((absmax.contiguous().view(torch.int32) >> 23) - 2).clamp(min=0).to(torch.uint8)
        step = e8m0_float(scale)
    else:
        ratio = absmax / torch.full_like(absmax, 6.0) / global_scale
        scale = ratio.clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn)
        step = scale.float() * global_scale
    value = blocks / step.unsqueeze(-1)
    boundaries = _boundaries(fmt).to(w.device)
    if fmt == "nf4":
        code = torch.bucketize(value, boundaries)
    else:
        code = torch.bucketize(value.abs(), boundaries) | (torch.signbit(value).long() << 3)
    return code.to(torch.uint8).reshape(rows, k), scale


def decode(fmt: str, weight: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Dense [n, k]: value x scale x global scale in float32, in that order, rounded once to ``dtype``."""
    codes = weight["codes"]
    n, half = codes.shape
    out = torch.empty(n, 2 * half, dtype=dtype, device=codes.device)
    for a, b in slices(n, 2 * half):
        decode_rows(fmt, {**weight, "codes": codes[a:b], "scale": _rows(fmt, weight["scale"], a, b)}, out[a:b])
    return out


def decode_rows(fmt: str, weight: Mapping[str, Tensor], out: Tensor) -> None:
    """``decode`` of a few rows into ``out`` [rows, k]."""
    rows, k = out.shape
    values = torch.tensor(table(fmt), dtype=torch.float32, device=out.device)
    codes = weight["codes"].int()
    product = values[torch.stack((codes & 0xF, codes >> 4), dim=-1)].reshape(rows, k)
    scale = weight["scale"]
    scale = e8m0_float(scale) if fmt == "mxfp4" else scale.float()
    group = GROUPS[fmt]
    if group > 0:
        product = product.reshape(rows, k // group, group)
    product = product * scale.unsqueeze(-1) * weight["global_scale"]
    out.copy_(product.reshape(rows, k))


def _rows(fmt: str, scale: Tensor, start: int, stop: int) -> Tensor:
    return scale if GROUPS[fmt] == 0 else scale[start:stop]
