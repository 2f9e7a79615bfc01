"""Plain Triton kernels of the extended attention ops (sm_80 and later; interpreted on a CPU).

The algorithms are those of ``attention_forward.py`` and ``attention_backward_kernels.py``, with every block masked and
loaded through pointers: rows and keys belong to one sequence, whose first row and length come from ``cu_q`` and
``cu_k`` where PACKED. Scores are kept in base 2 with everything added, x = (score + bias) log2(e), since a bias cannot
be folded into the scale. A sink is where a row's running peak and normaliser start. Kernels apart from the others, so
that those compile to what they compiled to (docs/adr/0021).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vbench.kernels.triton.attention_forward import _as_storage, _capped, _load_block, _round_to_storage

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

#: Sizes that only count, on which nothing should be specialised.
COUNTS = ["hq", "heads_per_kv", "sq", "sk", "blocks", "above", "below", "padded_rows"]


@triton.jit
def _place(table_ptr, cu_q_ptr, cu_k_ptr, block, sq, sk, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """(first row inside its sequence, sequence's first query, queries, first key, keys) of a block.

    ``table_ptr``: int32 [blocks, 2] of (sequence, first row); read where PACKED.
    """
    if PACKED:
        sequence = tl.load(table_ptr + 2 * block)
        first = tl.load(table_ptr + 2 * block + 1)
        first_q = tl.load(cu_q_ptr + sequence)
        first_k = tl.load(cu_k_ptr + sequence)
        return (
            first, first_q, tl.load(cu_q_ptr + sequence + 1) - first_q,
            first_k, tl.load(cu_k_ptr + sequence + 1) - first_k,
        )  # fmt: skip
    else:
        return block * BLOCK, 0, sq, 0, sk


@triton.jit
def _biased(
    s,
    rows,
    keys,
    rows_inside,
    keys_inside,
    slope,
    mask_ptr,
    stride_ms,
    stride_mk,
    shift,
    above,
    below,
    exponent_scale,
    cap_exponent,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
):
    """(x, tanh or score): raw products ``s`` as base-2 exponents, -inf where nothing may be seen.

    Args:
        rows, keys: indices inside the sequence, shaped so that they broadcast to ``s`` ([rows, keys] or its transpose).
        slope: of ALiBi, times log2(e). ``mask_ptr``: at the sequence's first row and key.
        shift: of the diagonal. above, below: key j is seen by row i if i - below <= j - shift <= i + above.
    """
    if SOFTCAP:
        s = _capped(s, cap_exponent)
    x = s * exponent_scale
    offset = keys - rows - shift
    if ALIBI:
        x -= slope * tl.abs(offset).to(tl.float32)
    if MASK:
        at = rows.to(tl.int64) * stride_ms + keys.to(tl.int64) * stride_mk
        mask = tl.load(mask_ptr + at, mask=rows_inside & keys_inside, other=0.0).to(tl.float32)
        x += mask * LOG2E
    seen = keys_inside & (offset <= above) & (offset >= -below)
    return tl.where(seen, x, -float("inf")), s


@triton.jit(do_not_specialize=COUNTS)
def extended_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    slopes_ptr,
    sink_ptr,
    mask_ptr,
    cu_q_ptr,
    cu_k_ptr,
    table_ptr,
    out_ptr,
    lse_ptr,
    exponent_scale,
    cap_exponent,
    hq,
    heads_per_kv,
    sq,
    sk,
    blocks,
    above,
    below,
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
    stride_mb,
    stride_mh,
    stride_ms,
    stride_mk,
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
    ALIGNED_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINK: tl.constexpr,
    MASK: tl.constexpr,
    PACKED: tl.constexpr,
    EMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[b, h, i, :] and lse[b, h, i] for BLOCK_M rows i of one sequence and head. Grid: batch * hq * blocks.

    Args:
        slopes_ptr, sink_ptr: float32 [hq]. mask_ptr: [batch, hq, sq, sk] with stride 0 where it has no such axis.
        exponent_scale, cap_exponent: as in ``attention_forward``. above, below: see ``_biased``.
        ALIGNED_RIGHT: the diagonal is shifted by keys - queries of the sequence.
    """
    # Long rows of a causal mask first.
    block = blocks - 1 - tl.program_id(0) % blocks
    head_index = tl.program_id(0) // blocks
    batch = head_index // hq
    head = head_index % hq
    kv_head = head // heads_per_kv
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)
    first_row, first_q, queries, first_k, keys_here = _place(
        table_ptr, cu_q_ptr, cu_k_ptr, block, sq, sk, BLOCK_M, PACKED
    )
    shift = 0
    if ALIGNED_RIGHT:
        shift = keys_here - queries

    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    row_inside = rows < queries
    inside = row_inside[:, None] & (columns[None, :] < D)
    rows64 = (first_q + rows).to(tl.int64)
    q_rows = batch64 * stride_qb + head64 * stride_qh + rows64[:, None] * stride_qs
    q = tl.load(q_ptr + q_rows + columns[None, :] * stride_qd, mask=inside, other=0.0)
    if EMULATE:
        q = q.to(tl.float32)
    STORAGE: tl.constexpr = q_ptr.dtype.element_ty

    block_keys = tl.arange(0, BLOCK_N)
    kv64 = kv_head.to(tl.int64)
    first_k64 = tl.cast(first_k, tl.int64)
    k_base = k_ptr + batch64 * stride_kb + kv64 * stride_kh + first_k64 * stride_ks
    v_base = v_ptr + batch64 * stride_vb + kv64 * stride_vh + first_k64 * stride_vs
    k_offsets = block_keys[:, None] * stride_ks + columns[None, :] * stride_kd
    v_offsets = block_keys[:, None] * stride_vs + columns[None, :] * stride_vd
    m_base = mask_ptr
    if MASK:
        m_base += batch64 * stride_mb + head64 * stride_mh
        m_base += tl.cast(first_q, tl.int64) * stride_ms + first_k64 * stride_mk
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if SINK:
        peak = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink_ptr + head) * LOG2E
        total = tl.where(peak == -float("inf"), 0.0, 1.0)

    begin = tl.maximum(first_row + shift - below, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + (BLOCK_M + above) + shift, keys_here)
    for key in tl.range(begin, end, BLOCK_N):
        key = tl.multiple_of(key, BLOCK_N)
        k = _load_block(
            k_base, batch, kv_head, key, stride_ks, k_offsets, keys_here, D, BLOCK_D, BLOCK_N, False, True, EMULATE
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        keys = key + block_keys
        x, _ = _biased(
            s, rows[:, None], keys[None, :], row_inside[:, None], (keys < keys_here)[None, :], slope, m_base,
            stride_ms, stride_mk, shift, above, below, exponent_scale, cap_exponent, SOFTCAP, ALIBI, MASK,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(x, 1))
        # A row that has seen no key yet has peak -inf; subtracting it would make NaN of -inf - -inf.
        subtracted = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        p = tl.exp2(x - subtracted[:, None])
        rescale = tl.exp2(peak - subtracted)
        total = total * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None]
        v = _load_block(
            v_base, batch, kv_head, key, stride_vs, v_offsets, keys_here, D, BLOCK_D, BLOCK_N, False, True, EMULATE
        )
        weights = _round_to_storage(p, STORAGE) if EMULATE else p.to(STORAGE)
        acc = tl.dot(weights, v, acc, input_precision=PRECISION)
        peak = new_peak

    alive = total > 0.0
    divisor = tl.where(alive, total, 1.0)
    acc = acc * (1.0 / divisor)[:, None]
    lse = tl.where(alive, (peak + tl.log2(divisor)) * LN2, -float("inf"))
    o_rows = batch64 * stride_ob + head64 * stride_oh + rows64[:, None] * stride_os
    tl.store(out_ptr + o_rows + columns[None, :] * stride_od, _as_storage(acc, STORAGE, EMULATE), mask=inside)
    l_rows = batch64 * stride_lb + head64 * stride_lh + rows64 * stride_ls
    tl.store(lse_ptr + l_rows, lse, mask=row_inside)


