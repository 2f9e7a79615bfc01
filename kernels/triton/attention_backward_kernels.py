"""Plain Triton attention backward (sm_80 and later; interpreted on a CPU): three kernels, no atomics, no dQ workspace.

``prepare_rows`` turns lse and out into what a step needs, ``gradient_of_queries`` owns a block of query rows and walks
keys, ``gradient_of_keys`` owns a block of keys and walks query rows of every head that reads them. Scores are computed
twice (seven products instead of five), and in return every sum has one owner and one order: bitwise reproducible.
(Algorithm: Dao, FlashAttention-2, 2023, section 3.1.2, its loop split in two.)

In base 2 as the forward: with c = log2(e) / sqrt(d) a weight is p = exp2(s * c - lse * log2(e)). A row with nothing to
attend to has lse -inf; ``prepare_rows`` stores +inf for it and for the rows that pad the last block, so that their
weights are 0 without a mask. ``EMULATE`` is for the interpreter, see attention_forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vbench.kernels.triton.attention_forward import _as_storage, _capped, _load_block, _round_to_storage

LOG2E = tl.constexpr(1.4426950408889634)

#: Sizes that only count, on which nothing should be specialised.
COUNTS = ["hq", "heads_per_kv", "sq", "sk", "above", "below", "heads", "heads_per_group", "padded_rows"]


@triton.jit(do_not_specialize=COUNTS)
def prepare_rows(
    out_ptr,
    dout_ptr,
    lse_ptr,
    dlse_ptr,
    exponent_ptr,
    delta_ptr,
    hq,
    sq,
    padded_rows,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_lb,
    stride_lh,
    stride_ls,
    stride_eb,
    stride_eh,
    stride_es,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DLSE: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """exponent[bh, i] = lse log2(e), +inf where nothing is attended to or i >= sq; delta = rowsum(out dout) - dlse.

    Args:
        exponent_ptr, delta_ptr: fp32 [batch * hq, padded_rows], contiguous; ``padded_rows`` a multiple of BLOCK_M.
        stride_g*: of dout. stride_e*: of dlse (read where DLSE).
    """
    blocks = padded_rows // BLOCK_M
    head_index = tl.program_id(0) // blocks
    batch64 = (head_index // hq).to(tl.int64)
    head64 = (head_index % hq).to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows64 = rows.to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    row_inside = rows < sq
    inside = row_inside[:, None] & (columns[None, :] < D)
    o_rows = batch64 * stride_ob + head64 * stride_oh + rows64[:, None] * stride_os
    g_rows = batch64 * stride_gb + head64 * stride_gh + rows64[:, None] * stride_gs
    out = tl.load(out_ptr + o_rows + columns[None, :] * stride_od, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + g_rows + columns[None, :] * stride_gd, mask=inside, other=0.0).to(tl.float32)
    lse_rows = batch64 * stride_lb + head64 * stride_lh + rows64 * stride_ls
    lse = tl.load(lse_ptr + lse_rows, mask=row_inside, other=-float("inf"))
    delta = tl.sum(out * dout, 1)
    if DLSE:
        dlse_rows = batch64 * stride_eb + head64 * stride_eh + rows64 * stride_es
        delta -= tl.load(dlse_ptr + dlse_rows, mask=row_inside, other=0.0)
    exponent = tl.where(lse == -float("inf"), float("inf"), lse * LOG2E)
    to = head_index.to(tl.int64) * padded_rows + rows
    tl.store(exponent_ptr + to, exponent)
    tl.store(delta_ptr + to, delta)


@triton.jit
def _walk_keys(
    dq,
    q,
    dout,
    exponent,
    delta,
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
    """Add to dq (unscaled) the keys ``first_key`` to ``last_key`` - 1; the mask as in ``attention_forward._attend``."""
    for key in tl.range(first_key, last_key, BLOCK_N):
        key = tl.multiple_of(key, BLOCK_N)
        k = _load_block(
            k_source, batch, kv_head, key, stride_ks, k_offsets, sk, D, BLOCK_D, BLOCK_N, DESCRIPTORS, MASKED, EMULATE
        )
        v = _load_block(
            v_source, batch, kv_head, key, stride_vs, v_offsets, sk, D, BLOCK_D, BLOCK_N, DESCRIPTORS, MASKED, EMULATE
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if SOFTCAP:
            s = _capped(s, cap_exponent)
        z = s * exponent_scale - exponent[:, None]
        if MASKED:
            keys = key + tl.arange(0, BLOCK_N)
            z = tl.where(keys[None, :] < visible_until[:, None], z, -float("inf"))
            if WINDOW:
                z = tl.where(keys[None, :] >= visible_from[:, None], z, -float("inf"))
        p = tl.exp2(z)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        ds = _round_to_storage(ds, STORAGE) if EMULATE else ds.to(STORAGE)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=COUNTS)
def gradient_of_queries(
    q_source,
    k_source,
    v_source,
    dout_source,
    exponent_ptr,
    delta_ptr,
    dq_ptr,
    exponent_scale,
    cap_exponent,
    scale,
    hq,
    heads_per_kv,
    sq,
    sk,
    above,
    below,
    heads,
    heads_per_group,
    padded_rows,
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
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
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
    """dq[b, h, i, :] for BLOCK_M rows i of one head.

    Args:
        *_source: pointers, or rank-4 tensor descriptors with block [1, 1, BLOCK_M, BLOCK_D] of q and dout and
            [1, 1, BLOCK_N, BLOCK_D] of k and v.
        exponent_ptr, delta_ptr: of ``prepare_rows``.
        exponent_scale, cap_exponent, above, below, BOUNDED, WINDOW, SOFTCAP: as in the forward.
        scale: 1 / sqrt(D), float32.
        heads: batch * hq. ``heads_per_group``: heads walked together, so that their K and V stay in the L2 cache.
        stride_g*: of dout. stride_o*: of dq.
    """
    row_blocks = tl.cdiv(sq, BLOCK_M)
    # As in the forward: inside a group of heads the long rows of a causal mask come first.
    group_programs = heads_per_group * row_blocks
    group = tl.program_id(0) // group_programs
    in_group = tl.program_id(0) % group_programs
    first_head = group * heads_per_group
    group_heads = tl.minimum(heads - first_head, heads_per_group)
    first_row = (row_blocks - 1 - in_group // group_heads) * BLOCK_M
    head_index = first_head + in_group % group_heads
    batch = head_index // hq
    head = head_index % hq
    kv_head = head // heads_per_kv
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)

    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    of_row = head_index.to(tl.int64) * padded_rows + rows
    exponent = tl.load(exponent_ptr + of_row)
    delta = tl.load(delta_ptr + of_row)

    if DESCRIPTORS:
        q_base = q_source
        g_base = dout_source
        k_base = k_source
        v_base = v_source
        q_offsets = 0
        g_offsets = 0
        k_offsets = 0
        v_offsets = 0
    else:
        own_rows = tl.arange(0, BLOCK_M)
        block_rows = tl.arange(0, BLOCK_N)
        q_base = q_source + batch64 * stride_qb + head64 * stride_qh
        g_base = dout_source + batch64 * stride_gb + head64 * stride_gh
        k_base = k_source + batch64 * stride_kb + kv_head * tl.cast(stride_kh, tl.int64)
        v_base = v_source + batch64 * stride_vb + kv_head * tl.cast(stride_vh, tl.int64)
        q_offsets = own_rows[:, None] * stride_qs + columns[None, :] * stride_qd
        g_offsets = own_rows[:, None] * stride_gs + columns[None, :] * stride_gd
        k_offsets = block_rows[:, None] * stride_ks + columns[None, :] * stride_kd
        v_offsets = block_rows[:, None] * stride_vs + columns[None, :] * stride_vd
    q = _load_block(
        q_base, batch, head, first_row, stride_qs, q_offsets, sq, D, BLOCK_D, BLOCK_M, DESCRIPTORS, True, EMULATE
    )
    dout = _load_block(
        g_base, batch, head, first_row, stride_gs, g_offsets, sq, D, BLOCK_D, BLOCK_M, DESCRIPTORS, True, EMULATE
    )
    STORAGE: tl.constexpr = dq_ptr.dtype.element_ty

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
        begin = tl.maximum(first_row - below, 0) // BLOCK_N * BLOCK_N
        edge_end = tl.cdiv(tl.maximum(first_row + BLOCK_M - 1 - below, 0), BLOCK_N) * BLOCK_N
        whole_begin = tl.minimum(edge_end, tl.maximum(whole_end, begin))
        whole_end = tl.maximum(whole_end, whole_begin)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW:
        dq = _walk_keys(
            dq, q, dout, exponent, delta, k_base, v_base, batch, kv_head, begin, whole_begin, sk, visible_from,
            visible_until, exponent_scale, cap_exponent, stride_ks, stride_vs, k_offsets, v_offsets,
            D, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, True, EMULATE, STORAGE, PRECISION,
        )  # fmt: skip
    dq = _walk_keys(
        dq, q, dout, exponent, delta, k_base, v_base, batch, kv_head, whole_begin, whole_end, sk, visible_from,
        visible_until, exponent_scale, cap_exponent, stride_ks, stride_vs, k_offsets, v_offsets,
        D, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, False, EMULATE, STORAGE, PRECISION,
    )  # fmt: skip
    dq = _walk_keys(
        dq, q, dout, exponent, delta, k_base, v_base, batch, kv_head, whole_end, any_sees, sk, visible_from,
        visible_until, exponent_scale, cap_exponent, stride_ks, stride_vs, k_offsets, v_offsets,
        D, BLOCK_D, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, True, EMULATE, STORAGE, PRECISION,
    )  # fmt: skip

    dq = dq * scale
    inside = (rows < sq)[:, None] & (columns[None, :] < D)
    o_rows = batch64 * stride_ob + head64 * stride_oh + rows.to(tl.int64)[:, None] * stride_os
    tl.store(dq_ptr + o_rows + columns[None, :] * stride_od, _as_storage(dq, STORAGE, EMULATE), mask=inside)


@triton.jit
def _walk_rows(
    dk,
    dv,
    k,
    v,
    q_source,
    dout_source,
    exponent_ptr,
    delta_ptr,
    batch,
    head,
    first_row,
    last_row,
    sq,
    sees_from,
    sees_to,
    exponent_scale,
    cap_exponent,
    stride_qs,
    stride_gs,
    q_offsets,
    g_offsets,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    MASKED: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    EMULATE: tl.constexpr,
    STORAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add to dk (unscaled) and dv the query rows ``first_row`` to ``last_row`` - 1 of one head.

    MASKED: key c of the block is seen by rows >= sees_from + c, and with WINDOW by rows <= sees_to + c only. Rows >=
    ``sq`` have exponent +inf, so weight 0; MASK_ROWS keeps pointers from reading them. A key >= sk was read as zeros
    and may get an infinite weight: its gradients are not stored. Everything is held transposed, [keys, rows], so that
    the weights and score gradients are left operands, which the matrix units take from registers.
    """
    for row in tl.range(first_row, last_row, BLOCK_M):
        row = tl.multiple_of(row, BLOCK_M)
        rows = row + tl.arange(0, BLOCK_M)
        q = _load_block(
            q_source, batch, head, row, stride_qs, q_offsets, sq, D, BLOCK_D, BLOCK_M, DESCRIPTORS, MASK_ROWS, EMULATE
        )
        exponent = tl.load(exponent_ptr + rows)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if SOFTCAP:
            s = _capped(s, cap_exponent)
        z = s * exponent_scale - exponent[None, :]
        if MASKED:
            first_seen_by = tl.arange(0, BLOCK_N) + (sees_from - row)
            z = tl.where(tl.arange(0, BLOCK_M)[None, :] >= first_seen_by[:, None], z, -float("inf"))
            if WINDOW:
                last_seen_by = tl.arange(0, BLOCK_N) + (sees_to - row)
                z = tl.where(tl.arange(0, BLOCK_M)[None, :] <= last_seen_by[:, None], z, -float("inf"))
        p = tl.exp2(z)
        dout = _load_block(
            dout_source, batch, head, row, stride_gs, g_offsets, sq, D, BLOCK_D, BLOCK_M, DESCRIPTORS, MASK_ROWS,
            EMULATE,
        )  # fmt: skip
        weights = _round_to_storage(p, STORAGE) if EMULATE else p.to(STORAGE)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        dv = tl.dot(weights, dout, dv, input_precision=PRECISION)
        delta = tl.load(delta_ptr + rows)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        ds = _round_to_storage(ds, STORAGE) if EMULATE else ds.to(STORAGE)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def gradient_of_keys(
    q_source,
    k_source,
    v_source,
    dout_source,
    exponent_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    exponent_scale,
    cap_exponent,
    scale,
    hq,
    heads_per_kv,
    sq,
    sk,
    above,
    below,
    heads,
    heads_per_group,
    padded_rows,
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
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_md,
    stride_wb,
    stride_wh,
    stride_ws,
    stride_wd,
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
    """dk and dv[b, h, j, :] for BLOCK_N keys j of one key head, over all its query heads.

    Args:
        heads: batch * hk, key heads. ``heads_per_group``: key heads walked together, so that the Q and dO of their
            query heads stay in the L2 cache.
        stride_g*: of dout. stride_m*: of dk. stride_w*: of dv. The rest as in ``gradient_of_queries``.
    """
    key_blocks = tl.cdiv(sk, BLOCK_N)
    # The first keys of a causal mask are seen by the most rows: long blocks first.
    group_programs = heads_per_group * key_blocks
    group = tl.program_id(0) // group_programs
    in_group = tl.program_id(0) % group_programs
    first_head = group * heads_per_group
    group_heads = tl.minimum(heads - first_head, heads_per_group)
    first_key = (in_group // group_heads) * BLOCK_N
    head_index = first_head + in_group % group_heads
    hk = hq // heads_per_kv
    batch = head_index // hk
    kv_head = head_index % hk
    batch64 = batch.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)

    keys = first_key + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    STORAGE: tl.constexpr = dk_ptr.dtype.element_ty

    # Key j is seen by rows j - above to j + below. Blocks of rows that see some of these keys, those that see all, and
    # again some: a window's lower edge, or the last rows, which pointers must not read past. (The copy engine fills
    # what is beyond sq with zeros.)
    sees_from = first_key - above
    sees_to = first_key + below
    if BOUNDED:
        any_from = tl.minimum(tl.maximum(sees_from, 0), sq) // BLOCK_M * BLOCK_M
        all_from = tl.cdiv(tl.maximum(tl.minimum(first_key + BLOCK_N, sk) - 1 - above, 0), BLOCK_M) * BLOCK_M
        all_from = tl.minimum(all_from, tl.cdiv(sq, BLOCK_M) * BLOCK_M)
    else:
        any_from = 0
        all_from = 0
    any_until = sq
    all_until = sq
    if WINDOW:
        any_until = tl.maximum(tl.minimum(tl.minimum(first_key + BLOCK_N, sk) + below, sq), any_from)
        all_until = tl.maximum(tl.minimum(sees_to + 1, sq), 0) // BLOCK_M * BLOCK_M
        all_from = tl.minimum(all_from, tl.cdiv(any_until, BLOCK_M) * BLOCK_M)
    if not DESCRIPTORS:
        all_until = tl.minimum(all_until, sq // BLOCK_M * BLOCK_M)
    all_until = tl.maximum(all_until, all_from)

    if DESCRIPTORS:
        k_base = k_source
        v_base = v_source
        q_offsets = 0
        g_offsets = 0
        k_offsets = 0
        v_offsets = 0
    else:
        own_keys = tl.arange(0, BLOCK_N)
        block_rows = tl.arange(0, BLOCK_M)
        k_base = k_source + batch64 * stride_kb + kv_head64 * stride_kh
        v_base = v_source + batch64 * stride_vb + kv_head64 * stride_vh
        q_offsets = block_rows[:, None] * stride_qs + columns[None, :] * stride_qd
        g_offsets = block_rows[:, None] * stride_gs + columns[None, :] * stride_gd
        k_offsets = own_keys[:, None] * stride_ks + columns[None, :] * stride_kd
        v_offsets = own_keys[:, None] * stride_vs + columns[None, :] * stride_vd
    k = _load_block(
        k_base, batch, kv_head, first_key, stride_ks, k_offsets, sk, D, BLOCK_D, BLOCK_N, DESCRIPTORS, True, EMULATE
    )
    v = _load_block(
        v_base, batch, kv_head, first_key, stride_vs, v_offsets, sk, D, BLOCK_D, BLOCK_N, DESCRIPTORS, True, EMULATE
    )

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_query_head = kv_head * heads_per_kv
    for head in range(first_query_head, first_query_head + heads_per_kv):
        of_head = (batch64 * hq + head) * padded_rows
        if DESCRIPTORS:
            q_base = q_source
            g_base = dout_source
        else:
            q_base = q_source + batch64 * stride_qb + head * tl.cast(stride_qh, tl.int64)
            g_base = dout_source + batch64 * stride_gb + head * tl.cast(stride_gh, tl.int64)
        if BOUNDED:
            dk, dv = _walk_rows(
                dk, dv, k, v, q_base, g_base, exponent_ptr + of_head, delta_ptr + of_head, batch, head,
                any_from, all_from, sq, sees_from, sees_to, exponent_scale, cap_exponent,
                stride_qs, stride_gs, q_offsets, g_offsets,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, True, True, EMULATE, STORAGE, PRECISION,
            )  # fmt: skip
        dk, dv = _walk_rows(
            dk, dv, k, v, q_base, g_base, exponent_ptr + of_head, delta_ptr + of_head, batch, head,
            all_from, all_until, sq, sees_from, sees_to, exponent_scale, cap_exponent,
            stride_qs, stride_gs, q_offsets, g_offsets,
            D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, False, False, EMULATE, STORAGE, PRECISION,
        )  # fmt: skip
        if WINDOW or not DESCRIPTORS:
            dk, dv = _walk_rows(
                dk, dv, k, v, q_base, g_base, exponent_ptr + of_head, delta_ptr + of_head, batch, head,
                all_until, any_until, sq, sees_from, sees_to, exponent_scale, cap_exponent,
                stride_qs, stride_gs, q_offsets, g_offsets,
                D, BLOCK_D, BLOCK_M, BLOCK_N, WINDOW, SOFTCAP, DESCRIPTORS, WINDOW, True, EMULATE, STORAGE, PRECISION,
            )  # fmt: skip

    dk = dk * scale
    inside = (keys < sk)[:, None] & (columns[None, :] < D)
    keys64 = keys.to(tl.int64)[:, None]
    m_rows = batch64 * stride_mb + kv_head64 * stride_mh + keys64 * stride_ms
    w_rows = batch64 * stride_wb + kv_head64 * stride_wh + keys64 * stride_ws
    tl.store(dk_ptr + m_rows + columns[None, :] * stride_md, _as_storage(dk, STORAGE, EMULATE), mask=inside)
    tl.store(dv_ptr + w_rows + columns[None, :] * stride_wd, _as_storage(dv, STORAGE, EMULATE), mask=inside)
