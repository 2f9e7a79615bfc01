"""Warp-specialised Hopper attention forward in Gluon: sm_90a, D 64 or 128, bf16 or fp16. It cannot be interpreted.

Shape of the kernel (FlashAttention-3, Shah et al. 2024, without its ping-pong barriers): a persistent grid; in each
block one producer partition issues bulk tensor copies and WORKERS consumer warpgroups of 64 query rows each share the
K and V it streams. A consumer overlaps its matrix products with its softmax: QK(j) and PV(j-1) are issued together, the
softmax of j runs under PV(j-1), and P stays in registers as the left operand. wgmma groups retire in order, so QK is
issued first because it is needed first.

Keys are walked from the last block to the first, so that all masked blocks (tail, diagonal) come before the loop that
needs no mask. Every tile walks at least one block: a row that sees no key then ends with total 0, which is out 0 and
lse -inf like everywhere else.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: Barrier among the threads of a partition; Triton 3.6 names it thread_barrier, 3.7 barrier.
partition_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
#: Query rows of a consumer warpgroup: the M of one wgmma.
WORKER_ROWS = gl.constexpr(64)
#: One [rows, D] block as wgmma and the copy engine see it; rank 4 is the same memory with the descriptor's unit axes.
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
#: One integer held by every thread of a partition.
SCALAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
SCALAR_MEMORY = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LN2 = gl.constexpr(0.6931471805599453)
#: KEEP_PEAK: how far scores may grow beyond the peak before it moves, in powers of two. Weights stay below 2^8, which
#: 16-bit floats hold and float32 sums of 2^31 of them too.
PEAK_SLACK = gl.constexpr(8.0)
#: 1.5 * 2^23: added to a float32 below 2^22, it leaves the nearest integer in the low bits.
ROUNDER = gl.constexpr(12582912.0)
#: 2^x on [-1/2, 1/2] is POWER_0 + POWER_1 x + ...: least relative error at 2000 Chebyshev nodes (Lawson's iteration).
POWER_0 = gl.constexpr(1.0000001192092896)
POWER_1 = gl.constexpr(0.6931469440460205)
POWER_2 = gl.constexpr(0.24022120237350464)
POWER_3 = gl.constexpr(0.05550713092088699)
POWER_4 = gl.constexpr(0.009675540961325169)
POWER_5 = gl.constexpr(0.001327647129073739)

#: Flag of two rows of a thread: 1 in the whole warp if the factor of any of its rows is not 1.
_ANY_ROW = gl.constexpr(
    """{ .reg .pred p;
    setp.neu.f32 p, $2, 0f3F800000;
    setp.neu.or.f32 p, $3, 0f3F800000, p;
    vote.sync.any.pred p, p, 0xffffffff;
    selp.s32 $0, 1, 0, p;
    selp.s32 $1, 1, 0, p; }"""
)


def _scale_text(count: int) -> str:
    """PTX: ``count`` values times their factors where the first flag is not 0, else untouched, behind one branch."""
    moves = "".join(f"mov.f32 ${i}, ${count + i};" for i in range(count))
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};" for i in range(count))
    skip = f"setp.eq.s32 p, ${3 * count}, 0; @p bra.uni DONE;"
    return "{ .reg .pred p;" + moves + skip + products + "DONE: }"


def _scale_constraints(count: int) -> str:
    return ",".join(["=f"] * count + ["f"] * (2 * count) + ["r"] * count)


#: An accumulator of 64 rows: half its columns are a thread's.
_SCALE_32 = gl.constexpr(_scale_text(32))
_SCALE_32_CONSTRAINTS = gl.constexpr(_scale_constraints(32))
_SCALE_64 = gl.constexpr(_scale_text(64))
_SCALE_64_CONSTRAINTS = gl.constexpr(_scale_constraints(64))

#: Sizes that only count. Specialising on them would compile the kernel anew for each length and head count.
COUNTS = ["hq", "heads_per_kv", "sq", "sk", "shift", "heads", "heads_per_group", "stride_lb", "stride_lh"]


@gluon.jit
def _locate(tile, heads, heads_per_group, hq, heads_per_kv, row_blocks):
    """Tile number -> (batch, query head, key head, row block).

    Groups of heads, so that their K and V stay in the L2 cache. Inside the last group long rows (of a causal mask) come
    first, inside the one before it last, and so on: lengths then change little from one round to the next, which is
    what the turning in ``_tile_number`` needs to even them out.
    """
    group_tiles = heads_per_group * row_blocks
    group = tile // group_tiles
    in_group = tile % group_tiles
    first_head = group * heads_per_group
    group_heads = gl.minimum(heads - first_head, heads_per_group)
    groups = (heads + heads_per_group - 1) // heads_per_group
    rank = in_group // group_heads
    row_block = gl.where((groups - group) % 2 == 0, rank, row_blocks - 1 - rank)
    head_index = first_head + in_group % group_heads
    batch = head_index // hq
    head = head_index % hq
    return batch, head, head // heads_per_kv, row_block


@gluon.jit
def _tile_number(round_index):
    """Tile of this program in a round. Odd rounds run backwards, so that nobody always gets the longest of a round."""
    program = gl.program_id(0)
    programs = gl.num_programs(0)
    turned = programs - 1 - program
    return round_index * programs + gl.where(round_index % 2 == 0, program, turned)


@gluon.jit
def _rounds(tiles):
    """How many tiles this program has: all whole rounds, and the last, partial one if its number is inside."""
    whole = tiles // gl.num_programs(0)
    return whole + gl.where(_tile_number(whole) < tiles, 1, 0)


@gluon.jit
def _key_blocks(first_row, rows, sk, shift, CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr):
    """Blocks of keys that ``rows`` rows from ``first_row`` walk; at least 1."""
    end = gl.minimum(first_row + rows + shift, sk) if CAUSAL else sk
    return gl.maximum((end + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _load_kv(desc, smem, full, empty, count, batch, kv_head, block, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Wait for a free stage, then copy rows [block * BLOCK_N, ...) of one head into it."""
    stage = count % STAGES
    phase = (count // STAGES) & 1
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [batch, kv_head, block * BLOCK_N, 0], full.index(stage), smem.index(stage))


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem,
    where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    hq, heads_per_kv, sq, sk, shift, heads, heads_per_group,
    CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WORKERS: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = WORKERS * WORKER_ROWS
    row_blocks = (sq + BLOCK_M - 1) // BLOCK_M
    count = 0
    for round_index in range(_rounds(heads * row_blocks)):
        batch, head, kv_head, row_block = _locate(
            _tile_number(round_index), heads, heads_per_group, hq, heads_per_kv, row_blocks
        )
        first_row = row_block * BLOCK_M
        blocks = _key_blocks(first_row, BLOCK_M, sk, shift, CAUSAL, BLOCK_N)
        _load_kv(k_desc, k_smem, k_full, k_empty, count, batch, kv_head, blocks - 1, BLOCK_N, STAGES)
        for worker in gl.static_range(WORKERS):
            mbarrier.wait(q_empty.index(worker), (round_index & 1) ^ 1)
        # Every worker has read where the last tile lay; the arrival that announces Q publishes where this one lies.
        where.index(0).store(gl.full([1], batch, gl.int32, SCALAR))
        where.index(1).store(gl.full([1], head, gl.int32, SCALAR))
        where.index(2).store(gl.full([1], row_block, gl.int32, SCALAR))
        partition_barrier()
        for worker in gl.static_range(WORKERS):
            mbarrier.expect(q_full.index(worker), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                q_desc, [batch, head, first_row + worker * WORKER_ROWS, 0], q_full.index(worker), q_smem.index(worker)
            )
        # K runs one block ahead of V, as the consumers need it.
        for step in range(1, blocks):
            block = blocks - 1 - step
            _load_kv(k_desc, k_smem, k_full, k_empty, count + step, batch, kv_head, block, BLOCK_N, STAGES)
            _load_kv(v_desc, v_smem, v_full, v_empty, count + step - 1, batch, kv_head, block + 1, BLOCK_N, STAGES)
        _load_kv(v_desc, v_smem, v_full, v_empty, count + blocks - 1, batch, kv_head, 0, BLOCK_N, STAGES)
        count += blocks


