"""Device functions shared by the FP4 kernels: decoding of packed weights, scales, activation, rounding to the output.

Every function has two bodies chosen at compile time. ``NATIVE`` uses two-lane 16-bit instructions (PTX, sm_80 and
later); the other is plain Triton, runs in the interpreter, and is what float32 activations use everywhere.

The interpreter holds bfloat16 as raw integers: its arithmetic on them is wrong without an error, and its stores
truncate (anchor: toolchain, "Interpreter"). So nothing but a load touches bfloat16 there, and results are rounded by
integer arithmetic (``round_bf16_bits``) and stored through an int16 view.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

#: Two codes of four sit in the two 16-bit lanes of a register; each output register is one code position of both lanes.
#: q + 8 in the low mantissa bits of 128.0 (bf16) is 128 + q + 8, so a quarter of it minus 34 is q / 4. A code four bits
#: further up needs no shift: below 2 * 2^-126 a bf16 grows linearly with its bits, exponent's lowest bit included, so
#: those bits alone are (q + 8) x 2^-129, and 2^127 times that minus 2 is q / 4 too. bf16 products honour subnormals.
_INT4_BF16 = tl.constexpr(
    """{
    .reg .b32 t, quarter, large, off, two;
    mov.b32 quarter, 0x3E803E80;
    mov.b32 large, 0x7F007F00;
    mov.b32 off, 0xC208C208;
    mov.b32 two, 0xC000C000;
    shr.u32 t, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    and.b32 $1, $4, 0x00F000F0;
    lop3.b32 $2, t, 0x000F000F, 0x43004300, 0xEA;
    and.b32 $3, t, 0x00F000F0;
    fma.rn.bf16x2 $0, $0, quarter, off;
    fma.rn.bf16x2 $1, $1, large, two;
    fma.rn.bf16x2 $2, $2, quarter, off;
    fma.rn.bf16x2 $3, $3, large, two;
    }"""
)
#: 1024.0 in fp16 has ten mantissa bits, room for a code four bits further up: 1024 + 16 (q + 8), a sixteenth, minus 72.
_INT4_FP16 = tl.constexpr(
    """{
    .reg .b32 t, one, sixteenth, off, less;
    mov.b32 one, 0x3C003C00;
    mov.b32 sixteenth, 0x2C002C00;
    mov.b32 off, 0xE408E408;
    mov.b32 less, 0xD480D480;
    shr.u32 t, $4, 8;
    lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $1, $4, 0x00F000F0, 0x64006400, 0xEA;
    lop3.b32 $2, t, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $3, t, 0x00F000F0, 0x64006400, 0xEA;
    fma.rn.f16x2 $0, $0, one, off;
    fma.rn.f16x2 $1, $1, sixteenth, less;
    fma.rn.f16x2 $2, $2, one, off;
    fma.rn.f16x2 $3, $3, sixteenth, less;
    }"""
)
#: What the native integer decode into bf16 leaves out; the epilogue multiplies the float32 sum by it, which is exact.
INT4_DEFERRED = tl.constexpr(4.0)
#: E2M1 in bf16: sign to bit 15, the three magnitude bits to 8..6 (two exponent bits, one mantissa bit) gives the value
#: times 2^-126, the half included because bf16 products honour subnormals. ``packing.TWIDDLE`` places the bits so that
#: three of the four codes need one shift and one AND. $5 has the scales of code positions 0 and 1 in its halves (times
#: 2^117), $7 those of 2 and 3, which a two-lane product takes from either half. $6 and $8 are those of the second
#: element, which stands in the same group of 16 columns: the same registers, as the ahead-of-time gate reads in the
#: comment that they are named in.
_E2M1_BF16 = tl.constexpr(
    """{
    .reg .b32 t1, t2, t3, t4, t5, f0, f1, f2, f3;
    .reg .b16 l, h;
    // shared: $5 $6, $7 $8
    mov.b32 {l, h}, $5;
    mov.b32 f0, {l, l};
    mov.b32 f1, {h, h};
    mov.b32 {l, h}, $7;
    mov.b32 f2, {l, l};
    mov.b32 f3, {h, h};
    shl.b32 t1, $4, 3;
    shl.b32 t2, $4, 6;
    shr.u32 t3, $4, 4;
    shr.u32 t4, $4, 5;
    shl.b32 t5, $4, 1;
    and.b32 t3, t3, 0x00C000C0;
    lop3.b32 t3, t4, 0x01000100, t3, 0xEA;
    lop3.b32 t3, t5, 0x80008000, t3, 0xEA;
    and.b32 t4, $4, 0x81C081C0;
    and.b32 t1, t1, 0x81C081C0;
    and.b32 t2, t2, 0x81C081C0;
    mov.b32 t5, 0x80008000;
    fma.rn.bf16x2 $0, t4, f0, t5;
    fma.rn.bf16x2 $1, t1, f1, t5;
    fma.rn.bf16x2 $2, t2, f2, t5;
    fma.rn.bf16x2 $3, t3, f3, t5;
    }"""
)
#: E2M1 in fp16: magnitude bits to 11..9 gives the value times 2^-14. Codes in nibble order.
_E2M1_FP16 = tl.constexpr(
    """{
    .reg .b32 t0, t1, t2, s0, s1, s2, z, f0, f1, f2, f3;
    .reg .b16 l, h;
    // shared: $5 $6, $7 $8
    mov.b32 {l, h}, $5;
    mov.b32 f0, {l, l};
    mov.b32 f1, {h, h};
    mov.b32 {l, h}, $7;
    mov.b32 f2, {l, l};
    mov.b32 f3, {h, h};
    shl.b32 s0, $4, 12;
    shl.b32 s1, $4, 8;
    shl.b32 s2, $4, 4;
    shl.b32 t0, $4, 9;
    shl.b32 t1, $4, 5;
    shl.b32 t2, $4, 1;
    and.b32 t0, t0, 0x0E000E00;
    and.b32 t1, t1, 0x0E000E00;
    and.b32 t2, t2, 0x0E000E00;
    lop3.b32 t0, s0, 0x80008000, t0, 0xEA;
    lop3.b32 t1, s1, 0x80008000, t1, 0xEA;
    lop3.b32 t2, s2, 0x80008000, t2, 0xEA;
    shr.u32 s0, $4, 3;
    and.b32 s0, s0, 0x0E000E00;
    lop3.b32 s0, $4, 0x80008000, s0, 0xEA;
    mov.b32 z, 0x80008000;
    fma.rn.f16x2 $0, t0, f0, z;
    fma.rn.f16x2 $1, t1, f1, z;
    fma.rn.f16x2 $2, t2, f2, z;
    fma.rn.f16x2 $3, s0, f3, z;
    }"""
)
#: What the native E2M1 decode leaves out of its product, so that scale x 2^k stays inside the 16-bit type:
#: the epilogue multiplies the float32 sum by this power of two, which is exact.
E2M1_DEFERRED = tl.constexpr(512.0)


@triton.jit
def e2m1_value(code):
    """E2M1 codes (int32, 0..15) -> float32 values, the sign of zero kept: bits in place, times 2^126."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 85070591730234615865843651857942052864.0


