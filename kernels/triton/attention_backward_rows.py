"""What a backward does row by row before and after the products: statistics in, the summed dQ out. Plain Triton.

Both kernels move bytes and nothing else: ``prepare_rows`` reads out and dO, ``finish_dq`` reads a float32 workspace.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
#: Sizes that only count; specialising on them would compile anew for each length.
COUNTS = ["hq", "sq", "sq_padded"]


@triton.jit(do_not_specialize=COUNTS)
def prepare_rows(
    out_ptr, do_ptr, lse_ptr, dlse_ptr, stats_ptr, dq_ptr, hq, sq, sq_padded,
    stride_ob, stride_oh, stride_os, stride_gb, stride_gh, stride_gs, stride_lb, stride_lh, stride_ls,
    stride_mb, stride_mh, stride_ms,
    D: tl.constexpr, ROWS: tl.constexpr, HAS_DLSE: tl.constexpr, ZERO_DQ: tl.constexpr,
):  # fmt: skip
    """lse2 and delta of ROWS rows of one head, and zeros in their part of the dQ workspace.

    Grid: (sq_padded / ROWS * b * hq).

    Args:
        out_ptr, do_ptr: 16-bit [b, hq, sq, D], innermost stride 1. lse_ptr: float32 [b, hq, sq], natural logarithm.
        dlse_ptr: float32 [b, hq, sq], the gradient of lse, read if HAS_DLSE.
        stats_ptr: float32 [b * hq, 2, sq_padded], contiguous: lse2 = lse log2(e), +inf for a row that sees no key and
            for padding; delta = rowsum(out dO) - dlse, 0 for padding.
        dq_ptr: float32 [b * hq, sq_padded, D], contiguous, zeroed if ZERO_DQ.
    """
    blocks = sq_padded // ROWS
    index = (tl.program_id(0) // blocks).to(tl.int64)
    batch = index // hq
    head = index % hq
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    inside = rows < sq
    columns = tl.arange(0, D)
    o_rows = batch * stride_ob + head * stride_oh + rows.to(tl.int64) * stride_os
    g_rows = batch * stride_gb + head * stride_gh + rows.to(tl.int64) * stride_gs
    out = tl.load(out_ptr + o_rows[:, None] + columns[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    grad = tl.load(do_ptr + g_rows[:, None] + columns[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * grad, axis=1)
    if HAS_DLSE:
        m_rows = batch * stride_mb + head * stride_mh + rows.to(tl.int64) * stride_ms
        delta -= tl.load(dlse_ptr + m_rows, mask=inside, other=0.0)
    l_rows = batch * stride_lb + head * stride_lh + rows.to(tl.int64) * stride_ls
    lse = tl.load(lse_ptr + l_rows, mask=inside, other=-float("inf"))
    lse2 = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    stats = index * 2 * sq_padded + rows
    tl.store(stats_ptr + stats, lse2)
    tl.store(stats_ptr + stats + sq_padded, delta)
    if ZERO_DQ:
        offsets = (index * sq_padded + rows)[:, None] * D + columns[None, :]
        tl.store(dq_ptr + offsets, tl.zeros([ROWS, D], tl.float32))


@triton.jit(do_not_specialize=COUNTS)
def finish_dq(
    sums_ptr, dq_ptr, scale, hq, sq, sq_padded, stride_qb, stride_qh, stride_qs, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """dQ [b, hq, sq, D] = scale * sums [b * hq, sq_padded, D], rounded once. Grid: (sq_padded / ROWS * b * hq)."""
    blocks = sq_padded // ROWS
    index = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    sums = tl.load(sums_ptr + (index * sq_padded + rows)[:, None] * D + columns[None, :])
    out = (index // hq) * stride_qb + (index % hq) * stride_qh + rows.to(tl.int64) * stride_qs
    value = (sums * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + out[:, None] + columns[None, :], value, mask=(rows < sq)[:, None])
