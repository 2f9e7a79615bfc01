"""The last launch of the Gluon backward: dQ out of its float32 workspace. Plain Triton."""

from __future__ import annotations

import triton
import triton.language as tl

#: Sizes that only count; specialising on them would compile anew for each length.
COUNTS = ["hq", "sq", "sq_padded"]


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
