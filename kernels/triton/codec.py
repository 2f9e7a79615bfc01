"""Encoders and decoders of all formats, bit for bit as the formats define them.

Encoding divides in IEEE float32 (``tl.div_rn``: Triton's ``/`` is not correctly rounded on NVIDIA GPUs), rounds
integers half to even by adding and subtracting 1.5 x 2^23, E2M1 by seven comparisons and NF4 by fifteen. The
tensor-wide maximum takes a first kernel that leaves one maximum per program; every program of the second kernel takes
the maximum of those, so no order and no atomic is involved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton._fp4 import e2m1_value, e4m3_value, e8m0_value, nf4_table, nf4_value, to_output
from vbench.kernels.triton.packing import GROUPS, check_weight
from vbench.kernels.triton.probe import INTERPRETED, check_device
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

#: Programs of the absmax pass at most; each of the second kernel's programs reads that many partial maxima.
MAX_PARTIALS = 1024
ROUND_TO_INTEGER = tl.constexpr(12582912.0)  # 1.5 x 2^23: adding it leaves no fraction bits for |v| < 2^22
#: Encoding -> (format it decodes as, what is added to the float32 bits of a block's absmax before its exponent is
#: taken: mxfp4's scale rules floor, even (up from 1.75), rceil (up from above 1.5), ceil (up from above 1)).
ENCODINGS = {
    **{fmt: (fmt, 0) for fmt in GROUPS},
    "mxfp4_even": ("mxfp4", 1 << 21),
    "mxfp4_rceil": ("mxfp4", (1 << 22) - 1),
    "mxfp4_ceil": ("mxfp4", (1 << 23) - 1),
}
MIN_NORMAL = tl.constexpr(1.1754943508222875e-38)  # 2^-126


@triton.jit
def absmax_partials_kernel(w_ptr, partial_ptr, total, per_program, BLOCK: tl.constexpr):
    """partial[p] = max |w| over elements [p * per_program, (p + 1) * per_program)."""
    start = tl.program_id(0).to(tl.int64) * per_program
    best = tl.zeros((BLOCK,), tl.float32)
    for step in range(0, per_program, BLOCK):
        index = start + step + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + index, mask=index < total, other=0.0).to(tl.float32)
        best = tl.maximum(best, tl.abs(w))
    tl.store(partial_ptr + tl.program_id(0), tl.max(best, axis=0))


@triton.jit
def _tensor_absmax(partial_ptr, count, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    return tl.max(tl.load(partial_ptr + index, mask=index < count, other=0.0), axis=0)


@triton.jit
def _int_code(w, scale):
    """clamp(round-half-even(w / scale), -7, 7) + 8 as int32."""
    q = tl.div_rn(w, scale)
    q = (q + ROUND_TO_INTEGER) - ROUND_TO_INTEGER
    return tl.minimum(tl.maximum(q, -7.0), 7.0).to(tl.int32) + 8


@triton.jit
def _e2m1_code(w, step):
    """E2M1 code of w / step as int32: nearest, ties to the even code, saturating, sign of zero kept."""
    v = tl.div_rn(w, step)
    a = tl.abs(v)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32) + (a >= 1.75).to(tl.int32)
    code += (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32) + (a > 5.0).to(tl.int32)
    return code | ((v.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _pack_pairs(codes, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """int32 codes [ROWS, 2 * BYTES] -> bytes u8 [ROWS, BYTES], element 0 low."""
    low, high = tl.split(tl.reshape(codes, (ROWS, BYTES, 2)))
    return (low | (high << 4)).to(tl.uint8)


@triton.jit
def encode_int_kernel(
    w_ptr,  # [n, k] contiguous
    codes_ptr,  # u8 [n, k/2]
    scale_ptr,  # float32 [1], [n] or [n, k/128]
    global_ptr,  # float32 [1]
    partial_ptr,  # float32 [count]: partial maxima (tensor scale only)
    count,
    n,
    k,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """absmax7. GROUP 0: one scale, from the partial maxima; -1: one a row, read twice; else one a BLOCK_K of a row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = (rows < n)[:, None]
    base = rows.to(tl.int64)[:, None] * k
    if GROUP == 0:
        absmax = tl.zeros((ROWS,), tl.float32) + _tensor_absmax(partial_ptr, count, COUNT)
    else:
        absmax = tl.zeros((ROWS,), tl.float32)
    if GROUP == -1:
        best = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for start in range(0, k, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            w = tl.load(w_ptr + base + column[None, :], mask=row_ok & (column < k)[None, :], other=0.0).to(tl.float32)
            best = tl.maximum(best, tl.abs(w))
        absmax = tl.max(best, axis=1)
    scale = tl.maximum(tl.div_rn(absmax, 7.0), MIN_NORMAL)
    if GROUP <= 0:
        first, last = tl.program_id(1) * 0, k
    else:
        first = tl.program_id(1) * BLOCK_K
        last = first + BLOCK_K
    if GROUP == 0:
        first = tl.program_id(1) * BLOCK_K
        last = min(first + BLOCK_K, k)
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(scale_ptr, tl.max(scale, axis=0))
    if GROUP == -1:
        tl.store(scale_ptr + rows, scale, mask=rows < n)
    for start in range(first, last, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + base + column[None, :], mask=row_ok & (column < k)[None, :], other=0.0).to(tl.float32)
        if GROUP > 0:
            scale = tl.maximum(tl.div_rn(tl.max(tl.abs(w), axis=1), 7.0), MIN_NORMAL)
            tl.store(scale_ptr + rows.to(tl.int64) * (k // GROUP) + tl.program_id(1), scale, mask=rows < n)
        packed = _pack_pairs(_int_code(w, scale[:, None]), ROWS, BLOCK_K // 2)
        pair = start // 2 + tl.arange(0, BLOCK_K // 2)
        tl.store(
            codes_ptr + rows.to(tl.int64)[:, None] * (k // 2) + pair[None, :],
            packed,
            mask=row_ok & (pair < k // 2)[None, :],
        )
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(global_ptr, 1.0)


@triton.jit
def _nf4_code(v):
    """NF4 code as int32: the number of thresholds (midpoints of table neighbours, in float32) strictly below v."""
    code = (v > -0.8480963706970215).to(tl.int32) + (v > -0.6106328964233398).to(tl.int32)
    code += (v > -0.4599952697753906).to(tl.int32) + (v > -0.33967941999435425).to(tl.int32)
    code += (v > -0.23460739850997925).to(tl.int32) + (v > -0.13791173696517944).to(tl.int32)
    code += (v > -0.045525018125772476).to(tl.int32) + (v > 0.03979014977812767).to(tl.int32)
    code += (v > 0.120255246758461).to(tl.int32) + (v > 0.2035212516784668).to(tl.int32)
    code += (v > 0.2920137643814087).to(tl.int32) + (v > 0.3893125355243683).to(tl.int32)
    code += (v > 0.5016634464263916).to(tl.int32) + (v > 0.6427869200706482).to(tl.int32)
    code += (v > 0.8614784479141235).to(tl.int32)
    return code


@triton.jit
def encode_blocks_kernel(
    w_ptr,  # [blocks, GROUP]: the weight, contiguous
    codes_ptr,  # u8 [blocks, GROUP/2]
    scale_ptr,  # [blocks]: u8 view of E4M3 (nvfp4), E8M0 bytes (mxfp4) or float32 (nf4)
    global_ptr,  # float32 [1]
    partial_ptr,  # float32 [count]: partial maxima (nvfp4 only)
    count,
    blocks,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """nvfp4, mxfp4 and nf4: blocks along K with a scale of their own; see the formats' definitions.

    ROUNDING: mxfp4's scale rule, see ENCODINGS.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    ok = block < blocks
    element = tl.arange(0, GROUP)
    w = tl.load(w_ptr + block[:, None] * GROUP + element[None, :], mask=ok[:, None], other=0.0).to(tl.float32)
    absmax = tl.max(tl.abs(w), axis=1)
    step = 1.0
    if FORMAT == "nvfp4":
        step = tl.maximum(tl.div_rn(_tensor_absmax(partial_ptr, count, COUNT), 2688.0), MIN_NORMAL)
        ratio = tl.div_rn(tl.div_rn(absmax, 6.0), step)
        bits = tl.minimum(tl.maximum(ratio, 0.015625), 448.0).to(tl.int32, bitcast=True)
        # Round to 3 mantissa bits, half to even; the value is in E4M3's normal range, so only the bias differs.
        byte = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        codes = _e2m1_code(w, (e4m3_value(byte) * step)[:, None])
        tl.store(scale_ptr + block, byte.to(tl.uint8), mask=ok)
    elif FORMAT == "mxfp4":
        byte = tl.maximum(((absmax.to(tl.int32, bitcast=True) + ROUNDING) >> 23) - 2, 0)
        codes = _e2m1_code(w, e8m0_value(byte)[:, None])
        tl.store(scale_ptr + block, byte.to(tl.uint8), mask=ok)
    else:
        scale = tl.maximum(absmax, MIN_NORMAL)
        codes = _nf4_code(tl.div_rn(w, scale[:, None]))
        tl.store(scale_ptr + block, scale, mask=ok)
    packed = _pack_pairs(codes, BLOCKS, GROUP // 2)
    pair = tl.arange(0, GROUP // 2)
    tl.store(codes_ptr + block[:, None] * (GROUP // 2) + pair[None, :], packed, mask=ok[:, None])
    if tl.program_id(0) == 0:
        tl.store(global_ptr, step)


@triton.jit
def decode_kernel(
    codes_ptr,  # u8 [rows, width/2]
    scale_ptr,  # float32, u8 view of E4M3 or E8M0 bytes: [rows], or one for all
    global_ptr,  # float32 [1]
    table_ptr,  # float32 [16], nf4 only
    y_ptr,  # [rows, width]; int16 view when rounded by bits
    row_count,
    width,
    ONE_SCALE: tl.constexpr,
    FORMAT: tl.constexpr,
    Y: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """fl_y(fl32(value x scale x global)), the product in that order. A row is what shares a scale."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    pair = (tl.program_id(1) * PAIRS + tl.arange(0, PAIRS))[None, :]
    row_ok = row < row_count
    ok = row_ok & (pair < width // 2)
    byte = tl.load(codes_ptr + row * (width // 2) + pair, mask=ok, other=0).to(tl.int32)
    if FORMAT == "nvfp4":
        low, high = e2m1_value(byte & 0xF), e2m1_value(byte >> 4)
        scale = e4m3_value(tl.load(scale_ptr + row, mask=row_ok, other=0).to(tl.int32))
        factor = tl.load(global_ptr)
        low, high = low * scale * factor, high * scale * factor
    elif FORMAT == "mxfp4":
        scale = e8m0_value(tl.load(scale_ptr + row, mask=row_ok, other=0).to(tl.int32))
        low, high = e2m1_value(byte & 0xF) * scale, e2m1_value(byte >> 4) * scale
    elif FORMAT == "nf4":
        scale = tl.load(scale_ptr + row, mask=row_ok, other=0.0)
        low, high = nf4_value(byte & 0xF, table_ptr) * scale, nf4_value(byte >> 4, table_ptr) * scale
    else:
        # The nibble as the last bits of 2^23, minus 2^23 + 8: exact, and cheaper than converting an integer.
        low = ((byte & 0xF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        high = ((byte >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
        scale = tl.load(scale_ptr) if ONE_SCALE else tl.load(scale_ptr + row, mask=row_ok, other=0.0)
        low, high = low * scale, high * scale
    value = tl.reshape(tl.join(low, high), (ROWS, 2 * PAIRS))
    column = tl.program_id(1) * (2 * PAIRS) + tl.arange(0, 2 * PAIRS)[None, :]
    tl.store(y_ptr + row * width + column, to_output(value, Y, not INTERPRETED), mask=row_ok & (column < width))


def _contiguous(name: str, t: Any, shape: tuple[int, ...], device: Device) -> None:
    if t.device.type != device:
        raise Unsupported("wrong_device", f"{name} is on {t.device}, the kernel was made for {device}")
    if tuple(t.shape) != shape:
        raise Unsupported("weight_shape", f"{name} is {tuple(t.shape)}, the case says {shape}")
    if not t.is_contiguous():
        raise Unsupported("not_contiguous", f"{name} must be contiguous; call .contiguous()")


def _stored(t: Any, y: str) -> Any:
    """The tensor a kernel writes: an int16 view where bf16 is rounded by bits (interpreter)."""
    return t.view(torch.int16) if INTERPRETED and y == "bf16" else t


class QuantizeKernel:
    """fp4_quantize of one case. Exact, deterministic."""

    numerics = Numerics("fp32")
    produces = ("codes", "scale", "global_scale")
    deterministic = True

    def __init__(self, case: Case, device: Device) -> None:
        self.device: Device = device
        self.fmt, self.rounding = ENCODINGS[case.text("fmt")]
        self.w = case.text("w")
        self.n, self.k = case.axis("n"), case.axis("k")

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """``w`` [n, k] finite, in the case's dtype. Writes codes, scale, global_scale.

        Raises:
            Unsupported: ``wrong_device``, ``weight_shape``, ``weight_dtype``, ``not_contiguous``, ``nonfinite_weight``.
        """
        w, n, k, group = inputs["w"], self.n, self.k, GROUPS[self.fmt]
        _contiguous("w", w, (n, k), self.device)
        if w.dtype != getattr(torch, TORCH_DTYPE_NAMES[self.w]):
            raise Unsupported("weight_dtype", f"w is {w.dtype}, the case says {self.w}")
        if not bool(torch.isfinite(w).all()):
            raise Unsupported("nonfinite_weight", "the weight holds NaN or Inf and FP4 has no code for them")
        codes, scale, global_scale = out["codes"], out["scale"], out["global_scale"]
        total = n * k
        # Few large programs: the second kernel reads every partial maximum.
        block = 64 if INTERPRETED and total < 4096 else 4096
        per_program = triton.cdiv(triton.cdiv(total, MAX_PARTIALS), block) * block
        count = triton.cdiv(total, per_program)
        count_pad = max(16, triton.next_power_of_2(count))
        partial = torch.empty(count, dtype=torch.float32, device=w.device)
        needs_absmax = group == 0 or self.fmt == "nvfp4"

        def launch() -> None:
            if needs_absmax:
                absmax_partials_kernel[(count,)](w, partial, total, per_program, BLOCK=block, num_warps=8)
            if self.fmt in ("nvfp4", "mxfp4", "nf4"):
                blocks = total // group
                per = 16 if INTERPRETED and blocks < 256 else 4096 // group
                encode_blocks_kernel[(triton.cdiv(blocks, per),)](
                    w, codes, scale.view(torch.uint8) if self.fmt == "nvfp4" else scale, global_scale, partial, count,
                    blocks, FORMAT=self.fmt, GROUP=group, ROUNDING=self.rounding, BLOCKS=per, COUNT=count_pad,
                    num_warps=4,
                )  # fmt: skip
                return
            block_k, rows = (128, 32) if group == 128 else (1024, 1) if group == -1 else (256, 16)
            if INTERPRETED:
                block_k = min(block_k, max(16, triton.next_power_of_2(k)))
            grid = (triton.cdiv(n, rows), 1 if group == -1 else triton.cdiv(k, block_k))
            encode_int_kernel[grid](
                w, codes, scale, global_scale, partial, count, n, k,
                GROUP=group, BLOCK_K=block_k, ROWS=rows, COUNT=count_pad, num_warps=4,
            )  # fmt: skip

        return launch


class DequantizeKernel:
    """fp4_dequantize of one case. Exact, deterministic."""

    numerics = Numerics("fp32")
    produces = ("weight",)
    deterministic = True

    def __init__(self, case: Case, device: Device) -> None:
        self.device: Device = device
        self.fmt, self.y = case.text("fmt"), case.text("y")
        self.n, self.k = case.axis("n"), case.axis("k")

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """``codes``, ``scale``, ``global_scale`` of the case's format. Writes weight [n, k].

        Raises:
            Unsupported: ``wrong_device``, ``weight_shape``, ``weight_dtype``, ``scale_not_finite_positive``.
        """
        for name in ("codes", "scale", "global_scale"):
            _contiguous(name, inputs[name], tuple(inputs[name].shape), self.device)
        check_weight(self.fmt, inputs, self.n, self.k, nan_scales=True)
        weight = _stored(out["weight"], self.y)
        launcher = decode_launcher(self.fmt, self.y, inputs, weight, self.n, self.k)

        def launch() -> None:
            launcher()

        return launch


def decode_launcher(
    fmt: str,
    y: str,
    inputs: Mapping[str, Any],
    weight: Any,
    n: int,
    k: int,
    tile: tuple[int, int, int] | None = None,
) -> Launch:
    """A launch that decodes rows of a canonical weight into ``weight`` [n, k] (int16 view of bf16 when interpreted).

    The weight is seen as rows that share a scale: its own rows, or its groups, which are contiguous.

    Args:
        tile: rows, code bytes of a row, and warps of a program.
    """
    codes, scale, global_scale = inputs["codes"], inputs["scale"], inputs["global_scale"]
    group = GROUPS[fmt]
    values = nf4_table(weight.device) if fmt == "nf4" else global_scale
    if fmt == "nvfp4":
        scale = scale.view(torch.uint8)
    rows, width = (n * k // group, group) if group > 0 else (n, k)
    if tile is None:
        tile = (1024 // (width // 2), width // 2, 4) if group > 0 else (2, 512, 8)
        if INTERPRETED:
            tile = (min(64, triton.next_power_of_2(rows)), min(512, max(8, triton.next_power_of_2(width // 2))), 4)
    per_rows, pairs, warps = tile
    grid = (triton.cdiv(rows, per_rows), triton.cdiv(width // 2, pairs))

    def launch() -> None:
        decode_kernel[grid](
            codes, scale, global_scale, values, weight, rows, width,
            ONE_SCALE=group == 0, FORMAT=fmt, Y=y, INTERPRETED=INTERPRETED,
            ROWS=per_rows, PAIRS=pairs, num_warps=warps,
        )  # fmt: skip

    return launch


def _check_case(case: Case) -> None:
    n, k, group = case.axis("n"), case.axis("k"), GROUPS[ENCODINGS[case.text("fmt")][0]]
    if n * k == 0:
        raise Unsupported("zero_size", f"n={n}, k={k}: nothing to encode")
    if k % 2:
        raise Unsupported("k_odd", f"k={k}: two codes share a byte")
    if group > 0 and k % group:
        raise Unsupported("k_not_multiple_of_block", f"k={k} is no multiple of {group}")
    if k >= 2**31 or n >= 2**31:
        raise Unsupported("too_large", f"n={n}, k={k}: each must fit 31 bits")


def make_quantize(case: Case, variant: str, device: Device) -> QuantizeKernel:
    """Factory of fp4_quantize. Raises Unsupported: see ``_check_case`` and ``probe.check_device``."""
    check_device(device)
    _check_case(case)
    return QuantizeKernel(case, device)


def make_dequantize(case: Case, variant: str, device: Device) -> DequantizeKernel:
    """Factory of fp4_dequantize. Raises Unsupported: see ``_check_case`` and ``probe.check_device``."""
    check_device(device)
    _check_case(case)
    return DequantizeKernel(case, device)
