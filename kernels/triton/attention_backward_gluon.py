"""Hopper attention backward in Gluon: sm_90a, D 64 or 128, bf16 or fp16. It cannot be interpreted.

A program owns 128 keys of one K/V head, keeps dK and dV in registers and walks the queries of its head group in tiles
of BLOCK_M rows (FlashAttention-2, Dao 2023, section 3.1.2; the register plan is that of FlashAttention-3, Shah et al.
2024). Scores are kept transposed, keys by queries, so that P and dS leave the exponentials in the registers that wgmma
takes as its left operand:

    S^T = K Q^T      P^T = exp2(S^T c - lse2)      dV += P^T dO
    dP^T = V dO^T    dS^T = P^T (dP^T - delta)     dK += dS^T Q      dQ += dS K

Here stand what all walks share, and one of eight warps in step that makes dK and dV alone, for the deterministic
variant (dQ: attention_backward_gluon_dq.py). The walk with dQ is attention_backward_gluon_pair.py.

wgmma groups retire in the order of issue. A step goes from dS(j) to dS(j + 1) and issues dK(j) (and dQ(j)), S(j + 1),
dP(j + 1), dV(j + 1): the exponentials run under dP(j + 1), the differences under dV(j + 1). Nothing is in flight where
the loop closes. ptxas runs all wgmma of a kernel one by one (its notes C7510 to C7515) where a result in flight around
the loop is read, where an accumulator is written by anything but wgmma, or where registers are short; the order, and
``_opaque_zero``, are what keeps it from that.

lse2 is +inf for rows of padding and rows that see no key, which makes their P zero; so only the keys' end and the
diagonal need a mask. The scale enters dK at the end, and dQ when it is rounded.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

#: Barrier among the threads of a partition; Triton 3.6 names it thread_barrier, 3.7 barrier.
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
#: Keys of a program.
BLOCK_N = gl.constexpr(128)
#: One 16-bit [rows, columns] block as wgmma and the copy engine see it.
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
#: Vectors of lse2 and delta: plain memory.
VECTOR_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

#: Sizes that only count; see attention_gluon.COUNTS.
COUNTS = ["hq", "hk", "sq", "sk", "sq_padded", "shift"]


@builtin
def _reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    """Add a shared-memory block to global memory through the copy engine: cp.reduce.async.bulk.tensor, add.

    Gluon 3.6 and 3.7 have the builder call and no function for it (3.8 and later: tma.async_atomic_add).
    """
    from triton._C.libtriton import ir

    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@gluon.jit
def _range_of_tiles(first_key, sq, shift, CAUSAL: gl.constexpr, BLOCK_M: gl.constexpr):
    """First query tile that sees keys from ``first_key`` on, and how many there are; at least one is walked."""
    tiles = (sq + BLOCK_M - 1) // BLOCK_M
    first = 0
    if CAUSAL:
        first = gl.minimum(gl.maximum(first_key - shift, 0) // BLOCK_M, tiles - 1)
    return first, tiles - first


@gluon.jit
def _load_q(q_desc, q_smem, q_full, count, batch, head, block, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, wanted):
    stage = count % STAGES
    mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(
        q_desc, [batch, head, block * BLOCK_M, 0], q_full.index(stage), q_smem.index(stage), pred=wanted
    )


@gluon.jit
def _load_do(
    do_desc, stats_desc, do_smem, stats_smem, do_full, count, batch, head, hq, block,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, wanted,
):  # fmt: skip
    """dO of a tile, and its rows' lse2 and delta."""
    stage = count % STAGES
    nbytes: gl.constexpr = do_desc.block_type.nbytes + stats_desc.block_type.nbytes
    mbarrier.expect(do_full.index(stage), nbytes, pred=wanted)
    tma.async_copy_global_to_shared(
        do_desc, [batch, head, block * BLOCK_M, 0], do_full.index(stage), do_smem.index(stage), pred=wanted
    )
    tma.async_copy_global_to_shared(
        stats_desc, [0, batch * hq + head, block * BLOCK_M], do_full.index(stage), stats_smem.index(stage), pred=wanted
    )


@gluon.jit
def _load_kv(desc, smem, full, batch, head, first_key):
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, head, first_key, 0], full, smem)


@gluon.jit
def _next(head, block, first, end):
    """The tile after (head, block): the next of this head, else the first of the next head."""
    last = block + 1 == end
    return gl.where(last, head + 1, head), gl.where(last, first, block + 1)