@gluon.jit
def _exp2_by_fma(x):
    """2^x for x <= 8 without the exponential unit: an integer's power, which moves the exponent, times that of a
    rest in [-1/2, 1/2], a polynomial of degree 5 (relative error 2^-23.6 before rounding). Below 2^-125 everything is
    2^-125, so masked scores must not come here.
    """
    x = gl.maximum(x, -125.0)
    shifted = x + ROUNDER
    rest = x - (shifted - ROUNDER)
    power = rest * POWER_5 + POWER_4
    power = power * rest + POWER_3
    power = power * rest + POWER_2
    power = power * rest + POWER_1
    power = power * rest + POWER_0
    return (power.to(gl.int32, bitcast=True) + (shifted.to(gl.int32, bitcast=True) << 23)).to(gl.float32, bitcast=True)


@gluon.jit
def _rescale(acc, factor, KEEP_PEAK: gl.constexpr, D: gl.constexpr, O_LAYOUT: gl.constexpr):
    """``acc`` times a factor a row; with KEEP_PEAK a warp whose factors are all 1 branches around the products."""
    rows: gl.constexpr = gl.SliceLayout(1, O_LAYOUT)
    if KEEP_PEAK:
        # Of all rows of a warp and written to both rows of a thread, so that any of the flags stands for all of them.
        flag = gl.inline_asm_elementwise(_ANY_ROW, "=r,=r,f,f", [factor], dtype=gl.int32, is_pure=True, pack=2)
        factor = gl.convert_layout(factor, rows)[:, None]
        flag = gl.convert_layout(flag, rows)[:, None]
        if D == 128:
            acc = gl.inline_asm_elementwise(
                _SCALE_64, _SCALE_64_CONSTRAINTS, [acc, factor, flag], dtype=gl.float32, is_pure=True, pack=64
            )
        else:
            acc = gl.inline_asm_elementwise(
                _SCALE_32, _SCALE_32_CONSTRAINTS, [acc, factor, flag], dtype=gl.float32, is_pure=True, pack=32
            )
    else:
        acc = acc * gl.convert_layout(factor, rows)[:, None]
    return acc