@triton.jit(do_not_specialize=COUNTS)
def extended_gradient_of_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    exponent_ptr,
    delta_ptr,
    slopes_ptr,
    mask_ptr,
    cu_q_ptr,
    cu_k_ptr,
    table_ptr,
    dq_ptr,
    exponent_scale,
    cap_exponent,
    scale,
    hq,
    heads_per_kv,
    sq,
    sk,
    blocks,
    above,
    below,
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
    stride_mk,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
    PACKED: tl.constexpr,
    EMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq[b, h, i, :] for BLOCK_M rows i of one sequence and head. Grid: batch * hq * blocks.

    Args:
        exponent_ptr, delta_ptr: of ``attention_backward_kernels.prepare_rows``, by row of the whole batch element.
        scale: 1 / sqrt(D). stride_g*: of dout. stride_o*: of dq. The rest as in ``extended_forward``.
    """
    block = blocks - 1 - tl.program_id(0) % blocks
    head_index = tl.program_id(0) // blocks
    batch = head_index // hq
    head = head_index % hq
    kv_head = head // heads_per_kv
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)
    first_row, first_q, queries, first_k, keys_here = _place(
        table_ptr, cu_q_ptr, cu_k_ptr, block, sq, sk, BLOCK_M, PACKED
    )
    shift = 0
    if ALIGNED_RIGHT:
        shift = keys_here - queries

    rows = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    row_inside = rows < queries
    inside = row_inside[:, None] & (columns[None, :] < D)
    rows64 = (first_q + rows).to(tl.int64)
    of_row = head_index.to(tl.int64) * padded_rows + rows64
    exponent = tl.load(exponent_ptr + of_row, mask=row_inside, other=float("inf"))
    delta = tl.load(delta_ptr + of_row, mask=row_inside, other=0.0)
    q_rows = batch64 * stride_qb + head64 * stride_qh + rows64[:, None] * stride_qs
    g_rows = batch64 * stride_gb + head64 * stride_gh + rows64[:, None] * stride_gs
    q = tl.load(q_ptr + q_rows + columns[None, :] * stride_qd, mask=inside, other=0.0)
    dout = tl.load(dout_ptr + g_rows + columns[None, :] * stride_gd, mask=inside, other=0.0)
    if EMULATE:
        q = q.to(tl.float32)
        dout = dout.to(tl.float32)
    STORAGE: tl.constexpr = dq_ptr.dtype.element_ty

    block_keys = tl.arange(0, BLOCK_N)
    kv64 = kv_head.to(tl.int64)
    first_k64 = tl.cast(first_k, tl.int64)
    k_base = k_ptr + batch64 * stride_kb + kv64 * stride_kh + first_k64 * stride_ks
    v_base = v_ptr + batch64 * stride_vb + kv64 * stride_vh + first_k64 * stride_vs
    k_offsets = block_keys[:, None] * stride_ks + columns[None, :] * stride_kd
    v_offsets = block_keys[:, None] * stride_vs + columns[None, :] * stride_vd
    m_base = mask_ptr
    if MASK:
        m_base += batch64 * stride_mb + head64 * stride_mh
        m_base += tl.cast(first_q, tl.int64) * stride_ms + first_k64 * stride_mk
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + head) * LOG2E

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = tl.maximum(first_row + shift - below, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(first_row + (BLOCK_M + above) + shift, keys_here)
    for key in tl.range(begin, end, BLOCK_N):
        key = tl.multiple_of(key, BLOCK_N)
        k = _load_block(
            k_base, batch, kv_head, key, stride_ks, k_offsets, keys_here, D, BLOCK_D, BLOCK_N, False, True, EMULATE
        )
        v = _load_block(
            v_base, batch, kv_head, key, stride_vs, v_offsets, keys_here, D, BLOCK_D, BLOCK_N, False, True, EMULATE
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        keys = key + block_keys
        x, tanh = _biased(
            s, rows[:, None], keys[None, :], row_inside[:, None], (keys < keys_here)[None, :], slope, m_base,
            stride_ms, stride_mk, shift, above, below, exponent_scale, cap_exponent, SOFTCAP, ALIBI, MASK,
        )  # fmt: skip
        ds = tl.exp2(x - exponent[:, None]) * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * (1.0 - tanh * tanh)
        ds = _round_to_storage(ds, STORAGE) if EMULATE else ds.to(STORAGE)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)

    dq = dq * scale
    o_rows = batch64 * stride_ob + head64 * stride_oh + rows64[:, None] * stride_os
    tl.store(dq_ptr + o_rows + columns[None, :] * stride_od, _as_storage(dq, STORAGE, EMULATE), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def extended_gradient_of_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    exponent_ptr,
    delta_ptr,
    slopes_ptr,
    mask_ptr,
    cu_q_ptr,
    cu_k_ptr,
    table_ptr,
    dk_ptr,
    dv_ptr,
    exponent_scale,
    cap_exponent,
    scale,
    hq,
    heads_per_kv,
    sq,
    sk,
    blocks,
    above,
    below,
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
    stride_mk,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    stride_wb,
    stride_wh,
    stride_ws,
    stride_wd,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    MASK: tl.constexpr,
    PACKED: tl.constexpr,
    EMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv[b, h, j, :] for BLOCK_N keys j of one sequence and key head. Grid: batch * hk * blocks.

    Args:
        table_ptr: of blocks of keys. stride_o*: of dk. stride_w*: of dv. The rest as in
            ``extended_gradient_of_queries``. Everything is held transposed, [keys, rows].
    """
    block = tl.program_id(0) % blocks
    head_index = tl.program_id(0) // blocks
    hk = hq // heads_per_kv
    batch = head_index // hk
    kv_head = head_index % hk
    batch64 = batch.to(tl.int64)
    kv64 = kv_head.to(tl.int64)
    first_key, first_q, queries, first_k, keys_here = _place(
        table_ptr, cu_q_ptr, cu_k_ptr, block, sq, sk, BLOCK_N, PACKED
    )
    shift = 0
    if ALIGNED_RIGHT:
        shift = keys_here - queries

    keys = first_key + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    key_inside = keys < keys_here
    inside = key_inside[:, None] & (columns[None, :] < D)
    keys64 = (first_k + keys).to(tl.int64)[:, None]
    k_rows = batch64 * stride_kb + kv64 * stride_kh + keys64 * stride_ks
    v_rows = batch64 * stride_vb + kv64 * stride_vh + keys64 * stride_vs
    k = tl.load(k_ptr + k_rows + columns[None, :] * stride_kd, mask=inside, other=0.0)
    v = tl.load(v_ptr + v_rows + columns[None, :] * stride_vd, mask=inside, other=0.0)
    if EMULATE:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    STORAGE: tl.constexpr = dk_ptr.dtype.element_ty

    block_rows = tl.arange(0, BLOCK_M)
    q_offsets = block_rows[:, None] * stride_qs + columns[None, :] * stride_qd
    g_offsets = block_rows[:, None] * stride_gs + columns[None, :] * stride_gd
    first_q64 = tl.cast(first_q, tl.int64)
    # Key j is seen by rows j - shift - above to j - shift + below.
    begin = tl.maximum(first_key - shift - above, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(first_key + (BLOCK_N + below) - shift, queries)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_head = kv_head * heads_per_kv
    for head in range(first_head, first_head + heads_per_kv):
        head64 = tl.cast(head, tl.int64)
        q_base = q_ptr + batch64 * stride_qb + head64 * stride_qh + first_q64 * stride_qs
        g_base = dout_ptr + batch64 * stride_gb + head64 * stride_gh + first_q64 * stride_gs
        of_head = (batch64 * hq + head) * padded_rows + first_q64
        m_base = mask_ptr
        if MASK:
            m_base += batch64 * stride_mb + head64 * stride_mh
            m_base += first_q64 * stride_ms + tl.cast(first_k, tl.int64) * stride_mk
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + head) * LOG2E
        for row in tl.range(begin, end, BLOCK_M):
            row = tl.multiple_of(row, BLOCK_M)
            rows = row + block_rows
            row_inside = rows < queries
            q = _load_block(
                q_base, batch, head, row, stride_qs, q_offsets, queries, D, BLOCK_D, BLOCK_M, False, True, EMULATE
            )
            exponent = tl.load(exponent_ptr + of_head + rows, mask=row_inside, other=float("inf"))
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            x, tanh = _biased(
                s, rows[None, :], keys[:, None], row_inside[None, :], key_inside[:, None], slope, m_base,
                stride_ms, stride_mk, shift, above, below, exponent_scale, cap_exponent, SOFTCAP, ALIBI, MASK,
            )  # fmt: skip
            p = tl.exp2(x - exponent[None, :])
            dout = _load_block(
                g_base, batch, head, row, stride_gs, g_offsets, queries, D, BLOCK_D, BLOCK_M, False, True, EMULATE
            )
            weights = _round_to_storage(p, STORAGE) if EMULATE else p.to(STORAGE)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            dv = tl.dot(weights, dout, dv, input_precision=PRECISION)
            delta = tl.load(delta_ptr + of_head + rows, mask=row_inside, other=0.0)
            ds = p * (dp - delta[None, :])
            if SOFTCAP:
                ds = ds * (1.0 - tanh * tanh)
            ds = _round_to_storage(ds, STORAGE) if EMULATE else ds.to(STORAGE)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)

    dk = dk * scale
    o_rows = batch64 * stride_ob + kv64 * stride_oh + keys64 * stride_os
    w_rows = batch64 * stride_wb + kv64 * stride_wh + keys64 * stride_ws
    tl.store(dk_ptr + o_rows + columns[None, :] * stride_od, _as_storage(dk, STORAGE, EMULATE), mask=inside)
    tl.store(dv_ptr + w_rows + columns[None, :] * stride_wd, _as_storage(dv, STORAGE, EMULATE), mask=inside)


@triton.jit(do_not_specialize=["batches", "hq", "padded_rows"])
def gradient_of_sinks(
    exponent_ptr, delta_ptr, sink_ptr, dsink_ptr, batches, hq, padded_rows, BLOCK: tl.constexpr, SINK: tl.constexpr
):  # fmt: skip
    """dsink[h] = -sum exp2(sink log2(e) - exponent) delta over batch and rows, in one order; 0 without SINK. Grid: hq.

    ``padded_rows`` is a multiple of BLOCK; padding has exponent +inf, so weight 0.
    """
    head = tl.program_id(0)
    sums = tl.zeros([BLOCK], tl.float32)
    if SINK:
        sink = tl.load(sink_ptr + head) * LOG2E
        for batch in range(batches):
            of_head = (tl.cast(batch, tl.int64) * hq + head) * padded_rows
            for row in range(0, padded_rows, BLOCK):
                at = of_head + row + tl.arange(0, BLOCK)
                sums -= tl.exp2(sink - tl.load(exponent_ptr + at)) * tl.load(delta_ptr + at)
    tl.store(dsink_ptr + head, tl.sum(sums, 0))
