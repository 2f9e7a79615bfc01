"""The last launch of the Gluon backward: dQ out of its float32 workspace. Plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl

#: Sizes that only count; specialising on them would compile anew for each length.
COUNTS = ["hq", "sq", "sq_padded"]


@triton.jit(do_not_specialize=COUNTS)
def finish_dq(
    sums_ptr, dq_ptr, scale, hq, sq, sq_padded, stride_qb, stride_qh, stride_qs, D: tl.constexpr
):  # fmt: skip
    """dQ [b, hq, sq, D] = scale * sums, rounded once. Grid: (sq_padded / 64 * b * hq).

    Args:
        sums_ptr: float32 [b * hq, sq_padded, D] in panels of 64 x 64, those of the same rows together, each with axes
            (column / 8, row / 16, row % 8, column % 8 / 2, row % 16 / 8, column % 2), the order of a wgmma
            accumulator's registers. sq_padded is a multiple of 64.
    """
    ROWS: tl.constexpr = 64
    blocks = sq_padded // ROWS
    index = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    first = tl.program_id(0).to(tl.int64) * (ROWS * D)
    flat = tl.load(sums_ptr + first + tl.arange(0, ROWS * D))
    axes = tl.reshape(flat, (D // 64, 8, 4, 8, 4, 2, 2))
    sums = tl.reshape(tl.permute(axes, (2, 5, 3, 0, 1, 4, 6)), (ROWS, D))
    out = (index // hq) * stride_qb + (index % hq) * stride_qh + rows.to(tl.int64) * stride_qs
    value = (sums * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + out[:, None] + columns[None, :], value, mask=(rows < sq)[:, None])
