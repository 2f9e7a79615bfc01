"""fp4_linear for many tokens on Hopper, in Gluon: decoded weights as the register operand of asynchronous wgmma.

A persistent grid; in each program one producer partition issues bulk tensor copies, and two consumer warpgroups of ROWS
features each share the tokens it streams. A consumer decodes the second half of a K block while the products of the
first are in flight, and the two consumers meet nowhere but in the stages' barriers, so that one multiplies while the
other decodes.
(Plain Triton waits for each product that has a register operand, and all its warps meet at each block.)

Tall tiles (many features, few tokens) cost little: a packed weight is a quarter of the bytes, so 256 features x 128
tokens need 48 KiB a K block where a 16-bit tile of that area needs 96.
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
from triton.language import debug_barrier

from vbench.kernels.triton._fp4 import _E8M0_BF16, _NF4_BF16, _SCALES_BF16, _SCALES_FP16, E2M1_DEFERRED, INT4_DEFERRED

#: The packed layout this kernel reads: tiles of 64 rows x 32 columns, K blocks of 128.
BKW = gl.constexpr(32)
#: 64-byte rows, as the copy engine writes and wgmma and ldmatrix read them.
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
#: Halves of ``_fp4``'s decoders, see there: code positions 0 and 1, and 2 and 3.
_INT4_BF16 = """{{
    .reg .b32 t, quarter, large, off, two;
    mov.b32 quarter, 0x3E803E80;
    mov.b32 large, 0x7F007F00;
    mov.b32 off, 0xC208C208;
    mov.b32 two, 0xC000C000;
    shr.u32 t, $2, {shift};
    lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA;
    and.b32 $1, t, 0x00F000F0;
    fma.rn.bf16x2 $0, $0, quarter, off;
    fma.rn.bf16x2 $1, $1, large, two;
}}"""
_INT4_FP16 = """{{
    .reg .b32 t, one, sixteenth, off, less;
    mov.b32 one, 0x3C003C00;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 off, 0xE408E408;
    mov.b32 less, 0xD480D480;
    shr.u32 t, $2, {shift};
    lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $1, t, 0x00F000F0, 0x64006400, 0xEA;
    fma.rn.f16x2 $0, $0, one, off;
    fma.rn.f16x2 $1, $1, sixteenth, less;
}}"""
_INT4_BF16_LOW = gl.constexpr(_INT4_BF16.format(shift=0))
_INT4_BF16_HIGH = gl.constexpr(_INT4_BF16.format(shift=8))
_INT4_FP16_LOW = gl.constexpr(_INT4_FP16.format(shift=0))
_INT4_FP16_HIGH = gl.constexpr(_INT4_FP16.format(shift=8))
#: The same times a scale s in x's dtype. bf16: of the codes' bits alone, one product with a scale and one rounding make
#: q x s x 2^-19: $3 has s x 2^114 for the code at bit 0 and s x 2^110 for the one at bit 4 in its halves, $5 the
#: s x -8 x 2^-19 that undoes the offset of 8, in both.
_INT4_BF16_TIMES = """{{
    .reg .b32 t, u, f, g;
    .reg .b16 l, h;
    // shared: $3 $4, $5 $6
    mov.b32 {{l, h}}, $3;
    mov.b32 f, {{l, l}};
    mov.b32 g, {{h, h}};
    shr.u32 t, $2, {shift};
    and.b32 u, t, 0x00F000F0;
    and.b32 t, t, 0x000F000F;
    fma.rn.bf16x2 $0, t, f, $5;
    fma.rn.bf16x2 $1, u, g, $5;
}}"""
#: fp16 has no range for that: the integer, then its product with $3; $5 is not read.
_INT4_FP16_TIMES = """{{
    // shared: $3 $4
    {decode}
    mul.rn.f16x2 $0, $0, $3;
    mul.rn.f16x2 $1, $1, $3;
}}"""
_INT4_BF16_LOW_TIMES = gl.constexpr(_INT4_BF16_TIMES.format(shift=0))
_INT4_BF16_HIGH_TIMES = gl.constexpr(_INT4_BF16_TIMES.format(shift=8))
_INT4_FP16_LOW_TIMES = gl.constexpr(_INT4_FP16_TIMES.format(decode=_INT4_FP16.format(shift=0)))
_INT4_FP16_HIGH_TIMES = gl.constexpr(_INT4_FP16_TIMES.format(decode=_INT4_FP16.format(shift=8)))
#: A scale in both halves -> $3 and $5 of ``_INT4_BF16_TIMES``: products with powers of two, exact for the scales that
#: ``packing.has_far_scales`` lets through.
_SCALED_BF16 = gl.constexpr(
    """{
    .reg .b32 f, o, z;
    mov.b32 f, 0x76807880;
    mov.b32 o, 0xB780B780;
    mov.b32 z, 0x80008000;
    fma.rn.bf16x2 $0, $2, f, z;
    fma.rn.bf16x2 $1, $2, o, z;
    }"""
)
#: What they leave out; the epilogue multiplies by it.
SCALED_DEFERRED = gl.constexpr(524288.0)
#: $3 has the scales of the two code positions in its halves; $4 is that of the second element of the pair, which
#: always shares its scales (see ``_fp4._E2M1_BF16``).
_E2M1_BF16_LOW = gl.constexpr(
    """{
    .reg .b32 t, u, z, f, g;
    .reg .b16 l, h;
    // shared: $3 $4
    mov.b32 {l, h}, $3;
    mov.b32 f, {l, l};
    mov.b32 g, {h, h};
    mov.b32 z, 0x80008000;
    shl.b32 u, $2, 3;
    and.b32 t, $2, 0x81C081C0;
    and.b32 u, u, 0x81C081C0;
    fma.rn.bf16x2 $0, t, f, z;
    fma.rn.bf16x2 $1, u, g, z;
    }"""
)
_E2M1_BF16_HIGH = gl.constexpr(
    """{
    .reg .b32 t, u, v, w, z, f, g;
    .reg .b16 l, h;
    // shared: $3 $4
    mov.b32 {l, h}, $3;
    mov.b32 f, {l, l};
    mov.b32 g, {h, h};
    mov.b32 z, 0x80008000;
    shl.b32 t, $2, 6;
    shr.u32 u, $2, 4;
    shr.u32 v, $2, 5;
    shl.b32 w, $2, 1;
    and.b32 t, t, 0x81C081C0;
    and.b32 u, u, 0x00C000C0;
    lop3.b32 u, v, 0x01000100, u, 0xEA;
    lop3.b32 u, w, 0x80008000, u, 0xEA;
    fma.rn.bf16x2 $0, t, f, z;
    fma.rn.bf16x2 $1, u, g, z;
    }"""
)
_E2M1_FP16 = """{{
    .reg .b32 t, u, s, v, z, f, g;
    .reg .b16 l, h;
    // shared: $3 $4
    mov.b32 {{l, h}}, $3;
    mov.b32 f, {{l, l}};
    mov.b32 g, {{h, h}};
    mov.b32 z, 0x80008000;
    {magnitude_a}
    {magnitude_b}
    shl.b32 s, $2, {sign_a};
    shl.b32 v, $2, {sign_b};
    and.b32 t, t, 0x0E000E00;
    and.b32 u, u, 0x0E000E00;
    lop3.b32 t, s, 0x80008000, t, 0xEA;
    lop3.b32 u, v, 0x80008000, u, 0xEA;
    fma.rn.f16x2 $0, t, f, z;
    fma.rn.f16x2 $1, u, g, z;
}}"""
_E2M1_FP16_LOW = gl.constexpr(
    _E2M1_FP16.format(magnitude_a="shl.b32 t, $2, 9;", magnitude_b="shl.b32 u, $2, 5;", sign_a=12, sign_b=8)
)
_E2M1_FP16_HIGH = gl.constexpr(
    _E2M1_FP16.format(magnitude_a="shl.b32 t, $2, 1;", magnitude_b="shr.u32 u, $2, 3;", sign_a=4, sign_b=0)
)
COUNTS = ["M", "k_blocks", "part_blocks", "parts", "m_tiles", "n_tiles"]


@gluon.jit
def _work(index, parts, m_tiles, n_tiles, GROUP_M: gl.constexpr):
    """Work number -> (part of K, token tile, feature tile): GROUP_M token tiles share weights that they meet in L2."""
    tile = index // parts
    group = tile // (GROUP_M * n_tiles)
    group_rows = gl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    inner = tile - group * GROUP_M * n_tiles
    return index - tile * parts, group * GROUP_M + inner % group_rows, inner // group_rows


@gluon.jit
def _produce(
    x_desc, codes_desc, x_smem, w_smem, full, empty, k_blocks, part_blocks, parts, m_tiles, n_tiles,
    ROWS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = 2 * ROWS // 64
    count = 0
    for index in range(gl.program_id(0), parts * m_tiles * n_tiles, gl.num_programs(0)):
        part, tile_m, tile_n = _work(index, parts, m_tiles, n_tiles, GROUP_M)
        first = part * part_blocks
        for block in range(first, gl.minimum(first + part_blocks, k_blocks)):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
            bar = full.index(stage)
            mbarrier.expect(bar, TILES * codes_desc.block_type.nbytes + 4 * x_desc.block_type.nbytes)
            for t in gl.static_range(TILES):
                row = ((tile_n * TILES + t) * k_blocks + block) * 64
                tma.async_copy_global_to_shared(codes_desc, [row, 0], bar, w_smem.index(stage * TILES + t))
            for j in gl.static_range(4):
                column = block * (4 * BKW) + j * BKW
                tma.async_copy_global_to_shared(x_desc, [tile_m * BM, column], bar, x_smem.index(stage * 4 + j))
            count += 1


@gluon.jit
def _asm2(asm: gl.constexpr, packed, X: gl.constexpr):
    """Two code positions from an asm of one packed input."""
    if X == "bf16":
        a, b = gl.inline_asm_elementwise(
            asm, "=&r,=&r,r", [packed], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
        )
    else:
        a, b = gl.inline_asm_elementwise(
            asm, "=&r,=&r,r", [packed], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
        )
    return a, b


@gluon.jit
def _scales(word, FORMAT: gl.constexpr, X: gl.constexpr):
    """Scale words -> int32 with the scales of code positions 0 and 1, and of 2 and 3, in their halves."""
    if FORMAT == "mxfp4":
        asm: gl.constexpr = _E8M0_BF16
    elif X == "bf16":
        asm: gl.constexpr = _SCALES_BF16  # type: ignore[no-redef]
    else:
        asm: gl.constexpr = _SCALES_FP16  # type: ignore[no-redef]
    a, b = gl.inline_asm_elementwise(asm, "=&r,=&r,r", [word], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    return a, b


@gluon.jit
def _pick(first, second, low_half):
    """[rows] scales of columns 0..15 and of 16..31 -> [rows, 32]; the choice is a constant of each register."""
    return gl.where(low_half, first[:, None], second[:, None])


@gluon.jit
def _scale_pairs(scale, X: gl.constexpr):
    """float32 [rows], rounded to x's dtype -> the two registers that ``_INT4_BF16_TIMES`` or its fp16 twin takes."""
    if X == "bf16":
        bits = scale.to(gl.bfloat16).to(gl.int16, bitcast=True)
    else:
        bits = scale.to(gl.float16).to(gl.int16, bitcast=True)
    first = bits.to(gl.int32) & 0xFFFF
    first = first | (first << 16)
    offset = first
    if X == "bf16":
        first, offset = gl.inline_asm_elementwise(
            _SCALED_BF16, "=&r,=&r,r", [first], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
    return first, offset


@gluon.jit
def _half(
    packed, scales, low_half, FORMAT: gl.constexpr, HALF: gl.constexpr, X: gl.constexpr, SCALED: gl.constexpr
):  # fmt: skip
    """Code positions 2 HALF and 2 HALF + 1, exact in x's dtype (nf4, SCALED: rounded). A half at a time
    keeps fewer registers alive.

    Args:
        scales: E2M1: of the first and the last 16 columns, see ``_scales``. SCALED: see ``_scale_pairs``.
    """
    if SCALED:
        s, _ = gl.broadcast(scales[0][:, None], packed)
        o, _ = gl.broadcast(scales[1][:, None], packed)
        if X == "bf16":
            times: gl.constexpr = _INT4_BF16_LOW_TIMES if HALF == 0 else _INT4_BF16_HIGH_TIMES
            a, b = gl.inline_asm_elementwise(
                times, "=&r,=&r,r,r,r,r,r", [packed, s, o], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
            )
        else:
            times: gl.constexpr = _INT4_FP16_LOW_TIMES if HALF == 0 else _INT4_FP16_HIGH_TIMES  # type: ignore[no-redef]
            a, b = gl.inline_asm_elementwise(
                times, "=&r,=&r,r,r,r,r,r", [packed, s, o], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
            )
        return a, b
    if FORMAT == "nvfp4" or FORMAT == "mxfp4":
        s = _pick(scales[0], scales[1], low_half)
        if X == "bf16":
            asm: gl.constexpr = _E2M1_BF16_LOW if HALF == 0 else _E2M1_BF16_HIGH
            a, b = gl.inline_asm_elementwise(
                asm, "=&r,=&r,r,r,r", [packed, s], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
            )
        else:
            asm: gl.constexpr = _E2M1_FP16_LOW if HALF == 0 else _E2M1_FP16_HIGH  # type: ignore[no-redef]
            a, b = gl.inline_asm_elementwise(
                asm, "=&r,=&r,r,r,r", [packed, s], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
            )
    elif FORMAT == "nf4":
        p, q, r, t = gl.inline_asm_elementwise(
            _NF4_BF16, "=&r,=&r,=&r,=&r,r", [packed],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
        a, b = (p, q) if HALF == 0 else (r, t)
    elif X == "bf16":
        a, b = _asm2(_INT4_BF16_LOW if HALF == 0 else _INT4_BF16_HIGH, packed, X)
    else:
        a, b = _asm2(_INT4_FP16_LOW if HALF == 0 else _INT4_FP16_HIGH, packed, X)
    return a, b


@gluon.jit
def _activate(value, ACT: gl.constexpr):
    """As ``_fp4.activate``."""
    if ACT == "relu":
        value = gl.where(value < 0.0, 0.0, value)
    elif ACT == "gelu":
        value = 0.5 * value * (1.0 + gl.erf(value * 0.7071067811865476))
    elif ACT == "silu":
        e = gl.exp(-gl.abs(value))
        value = gl.where(value < 0.0, value * e, value) / (1.0 + e)
    return value


@gluon.jit
def _consume(
    y_desc, scale_ptr, global_ptr, bias_ptr, partial_ptr, ticket_ptr, x_smem, w_smem, y_smem, full, empty, N, k_blocks,
    part_blocks, parts, m_tiles, n_tiles,
    FORMAT: gl.constexpr, GROUP: gl.constexpr, X: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, BLOCK_SUMS: gl.constexpr,
    SPLIT: gl.constexpr, SCALED: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    PER_WORKER: gl.constexpr = ROWS // 64
    TILES: gl.constexpr = 2 * PER_WORKER
    #: 32-bit words of scale bytes that a row of a block has.
    WORDS: gl.constexpr = 2 if FORMAT == "nvfp4" else 1
    BYTES: gl.constexpr = FORMAT == "nvfp4" or FORMAT == "mxfp4"
    #: Sums of their own in a block: one for each group with a float32 scale.
    GROUPS: gl.constexpr = 128 // GROUP if GROUP > 0 and not SCALED else 0
    PARTIAL: gl.constexpr = BLOCK_SUMS or GROUPS > 0
    left_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LEFT))
    left_columns = gl.arange(0, BKW, layout=gl.SliceLayout(0, LEFT))
    acc_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
    tokens = gl.arange(0, BM, layout=gl.SliceLayout(0, ACC))
    low_half = ((left_columns & 16) == 0)[None, :]
    y_tile = y_smem.index(WORKER)
    zero = gl.zeros([ROWS, BM], gl.float32, ACC)
    count = 0
    for index in range(gl.program_id(0), parts * m_tiles * n_tiles, gl.num_programs(0)):
        part_k, tile_m, tile_n = _work(index, parts, m_tiles, n_tiles, GROUP_M)
        first = part_k * part_blocks
        last = gl.minimum(first + part_blocks, k_blocks)
        start = gl.minimum(first, k_blocks - 1)
        # Rows beyond N decode to rubbish that the copy engine clips; their scales are not read.
        first_row = (tile_n * 2 + WORKER) * ROWS
        rows = first_row + acc_rows
        if BYTES:
            in_tile = (first_row + left_rows) // 64 * (k_blocks * (64 * WORDS)) + (left_rows % 64) * WORDS
            inside = first_row + left_rows < N
            first_word = gl.load(scale_ptr + in_tile + start * (64 * WORDS), mask=inside, other=0)
            second_word = first_word
            if WORDS == 2:
                second_word = gl.load(scale_ptr + in_tile + start * (64 * WORDS) + 1, mask=inside, other=0)
        if SCALED:
            scale_at = scale_ptr + (first_row + left_rows) // 64 * (k_blocks * 64) + left_rows % 64
            inside = first_row + left_rows < N
            scale = gl.load(scale_at + start * 64, mask=inside, other=0.0)
        if GROUPS > 0:
            group_at = rows // 64 * (k_blocks * (64 * GROUPS)) + rows % 64
            g0 = gl.load(scale_ptr + group_at + start * (64 * GROUPS), mask=rows < N, other=0.0)
            g1 = g0
            if GROUPS == 2:
                g1 = gl.load(scale_ptr + group_at + start * (64 * GROUPS) + 64, mask=rows < N, other=0.0)
        acc = zero
        for pair in range(first, last, 2):
            total = zero
            part = zero
            for h in gl.static_range(2):
                stage = count % STAGES
                mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                packed = w_smem.index(stage * TILES + WORKER * PER_WORKER)._reinterpret(
                    gl.int16, [ROWS, BKW], TILE_LAYOUT
                )
                words = packed.load(LEFT)
                ahead = gl.minimum(pair + h + 1, last - 1)
                low, high = 0, 0
                if BYTES:
                    p0, p1 = _scales(first_word, FORMAT, X)
                    q0, q1 = p0, p1
                    first_word = gl.load(scale_ptr + in_tile + ahead * (64 * WORDS), mask=inside, other=0)
                    if WORDS == 2:
                        q0, q1 = _scales(second_word, FORMAT, X)
                        second_word = gl.load(scale_ptr + in_tile + ahead * (64 * WORDS) + 1, mask=inside, other=0)
                    low, high = (p0, q0), (p1, q1)  # type: ignore[assignment]  # tuples here, tensors else
                if SCALED:
                    low = _scale_pairs(scale, X)
                    high = low
                    scale = gl.load(scale_at + ahead * 64, mask=inside, other=0.0)
                if GROUPS > 0:
                    now0, now1 = g0, g1
                    g0 = gl.load(scale_ptr + group_at + ahead * (64 * GROUPS), mask=rows < N, other=0.0)
                    if GROUPS == 2:
                        g1 = gl.load(scale_ptr + group_at + ahead * (64 * GROUPS) + 64, mask=rows < N, other=0.0)
                x0 = x_smem.index(stage * 4).permute((1, 0))
                x1 = x_smem.index(stage * 4 + 1).permute((1, 0))
                x2 = x_smem.index(stage * 4 + 2).permute((1, 0))
                x3 = x_smem.index(stage * 4 + 3).permute((1, 0))
                w0, w1 = _half(words, low, low_half, FORMAT, 0, X, SCALED)
                if GROUPS == 2:
                    one = warpgroup_mma(w0, x0, zero, use_acc=False, is_async=True)
                    one = warpgroup_mma(w1, x1, one, is_async=True)
                    w2, w3 = _half(words, high, low_half, FORMAT, 1, X, SCALED)
                    two = warpgroup_mma(w2, x2, zero, use_acc=False, is_async=True)
                    two = warpgroup_mma(w3, x3, two, is_async=True)
                    one, two = warpgroup_mma_wait(num_outstanding=0, deps=[one, two])
                    mbarrier.arrive(empty.index(stage), count=1)
                    if BLOCK_SUMS:
                        total = one * now0[:, None] if h == 0 else total + one * now0[:, None]
                        total += two * now1[:, None]
                    else:
                        acc += one * now0[:, None]
                        acc += two * now1[:, None]
                else:
                    if GROUPS == 1:
                        part = warpgroup_mma(w0, x0, zero, use_acc=False, is_async=True)
                    elif PARTIAL:
                        part = warpgroup_mma(w0, x0, part, use_acc=h > 0, is_async=True)
                    else:
                        part = warpgroup_mma(w0, x0, acc, is_async=True)
                    part = warpgroup_mma(w1, x1, part, is_async=True)
                    w2, w3 = _half(words, high, low_half, FORMAT, 1, X, SCALED)
                    part = warpgroup_mma(w2, x2, part, is_async=True)
                    part = warpgroup_mma(w3, x3, part, is_async=True)
                    # Products in flight over the loop's edge would make ptxas wait for each one (its note C7512).
                    part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
                    mbarrier.arrive(empty.index(stage), count=1)
                    if GROUPS == 1:
                        if BLOCK_SUMS:
                            total = part * now0[:, None] if h == 0 else total + part * now0[:, None]
                        else:
                            acc += part * now0[:, None]
                    elif not PARTIAL:
                        acc = part
                count += 1
            if BLOCK_SUMS:
                acc += total if GROUPS > 0 else part

        finish = True
        if SPLIT:
            tile = index // parts
            element = acc_rows[:, None] * BM + tokens[None, :]
            workspace = partial_ptr + (tile * parts * 2 + WORKER).to(gl.int64) * (ROWS * BM) + element
            gl.store(workspace + part_k * (2 * ROWS * BM), acc, cache_modifier=".cg")
            # All threads' stores must be issued before one thread publishes them with the ticket.
            debug_barrier()
            ticket = ticket_ptr + tile * 2 + WORKER
            finish = gl.atomic_add(ticket, 1, sem="acq_rel") == parts - 1
            if finish:
                gl.store(ticket, 0)
                acc = zero
                for p in range(parts):
                    acc += gl.load(workspace + p * (2 * ROWS * BM), cache_modifier=".cg")
        if finish:
            if X == "bf16" and SCALED:
                acc = acc * SCALED_DEFERRED
            elif X == "bf16" and not BYTES and FORMAT != "nf4":
                acc = acc * INT4_DEFERRED
            if FORMAT == "absmax7_row":
                acc = acc * gl.load(scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
            elif FORMAT == "absmax7_tensor":
                acc = acc * gl.load(scale_ptr)
            elif FORMAT == "nvfp4":
                acc = acc * E2M1_DEFERRED
                acc = acc * gl.load(global_ptr)
            if HAS_BIAS:
                acc = acc + gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)[:, None]
            acc = _activate(acc, ACT)
            tma.store_wait(pendings=0)
            y_tile.permute((1, 0)).store(acc.to(y_desc.dtype))
            fence_async_shared()
            tma.async_copy_shared_to_global(y_desc, [tile_m * BM, first_row], y_tile)
    tma.store_wait(pendings=0)


@gluon.jit(do_not_specialize=COUNTS)
def gluon_linear_kernel(
    x_desc, codes_desc, y_desc, scale_ptr, global_ptr, bias_ptr, partial_ptr, ticket_ptr,
    M, N, k_blocks, part_blocks, parts, m_tiles, n_tiles,
    FORMAT: gl.constexpr, GROUP: gl.constexpr, X: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, BLOCK_SUMS: gl.constexpr,
    SPLIT: gl.constexpr, SCALED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """y = act(x W^T + bias); nvfp4 with normal E4M3 scales, mxfp4 with scales that fit an operand.

    Args:
        x_desc: x [M, K], block [BM, 32]; codes_desc: int16 [tiles x blocks x 64, 32], block [64, 32]; both with the
            64-byte swizzle. y_desc: y [M, N], block [BM, ROWS].
        partial_ptr: float32 [m_tiles x n_tiles, parts, 2, ROWS, BM]; ticket_ptr: int32 [m_tiles x n_tiles, 2], zero
            before and after.
        k_blocks: K blocks of 128, an even number; part_blocks: of them in each of ``parts`` parts, even too.
        GROUP: columns that share a float32 scale (128 or 64), or 0.
        ROWS: features of one of the two consumers, a multiple of 64.
        BLOCK_SUMS: the order of sums that ``linear`` promises up to SPLIT_MAX_M tokens: 256 columns, then the next.
        SCALED: groups of 128: scales, rounded to x's dtype, multiply the weights, whose product rounds again; else
            scales multiply sums, for which wide token tiles have no registers.
        SPLIT: parts meet in ``partial_ptr``; else ``parts`` is 1.
    """
    TILES: gl.constexpr = 2 * ROWS // 64
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * 4, BM, BKW], x_desc.layout)
    w_smem = gl.allocate_shared_memory(codes_desc.dtype, [STAGES * TILES, 64, BKW], codes_desc.layout)
    y_smem = gl.allocate_shared_memory(y_desc.dtype, [2, BM, ROWS], y_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_produce, (
            x_desc, codes_desc, x_smem, w_smem, full, empty, k_blocks, part_blocks, parts, m_tiles, n_tiles,
            ROWS, BM, STAGES, GROUP_M,
        )),
        (_consume, (
            y_desc, scale_ptr, global_ptr, bias_ptr, partial_ptr, ticket_ptr, x_smem, w_smem, y_smem, full, empty, N,
            k_blocks, part_blocks, parts, m_tiles, n_tiles,
            FORMAT, GROUP, X, ACT, HAS_BIAS, ROWS, BM, STAGES, GROUP_M, BLOCK_SUMS, SPLIT, SCALED, 0,
        )),
        (_consume, (
            y_desc, scale_ptr, global_ptr, bias_ptr, partial_ptr, ticket_ptr, x_smem, w_smem, y_smem, full, empty, N,
            k_blocks, part_blocks, parts, m_tiles, n_tiles,
            FORMAT, GROUP, X, ACT, HAS_BIAS, ROWS, BM, STAGES, GROUP_M, BLOCK_SUMS, SPLIT, SCALED, 1,
        )),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
