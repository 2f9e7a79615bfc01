"""fp4_linear for up to 16 tokens on Hopper, in Gluon: tokens stay in registers, weights stream straight into fragments.

Each warp of a program owns one K block of 256 columns and keeps its piece of x as right-hand fragments for the whole
launch. It walks over tiles of 16 rows: four 16-byte loads a lane bring the packed tile in the order of the matrix
unit's left-hand fragments, so nothing passes through shared memory on the way in. The warps' float32 sums meet in
shared memory once in SLOTS tiles and are added in the order of K, part by part: the order that every kernel for up to
``linear.SPLIT_MAX_M`` tokens keeps.

(The plain kernel stages x beside the weights in shared memory, where its padded 16 rows a warp need twice the bytes of
the weights, and meets at a barrier each K block.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.language import debug_barrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from vbench.kernels.triton._fp4 import (
    _E2M1_BF16,
    _INT4_BF16,
    _INT4_FP16,
    _NF4_BF16,
    _SCALES_BF16,
    E2M1_DEFERRED,
    INT4_DEFERRED,
)
from vbench.kernels.triton.linear_gluon import _activate

ROWS = gl.constexpr(16)
#: Columns of a code position; a K block holds four.
COLUMNS = gl.constexpr(64)
#: 32-bit words of a tile: 16 rows x 256 columns.
WORDS = gl.constexpr(512)
#: Two E8M0 bytes of a word -> 2^(byte - 1) in both halves of a register, as bf16; bytes 0 to 128.
_E8M0 = """{{
    .reg .b32 b0, b1;
    prmt.b32 b0, $2, 0, {first};
    prmt.b32 b1, $2, 0, {second};
    mad.lo.u32 $0, b0, 0x00800080, 0x3F003F00;
    mad.lo.u32 $1, b1, 0x00800080, 0x3F003F00;
}}"""
_E8M0_LOW = gl.constexpr(_E8M0.format(first="0x4440", second="0x4441"))
_E8M0_HIGH = gl.constexpr(_E8M0.format(first="0x4442", second="0x4443"))


@gluon.jit
def _tile(words, left: gl.constexpr, W: gl.constexpr):
    """Loaded words [W, 32, 4] -> int16 tile [W, 16, 16] in the left operand's layout; moves no register."""
    halves = gl.join((words & 0xFFFF).to(gl.int16), (words >> 16).to(gl.int16))
    tile = halves.reshape([W, 8, 4, 2, 2, 2]).permute([0, 4, 1, 3, 2, 5]).reshape([W, 16, 16])
    return gl.convert_layout(tile, left, assert_trivial=True)


@gluon.jit
def _spread(scale, left: gl.constexpr, W: gl.constexpr):
    """[W, 16], a value a row -> [W, 16, 16] in the left operand's layout; a renaming of registers."""
    wide, _ = gl.broadcast(gl.expand_dims(scale, 2), gl.full([W, 16, 16], 0, gl.int32, left))
    return wide


