"""What stands between the matrix products of a decoder block: norms with their residual, rotary positions, gates.

Each kernel computes in float32 and stores once. Bfloat16 is upcast at the load, and rounded by bits when interpreted
(see ``_fp4.py``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vbench.kernels.triton._fp4 import to_output


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) without overflow: exp of a negative number only."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit
def add_norm_kernel(
    x_ptr,  # [rows, width]: the residual so far
    branch_ptr,  # [rows, width]: what is added to it (ADD)
    sum_ptr,  # [rows, width]: their sum, stored (ADD)
    gain_ptr,  # [width]
    shift_ptr,  # [width] (CENTRED)
    y_ptr,  # [rows, width]: the normalised sum
    width,
    eps,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    X: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: r = x + branch, stored; y = LayerNorm (CENTRED) or RMSNorm of the unrounded r."""
    base = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    ok = column < width
    r = tl.load(x_ptr + base + column, mask=ok, other=0.0).to(tl.float32)
    if ADD:
        r += tl.load(branch_ptr + base + column, mask=ok, other=0.0).to(tl.float32)
        tl.store(sum_ptr + base + column, to_output(r, X, NATIVE), mask=ok)
    if CENTRED:
        r = tl.where(ok, r - tl.sum(r, axis=0) / width, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(r * r, axis=0) / width + eps)
    y = r * scale * tl.load(gain_ptr + column, mask=ok, other=0.0).to(tl.float32)
    if CENTRED:
        y += tl.load(shift_ptr + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + base + column, to_output(y, X, NATIVE), mask=ok)


@triton.jit
def rotate_kernel(
    t_ptr,  # [rows, heads * 2 * half], turned in place
    turned_ptr,  # the same memory (an int16 view where bf16 is rounded by bits)
    cos_ptr,  # float32 [positions, half]
    sin_ptr,
    positions,
    heads,
    half,
    X: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one token: elements i and i + half turned by the angle of (row % positions, i)."""
    row, head = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    ok = column < half
    first = (row.to(tl.int64) * heads + head) * (2 * half) + column
    angle = (row % positions) * half + column
    c = tl.load(cos_ptr + angle, mask=ok, other=0.0)
    s = tl.load(sin_ptr + angle, mask=ok, other=0.0)
    a = tl.load(t_ptr + first, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(t_ptr + first + half, mask=ok, other=0.0).to(tl.float32)
    tl.store(turned_ptr + first, to_output(a * c - b * s, X, NATIVE), mask=ok)
    tl.store(turned_ptr + first + half, to_output(b * c + a * s, X, NATIVE), mask=ok)


@triton.jit
def gate_kernel(
    gate_ptr,  # [count]
    up_ptr,  # [count] (GATED)
    y_ptr,  # [count]
    count,
    GATED: tl.constexpr,
    X: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """GATED: y = silu(gate) * up. Else y = gelu(gate) in its tanh form: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3))."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = index < count
    x = tl.load(gate_ptr + index, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        y = x * _sigmoid(x) * tl.load(up_ptr + index, mask=ok, other=0.0).to(tl.float32)
    else:
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    tl.store(y_ptr + index, to_output(y, X, NATIVE), mask=ok)


@triton.jit
def add_kernel(a_ptr, b_ptr, y_ptr, count, X: tl.constexpr, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    """y = a + b, [count] each."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = index < count
    a = tl.load(a_ptr + index, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + index, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, to_output(a + b, X, NATIVE), mask=ok)