@gluon.jit
def _opaque_zero(j):
    """0, without the compiler knowing. Addresses that depend on it are not worked out before the loop and kept, one
    register pair a wgmma."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [j], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _tile(smem, stage, ROWS: gl.constexpr, D: gl.constexpr):
    """A stage of a ring as wgmma sees it."""
    return smem.index(stage)._reinterpret(smem.dtype, [ROWS, D], TILE_LAYOUT)


@gluon.jit
def _issue_scores(
    j, k, q_smem, q_full, s_layout: gl.constexpr, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr
):
    """S^T(j) = K Q^T, in flight."""
    KEYS: gl.constexpr = k.shape[0]
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, s_layout)
    mbarrier.wait(q_full.index(j % STAGES), (j // STAGES) & 1)
    q = _tile(q_smem, j % STAGES, BLOCK_M, D)
    return warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _weigh(
    j, s, dv, first_query, v, do_smem, stats_smem, do_full, exponent_scale, first_key, sk, shift,
    D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, KV_LAYOUT: gl.constexpr,
):  # fmt: skip
    """From S^T(j) in flight to dS^T(j), float32, and dV(j) in flight."""
    layout: gl.constexpr = s.type.tensor_type.layout
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=KV_LAYOUT, k_width=2)
    dtype: gl.constexpr = do_smem.dtype
    stage = j % STAGES
    KEYS: gl.constexpr = v.shape[0]
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, layout)
    stats = stats_smem.index(stage)._reinterpret(gl.float32, [2, BLOCK_M], VECTOR_LAYOUT)
    do = _tile(do_smem, stage, BLOCK_M, D)
    mbarrier.wait(do_full.index(stage), (j // STAGES) & 1)
    dp = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    # With S(j) every group before it is done, dK(j - 1) among them.
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    lse2 = stats.index(0).load(columns)
    p = gl.exp2(s * exponent_scale - lse2[None, :])
    # The weights are masked and not the scores: ptxas runs all wgmma one by one where an accumulator is written by
    # anything else. What was masked may be inf, and is selected away.
    partial = first_key + KEYS > sk
    if CAUSAL:
        partial = partial | (first_query + shift < first_key + KEYS - 1)
    if partial:
        keys = first_key + gl.arange(0, KEYS, layout=gl.SliceLayout(1, layout))
        limit = gl.full([BLOCK_M], sk - 1, gl.int32, columns)
        if CAUSAL:
            limit = gl.minimum(gl.arange(0, BLOCK_M, layout=columns) + (first_query + shift), limit)
        p = gl.where(keys[:, None] <= limit[None, :], p, 0.0)
    dv = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), do, dv, is_async=True)
    dp = warpgroup_mma_wait(num_outstanding=1, deps=[dp])
    delta = stats.index(1).load(columns)
    return p * (dp - delta[None, :]), dv


@gluon.jit
def _issue_dk(j, ds, dk, q_smem, D: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """dK(j) in flight."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=LAYOUT, k_width=2)
    q = _tile(q_smem, j % STAGES, BLOCK_M, D)
    return warpgroup_mma(gl.convert_layout(ds.to(q_smem.dtype), P_LAYOUT), q, dk, is_async=True)


@gluon.jit
def _step(
    j, total, head, block, ds, dk, dv, q_desc, do_desc, stats_desc, q_smem, kv_smem, do_smem, stats_smem,
    q_full, do_full, exponent_scale, batch, first_key, first, tiles, hq, sk, shift,
    D: gl.constexpr, BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    S_LAYOUT: gl.constexpr, KV_LAYOUT: gl.constexpr,
):  # fmt: skip
    """From dS^T(j) to dS^T(j + 1)."""
    zero = _opaque_zero(j)
    k = _tile(kv_smem, zero, BLOCK_N, D)
    v = _tile(kv_smem, zero + 1, BLOCK_N, D)
    dk = _issue_dk(j, ds, dk, q_smem, D, BLOCK_M, Q_STAGES, KV_LAYOUT)
    s = _issue_scores(j + 1, k, q_smem, q_full, S_LAYOUT, D, BLOCK_M, Q_STAGES)
    partition_barrier()
    # Every thread has passed a barrier since dV(j), and since the last step's S(j), hence dK(j - 1), were done.
    head, block = _next(head, block, first, first + tiles)
    wanted = j + 2 < total
    ahead_head, ahead_block = _next(head, block, first, first + tiles)
    _load_q(q_desc, q_smem, q_full, j + 2, batch, ahead_head, ahead_block, BLOCK_M, Q_STAGES, wanted)
    _load_do(
        do_desc, stats_desc, do_smem, stats_smem, do_full, j + 2, batch, ahead_head, hq, ahead_block,
        BLOCK_M, DO_STAGES, wanted,
    )  # fmt: skip
    ds, dv = _weigh(
        j + 1, s, dv, block * BLOCK_M, v, do_smem, stats_smem, do_full, exponent_scale, first_key, sk, shift,
        D, BLOCK_M, DO_STAGES, CAUSAL, KV_LAYOUT,
    )  # fmt: skip
    # The weights of dV must not stay in use around the loop: ptxas finds no registers for that.
    dv = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[dv]))
    return head, block, ds, dk, dv


