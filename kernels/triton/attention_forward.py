"""Plain Triton attention forward (sm_80 and later; interpreted on a CPU): one program per block of query rows.

Online softmax in base 2 (Milakov & Gimelshein 2018; Dao, FlashAttention-2, 2023): with c = log2(e) / sqrt(d) the
running peak is kept as ``peak = max(s) * c`` and a weight is ``exp2(s * c - peak)``, one FMA and one ex2. ``peak`` is
the rounded number that the exponents really subtract, so its rounding cancels between weights, normaliser and LSE.

Keys are walked in two loops: whole blocks that every row of the block sees, without a mask, then the diagonal and tail
blocks with one. ``EMULATE`` is for the interpreter, whose bf16 arithmetic is garbage and whose fp32 -> bf16 store
truncates: operands are widened when loaded, and what the GPU would round to the storage type is rounded by hand.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)

#: Sizes that only count. Specialising on them would compile the kernel anew for each length and head count.
COUNTS = ["hq", "heads_per_kv", "sq", "sk", "above", "below", "heads", "heads_per_group"]


@triton.jit
def _round_to_storage(x, STORAGE: tl.constexpr):
    """fp32 -> the nearest value of ``STORAGE``, ties to even, still fp32 (interpreter only)."""
    if tl.bfloat16 == STORAGE:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        return (nearest & 0xFFFF0000).to(tl.float32, bitcast=True)
    elif tl.float16 == STORAGE:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def _as_storage(x, STORAGE: tl.constexpr, EMULATE: tl.constexpr):
    """fp32 -> ``STORAGE``, for a store. The interpreter's own cast to bf16 truncates, and mangles subnormal numbers."""
    if EMULATE and tl.bfloat16 == STORAGE:
        bits = _round_to_storage(x, STORAGE).to(tl.uint32, bitcast=True)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(STORAGE)