@gluon.jit
def _softmax(
    s, peak, total, block, visible_until, exponent_scale,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, POLYNOMIAL: gl.constexpr, KEEP_PEAK: gl.constexpr,
):  # fmt: skip
    """Scores of one block -> (weights fp32, peak, total, factor for what was summed before).

    POLYNOMIAL: of eight groups of 8 columns, in how many the weights of an unmasked block come from ``_exp2_by_fma``.
    KEEP_PEAK: the peak moves only where a score exceeds it by PEAK_SLACK (FlashAttention-4): most factors are then 1.
    """
    layout: gl.constexpr = s.type.layout
    if MASKED:
        # column < limit, written so that the left side is a compile-time constant of each register (a thread holds the
        # columns 8 i + its own 0..7) and the right side only four values: one compare an element and no addition.
        columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        limit = (visible_until - block * BLOCK_N)[:, None] - (columns & 7)[None, :]
        s = gl.where((columns & -8)[None, :] < limit, s, -float("inf"))
    new_peak = gl.maximum(peak, gl.max(s, axis=1) * exponent_scale)
    if KEEP_PEAK:
        new_peak = gl.where(new_peak > peak + PEAK_SLACK, new_peak, peak)
    # A row that has seen no key yet has peak -inf; subtracting it would make NaN of -inf - -inf.
    base = gl.where(new_peak == -float("inf"), 0.0, new_peak) if MASKED else new_peak
    exponents = s * exponent_scale - base[:, None]
    p = gl.exp2(exponents)
    if POLYNOMIAL > 0 and not MASKED:
        # Which columns is known of each register when the kernel is compiled; what is not chosen is never computed.
        group = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout)) // 8
        p = gl.where((group % 8 < POLYNOMIAL)[None, :], _exp2_by_fma(exponents), p)
    rescale = gl.exp2(peak - base)
    total = total * rescale + gl.sum(p, axis=1)
    return p, new_peak, total, rescale


