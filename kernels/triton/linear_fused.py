"""y = act(x W^T + bias) with W decoded in registers: one kernel for decode (few tokens) and tiled (many) regimes.

The product is computed as W x^T: weights are the left operand, straight from registers after decoding, and tokens the
right one, whose tile may be as narrow as 8. Row scales are applied to the float32 sum (lossless); groups with float32
scales (g128, nf4, wide mxfp4) get their own float32 sums; E2M1 x E4M3 is exact in bf16 and fp16, and E2M1 x E8M0 in
bf16 for the scales that ``packing.E8M0_NARROW_MAX`` admits, so those are formed before the product.

Order of the sum, which every kernel for up to ``linear.SPLIT_MAX_M`` tokens keeps: inside a K block in the order of K,
group after group; blocks front to back; parts of K front to back.

WALK: where the output tiles alone fill the machine, one program sums all parts in turn: the same bits, no workspace.
Split-K: programs of one output tile write float32 partial sums to a workspace; whichever finishes last (an integer
ticket) adds them in split order. No floating-point atomics, so results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vbench.kernels.triton._fp4 import (
    E2M1_DEFERRED,
    INT4_DEFERRED,
    activate,
    e2m1_operands,
    e2m1_scales,
    e2m1_unscaled,
    int4_operands,
    nf4_operands,
    to_output,
)


@triton.jit
def _x_tile(x_ptr, rows_m, row_ok, column, K, stride_xm, EVEN_K: tl.constexpr, UPCAST: tl.constexpr):
    """x^T tile [columns, tokens] starting at ``column``; zero outside."""
    address = x_ptr + rows_m[None, :] * stride_xm + column[:, None]
    if EVEN_K:
        tile = tl.load(address, mask=row_ok[None, :], other=0.0)
    else:
        tile = tl.load(address, mask=row_ok[None, :] & (column[:, None] < K), other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _group_scale(group_at, column, K, GROUP: tl.constexpr):
    """float32 scales of a tile's rows for the group that ``column`` is in; the last one's beyond K."""
    return tl.load(group_at + min(column, K - 1) // GROUP * 64)


# Sizes whose divisibility no address depends on: one compilation serves them all.
@triton.jit(do_not_specialize=["M", "k_blocks", "blocks_per_split"])
def fused_linear_kernel(
    x_ptr,  # [M, K], last stride 1
    codes_ptr,  # int16 [n_tiles, k_blocks, 64, BKW]
    scale_ptr,  # see packing; bytes as int32 words
    global_ptr,  # float32 [1]
    table_ptr,  # float32 [16], nf4 only
    bias_ptr,  # [N] in x's dtype, or unused
    y_ptr,  # [M, N]; int16 view when results are rounded by bits
    partial_ptr,  # float32 [m_tiles, n_tiles, SPLIT, BN, BM]
    ticket_ptr,  # int32 [m_tiles, n_tiles], zero before and after
    M,
    N,
    K,
    stride_xm,
    stride_ym,
    k_blocks,
    blocks_per_split,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,  # columns that share a float32 scale, or 0
    X: tl.constexpr,
    ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BKW: tl.constexpr,
    SPLIT: tl.constexpr,
    WALK: tl.constexpr,  # parts of blocks_per_split blocks that a program sums one after the other; 1 if SPLIT > 1
    EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TWIDDLED: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_SUMS: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
):
    TILE: tl.constexpr = 64
    BK: tl.constexpr = 4 * BKW
    UPCAST: tl.constexpr = INTERPRETED
    n_tiles = tl.cdiv(N, BN)
    m_tiles = tl.cdiv(M, BM)
    # Programs that follow each other share GROUP_M token tiles' worth of weights: they meet them in L2.
    pid = tl.program_id(0)
    pid_s = tl.program_id(1)
    group = pid // (GROUP_M * n_tiles)
    group_rows = min(m_tiles - group * GROUP_M, GROUP_M)
    inner = pid - group * GROUP_M * n_tiles
    pid_m = group * GROUP_M + inner % group_rows
    pid_n = inner // group_rows

    rows = pid_n * BN + tl.arange(0, BN)
    columns = tl.arange(0, BKW)
    rows_m = pid_m * BM + tl.arange(0, BM)
    row_ok = rows_m < M
    rows_m64 = rows_m.to(tl.int64)
    first = pid_s * blocks_per_split
    last = min(first + blocks_per_split * WALK, k_blocks)

    codes_row = (rows // TILE) * (k_blocks * TILE * BKW) + (rows % TILE) * BKW
    codes_at = codes_ptr + codes_row[:, None] + columns[None, :]
    E2M1: tl.constexpr = FORMAT == "nvfp4" or FORMAT == "mxfp4"
    # Columns of a word of scale bytes.
    SPAN: tl.constexpr = 16 if FORMAT == "nvfp4" or BKW < 32 else 32
    if E2M1 and GROUP == 0:
        SCALES: tl.constexpr = BKW // SPAN
        scale_row = (rows // TILE) * (k_blocks * TILE * SCALES) + (rows % TILE) * SCALES
        scale_at = scale_ptr + scale_row[:, None] + tl.arange(0, SCALES)[None, :]
    tl.static_assert(GROUP == 0 or GROUP >= BKW)
    if GROUP > 0:
        k_pad = k_blocks * BK
        group_at = scale_ptr + (rows // TILE) * (tl.cdiv(k_pad, GROUP) * TILE) + rows % TILE
        g0 = _group_scale(group_at, first * BK, k_pad, GROUP)
        g1 = _group_scale(group_at, first * BK + BKW, k_pad, GROUP)
        g2 = _group_scale(group_at, first * BK + 2 * BKW, k_pad, GROUP)
        g3 = _group_scale(group_at, first * BK + 3 * BKW, k_pad, GROUP)

    # BLOCK_SUMS: one sum a K block, added in float32, as a g128 scale needs anyway. It keeps the accumulator of the
    # wgmma out of the loop's carried registers: on sm_90 ptxas otherwise makes each product wait for the one before
    # (its note C7515). Wide token tiles have no registers for a second accumulator and mostly escape that note.
    acc = tl.zeros((BN, BM), tl.float32)
    parts = tl.zeros((BN, BM), tl.float32)
    edge = first + blocks_per_split
    for block in range(first, last):
        if WALK > 1:  # noqa: SIM102  # a constant, and a value of the run: they do not mix in one condition
            # Once a part; the last part is added after the loop.
            if block == edge:
                if INTERPRETED:
                    edge += blocks_per_split
                else:
                    # What the compiler must not run on speculation keeps this a branch, where it would otherwise add
                    # and choose at every block; a barrier would keep it from fetching ahead.
                    edge = tl.inline_asm_elementwise(
                        "add.s32 $0, $1, $2;", "=r,r,r", [edge, blocks_per_split], dtype=tl.int32, is_pure=False, pack=1
                    )
                parts += acc
                acc = tl.zeros((BN, BM), tl.float32)
        packed = tl.load(codes_at + block * (TILE * BKW))
        k0 = block * BK + columns
        x0 = _x_tile(x_ptr, rows_m64, row_ok, k0, K, stride_xm, EVEN_K, UPCAST)
        x1 = _x_tile(x_ptr, rows_m64, row_ok, k0 + BKW, K, stride_xm, EVEN_K, UPCAST)
        x2 = _x_tile(x_ptr, rows_m64, row_ok, k0 + 2 * BKW, K, stride_xm, EVEN_K, UPCAST)
        x3 = _x_tile(x_ptr, rows_m64, row_ok, k0 + 3 * BKW, K, stride_xm, EVEN_K, UPCAST)
        if E2M1:
            if GROUP == 0:
                scales = tl.load(scale_at + block * (TILE * SCALES))
                f0, f1, f2, f3 = e2m1_scales(scales, BN, BKW, SPAN, FORMAT, X, NATIVE, SMALL_SCALES)
                w0, w1, w2, w3 = e2m1_operands(packed, f0, f1, f2, f3, X, NATIVE, TWIDDLED)
            else:
                w0, w1, w2, w3 = e2m1_unscaled(packed, X, NATIVE, TWIDDLED)
        elif FORMAT == "nf4":
            w0, w1, w2, w3 = nf4_operands(packed, table_ptr, X, NATIVE)
        else:
            w0, w1, w2, w3 = int4_operands(packed, X, NATIVE)
        if GROUP > 0:
            # Group scales are loaded a block ahead, so that their latency does not stand in the loop.
            ahead = min(block + 1, last - 1) * BK
            now0, now1, now2, now3 = g0, g1, g2, g3
            g0 = _group_scale(group_at, ahead, k_pad, GROUP)
            g1 = _group_scale(group_at, ahead + BKW, k_pad, GROUP)
            g2 = _group_scale(group_at, ahead + 2 * BKW, k_pad, GROUP)
            g3 = _group_scale(group_at, ahead + 3 * BKW, k_pad, GROUP)
            part = tl.dot(w0, x0, input_precision="ieee")
            if GROUP > BKW:
                part = tl.dot(w1, x1, part, input_precision="ieee")
            else:
                total = part * now0[:, None]
                part = tl.dot(w1, x1, input_precision="ieee")
            if GROUP > 2 * BKW:
                part = tl.dot(w2, x2, part, input_precision="ieee")
            else:
                total = total + part * now1[:, None] if GROUP <= BKW else part * now1[:, None]
                part = tl.dot(w2, x2, input_precision="ieee")
            if GROUP > BKW:
                part = tl.dot(w3, x3, part, input_precision="ieee")
            else:
                total += part * now2[:, None]
                part = tl.dot(w3, x3, input_precision="ieee")
            acc += part * now3[:, None] if GROUP > 2 * BKW else total + part * now3[:, None]
        elif BLOCK_SUMS:
            part = tl.dot(w0, x0, input_precision="ieee")
            part = tl.dot(w1, x1, part, input_precision="ieee")
            part = tl.dot(w2, x2, part, input_precision="ieee")
            part = tl.dot(w3, x3, part, input_precision="ieee")
            acc += part
        else:
            acc = tl.dot(w0, x0, acc, input_precision="ieee")
            acc = tl.dot(w1, x1, acc, input_precision="ieee")
            acc = tl.dot(w2, x2, acc, input_precision="ieee")
            acc = tl.dot(w3, x3, acc, input_precision="ieee")

    finish = True
    if SPLIT > 1:
        tile = pid_m * n_tiles + pid_n
        element = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        workspace = partial_ptr + tile.to(tl.int64) * (SPLIT * BN * BM) + element
        tl.store(workspace + pid_s * (BN * BM), acc, cache_modifier=".cg")
        # All threads' stores must be issued before one thread publishes them with the ticket.
        tl.debug_barrier()
        finish = tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel") == SPLIT - 1
        if finish:
            tl.store(ticket_ptr + tile, 0)
            acc = tl.zeros((BN, BM), tl.float32)
            for split in tl.static_range(SPLIT):
                acc += tl.load(workspace + split * (BN * BM), cache_modifier=".cg")
    if finish:
        value = parts + acc if WALK > 1 else acc
        if NATIVE and X == "bf16" and not E2M1 and FORMAT != "nf4":
            value = value * INT4_DEFERRED
        if FORMAT == "absmax7_row":
            value = value * tl.load(scale_ptr + rows)[:, None]
        elif FORMAT == "absmax7_tensor":
            value = value * tl.load(scale_ptr)
        elif FORMAT == "nvfp4":
            if NATIVE:
                value = value * E2M1_DEFERRED
            value = value * tl.load(global_ptr)
        row_in = rows < N
        if HAS_BIAS:
            bias = tl.load(bias_ptr + rows, mask=row_in, other=0.0).to(tl.float32)
            value = value + bias[:, None]
        value = activate(value, ACT)
        y_at = y_ptr + rows_m64[None, :] * stride_ym + rows[:, None]
        tl.store(y_at, to_output(value, X, not INTERPRETED), mask=row_in[:, None] & row_ok[None, :])
