"""dQ of the Hopper attention backward without a workspace, the same bits every time. Gluon; it cannot be interpreted.

A program owns 128 query rows; a producer streams K and V, and two consumer warpgroups of 64 rows each keep dQ in
registers and walk the keys in order:

    S = Q K^T      P = exp2(S c - lse2)      dP = dO V^T      dQ += P (dP - delta) K

The consumers share nothing but the stream, so one's exponentials run under the other's products. See
attention_backward_gluon.py for the traps; as there, nothing is in flight where the loop closes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from vbench.kernels.triton.attention_backward_gluon import COUNTS, TILE_LAYOUT, partition_barrier

#: Query rows of a consumer, and of a program.
WORKER_ROWS = gl.constexpr(64)
BLOCK_M = gl.constexpr(128)


@gluon.jit
def _key_blocks(first_row, sk, shift, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Key blocks that the rows of a program see; at least 1."""
    end = gl.minimum(first_row + BLOCK_M + shift, sk) if CAUSAL else sk
    return gl.maximum((end + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _load(desc, smem, full, empty, j, batch, head, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    stage = j % STAGES
    mbarrier.wait(empty.index(stage), ((j // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, j * BLOCK_N, 0], full.index(stage), smem.index(stage))


@gluon.jit
def _produce(
    q_desc, do_desc, k_desc, v_desc, q_smem, do_smem, k_smem, v_smem,
    rows_full, k_full, k_empty, v_full, v_empty,
    batch, head, kv_head, first_row, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for worker in gl.static_range(2):
        row = first_row + worker * WORKER_ROWS
        mbarrier.expect(rows_full.index(worker), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [batch, head, row, 0], rows_full.index(worker), q_smem.index(worker))
        tma.async_copy_global_to_shared(do_desc, [batch, head, row, 0], rows_full.index(worker), do_smem.index(worker))
    for j in range(blocks):
        _load(k_desc, k_smem, k_full, k_empty, j, batch, kv_head, BLOCK_N, STAGES)
        _load(v_desc, v_smem, v_full, v_empty, j, batch, kv_head, BLOCK_N, STAGES)


@gluon.jit
def _issue_scores(
    j, q, do, k_smem, v_smem, k_full, v_full, LAYOUT: gl.constexpr,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """S(j) and dP(j) in flight, in this order."""
    stage = j % STAGES
    zeros = gl.zeros([WORKER_ROWS, BLOCK_N], gl.float32, LAYOUT)
    mbarrier.wait(k_full.index(stage), (j // STAGES) & 1)
    k = k_smem.index(stage)._reinterpret(k_smem.dtype, [BLOCK_N, D], TILE_LAYOUT)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(stage), (j // STAGES) & 1)
    v = v_smem.index(stage)._reinterpret(v_smem.dtype, [BLOCK_N, D], TILE_LAYOUT)
    dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def _differ(
    j, s, dp, lse2, delta, first_row, exponent_scale, sk, shift, v_empty,
    CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """From S(j) and dP(j) in flight, the last groups issued, to dS(j) as float32; V(j) is released."""
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    p = gl.exp2(s * exponent_scale - lse2[:, None])
    partial = (j + 1) * BLOCK_N > sk
    if CAUSAL:
        partial = partial | (first_row + shift < (j + 1) * BLOCK_N - 1)
    if partial:
        layout: gl.constexpr = s.type.layout
        keys = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        limit = gl.full([WORKER_ROWS], sk - 1, gl.int32, gl.SliceLayout(1, layout))
        if CAUSAL:
            rows = first_row + gl.arange(0, WORKER_ROWS, layout=gl.SliceLayout(1, layout))
            limit = gl.minimum(rows + shift, limit)
        p = gl.where(keys[None, :] <= limit[:, None], p, 0.0)
    dp = warpgroup_mma_wait(num_outstanding=0, deps=[dp])
    mbarrier.arrive(v_empty.index(j % STAGES), count=1)
    return p * (dp - delta[:, None])


@gluon.jit
def _consume(
    dq_desc, lse2_ptr, delta_ptr, q_smem, do_smem, k_smem, v_smem, rows_full, k_full, k_empty, v_full, v_empty,
    exponent_scale, scale, batch, head, hq, first_row, blocks, sk, sq_padded, shift,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 query rows."""
    dtype: gl.constexpr = q_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    A_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=DQ_LAYOUT, k_width=2)
    first_row += WORKER * WORKER_ROWS
    rows = first_row + gl.arange(0, WORKER_ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    stats = (batch * hq + head).to(gl.int64) * sq_padded + rows
    lse2 = gl.load(lse2_ptr + stats)
    delta = gl.load(delta_ptr + stats)
    q_block = q_smem.index(WORKER)
    q = q_block._reinterpret(dtype, [WORKER_ROWS, D], TILE_LAYOUT)
    do = do_smem.index(WORKER)._reinterpret(dtype, [WORKER_ROWS, D], TILE_LAYOUT)
    dq = warpgroup_mma_init(gl.zeros([WORKER_ROWS, D], gl.float32, DQ_LAYOUT))
    mbarrier.wait(rows_full.index(WORKER), 0)
    s, dp = _issue_scores(0, q, do, k_smem, v_smem, k_full, v_full, S_LAYOUT, D, BLOCK_N, STAGES)
    ds = _differ(
        0, s, dp, lse2, delta, first_row, exponent_scale, sk, shift, v_empty, CAUSAL, BLOCK_N, STAGES
    )  # fmt: skip
    for j in range(blocks - 1):
        k = k_smem.index(j % STAGES)._reinterpret(dtype, [BLOCK_N, D], TILE_LAYOUT)
        dq = warpgroup_mma(gl.convert_layout(ds.to(dtype), A_LAYOUT), k, dq, is_async=True)
        s, dp = _issue_scores(j + 1, q, do, k_smem, v_smem, k_full, v_full, S_LAYOUT, D, BLOCK_N, STAGES)
        ds = _differ(
            j + 1, s, dp, lse2, delta, first_row, exponent_scale, sk, shift, v_empty, CAUSAL, BLOCK_N, STAGES
        )  # fmt: skip
        # dQ(j) came before S(j + 1), which is done.
        mbarrier.arrive(k_empty.index(j % STAGES), count=1)
    k = k_smem.index((blocks - 1) % STAGES)._reinterpret(dtype, [BLOCK_N, D], TILE_LAYOUT)
    dq = warpgroup_mma(gl.convert_layout(ds.to(dtype), A_LAYOUT), k, dq, is_async=True)
    dq = warpgroup_mma_wait(num_outstanding=0, deps=[dq])
    # Q has been read for the last time by every warp: its memory takes dQ.
    partition_barrier()
    q.store((dq * scale).to(dtype))
    fence_async_shared()
    partition_barrier()
    tma.async_copy_shared_to_global(dq_desc, [batch, head, first_row, 0], q_block)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=COUNTS)
def attention_backward_dq_hopper(
    q_desc, do_desc, k_desc, v_desc, dq_desc, lse2_ptr, delta_ptr,
    exponent_scale, scale, hq, hk, sq, sk, sq_padded, shift,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """dQ of op ``attention_backward``. Grid: (row blocks * b * hq), row blocks fastest, the longest walk first.

    Args:
        q_desc, do_desc, dq_desc: of [b, hq, sq, D], block [1, 1, 64, D]; k_desc, v_desc: of [b, hk, sk, D], block
            [1, 1, BLOCK_N, D]; all 16-bit with the 128-byte swizzle.
        lse2_ptr, delta_ptr: float32 [b * hq, sq_padded]; sq_padded a multiple of 128.
        exponent_scale: log2(e) * scale. shift: row i sees keys j <= i + shift when CAUSAL.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, WORKER_ROWS, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, WORKER_ROWS, D], do_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for worker in gl.static_range(2):
        mbarrier.init(rows_full.index(worker), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    row_blocks = (sq + BLOCK_M - 1) // BLOCK_M
    first_row = (row_blocks - 1 - gl.program_id(0) % row_blocks) * BLOCK_M
    batch = gl.program_id(0) // row_blocks // hq
    head = gl.program_id(0) // row_blocks % hq
    kv_head = head // (hq // hk)
    blocks = _key_blocks(first_row, sk, shift, CAUSAL, BLOCK_N)
    gl.warp_specialize([
        (_produce, (
            q_desc, do_desc, k_desc, v_desc, q_smem, do_smem, k_smem, v_smem,
            rows_full, k_full, k_empty, v_full, v_empty, batch, head, kv_head, first_row, blocks, BLOCK_N, STAGES,
        )),
        (_consume, (
            dq_desc, lse2_ptr, delta_ptr, q_smem, do_smem, k_smem, v_smem, rows_full, k_full, k_empty, v_full, v_empty,
            exponent_scale, scale, batch, head, hq, first_row, blocks, sk, sq_padded, shift,
            D, BLOCK_N, STAGES, CAUSAL, 0,
        )),
        (_consume, (
            dq_desc, lse2_ptr, delta_ptr, q_smem, do_smem, k_smem, v_smem, rows_full, k_full, k_empty, v_full, v_empty,
            exponent_scale, scale, batch, head, hq, first_row, blocks, sk, sq_padded, shift,
            D, BLOCK_N, STAGES, CAUSAL, 1,
        )),
    ], [4, 4], [240, 240])  # fmt: skip
