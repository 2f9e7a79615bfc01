"""The walk of attention_backward_gluon.py by two independent consumers of 64 keys each, with dQ. Gluon.

A producer issues the copies. Each consumer warpgroup runs ahead of the other by up to a tile, so that one's
exponentials run under the other's products. They meet once a tile, since dQ = dS K sums over the keys of both: each
writes its dS to shared memory, announces it, and multiplies both dS for its half of dQ (columns at head dim 128, rows
at 64). The half is added to a float32 workspace by the copy engine (a bulk reduction in the L2 cache), where tiles of
different programs meet in any order: dQ's last bits change from run to run. Without COMPUTE_DQ all that falls away.

dS is double-buffered, and then one barrier a tile is enough: who has seen both dS(j) knows that the other has written
dS(j), hence finished dQ(j - 1), hence read the buffer that dS(j + 1) goes to. dK, which needs nothing of the other, is
issued before that barrier.

The workspace of dQ holds panels of 64 x 64 in the order of the accumulator's registers (attention_backward_finish puts
them back), so that they go to shared memory in 16-byte stores without bank conflicts.

EARLY: dS(j) is announced under dV(j), where the step that made it ends, instead of after dV(j), where the next begins
    (and where ptxas waits for dV(j) before it even works dS(j) out). It is carried around the loop in 16 bits.
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

from vbench.kernels.triton.attention_backward_gluon import (
    COUNTS,
    TILE_LAYOUT,
    _issue_scores,
    _load_do,
    _load_q,
    _opaque_zero,
    _range_of_tiles,
    _reduce_add,
    _tile,
    _weigh,
    partition_barrier,
)

#: Keys of a consumer, and side of the square panels that dQ is multiplied in.
KEYS = gl.constexpr(64)
PANEL = gl.constexpr(64)
#: A panel of dQ as plain memory, in the order of its axes.
FLAT_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [5, 4, 3, 2, 1, 0]))


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, do_desc, stats_desc, q_smem, kv_smem, do_smem, stats_smem,
    k_full, v_full, q_full, q_empty, do_full, do_empty,
    batch, kv_head, first_key, first, tiles, hq, per_kv,
    BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
):  # fmt: skip
    """Everything the consumers read, in the order they read it."""
    mbarrier.expect(k_full, 2 * k_desc.block_type.nbytes)
    for worker in gl.static_range(2):
        row = first_key + worker * KEYS
        tma.async_copy_global_to_shared(k_desc, [batch, kv_head, row, 0], k_full, kv_smem.index(worker))
    head = kv_head * per_kv
    block = first
    for j in range(per_kv * tiles):
        mbarrier.wait(q_empty.index(j % Q_STAGES), ((j // Q_STAGES) & 1) ^ 1)
        _load_q(q_desc, q_smem, q_full, j, batch, head, block, BLOCK_M, Q_STAGES, True)
        if j == 0:
            mbarrier.expect(v_full, 2 * v_desc.block_type.nbytes)
            for worker in gl.static_range(2):
                row = first_key + worker * KEYS
                tma.async_copy_global_to_shared(v_desc, [batch, kv_head, row, 0], v_full, kv_smem.index(2 + worker))
        mbarrier.wait(do_empty.index(j % DO_STAGES), ((j // DO_STAGES) & 1) ^ 1)
        _load_do(do_desc, stats_desc, do_smem, stats_smem, do_full, j, batch, head, hq, block, BLOCK_M, DO_STAGES, True)
        head, block = _turn(head, block, first, first + tiles)


@gluon.jit
def _turn(head, block, first, end):
    """The tile after (head, block) in a walk of tiles [first, end) of one head after another."""
    following = block + 1
    return gl.where(following == end, head + 1, head), gl.where(following == end, first, following)


@gluon.jit
def _panel(smem, index, panel, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """64 of the columns of a [ROWS, COLUMNS] block: contiguous memory in the 128-byte swizzle."""
    return smem.index(index)._reinterpret(smem.dtype, [COLUMNS // PANEL, ROWS, PANEL], TILE_LAYOUT).index(panel)


@gluon.jit
def _announce(j, ds, ds_smem, ds_full, BLOCK_M: gl.constexpr, WORKER: gl.constexpr):
    """dS(j), float32 or rounded, to shared memory for both consumers."""
    _tile(ds_smem, (j & 1) * 2 + WORKER, KEYS, BLOCK_M).store(ds.to(ds_smem.dtype))
    fence_async_shared()
    # The copy engine has read the last dQ; with the barrier every thread knows, and knows that dS is written.
    tma.store_wait(pendings=0)
    partition_barrier()
    mbarrier.arrive(ds_full, count=1)


@gluon.jit
def _issue_gradients(
    j, zero, ds, dk, q_smem, kv_smem, ds_smem, ds_full,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, COMPUTE_DQ: gl.constexpr, EARLY: gl.constexpr,
    KV_LAYOUT: gl.constexpr, DQ_LAYOUT: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """dK(j) and dQ(j), this consumer's half, in flight in this order."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=KV_LAYOUT, k_width=2)
    if COMPUTE_DQ and not EARLY:
        _announce(j, ds, ds_smem, ds_full, BLOCK_M, WORKER)
    q = _tile(q_smem, j % STAGES, BLOCK_M, D)
    dk = warpgroup_mma(gl.convert_layout(ds.to(q_smem.dtype), P_LAYOUT), q, dk, is_async=True)
    zeros = gl.zeros([PANEL, PANEL], gl.float32, DQ_LAYOUT)
    dq = warpgroup_mma_init(zeros)
    if COMPUTE_DQ:
        pair = (j & 1) * 2
        mbarrier.wait(ds_full, j & 1)
        ds_panel: gl.constexpr = WORKER if BLOCK_M == 128 else 0
        k_panel: gl.constexpr = WORKER if D == 128 else 0
        ds_0 = _panel(ds_smem, pair, ds_panel, KEYS, BLOCK_M).permute((1, 0))
        dq = warpgroup_mma(ds_0, _panel(kv_smem, zero, k_panel, KEYS, D), zeros, use_acc=False, is_async=True)
        ds_1 = _panel(ds_smem, pair + 1, ds_panel, KEYS, BLOCK_M).permute((1, 0))
        dq = warpgroup_mma(ds_1, _panel(kv_smem, zero + 1, k_panel, KEYS, D), dq, is_async=True)
    return dq, dk