@triton.jit
def e4m3_value(byte):
    """E4M3 bytes (int32) -> float32: 2^120 rebiases the exponent and makes subnormals right; 0x7F is NaN."""
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    value = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0_value(byte):
    """E8M0 bytes (int32) -> float32 2^(byte - 127): subnormal for 0, NaN for 255."""
    value = tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
    return tl.where(byte == 255, float("nan"), value)


@triton.jit
def int4_operands(packed_i16, X: tl.constexpr, NATIVE: tl.constexpr):
    """Packed int16 (four codes an element) -> four tensors of integers -8..7, exact in the dtype of x."""
    if NATIVE:
        if X == "bf16":
            a, b, c, d = tl.inline_asm_elementwise(
                _INT4_BF16,
                "=&r,=&r,=&r,=&r,r",
                [packed_i16],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _INT4_FP16,
                "=&r,=&r,=&r,=&r,r",
                [packed_i16],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        p = packed_i16.to(tl.int32)
        a = ((p & 0xF) - 8).to(tl.float32)
        b = (((p >> 4) & 0xF) - 8).to(tl.float32)
        c = (((p >> 8) & 0xF) - 8).to(tl.float32)
        d = (((p >> 12) & 0xF) - 8).to(tl.float32)
    return a, b, c, d


#: Four E4M3 bytes of a word -> scales 0 and 1 in the halves of a register, 2 and 3 in those of another, times 2^117
#: (bf16): the exponent is rebiased by an integer addition, right for normal scales, which is what encoders with a scale
#: floor of 2^-6 write.
_SCALES_BF16 = tl.constexpr(
    """{
    .reg .b32 a, b;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    mad.lo.u32 $0, a, 0x00000010, 0x76807680;
    mad.lo.u32 $1, b, 0x00000010, 0x76807680;
    }"""
)
#: The same for fp16, times 2^5.
_SCALES_FP16 = tl.constexpr(
    """{
    .reg .b32 a, b;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    mad.lo.u32 $0, a, 0x00000080, 0x34003400;
    mad.lo.u32 $1, b, 0x00000080, 0x34003400;
    }"""
)


@triton.jit
def _any_scale(bits, X: tl.constexpr):
    """E4M3 byte (int32), also subnormal -> the scale times 2^117 (bf16) or 2^5 (fp16) in an int32's lower half."""
    value = (bits << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2^120
    if X == "bf16":
        half = (value * 166153499473114484112975882535043072.0).to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        half = (value * 32.0).to(tl.float16).to(tl.int16, bitcast=True)
    return half.to(tl.int32) & 0xFFFF


#: Four E8M0 bytes of a word -> 2^(byte - 1), two to a register: what brings an E2M1 code's bits, which as bf16 are the
#: value times 2^-126, to value x 2^(byte - 127). Right for bytes 0 to 128 (``packing.E8M0_NARROW_MAX``).
_E8M0_BF16 = tl.constexpr(
    """{
    .reg .b32 a, b;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    mad.lo.u32 $0, a, 0x00000080, 0x3F003F00;
    mad.lo.u32 $1, b, 0x00000080, 0x3F003F00;
    }"""
)
#: 2^126 in bf16 and 2^14 in fp16, twice: E2M1 operands without a scale.
_UNIT_BF16 = tl.constexpr(0x7E807E80)
_UNIT_FP16 = tl.constexpr(0x74007400)


@triton.jit
def _spread(value, ROWS: tl.constexpr, BKW: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, BKW/COLUMNS] -> [ROWS, BKW], every element COLUMNS times."""
    return tl.reshape(tl.broadcast_to(value[:, :, None], (ROWS, BKW // COLUMNS, COLUMNS)), (ROWS, BKW))


@triton.jit
def e2m1_scales(
    word_i32, ROWS: tl.constexpr, BKW: tl.constexpr, COLUMNS: tl.constexpr, FORMAT: tl.constexpr, X: tl.constexpr,
    NATIVE: tl.constexpr, SMALL_SCALES: tl.constexpr,
):  # fmt: skip
    """Scale words [ROWS, BKW/COLUMNS] -> tensors [ROWS, BKW]: for each code position its scale as float32, or

    NATIVE: int32 holding the scales of positions 0 and 1, and of 2 and 3 (both twice), nvfp4's times 2^117 (bf16) or
    2^5 (fp16), mxfp4's (bf16 only) times 2^126; SMALL_SCALES takes zero and subnormal E4M3 scales too, more slowly.

    Made of views, broadcasts and elementwise operations on a load, without index arithmetic: then the compiler moves
    the whole decode into the register layout of the matrix operand, instead of passing decoded weights through shared
    memory. Words of 32 bits let it prefetch the load asynchronously, and keep the layout of 16-bit operands.
    """
    if NATIVE:
        if FORMAT == "mxfp4":
            a, b = tl.inline_asm_elementwise(
                _E8M0_BF16, "=&r,=&r,r", [word_i32], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
        elif SMALL_SCALES:
            a = _any_scale(word_i32 & 0xFF, X) | (_any_scale((word_i32 >> 8) & 0xFF, X) << 16)
            b = _any_scale((word_i32 >> 16) & 0xFF, X) | (_any_scale((word_i32 >> 24) & 0xFF, X) << 16)
        elif X == "bf16":
            a, b = tl.inline_asm_elementwise(
                _SCALES_BF16, "=&r,=&r,r", [word_i32], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
        else:
            a, b = tl.inline_asm_elementwise(
                _SCALES_FP16, "=&r,=&r,r", [word_i32], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
            )
        c, d = a, b
    elif FORMAT == "mxfp4":
        a = e8m0_value(word_i32 & 0xFF)
        b = e8m0_value((word_i32 >> 8) & 0xFF)
        c = e8m0_value((word_i32 >> 16) & 0xFF)
        d = e8m0_value((word_i32 >> 24) & 0xFF)
    else:
        a = e4m3_value(word_i32 & 0xFF)
        b = e4m3_value((word_i32 >> 8) & 0xFF)
        c = e4m3_value((word_i32 >> 16) & 0xFF)
        d = e4m3_value((word_i32 >> 24) & 0xFF)
    a, b = _spread(a, ROWS, BKW, COLUMNS), _spread(b, ROWS, BKW, COLUMNS)
    c, d = _spread(c, ROWS, BKW, COLUMNS), _spread(d, ROWS, BKW, COLUMNS)
    return a, b, c, d


@triton.jit
def e2m1_unscaled(packed_i16, X: tl.constexpr, NATIVE: tl.constexpr, TWIDDLED: tl.constexpr):
    """Packed int16 -> the four code positions' E2M1 values, exact in x's dtype (NATIVE) or float32."""
    if NATIVE:
        unit = tl.full(packed_i16.shape, _UNIT_BF16 if X == "bf16" else _UNIT_FP16, tl.int32)
    else:
        unit = tl.full(packed_i16.shape, 1.0, tl.float32)
    a, b, c, d = e2m1_operands(packed_i16, unit, unit, unit, unit, X, NATIVE, TWIDDLED)
    return a, b, c, d


@triton.jit
def e2m1_operands(packed_i16, f0, f1, f2, f3, X: tl.constexpr, NATIVE: tl.constexpr, TWIDDLED: tl.constexpr):
    """Packed int16 and what ``e2m1_scales`` gives -> four tensors of E2M1 x scale, exact in x's dtype.

    NATIVE: nvfp4's are 2^-9 of it, see E2M1_DEFERRED.
    """
    if NATIVE:
        if X == "bf16":
            a, b, c, d = tl.inline_asm_elementwise(
                _E2M1_BF16,
                "=&r,=&r,=&r,=&r,r,r,r,r,r",
                [packed_i16, f0, f1],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _E2M1_FP16,
                "=&r,=&r,=&r,=&r,r,r,r,r,r",
                [packed_i16, f0, f1],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        p = packed_i16.to(tl.int32) & 0xFFFF
        if TWIDDLED:
            c0 = ((p >> 12) & 8) | ((p >> 6) & 7)
            c1 = ((p >> 9) & 8) | ((p >> 3) & 7)
            c2 = ((p >> 6) & 8) | (p & 7)
            c3 = ((p >> 11) & 8) | ((p >> 11) & 4) | ((p >> 10) & 3)
        else:
            c0 = p & 0xF
            c1 = (p >> 4) & 0xF
            c2 = (p >> 8) & 0xF
            c3 = (p >> 12) & 0xF
        a = e2m1_value(c0) * f0
        b = e2m1_value(c1) * f1
        c = e2m1_value(c2) * f2
        d = e2m1_value(c3) * f3
    return a, b, c, d


#: NF4: a byte permute looks four codes up in eight bytes, so the low and the high bytes of the first and the last eight
#: values take eight permutes; bit 3 of each code, spread over a byte, picks between the two halves of the table.
_NF4 = """{{
    .reg .b32 c, d, m, n, a, b, e, f, p, q, r, s;
    and.b32 c, $4, 0x77777777;
    shr.u32 d, c, 16;
    shl.b32 a, $4, 4;
    prmt.b32 m, a, $4, 0xD9C8;
    prmt.b32 n, a, $4, 0xFBEA;
    mov.b32 p, {0};
    mov.b32 q, {1};
    mov.b32 r, {2};
    mov.b32 s, {3};
    prmt.b32 a, p, q, c;
    prmt.b32 b, r, s, c;
    lop3.b32 a, m, b, a, 0xCA;
    prmt.b32 e, p, q, d;
    prmt.b32 f, r, s, d;
    lop3.b32 e, n, f, e, 0xCA;
    mov.b32 p, {4};
    mov.b32 q, {5};
    mov.b32 r, {6};
    mov.b32 s, {7};
    prmt.b32 b, p, q, c;
    prmt.b32 f, r, s, c;
    lop3.b32 b, m, f, b, 0xCA;
    prmt.b32 f, p, q, d;
    prmt.b32 p, r, s, d;
    lop3.b32 f, n, p, f, 0xCA;
    prmt.b32 c, a, b, 0x5140;
    prmt.b32 d, a, b, 0x7362;
    prmt.b32 m, e, f, 0x5140;
    prmt.b32 n, e, f, 0x7362;
    prmt.b32 $0, c, m, 0x5410;
    prmt.b32 $1, c, m, 0x7632;
    prmt.b32 $2, d, n, 0x5410;
    prmt.b32 $3, d, n, 0x7632;
}}"""
#: The table's bytes rounded to bf16 and to fp16: low bytes of values 0..15, then high bytes.
_NF4_BF16 = tl.constexpr(
    _NF4.format(
        *(
            "0xCA063280",
            "0x00BA3D92",
            "0xAD7C25A3",
            "0x803910E2",
            "0xBEBFBFBF",
            "0x00BDBEBE",
            "0x3E3E3E3D",
            "0x3F3F3F3E",
        )
    )
)
_NF4_FP16 = tl.constexpr(
    _NF4.format(
        *(
            "0x52339200",
            "0x00D4EA8D",
            "0x68E02618",
            "0x00C9800D",
            "0xB6B8B9BC",
            "0x00ADB1B4",
            "0x3533312D",
            "0x3C393837",
        )
    )
)


#: QLoRA's NormalFloat4 values (arXiv 2305.14314, appendix E), each exact in float32.
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_table(device: Any) -> Any:
    """The table as float32 [16] on a device, for kernels that look values up in memory."""
    import torch

    return torch.tensor(NF4_TABLE, dtype=torch.float32, device=device)


@triton.jit
def nf4_value(code, table_ptr):
    """NF4 codes (int32, 0..15) -> float32 values, read from the table [16] (one cache line)."""
    return tl.load(table_ptr + code)


@triton.jit
def nf4_operands(packed_i16, table_ptr, X: tl.constexpr, NATIVE: tl.constexpr):
    """Packed int16 -> the four code positions' table values: rounded to x's dtype (NATIVE), or float32."""
    if NATIVE:
        if X == "bf16":
            a, b, c, d = tl.inline_asm_elementwise(
                _NF4_BF16,
                "=&r,=&r,=&r,=&r,r",
                [packed_i16],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _NF4_FP16,
                "=&r,=&r,=&r,=&r,r",
                [packed_i16],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
                is_pure=True,
                pack=2,
            )
    else:
        p = packed_i16.to(tl.int32)
        a = nf4_value(p & 0xF, table_ptr)
        b = nf4_value((p >> 4) & 0xF, table_ptr)
        c = nf4_value((p >> 8) & 0xF, table_ptr)
        d = nf4_value((p >> 12) & 0xF, table_ptr)
    return a, b, c, d


@triton.jit
def activate(value, ACT: tl.constexpr):
    """relu, gelu (erf form) or silu in float32. NaN stays NaN under relu, as in torch."""
    if ACT == "relu":
        value = tl.where(value < 0.0, 0.0, value)
    elif ACT == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACT == "silu":
        # exp of a negative number only, so that nothing overflows on the way
        e = tl.exp(-tl.abs(value))
        value = tl.where(value < 0.0, value * e, value) / (1.0 + e)
    return value


@triton.jit
def round_bf16_bits(value):
    """float32 -> the int16 bit pattern of its round-half-even bfloat16, by integer arithmetic; NaN stays NaN."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).to(tl.int16)


@triton.jit
def to_output(value, Y: tl.constexpr, NATIVE_ROUNDING: tl.constexpr):
    """float32 -> what is stored for output dtype ``Y``: the value itself, or bit patterns for bf16 when interpreted."""
    if Y == "bf16":
        value = value.to(tl.bfloat16) if NATIVE_ROUNDING else round_bf16_bits(value)
    elif Y == "fp16":
        value = value.to(tl.float16)
    return value