@triton.jit
def _load_block(
    source,
    batch,
    head,
    first_row,
    stride_row,
    offsets,
    row_limit,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] of K or V from row ``first_row``; rows >= ``row_limit`` and columns >= D read as 0."""
    if DESCRIPTORS:
        block = tl.reshape(source.load([batch, head, first_row, 0]), (BLOCK_N, BLOCK_D))
    else:
        # The 64-bit part of the address is one scalar; offsets inside the block are 32-bit (checked by the host).
        pointers = source + tl.cast(first_row, tl.int64) * stride_row + offsets
        if MASK_ROWS or D != BLOCK_D:
            rows = first_row + tl.arange(0, BLOCK_N)
            columns = tl.arange(0, BLOCK_D)
            inside = (rows[:, None] < row_limit) & (columns[None, :] < D)
            block = tl.load(pointers, mask=inside, other=0.0)
        else:
            block = tl.load(pointers)
    if EMULATE:
        block = block.to(tl.float32)
    return block


@triton.jit
def _capped(s, cap_exponent):
    """tanh(y) of s, where s * cap_exponent = 2 y log2(e): 1 - 2 / (1 + e^2y), right in the limit on both sides."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(s * cap_exponent))


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    k_source,
    v_source,
    batch,
    kv_head,
    first_key,
    last_key,
    sk,
    visible_from,
    visible_until,
    exponent_scale,
    cap_exponent,
    stride_ks,
    stride_vs,
    k_offsets,
    v_offsets,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
    EMULATE: tl.constexpr,
    STORAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Fold keys ``first_key`` to ``last_key`` - 1 into (acc, total, peak).

    Row r sees keys < visible_until[r], and with WINDOW those >= visible_from[r] only.
    """
    for key in tl.range(first_key, last_key, BLOCK_N):
        key = tl.multiple_of(key, BLOCK_N)
        k = _load_block(
            k_source, batch, kv_head, key, stride_ks, k_offsets, sk, D, BLOCK_D, BLOCK_N, DESCRIPTORS, MASKED, EMULATE
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if SOFTCAP:
            s = _capped(s, cap_exponent)
        if MASKED:
            keys = key + tl.arange(0, BLOCK_N)
            s = tl.where(keys[None, :] < visible_until[:, None], s, -float("inf"))
            if WINDOW:
                s = tl.where(keys[None, :] >= visible_from[:, None], s, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(s, 1) * exponent_scale)
        # A row that has seen no key yet has peak -inf; subtracting it would make NaN of -inf - -inf.
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak) if MASKED else new_peak
        p = tl.exp2(s * exponent_scale - shift[:, None])
        rescale = tl.exp2(peak - shift)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = _load_block(
            v_source, batch, kv_head, key, stride_vs, v_offsets, sk, D, BLOCK_D, BLOCK_N, DESCRIPTORS, MASKED, EMULATE
        )
        weights = _round_to_storage(p, STORAGE) if EMULATE else p.to(STORAGE)
        acc = tl.dot(weights, v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=COUNTS)
def attention_forward(
    q_ptr,
    k_source,
    v_source,
    out_ptr,
    lse_ptr,
    exponent_scale,
    cap_exponent,
    hq,
    heads_per_kv,
    sq,
    sk,
    above,
    below,
    heads,
    heads_per_group,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    stride_lb,
    stride_lh,
    stride_ls,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[b, h, i, :] and lse[b, h, i] for BLOCK_M rows i of one head.

    Args:
        q_ptr, out_ptr, lse_ptr: pointers; ``k_source``, ``v_source``: pointers, or rank-4 tensor descriptors with
            block [1, 1, BLOCK_N, BLOCK_D] (then their strides are not read).
        exponent_scale: log2(e) / sqrt(D), float32; SOFTCAP: log2(e) times the cap.
        cap_exponent: SOFTCAP: 2 log2(e) / (sqrt(D) cap), see ``_capped``.
        above, below: BOUNDED lets row i see keys j <= i + above only (a causal mask, or a window's upper edge), WINDOW
            keys j >= i - below only.
        heads: batch * hq. ``heads_per_group``: heads walked together, so that their K and V stay in the L2 cache.
    """
    row_blocks = tl.cdiv(sq, BLOCK_M)
    # Inside a group of heads the long rows of a causal mask come first, so that short ones fill the tail.
    group_programs = heads_per_group * row_blocks
    group = tl.program_id(0) // group_programs
    in_group = tl.program_id(0) % group_programs
    first_head = group * heads_per_group
    group_heads = tl.minimum(heads - first_head, heads_per_group)
    row_block = row_blocks - 1 - in_group // group_heads
    head_index = first_head + in_group % group_heads
    batch = head_index // hq
    head = head_index % hq
    kv_head = head // heads_per_kv

    first_row = row_block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    row_inside = rows < sq
    inside = row_inside[:, None] & (columns[None, :] < D)
    rows64 = rows.to(tl.int64)
    batch64 = batch.to(tl.int64)
    q_offsets = batch64 * stride_qb + head * tl.cast(stride_qh, tl.int64) + rows64[:, None] * stride_qs
    q = tl.load(q_ptr + q_offsets + columns[None, :] * stride_qd, mask=inside, other=0.0)
    if EMULATE:
        q = q.to(tl.float32)
    STORAGE: tl.constexpr = q_ptr.dtype.element_ty

    block_rows = tl.arange(0, BLOCK_N)
    if DESCRIPTORS:
        k_base = k_source
        v_base = v_source
        k_offsets = 0
        v_offsets = 0
    else:
        k_base = k_source + batch64 * stride_kb + kv_head * tl.cast(stride_kh, tl.int64)
        v_base = v_source + batch64 * stride_vb + kv_head * tl.cast(stride_vh, tl.int64)
        k_offsets = block_rows[:, None] * stride_ks + columns[None, :] * stride_kd
        v_offsets = block_rows[:, None] * stride_vs + columns[None, :] * stride_vd

    if BOUNDED:
        visible_until = tl.minimum(rows + (above + 1), sk)
        all_see = tl.minimum(first_row + (above + 1), sk)
        any_sees = tl.minimum(first_row + BLOCK_M + above, sk)
    else:
        visible_until = tl.zeros([BLOCK_M], tl.int32) + sk
        all_see = sk
        any_sees = sk
    whole_end = tl.maximum(all_see // BLOCK_N, 0) * BLOCK_N
    visible_from = rows - below
    whole_begin = 0
    if WINDOW:
        # Blocks at the window's lower edge, which some rows see in part.
        begin = tl.maximum(first_row - below, 0) // BLOCK_N * BLOCK_N
        edge_end = tl.cdiv(tl.maximum(first_row + BLOCK_M - 1 - below, 0), BLOCK_N) * BLOCK_N
        whole_begin = tl.minimum(edge_end, tl.maximum(whole_end, begin))
        whole_end = tl.maximum(whole_end, whole_begin)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if WINDOW:
        acc, total, peak = _attend(
            acc, total, peak, q, k_base, v_base, batch, kv_head, begin, whole_begin, sk, visible_from, visible_until,
            exponent_scale, cap_exponent, stride_ks, stride_vs, k_offsets, v_offsets,
            D, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, True, EMULATE, STORAGE, PRECISION,
        )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_base, v_base, batch, kv_head, whole_begin, whole_end, sk, visible_from, visible_until,
        exponent_scale, cap_exponent, stride_ks, stride_vs, k_offsets, v_offsets,
        D, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, False, EMULATE, STORAGE, PRECISION,
    )  # fmt: skip
    acc, total, peak = _attend(
        acc, total, peak, q, k_base, v_base, batch, kv_head, whole_end, any_sees, sk, visible_from, visible_until,
        exponent_scale, cap_exponent, stride_ks, stride_vs, k_offsets, v_offsets,
        D, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, True, EMULATE, STORAGE, PRECISION,
    )  # fmt: skip

    alive = total > 0.0
    divisor = tl.where(alive, total, 1.0)
    acc = acc * (1.0 / divisor)[:, None]
    lse = tl.where(alive, (peak + tl.log2(divisor)) * LN2, -float("inf"))
    out_offsets = batch64 * stride_ob + head * tl.cast(stride_oh, tl.int64) + rows64[:, None] * stride_os
    tl.store(out_ptr + out_offsets + columns[None, :] * stride_od, _as_storage(acc, STORAGE, EMULATE), mask=inside)
    lse_offsets = batch64 * stride_lb + head * tl.cast(stride_lh, tl.int64) + rows64 * stride_ls
    tl.store(lse_ptr + lse_offsets, lse, mask=row_inside)