@gluon.jit
def _step(
    step, blocks, count, q, k_smem, v_smem, q_empty, k_full, k_empty, v_full, v_empty,
    p, rescale, acc, peak, total, visible_until, exponent_scale,
    MASKED: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, ROUND_EARLY: gl.constexpr,
    POLYNOMIAL: gl.constexpr, KEEP_PEAK: gl.constexpr,
):  # fmt: skip
    """Issue QK(step) and PV(step - 1); softmax of step under the latter.

    ``p`` and ``rescale`` come from the softmax of step - 1. p is carried as fp32, in the registers of the scores,
    because 16-bit values that cross a loop edge are unpacked and packed again, one PRMT each. ROUND_EARLY carries
    16-bit values all the same: with three consumers, 160 registers each, ptxas spills otherwise.
    """
    k_count = count + step
    v_count = k_count - 1
    k_stage = k_count % STAGES
    v_stage = v_count % STAGES
    weights = p if ROUND_EARLY else gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT)
    mbarrier.wait(k_full.index(k_stage), (k_count // STAGES) & 1)
    k = k_smem.index(k_stage)._reinterpret(k_smem.dtype, [BLOCK_N, D], TILE_LAYOUT)
    zeros = gl.zeros([WORKER_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    # The accumulator is rescaled here, under QK, and not where the factor is known: QK is in flight that much earlier.
    if not ROUND_EARLY:
        acc = _rescale(acc, rescale, KEEP_PEAK, D, O_LAYOUT)
    mbarrier.wait(v_full.index(v_stage), (v_count // STAGES) & 1)
    v = v_smem.index(v_stage)._reinterpret(v_smem.dtype, [BLOCK_N, D], TILE_LAYOUT)
    acc = warpgroup_mma(weights, v, acc, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=[s])
    mbarrier.arrive(k_empty.index(k_stage), count=1)
    # After the last QK of a tile the next Q may come. (A branch, since a predicated arrival keeps its barrier.)
    if step == blocks - 1:
        mbarrier.arrive(q_empty, count=1)
    p, peak, total, rescale = _softmax(
        s, peak, total, blocks - 1 - step, visible_until, exponent_scale, MASKED, BLOCK_N, POLYNOMIAL, KEEP_PEAK
    )
    # ptxas sees no dependency between the softmax and the wait and, left alone, hoists the wait above the exponentials,
    # which would leave the tensor core idle under them. This second wait for V is over at once, but its spin loop ends
    # a basic block, and across that ptxas does not hoist. p is a dependency so that LLVM does not sink the softmax.
    mbarrier.wait(v_full.index(v_stage), (v_count // STAGES) & 1)
    acc, p = warpgroup_mma_wait(num_outstanding=0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(v_stage), count=1)
    if ROUND_EARLY:
        p = gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT)
        acc = _rescale(acc, rescale, KEEP_PEAK, D, O_LAYOUT)
    return p, rescale, acc, peak, total


@gluon.jit
def _open_tile(
    round_index, count, where, q_full, k_full, k_empty, v_full, v_empty, sk, shift,
    CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WORKERS: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """Wait for Q; read where the tile lies; step over key blocks that only later workers' rows see.

    Returns batch, head, first row of this worker, its key blocks, and the count of K and V blocks consumed so far.
    """
    mbarrier.wait(q_full, round_index & 1)
    batch = gl.max(where.index(0).load(SCALAR), axis=0)
    head = gl.max(where.index(1).load(SCALAR), axis=0)
    tile_row = gl.max(where.index(2).load(SCALAR), axis=0) * (WORKERS * WORKER_ROWS)
    first_row = tile_row + WORKER * WORKER_ROWS
    blocks = _key_blocks(first_row, WORKER_ROWS, sk, shift, CAUSAL, BLOCK_N)
    if CAUSAL:
        skipped = _key_blocks(tile_row, WORKERS * WORKER_ROWS, sk, shift, CAUSAL, BLOCK_N) - blocks
        # Released when full and not before: a release is an arrival in the phase that the load began.
        for step in range(skipped):
            stage = (count + step) % STAGES
            phase = ((count + step) // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.arrive(k_empty.index(stage), count=1)
            mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(v_empty.index(stage), count=1)
        count += skipped
    return batch, head, first_row, blocks, count


@gluon.jit
def _consume(
    o_desc, lse_ptr, q_smem, k_smem, v_smem, o_smem,
    where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
    exponent_scale, sq, sk, shift, heads, stride_lb, stride_lh,
    CAUSAL: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WORKERS: gl.constexpr, D: gl.constexpr,
    ROUND_EARLY: gl.constexpr, POLYNOMIAL: gl.constexpr, KEEP_PEAK: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    """One consumer warpgroup: 64 query rows of each of the program's tiles."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=O_LAYOUT, k_width=2)
    ROW_LAYOUT: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q = q_smem.index(WORKER)._reinterpret(q_smem.dtype, [WORKER_ROWS, D], TILE_LAYOUT)
    o_block = o_smem.index(WORKER)
    o_tile = o_block._reinterpret(o_smem.dtype, [WORKER_ROWS, D], TILE_LAYOUT)
    rounds = _rounds(heads * ((sq + WORKERS * WORKER_ROWS - 1) // (WORKERS * WORKER_ROWS)))
    count = 0
    for round_index in range(rounds):
        batch, head, first_row, blocks, count = _open_tile(
            round_index, count, where, q_full.index(WORKER), k_full, k_empty, v_full, v_empty, sk, shift,
            CAUSAL, BLOCK_N, STAGES, WORKERS, WORKER,
        )  # fmt: skip
        stage = count % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        k = k_smem.index(stage)._reinterpret(k_smem.dtype, [BLOCK_N, D], TILE_LAYOUT)
        zeros = gl.zeros([WORKER_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(num_outstanding=0, deps=[s])
        mbarrier.arrive(k_empty.index(stage), count=1)
        if blocks == 1:
            mbarrier.arrive(q_empty.index(WORKER), count=1)
        rows = first_row + gl.arange(0, WORKER_ROWS, layout=ROW_LAYOUT)
        if CAUSAL:
            visible_until = gl.minimum(rows + (shift + 1), sk)
            whole = gl.maximum(gl.minimum(first_row + (shift + 1), sk) // BLOCK_N, 0)
        else:
            visible_until = gl.zeros([WORKER_ROWS], gl.int32, ROW_LAYOUT) + sk
            whole = sk // BLOCK_N
        masked = gl.maximum(blocks - whole, 1)
        peak = gl.full([WORKER_ROWS], -float("inf"), gl.float32, ROW_LAYOUT)
        total = gl.zeros([WORKER_ROWS], gl.float32, ROW_LAYOUT)
        p, peak, total, rescale = _softmax(
            s, peak, total, blocks - 1, visible_until, exponent_scale, True, BLOCK_N, POLYNOMIAL, KEEP_PEAK
        )
        if ROUND_EARLY:
            p = gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT)
        acc = gl.zeros([WORKER_ROWS, D], gl.float32, O_LAYOUT)
        for step in range(1, masked):
            p, rescale, acc, peak, total = _step(
                step, blocks, count, q, k_smem, v_smem, q_empty.index(WORKER), k_full, k_empty, v_full, v_empty,
                p, rescale, acc, peak, total, visible_until, exponent_scale,
                True, BLOCK_N, D, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT, ROUND_EARLY, POLYNOMIAL, KEEP_PEAK,
            )  # fmt: skip
        for step in range(masked, blocks):
            p, rescale, acc, peak, total = _step(
                step, blocks, count, q, k_smem, v_smem, q_empty.index(WORKER), k_full, k_empty, v_full, v_empty,
                p, rescale, acc, peak, total, visible_until, exponent_scale,
                False, BLOCK_N, D, STAGES, S_LAYOUT, O_LAYOUT, P_LAYOUT, ROUND_EARLY, POLYNOMIAL, KEEP_PEAK,
            )  # fmt: skip
        count += blocks
        v_stage = (count - 1) % STAGES
        if ROUND_EARLY:
            weights = p
        else:
            weights = gl.convert_layout(p.to(v_smem.dtype), P_LAYOUT)
            acc = _rescale(acc, rescale, KEEP_PEAK, D, O_LAYOUT)
        mbarrier.wait(v_full.index(v_stage), ((count - 1) // STAGES) & 1)
        v = v_smem.index(v_stage)._reinterpret(v_smem.dtype, [BLOCK_N, D], TILE_LAYOUT)
        acc = warpgroup_mma(weights, v, acc, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
        mbarrier.arrive(v_empty.index(v_stage), count=1)

        alive = total > 0.0
        divisor = gl.where(alive, total, 1.0)
        lse = gl.where(alive, (peak + gl.log2(divisor)) * LN2, -float("inf"))
        lse_offsets = batch.to(gl.int64) * stride_lb + head.to(gl.int64) * stride_lh
        gl.store(lse_ptr + lse_offsets + rows, lse, mask=rows < sq)
        acc = acc * gl.convert_layout(1.0 / divisor, gl.SliceLayout(1, O_LAYOUT))[:, None]
        tma.store_wait(pendings=0)
        o_tile.store(acc.to(o_smem.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [batch, head, first_row, 0], o_block)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=COUNTS)
def attention_forward_hopper(
    q_desc, k_desc, v_desc, o_desc, lse_ptr,
    exponent_scale, hq, heads_per_kv, sq, sk, shift, heads, heads_per_group, stride_lb, stride_lh,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WORKERS: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr, ROUND_EARLY: gl.constexpr, POLYNOMIAL: gl.constexpr, KEEP_PEAK: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """out and lse of op ``attention``.

    Args:
        q_desc, o_desc: descriptors of [b, hq, sq, D] with block [1, 1, 64, D]; k_desc, v_desc: of [b, hk, sk, D] with
            block [1, 1, BLOCK_N, D]; all with the 128-byte swizzle. ``lse_ptr``: float32 [b, hq, sq], rows contiguous.
        exponent_scale, shift, heads, heads_per_group: as in ``attention_forward``.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [WORKERS, 1, 1, WORKER_ROWS, D], q_desc.layout)
    o_smem = gl.allocate_shared_memory(dtype, [WORKERS, 1, 1, WORKER_ROWS, D], o_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    where = gl.allocate_shared_memory(gl.int32, [3, 1], SCALAR_MEMORY)
    q_full = gl.allocate_shared_memory(gl.int64, [WORKERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [WORKERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for worker in gl.static_range(WORKERS):
        mbarrier.init(q_full.index(worker), count=1)
        mbarrier.init(q_empty.index(worker), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=WORKERS)
        mbarrier.init(v_empty.index(stage), count=WORKERS)
    fence_async_shared()

    # Spelled out: a tuple bound to a name would turn its constexprs into run-time values.
    if WORKERS == 2:
        gl.warp_specialize([
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem,
                where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                hq, heads_per_kv, sq, sk, shift, heads, heads_per_group, CAUSAL, BLOCK_N, STAGES, WORKERS,
            )),
            (_consume, (
                o_desc, lse_ptr, q_smem, k_smem, v_smem, o_smem,
                where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                exponent_scale, sq, sk, shift, heads, stride_lb, stride_lh,
                CAUSAL, BLOCK_N, STAGES, WORKERS, D, ROUND_EARLY, POLYNOMIAL, KEEP_PEAK, 0,
            )),
            (_consume, (
                o_desc, lse_ptr, q_smem, k_smem, v_smem, o_smem,
                where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                exponent_scale, sq, sk, shift, heads, stride_lb, stride_lh,
                CAUSAL, BLOCK_N, STAGES, WORKERS, D, ROUND_EARLY, POLYNOMIAL, KEEP_PEAK, 1,
            )),
        ], [4, 4], [WORKER_REGISTERS, WORKER_REGISTERS])  # fmt: skip
    else:
        gl.static_assert(WORKERS == 3, "2 or 3 consumer warpgroups")
        gl.warp_specialize([
            (_produce, (
                q_desc, k_desc, v_desc, q_smem, k_smem, v_smem,
                where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                hq, heads_per_kv, sq, sk, shift, heads, heads_per_group, CAUSAL, BLOCK_N, STAGES, WORKERS,
            )),
            (_consume, (
                o_desc, lse_ptr, q_smem, k_smem, v_smem, o_smem,
                where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                exponent_scale, sq, sk, shift, heads, stride_lb, stride_lh,
                CAUSAL, BLOCK_N, STAGES, WORKERS, D, ROUND_EARLY, POLYNOMIAL, KEEP_PEAK, 0,
            )),
            (_consume, (
                o_desc, lse_ptr, q_smem, k_smem, v_smem, o_smem,
                where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                exponent_scale, sq, sk, shift, heads, stride_lb, stride_lh,
                CAUSAL, BLOCK_N, STAGES, WORKERS, D, ROUND_EARLY, POLYNOMIAL, KEEP_PEAK, 1,
            )),
            (_consume, (
                o_desc, lse_ptr, q_smem, k_smem, v_smem, o_smem,
                where, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                exponent_scale, sq, sk, shift, heads, stride_lb, stride_lh,
                CAUSAL, BLOCK_N, STAGES, WORKERS, D, ROUND_EARLY, POLYNOMIAL, KEEP_PEAK, 2,
            )),
        ], [4, 4, 4], [WORKER_REGISTERS, WORKER_REGISTERS, WORKER_REGISTERS])  # fmt: skip