@gluon.jit(do_not_specialize=COUNTS)
def attention_backward_hopper(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc,
    exponent_scale, scale, hq, hk, sq, sk, sq_padded, shift,
    D: gl.constexpr, BLOCK_M: gl.constexpr, Q_STAGES: gl.constexpr, DO_STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """dK and dV of op ``attention_backward``. Grid: (key blocks * b * hk), key blocks fastest, so that programs that
    run together read the same Q and dO, and a causal mask's long walks start first.

    Args:
        q_desc, do_desc: of [b, hq, sq, D], block [1, 1, BLOCK_M, D]. k_desc, v_desc, dk_desc, dv_desc: of
            [b, hk, sk, D], block [1, 1, 128, D]. All 16-bit with the 128-byte swizzle.
        stats_desc: of float32 [2, b * hq, sq_padded] (lse2, delta), block [2, 1, BLOCK_M], no swizzle.
        exponent_scale: log2(e) * scale. shift: row i sees keys j <= i + shift when CAUSAL.
        sq_padded: sq rounded up to BLOCK_M.
    """
    dtype: gl.constexpr = q_desc.dtype
    gl.static_assert(Q_STAGES >= 3, "Q of j - 1, j and j + 1 live at once")
    gl.static_assert(DO_STAGES == 2, "two tiles are loaded ahead")
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    KV_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    q_smem = gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [DO_STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    kv_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_N, D], k_desc.layout)
    stats_smem = gl.allocate_shared_memory(gl.float32, [DO_STAGES, 2, 1, BLOCK_M], stats_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    for stage in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(stage), count=1)
    for stage in gl.static_range(DO_STAGES):
        mbarrier.init(do_full.index(stage), count=1)
    fence_async_shared()
    partition_barrier()

    key_blocks = (sk + BLOCK_N - 1) // BLOCK_N
    first_key = (gl.program_id(0) % key_blocks) * BLOCK_N
    batch = gl.program_id(0) // key_blocks // hk
    kv_head = gl.program_id(0) // key_blocks % hk
    per_kv = hq // hk
    first, tiles = _range_of_tiles(first_key, sq, shift, CAUSAL, BLOCK_M)
    # At least 1.
    total = per_kv * tiles
    head = kv_head * per_kv
    _load_kv(k_desc, kv_smem.index(0), k_full, batch, kv_head, first_key)
    _load_q(q_desc, q_smem, q_full, 0, batch, head, first, BLOCK_M, Q_STAGES, True)
    _load_kv(v_desc, kv_smem.index(1), v_full, batch, kv_head, first_key)
    _load_do(do_desc, stats_desc, do_smem, stats_smem, do_full, 0, batch, head, hq, first, BLOCK_M, DO_STAGES, True)
    next_head, block = _next(head, first, first, first + tiles)
    more = total > 1
    _load_q(q_desc, q_smem, q_full, 1, batch, next_head, block, BLOCK_M, Q_STAGES, more)
    _load_do(
        do_desc, stats_desc, do_smem, stats_smem, do_full, 1, batch, next_head, hq, block, BLOCK_M, DO_STAGES, more
    )  # fmt: skip
    block = first
    kv_zeros = gl.zeros([BLOCK_N, D], gl.float32, KV_LAYOUT)
    dk = warpgroup_mma_init(kv_zeros)
    dv = warpgroup_mma_init(kv_zeros)
    mbarrier.wait(k_full, 0)
    s = _issue_scores(0, _tile(kv_smem, 0, BLOCK_N, D), q_smem, q_full, S_LAYOUT, D, BLOCK_M, Q_STAGES)
    mbarrier.wait(v_full, 0)
    ds, dv = _weigh(
        0, s, dv, block * BLOCK_M, _tile(kv_smem, 1, BLOCK_N, D), do_smem, stats_smem, do_full,
        exponent_scale, first_key, sk, shift, D, BLOCK_M, DO_STAGES, CAUSAL, KV_LAYOUT,
    )  # fmt: skip
    dv = warpgroup_mma_init(warpgroup_mma_wait(num_outstanding=0, deps=[dv]))
    for j in range(total - 1):
        head, block, ds, dk, dv = _step(
            j, total, head, block, ds, dk, dv, q_desc, do_desc, stats_desc, q_smem, kv_smem, do_smem, stats_smem,
            q_full, do_full, exponent_scale, batch, first_key, first, tiles, hq, sk, shift,
            D, BLOCK_M, Q_STAGES, DO_STAGES, CAUSAL, S_LAYOUT, KV_LAYOUT,
        )  # fmt: skip
    dk = _issue_dk(total - 1, ds, dk, q_smem, D, BLOCK_M, Q_STAGES, KV_LAYOUT)
    dk, dv = warpgroup_mma_wait(num_outstanding=0, deps=[dk, dv])
    # K and V have been read for the last time by every warp: their memory takes dK and dV.
    partition_barrier()
    _tile(kv_smem, 0, BLOCK_N, D).store((dk * scale).to(dtype))
    _tile(kv_smem, 1, BLOCK_N, D).store(dv.to(dtype))
    fence_async_shared()
    partition_barrier()
    tma.async_copy_shared_to_global(dk_desc, [batch, kv_head, first_key, 0], kv_smem.index(0))
    tma.async_copy_shared_to_global(dv_desc, [batch, kv_head, first_key, 0], kv_smem.index(1))
    tma.store_wait(pendings=0)