@gluon.jit
def _add_dq(
    dq, outstanding: gl.constexpr, row, dq_desc, dq_smem,
    D: gl.constexpr, COMPUTE_DQ: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """This consumer's half of dQ to the workspace; ``outstanding`` groups were issued after it. Always a barrier.

    ``row``: of [b * hq * sq_padded].
    """
    if COMPUTE_DQ:
        dq = warpgroup_mma_wait(num_outstanding=outstanding, deps=[dq])
        half = dq_smem.index(WORKER)
        # Row = 16 warp + 8 half + lane / 4, column = 8 group + 2 (lane % 4) + one: a thread's four values of a group
        # become neighbours, then its lanes, then the warps.
        parts = dq.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5))
        half._reinterpret(gl.float32, [8, 4, 8, 4, 2, 2], FLAT_LAYOUT).store(parts)
        fence_async_shared()
        partition_barrier()
        # A panel of 64 x 64 is 32 rows of 128 floats.
        panel = row // PANEL * (D // PANEL) + WORKER
        _reduce_add(dq_desc, [panel * 32, 0], half._reinterpret(gl.float32, [32, 128], dq_desc.layout))
    else:
        partition_barrier()


@gluon.jit
def _step(
    j, head, block, ds, dk, dv,
    dq_desc, q_smem, kv_smem, do_smem, stats_smem, ds_smem, dq_smem,
    q_full, q_empty, do_full, do_empty, ds_full,
    exponent_scale, batch, first_key, first, tiles, hq, sk, sq_padded, shift,
    D: gl.constexpr, BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    COMPUTE_DQ: gl.constexpr, EARLY: gl.constexpr,
    S_LAYOUT: gl.constexpr, KV_LAYOUT: gl.constexpr, DQ_LAYOUT: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """From dS^T(j) to dS^T(j + 1)."""
    zero = _opaque_zero(j)
    k = _tile(kv_smem, zero + WORKER, KEYS, D)
    v = _tile(kv_smem, zero + (2 + WORKER), KEYS, D)
    dq, dk = _issue_gradients(
        j, zero, ds, dk, q_smem, kv_smem, ds_smem, ds_full,
        D, BLOCK_M, Q_STAGES, COMPUTE_DQ, EARLY, KV_LAYOUT, DQ_LAYOUT, WORKER,
    )  # fmt: skip
    s = _issue_scores(j + 1, k, q_smem, q_full, S_LAYOUT, D, BLOCK_M, Q_STAGES)
    row = (batch * hq + head) * sq_padded + block * BLOCK_M
    _add_dq(dq, 1, row, dq_desc, dq_smem, D, COMPUTE_DQ, WORKER)
    # Every thread has passed a barrier since dV(j), and since the last step's S(j), hence dK(j - 1), were done.
    if j > 0:
        mbarrier.arrive(q_empty.index((j - 1) % Q_STAGES), count=1)
    mbarrier.arrive(do_empty.index(j % DO_STAGES), count=1)
    head, block = _turn(head, block, first, first + tiles)
    ds, dv = _weigh(
        j + 1, s, dv, block * BLOCK_M, v, do_smem, stats_smem, do_full, exponent_scale, first_key, sk, shift,
        D, BLOCK_M, DO_STAGES, CAUSAL, KV_LAYOUT,
    )  # fmt: skip
    if COMPUTE_DQ and EARLY:
        ds = ds.to(q_smem.dtype)
        _announce(j + 1, ds, ds_smem, ds_full, BLOCK_M, WORKER)
    # The weights of dV must not stay in use around the loop: ptxas finds no registers for that.
    dv = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[dv]))
    return head, block, ds, dk, dv