@gluon.jit
def _byte_scales(word, FORMAT: gl.constexpr, Q: gl.constexpr):
    """Scale words of 64 columns' rows -> int32 [W, 16] with the scales of code positions 0 and 1, and of 2 and 3."""
    if FORMAT == "nvfp4":
        asm: gl.constexpr = _SCALES_BF16
    else:
        asm: gl.constexpr = _E8M0_HIGH if Q % 2 else _E8M0_LOW  # type: ignore[no-redef]  # one of two branches
    f01, f23 = gl.inline_asm_elementwise(asm, "=&r,=&r,r", [word], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    return f01, f23


@gluon.jit
def _split_words(words, left: gl.constexpr, COUNT: gl.constexpr, W: gl.constexpr):
    """Scale words [W, 16, COUNT] -> the word of each 64 columns, int32 [W, 16] as the left operand's rows lie."""
    rows: gl.constexpr = gl.SliceLayout(2, left)
    if COUNT == 4:
        even, odd = gl.split(words.reshape([W, 16, 2, 2]))
        a, c = gl.split(even)
        b, d = gl.split(odd)
        a, b = gl.convert_layout(a, rows, assert_trivial=True), gl.convert_layout(b, rows, assert_trivial=True)
        c, d = gl.convert_layout(c, rows, assert_trivial=True), gl.convert_layout(d, rows, assert_trivial=True)
    else:
        a, c = gl.split(words)
        a, c = gl.convert_layout(a, rows, assert_trivial=True), gl.convert_layout(c, rows, assert_trivial=True)
        b, d = a, c
    return a, b, c, d


@gluon.jit
def _quarter(
    part, words, scale, xs, left: gl.constexpr, FORMAT: gl.constexpr, X: gl.constexpr, W: gl.constexpr, Q: gl.constexpr
):
    """``part`` plus the products of the block's 64 columns ``Q``: four code positions of 16, x's pieces ``xs``.

    Args:
        scale: nvfp4, mxfp4: the bytes of each row's code positions, int32 [W, 16].
    """
    tile = _tile(words, left, W)
    if FORMAT == "nvfp4" or FORMAT == "mxfp4":
        f01, f23 = _byte_scales(scale, FORMAT, Q)
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            _E2M1_BF16, "=&r,=&r,=&r,=&r,r,r,r,r,r", [tile, _spread(f01, left, W), _spread(f23, left, W)],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif X == "bf16":
        asm: gl.constexpr = _NF4_BF16 if FORMAT == "nf4" else _INT4_BF16
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r", [tile],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            _INT4_FP16, "=&r,=&r,=&r,=&r,r", [tile],
            dtype=(gl.float16, gl.float16, gl.float16, gl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    part = mma_v2(w0, xs[4 * Q], part)
    part = mma_v2(w1, xs[4 * Q + 1], part)
    part = mma_v2(w2, xs[4 * Q + 2], part)
    return mma_v2(w3, xs[4 * Q + 3], part)


@gluon.jit
def _add_warps(flat, total, part: gl.constexpr, PART: gl.constexpr, out: gl.constexpr):
    """``total`` plus the sums of a part's K blocks, front to back: [slots, W, ...] -> [slots, 1, ...]."""
    for w in gl.static_range(PART):
        total += flat.slice(part * PART + w, 1, dim=1).load(out)
    return total


@gluon.jit
def _add_parts(partial_ptr, at, inside, part_stride, parts, value):
    for part in range(parts):
        value += gl.load(partial_ptr + part * part_stride + at, mask=inside, other=0.0, cache_modifier=".cg")
    return value


@gluon.jit
def _store_out(
    value, row, token, inside, scale_ptr, global_ptr, bias_ptr, y_ptr, M, N, stride_ym,
    FORMAT: gl.constexpr, X: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    inside = inside & (row < N)
    if X == "bf16" and (FORMAT == "absmax7_row" or FORMAT == "absmax7_tensor" or FORMAT == "absmax7_g128"):
        value = value * INT4_DEFERRED
    if FORMAT == "absmax7_row":
        value = value * gl.load(scale_ptr + row, mask=inside, other=0.0)
    elif FORMAT == "absmax7_tensor":
        value = value * gl.load(scale_ptr)
    elif FORMAT == "nvfp4":
        value = value * E2M1_DEFERRED
        value = value * gl.load(global_ptr)
    if HAS_BIAS:
        value = value + gl.load(bias_ptr + row, mask=inside, other=0.0).to(gl.float32)
    value = _activate(value, ACT)
    y_at = y_ptr + token.to(gl.int64) * stride_ym + row
    gl.store(y_at, value.to(y_ptr.dtype.element_ty), mask=inside & (token < M))


@gluon.jit(do_not_specialize=["M", "k_blocks", "tiles"])
def stationary_kernel(
    x_ptr,  # [M, K], last stride 1
    words_ptr,  # int32 [tiles, k_blocks, 4, 32, 4]
    scale_ptr,  # nvfp4, mxfp4: int32 [tiles, k_blocks, 16, 4 or 2]; GROUPS: float32 [tiles, k_blocks, GROUPS, 16]
    global_ptr,  # float32 [1]
    bias_ptr,  # [N] in x's dtype, or unused
    y_ptr,  # [M, N]
    partial_ptr,  # float32 [parts, tiles, 16, BM]
    ticket_ptr,  # int32 [tiles], zero before and after
    M, N, K, stride_xm, stride_ym, k_blocks, tiles,
    FORMAT: gl.constexpr, X: gl.constexpr, ACT: gl.constexpr, HAS_BIAS: gl.constexpr, BM: gl.constexpr,
    W: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr, SPLIT: gl.constexpr, GROUPS: gl.constexpr,
    DEPENDENT: gl.constexpr,
):  # fmt: skip
    """y = act(x W^T + bias); nvfp4 with normal E4M3 scales, mxfp4 with scales that fit an operand.

    Args:
        BM: 8 or 16 tokens at most.
        W: warps, at least PART * PARTS of them with work.
        PART: K blocks of a part of the sum; PARTS: parts in a program; SPLIT: programs along K.
        GROUPS: float32 scales of a row in a K block: 2 (g128), 4 (nf4) or 0.
        DEPENDENT: launched as a dependent of the kernel before it: weights, which no kernel writes, are fetched while
            that one still finishes; x is not read and nothing is written before its end.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32, 1], [W, 1, 1], [2, 1, 0])
    BYTES: gl.constexpr = FORMAT == "nvfp4" or FORMAT == "mxfp4"
    #: 32-bit words of scale bytes that a row of a K block has.
    COUNT: gl.constexpr = 4 if FORMAT == "nvfp4" else 2
    WARP_BASES: gl.constexpr = (
        [[1, 0, 0], [2, 0, 0], [4, 0, 0], [8, 0, 0]] if W == 16 else [[1, 0, 0], [2, 0, 0], [4, 0, 0]]
    )
    SLOTS: gl.constexpr = W // 2

    part_block = gl.program_id(1) * (PART * PARTS)
    step = gl.num_programs(0)
    # Warps without a block of their own multiply some block by zeros.
    lw = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, LOAD)))
    ll = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, LOAD)))
    le = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LOAD)))
    words_at = gl.minimum(part_block + lw, k_blocks - 1)[:, None, None] * WORDS
    words_at += ll[None, :, None] * 4 + le[None, None, :]
    if BYTES:
        # Registers: a row's words, then those of its partner eight rows below; four lanes of a row load the same.
        SCALES: gl.constexpr = gl.DistributedLinearLayout(
            [[0, 0, 1], [0, 0, 2], [0, 8, 0]] if COUNT == 4 else [[0, 0, 1], [0, 8, 0]],
            [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]], WARP_BASES, [], [W, 16, COUNT],
        )  # fmt: skip
        sw = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, SCALES)))
        sr = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, SCALES)))
        sc = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, SCALES)))
        scale_at = gl.minimum(part_block + sw, k_blocks - 1)[:, None, None] * (ROWS * COUNT)
        scale_at += sr[None, :, None] * COUNT + sc[None, None, :]
    elif GROUPS > 0:
        gw = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, ACC)))
        gr = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, ACC)))
        scale_at = gl.minimum(part_block + gw, k_blocks - 1)[:, None] * (ROWS * GROUPS) + gr[None, :]
    first = gl.program_id(0)
    words = words_ptr + first * k_blocks * WORDS
    q0 = gl.load(words + words_at)
    q1 = gl.load(words + words_at + 128)
    q2 = gl.load(words + words_at + 256)
    q3 = gl.load(words + words_at + 384)
    if BYTES:
        next_scales = gl.load(scale_ptr + first * k_blocks * (ROWS * COUNT) + scale_at)
    next_groups = ()
    for g in gl.static_range(GROUPS):
        next_groups = next_groups + (gl.load(scale_ptr + (first * k_blocks * GROUPS + g) * ROWS + scale_at),)  # type: ignore[assignment]  # noqa: RUF005

    xw = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, RIGHT)))
    xk = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, RIGHT)))
    xm = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, RIGHT)))
    column = (part_block + xw)[:, None, None] * 256 + xk[None, :, None]
    x_at = column + xm[None, None, :] * stride_xm
    x_ok = (xm < M)[None, None, :] & (xw < PART * PARTS)[:, None, None]
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    xs = ()
    for j in gl.static_range(16):
        xs = xs + (gl.load(x_ptr + x_at + j * 16, mask=x_ok & (column + j * 16 < K), other=0.0),)  # type: ignore[assignment]  # noqa: RUF005

    SUMS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    OUT: gl.constexpr = gl.BlockedLayout([1, 1, BM // 4], [1, 1, 32], [W // 2, 1, 2], [2, 1, 0])
    sums = gl.allocate_shared_memory(gl.float32, [SLOTS, W, ROWS, BM], SUMS)
    flat = sums._reinterpret(gl.float32, [SLOTS, W, ROWS * BM], FLAT)
    slot = gl.arange(0, SLOTS, gl.SliceLayout(1, gl.SliceLayout(2, OUT)))[:, None, None]
    element = gl.arange(0, ROWS * BM, gl.SliceLayout(0, gl.SliceLayout(1, OUT)))[None, None, :]
    token = element % BM
    part_stride = tiles * ROWS * BM
    zero = gl.zeros([W, ROWS, BM], gl.float32, ACC)

    for base in range(first, tiles, SLOTS * step):
        count = gl.minimum((tiles - base + step - 1) // step, SLOTS)
        for i in range(count):
            # A quarter's registers take the next tile's words as soon as its products are formed.
            ahead = gl.minimum(base + (i + 1) * step, tiles - 1) * k_blocks
            words = words_ptr + ahead * WORDS
            s0, s1, s2, s3 = 0, 0, 0, 0
            if BYTES:
                s0, s1, s2, s3 = _split_words(next_scales, LEFT, COUNT, W)
                next_scales = gl.load(scale_ptr + ahead * (ROWS * COUNT) + scale_at)
            groups = next_groups
            next_groups = ()
            for g in gl.static_range(GROUPS):
                next_groups = next_groups + (gl.load(scale_ptr + (ahead * GROUPS + g) * ROWS + scale_at),)  # type: ignore[assignment]  # noqa: RUF005
            part = _quarter(zero, q0, s0, xs, LEFT, FORMAT, X, W, 0)
            q0 = gl.load(words + words_at)
            if GROUPS == 4:
                block = part * groups[0][:, :, None]  # type: ignore[misc]
                part = zero
            part = _quarter(part, q1, s1, xs, LEFT, FORMAT, X, W, 1)
            q1 = gl.load(words + words_at + 128)
            if GROUPS == 4:
                block += part * groups[1][:, :, None]  # type: ignore[misc]
                part = zero
            if GROUPS == 2:
                block = part * groups[0][:, :, None]  # type: ignore[misc]
                part = zero
            part = _quarter(part, q2, s2, xs, LEFT, FORMAT, X, W, 2)
            q2 = gl.load(words + words_at + 256)
            if GROUPS == 4:
                block += part * groups[2][:, :, None]  # type: ignore[misc]
                part = zero
            part = _quarter(part, q3, s3, xs, LEFT, FORMAT, X, W, 3)
            q3 = gl.load(words + words_at + 384)
            if GROUPS > 0:
                part = block + part * groups[GROUPS - 1][:, :, None]
            sums.index(i).store(part)

        tile = base + slot * step
        inside = tile < tiles
        row = tile * ROWS + element // BM
        nothing = gl.zeros([SLOTS, 1, ROWS * BM], gl.float32, OUT)
        value = nothing
        for part in gl.static_range(PARTS):
            part_sum = _add_warps(flat, nothing, part, PART, OUT)
            if SPLIT == 1:
                value += part_sum
            else:
                part_at = partial_ptr + (gl.program_id(1) * PARTS + part) * part_stride
                gl.store(part_at + row * BM + token, part_sum, mask=inside, cache_modifier=".cg")
        finish = True
        if SPLIT > 1:
            # All threads' stores must be issued before one thread publishes them with the ticket.
            debug_barrier()
            finish = gl.atomic_add(ticket_ptr + base, 1, sem="acq_rel") == SPLIT - 1
            if finish:
                gl.store(ticket_ptr + base, 0)
                value = _add_parts(partial_ptr, row * BM + token, inside, part_stride, SPLIT * PARTS, value)
        if finish:
            _store_out(
                value, row, token, inside, scale_ptr, global_ptr, bias_ptr, y_ptr, M, N, stride_ym,
                FORMAT, X, ACT, HAS_BIAS,
            )  # fmt: skip
