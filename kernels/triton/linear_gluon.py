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

from vbench.kernels.triton._fp4 import _SCALES_BF16, _SCALES_FP16, E2M1_DEFERRED

#: The packed layout this kernel reads: tiles of 64 rows x 32 columns, K blocks of 128.
BKW = gl.constexpr(32)
#: 64-byte rows, as the copy engine writes and wgmma and ldmatrix read them.
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
#: Halves of ``_fp4``'s decoders, see there: code positions 0 and 1, and 2 and 3.
_INT4 = """{{
    .reg .b32 t, u, one, off;
    mov.b32 one, {one};
    mov.b32 off, {off};
    shr.u32 t, $2, {first};
    shr.u32 u, $2, {second};
    lop3.b32 $0, t, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $1, u, 0x000F000F, {magic}, 0xEA;
    fma.rn.{kind} $0, $0, one, off;
    fma.rn.{kind} $1, $1, one, off;
}}"""
_BF16 = {"one": "0x3F803F80", "off": "0xC308C308", "magic": "0x43004300", "kind": "bf16x2"}
_FP16 = {"one": "0x3C003C00", "off": "0xE408E408", "magic": "0x64006400", "kind": "f16x2"}
_INT4_BF16_LOW = gl.constexpr(_INT4.format(first=0, second=4, **_BF16))
_INT4_BF16_HIGH = gl.constexpr(_INT4.format(first=8, second=12, **_BF16))
_INT4_FP16_LOW = gl.constexpr(_INT4.format(first=0, second=4, **_FP16))
_INT4_FP16_HIGH = gl.constexpr(_INT4.format(first=8, second=12, **_FP16))
_E2M1_BF16_LOW = gl.constexpr(
    """{
    .reg .b32 t, u, f, g, z;
    prmt.b32 f, $3, $4, 0x7610;
    prmt.b32 g, $5, $6, 0x7610;
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
    .reg .b32 t, u, v, w, f, g, z;
    prmt.b32 f, $3, $4, 0x7610;
    prmt.b32 g, $5, $6, 0x7610;
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
    .reg .b32 t, u, s, v, f, g, z;
    prmt.b32 f, $3, $4, 0x7610;
    prmt.b32 g, $5, $6, 0x7610;
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
COUNTS = ["M", "k_blocks", "m_tiles", "n_tiles"]


@gluon.jit
def _tile(index, m_tiles, n_tiles, GROUP_M: gl.constexpr):
    """Tile number -> (token tile, feature tile): GROUP_M token tiles share the weights that they meet in L2."""
    group = index // (GROUP_M * n_tiles)
    group_rows = gl.minimum(m_tiles - group * GROUP_M, GROUP_M)
    inner = index - group * GROUP_M * n_tiles
    return group * GROUP_M + inner % group_rows, inner // group_rows


@gluon.jit
def _produce(
    x_desc, codes_desc, x_smem, w_smem, full, empty, k_blocks, m_tiles, n_tiles,
    ROWS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = 2 * ROWS // 64
    count = 0
    for index in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile(index, m_tiles, n_tiles, GROUP_M)
        for block in range(k_blocks):
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
def _int4_half(packed, HALF: gl.constexpr, X: gl.constexpr):
    """Code positions 2 HALF and 2 HALF + 1 as integers in x's dtype. Halves, so that fewer registers are live."""
    if X == "bf16":
        asm: gl.constexpr = _INT4_BF16_LOW if HALF == 0 else _INT4_BF16_HIGH
        a, b = gl.inline_asm_elementwise(
            asm, "=&r,=&r,r", [packed], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
        )
    else:
        asm: gl.constexpr = _INT4_FP16_LOW if HALF == 0 else _INT4_FP16_HIGH  # type: ignore[no-redef]
        a, b = gl.inline_asm_elementwise(
            asm, "=&r,=&r,r", [packed], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
        )
    return a, b


@gluon.jit
def _scales(word, X: gl.constexpr):
    if X == "bf16":
        a, b, c, d = gl.inline_asm_elementwise(
            _SCALES_BF16, "=&r,=&r,=&r,=&r,r", [word],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            _SCALES_FP16, "=&r,=&r,=&r,=&r,r", [word],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return a, b, c, d


@gluon.jit
def _pick(first, second, low_half):
    """[rows] scales of columns 0..15 and of 16..31 -> [rows, 32]; the choice is a constant of each register."""
    return gl.where(low_half, first[:, None], second[:, None])


@gluon.jit
def _e2m1_half(packed, f0, f1, low_half, HALF: gl.constexpr, X: gl.constexpr):
    """Code positions 2 HALF and 2 HALF + 1; f0, f1: their scales of the first and the last 16 columns, as pairs."""
    s0 = _pick(f0[0], f0[1], low_half)
    s1 = _pick(f1[0], f1[1], low_half)
    if X == "bf16":
        asm: gl.constexpr = _E2M1_BF16_LOW if HALF == 0 else _E2M1_BF16_HIGH
        a, b = gl.inline_asm_elementwise(
            asm, "=&r,=&r,r,r,r,r,r", [packed, s0, s1], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
        )
    else:
        asm: gl.constexpr = _E2M1_FP16_LOW if HALF == 0 else _E2M1_FP16_HIGH  # type: ignore[no-redef]
        a, b = gl.inline_asm_elementwise(
            asm, "=&r,=&r,r,r,r,r,r", [packed, s0, s1], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
        )
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
    y_desc, scale_ptr, global_ptr, bias_ptr, x_smem, w_smem, y_smem, full, empty, N, k_blocks, m_tiles, n_tiles,
    FORMAT: gl.constexpr, X: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, WORKER: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=ACC, k_width=2)
    PER_WORKER: gl.constexpr = ROWS // 64
    TILES: gl.constexpr = 2 * PER_WORKER
    left_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LEFT))
    left_columns = gl.arange(0, BKW, layout=gl.SliceLayout(0, LEFT))
    low_half = ((left_columns & 16) == 0)[None, :]
    y_tile = y_smem.index(WORKER)
    count = 0
    for index in range(gl.program_id(0), m_tiles * n_tiles, gl.num_programs(0)):
        tile_m, tile_n = _tile(index, m_tiles, n_tiles, GROUP_M)
        # Rows beyond N decode to rubbish that the copy engine clips; their scales are not read.
        first_row = (tile_n * 2 + WORKER) * ROWS
        if FORMAT == "nvfp4":
            in_tile = (first_row + left_rows) // 64 * (k_blocks * 128) + (left_rows % 64) * 2
            inside = first_row + left_rows < N
            first_word = gl.load(scale_ptr + in_tile, mask=inside, other=0)
            second_word = gl.load(scale_ptr + in_tile + 1, mask=inside, other=0)
        acc = gl.zeros([ROWS, BM], gl.float32, ACC)
        for block in range(k_blocks):
            stage = count % STAGES
            mbarrier.wait(full.index(stage), (count // STAGES) & 1)
            packed = w_smem.index(stage * TILES + WORKER * PER_WORKER)._reinterpret(gl.int16, [ROWS, BKW], TILE_LAYOUT)
            words = packed.load(LEFT)
            if FORMAT == "nvfp4":
                p0, p1, p2, p3 = _scales(first_word, X)
                q0, q1, q2, q3 = _scales(second_word, X)
                ahead = in_tile + gl.minimum(block + 1, k_blocks - 1) * 128
                first_word = gl.load(scale_ptr + ahead, mask=inside, other=0)
                second_word = gl.load(scale_ptr + ahead + 1, mask=inside, other=0)
                w0, w1 = _e2m1_half(words, (p0, q0), (p1, q1), low_half, 0, X)
            else:
                w0, w1 = _int4_half(words, 0, X)
            acc = warpgroup_mma(w0, x_smem.index(stage * 4).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(w1, x_smem.index(stage * 4 + 1).permute((1, 0)), acc, is_async=True)
            if FORMAT == "nvfp4":
                w2, w3 = _e2m1_half(words, (p2, q2), (p3, q3), low_half, 1, X)
            else:
                w2, w3 = _int4_half(words, 1, X)
            acc = warpgroup_mma(w2, x_smem.index(stage * 4 + 2).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(w3, x_smem.index(stage * 4 + 3).permute((1, 0)), acc, is_async=True)
            # Products in flight over the loop's edge would make ptxas wait for each one (its note C7512).
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(empty.index(stage), count=1)
            count += 1

        rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ACC))
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
    x_desc, codes_desc, y_desc, scale_ptr, global_ptr, bias_ptr, M, N, k_blocks, m_tiles, n_tiles,
    FORMAT: gl.constexpr, X: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr,
    ROWS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """y = act(x W^T + bias) for absmax7_tensor, absmax7_row and nvfp4 (normal E4M3 scales).

    Args:
        x_desc: x [M, K], block [BM, 32]; codes_desc: int16 [tiles x blocks x 64, 32], block [64, 32]; both with the
            64-byte swizzle. y_desc: y [M, N], block [BM, ROWS].
        ROWS: features of one of the two consumers, a multiple of 64.
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
            x_desc, codes_desc, x_smem, w_smem, full, empty, k_blocks, m_tiles, n_tiles, ROWS, BM, STAGES, GROUP_M,
        )),
        (_consume, (
            y_desc, scale_ptr, global_ptr, bias_ptr, x_smem, w_smem, y_smem, full, empty, N, k_blocks, m_tiles, n_tiles,
            FORMAT, X, ACT, HAS_BIAS, ROWS, BM, STAGES, GROUP_M, 0,
        )),
        (_consume, (
            y_desc, scale_ptr, global_ptr, bias_ptr, x_smem, w_smem, y_smem, full, empty, N, k_blocks, m_tiles, n_tiles,
            FORMAT, X, ACT, HAS_BIAS, ROWS, BM, STAGES, GROUP_M, 1,
        )),
    ], [4, 4], [REGISTERS, REGISTERS])  # fmt: skip