@gluon.jit
def _consume(
    dq_desc, dk_desc, dv_desc, q_smem, kv_smem, do_smem, stats_smem, ds_smem, dq_smem,
    k_full, v_full, q_full, q_empty, do_full, do_empty, ds_full,
    exponent_scale, scale, batch, kv_head, first_key, first, tiles, hq, per_kv, sk, sq_padded, shift,
    D: gl.constexpr, BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, COMPUTE_DQ: gl.constexpr, EARLY: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 keys."""
    dtype: gl.constexpr = q_smem.dtype
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    DQ_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PANEL, 16])
    first_key += WORKER * KEYS
    # At least 1.
    total = per_kv * tiles
    head = kv_head * per_kv
    block = first
    kv_zeros = gl.zeros([KEYS, D], gl.float32, KV_LAYOUT)
    dk = warpgroup_mma_init(kv_zeros)
    dv = warpgroup_mma_init(kv_zeros)
    mbarrier.wait(k_full, 0)
    s = _issue_scores(0, _tile(kv_smem, WORKER, KEYS, D), q_smem, q_full, S_LAYOUT, D, BLOCK_M, Q_STAGES)
    mbarrier.wait(v_full, 0)
    ds, dv = _weigh(
        0, s, dv, block * BLOCK_M, _tile(kv_smem, 2 + WORKER, KEYS, D), do_smem, stats_smem, do_full,
        exponent_scale, first_key, sk, shift, D, BLOCK_M, DO_STAGES, CAUSAL, KV_LAYOUT,
    )  # fmt: skip
    if COMPUTE_DQ and EARLY:
        ds = ds.to(dtype)
        _announce(0, ds, ds_smem, ds_full, BLOCK_M, WORKER)
    dv = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[dv]))
    for j in range(total - 1):
        head, block, ds, dk, dv = _step(
            j, head, block, ds, dk, dv,
            dq_desc, q_smem, kv_smem, do_smem, stats_smem, ds_smem, dq_smem,
            q_full, q_empty, do_full, do_empty, ds_full,
            exponent_scale, batch, first_key, first, tiles, hq, sk, sq_padded, shift,
            D, BLOCK_M, Q_STAGES, DO_STAGES, CAUSAL, COMPUTE_DQ, EARLY, S_LAYOUT, KV_LAYOUT, DQ_LAYOUT, WORKER,
        )  # fmt: skip
    dq, dk = _issue_gradients(
        total - 1, 0, ds, dk, q_smem, kv_smem, ds_smem, ds_full,
        D, BLOCK_M, Q_STAGES, COMPUTE_DQ, EARLY, KV_LAYOUT, DQ_LAYOUT, WORKER,
    )  # fmt: skip
    row = (batch * hq + head) * sq_padded + block * BLOCK_M
    _add_dq(dq, 0, row, dq_desc, dq_smem, D, COMPUTE_DQ, WORKER)
    dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=[dk, dv])
    # This consumer alone reads its V, and has for the last time; its K the other may still read. dV and dK take turns.
    v_block = kv_smem.index(2 + WORKER)
    v = v_block._reinterpret(dtype, [KEYS, D], TILE_LAYOUT)
    partition_barrier()
    v.store(dv.to(dtype))
    fence_async_shared()
    partition_barrier()
    tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, first_key, 0], v_block)
    dk = (dk * scale).to(dtype)
    tma.store_wait(pendings=0)
    partition_barrier()
    v.store(dk)
    fence_async_shared()
    partition_barrier()
    tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, first_key, 0], v_block)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=COUNTS)
def attention_backward_pair_hopper(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dq_desc, dk_desc, dv_desc,
    exponent_scale, scale, hq, hk, sq, sk, sq_padded, shift,
    D: gl.constexpr, BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, COMPUTE_DQ: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """dK, dV and the sums of dQ as ``attention_backward_hopper`` has them, but K, V, dK and dV move in blocks
    [1, 1, 64, D].

    Args:
        dq_desc: of float32 [b * hq * sq_padded * D / 128, 128], zero before the launch, block [32, 128], no swizzle:
            panel (rows / 64, columns / 64) after panel, each in the order that ``attention_backward_finish`` reads.
            Unscaled sums. Any descriptor, unused, without COMPUTE_DQ.
        sq_padded: sq rounded up to BLOCK_M.
        EARLY: see above.
    """
    gl.static_assert((D == 128 and BLOCK_M == 64) or (D == 64 and BLOCK_M == 128), "dQ has two halves of 64 x 64")
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [DO_STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    # K of consumer 0 and 1, then V of 0 and 1.
    kv_smem = gl.allocate_shared_memory(dtype, [4, 1, 1, KEYS, D], k_desc.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [DO_STAGES, 2, 1, BLOCK_M], stats_desc.layout)
    if COMPUTE_DQ:
        ds_smem = gl.allocate_shared_memory(dtype, [4, KEYS, BLOCK_M], TILE_LAYOUT)
        dq_smem = gl.allocate_shared_memory(gl.float32, [2, PANEL, PANEL], dq_desc.layout)
    else:
        ds_smem = q_smem
        dq_smem = q_smem
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    do_empty = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(ds_full, count=2)
    for stage in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(stage), count=1)
        mbarrier.init(q_empty.index(stage), count=2)
    for stage in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(stage), count=1)
        mbarrier.init(do_empty.index(stage), count=2)
    fence_async_shared()

    key_blocks = (sk + 2 * KEYS - 1) // (2 * KEYS)
    first_key = (gl.program_id(0) % key_blocks) * (2 * KEYS)
    batch = gl.program_id(0) // key_blocks // hk
    kv_head = gl.program_id(0) // key_blocks % hk
    per_kv = hq // hk
    first, tiles = _range_of_tiles(first_key, sq, shift, CAUSAL, BLOCK_M)
    gl.warp_specialize([
        (_produce, (
            q_desc, k_desc, v_desc, do_desc, stats_desc, q_smem, kv_smem, do_smem, stats_smem,
            k_full, v_full, q_full, q_empty, do_full, do_empty,
            batch, kv_head, first_key, first, tiles, hq, per_kv, BLOCK_M, Q_STAGES, DO_STAGES,
        )),
        (_consume, (
            dq_desc, dk_desc, dv_desc, q_smem, kv_smem, do_smem, stats_smem, ds_smem, dq_smem,
            k_full, v_full, q_full, q_empty, do_full, do_empty, ds_full,
            exponent_scale, scale, batch, kv_head, first_key, first, tiles, hq, per_kv, sk, sq_padded, shift,
            D, BLOCK_M, Q_STAGES, DO_STAGES, CAUSAL, COMPUTE_DQ, EARLY, 0,
        )),
        (_consume, (
            dq_desc, dk_desc, dv_desc, q_smem, kv_smem, do_smem, stats_smem, ds_smem, dq_smem,
            k_full, v_full, q_full, q_empty, do_full, do_empty, ds_full,
            exponent_scale, scale, batch, kv_head, first_key, first, tiles, hq, per_kv, sk, sq_padded, shift,
            D, BLOCK_M, Q_STAGES, DO_STAGES, CAUSAL, COMPUTE_DQ, EARLY, 1,
        )),
    ], [4, 4], [240, 240])  # fmt: skip
