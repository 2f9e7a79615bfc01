"""Device functions shared by the FP4 kernels: decoding of packed weights, scales, activation, rounding to the output.

Every function has two bodies chosen at compile time. ``NATIVE`` uses two-lane 16-bit instructions (PTX, sm_80 and
later); the other is plain Triton, runs in the interpreter, and is what float32 activations use everywhere.

The interpreter holds bfloat16 as raw integers: its arithmetic on them is wrong without an error, and its stores
truncate (anchor: toolchain, "Interpreter"). So nothing but a load touches bfloat16 there, and results are rounded by
integer arithmetic (``round_bf16_bits``) and stored through an int16 view.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Two codes of four sit in the two 16-bit lanes of a register; each output register is one code position of both lanes.
#: q + 8 in the low mantissa bits of 128.0 (bf16) is exactly 128 + q + 8; subtracting 136 leaves q, exactly.
_INT4_BF16 = tl.constexpr(
    """{
    .reg .b32 t1, t2, t3, one, off;
    mov.b32 one, 0x3F803F80;
    mov.b32 off, 0xC308C308;
    shr.u32 t1, $4, 4;
    shr.u32 t2, $4, 8;
    shr.u32 t3, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $1, t1, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $2, t2, 0x000F000F, 0x43004300, 0xEA;
    lop3.b32 $3, t3, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, $0, one, off;
    fma.rn.bf16x2 $1, $1, one, off;
    fma.rn.bf16x2 $2, $2, one, off;
    fma.rn.bf16x2 $3, $3, one, off;
    }"""
)
#: The same with 1024.0 in fp16 (ten mantissa bits); -1032 = 0xE408.
_INT4_FP16 = tl.constexpr(
    """{
    .reg .b32 t1, t2, t3, one, off;
    mov.b32 one, 0x3C003C00;
    mov.b32 off, 0xE408E408;
    shr.u32 t1, $4, 4;
    shr.u32 t2, $4, 8;
    shr.u32 t3, $4, 12;
    lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $1, t1, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $2, t2, 0x000F000F, 0x64006400, 0xEA;
    lop3.b32 $3, t3, 0x000F000F, 0x64006400, 0xEA;
    fma.rn.f16x2 $0, $0, one, off;
    fma.rn.f16x2 $1, $1, one, off;
    fma.rn.f16x2 $2, $2, one, off;
    fma.rn.f16x2 $3, $3, one, off;
    }"""
)
#: E2M1 in bf16: sign to bit 15, the three magnitude bits to 8..6 (two exponent bits, one mantissa bit) gives the value
#: times 2^-126, the half included because bf16 products honour subnormals. ``packing.TWIDDLE`` places the bits so that
#: three of the four codes need one shift and one AND. $5..$12 are the scales (times 2^117) of the two elements for each
#: code position, each scale in both halves of its register.
_E2M1_BF16 = tl.constexpr(
    """{
    .reg .b32 t1, t2, t3, t4, t5, f0, f1, f2, f3;
    prmt.b32 f0, $5, $6, 0x7610;
    prmt.b32 f1, $7, $8, 0x7610;
    prmt.b32 f2, $9, $10, 0x7610;
    prmt.b32 f3, $11, $12, 0x7610;
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
    prmt.b32 f0, $5, $6, 0x7610;
    prmt.b32 f1, $7, $8, 0x7610;
    prmt.b32 f2, $9, $10, 0x7610;
    prmt.b32 f3, $11, $12, 0x7610;
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


#: Four E4M3 bytes of a word -> four registers holding the scale twice, times 2^117 (bf16): the exponent is rebiased by
#: an integer addition, right for normal scales, which is what encoders with a scale floor of 2^-6 write.
_SCALES_BF16 = tl.constexpr(
    """{
    .reg .b32 b0, b1, b2, b3;
    prmt.b32 b0, $4, 0, 0x4440;
    prmt.b32 b1, $4, 0, 0x4441;
    prmt.b32 b2, $4, 0, 0x4442;
    prmt.b32 b3, $4, 0, 0x4443;
    mad.lo.u32 $0, b0, 0x00100010, 0x76807680;
    mad.lo.u32 $1, b1, 0x00100010, 0x76807680;
    mad.lo.u32 $2, b2, 0x00100010, 0x76807680;
    mad.lo.u32 $3, b3, 0x00100010, 0x76807680;
    }"""
)
#: The same for fp16, times 2^5.
_SCALES_FP16 = tl.constexpr(
    """{
    .reg .b32 b0, b1, b2, b3;
    prmt.b32 b0, $4, 0, 0x4440;
    prmt.b32 b1, $4, 0, 0x4441;
    prmt.b32 b2, $4, 0, 0x4442;
    prmt.b32 b3, $4, 0, 0x4443;
    mad.lo.u32 $0, b0, 0x00800080, 0x34003400;
    mad.lo.u32 $1, b1, 0x00800080, 0x34003400;
    mad.lo.u32 $2, b2, 0x00800080, 0x34003400;
    mad.lo.u32 $3, b3, 0x00800080, 0x34003400;
    }"""
)


@triton.jit
def _any_scale(bits, X: tl.constexpr):
    """E4M3 byte (int32) -> int32 with the scale times 2^117 (bf16) or 2^5 (fp16) in both halves; subnormal ones too."""
    value = (bits << 20).to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2^120
    if X == "bf16":
        half = (value * 166153499473114484112975882535043072.0).to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        half = (value * 32.0).to(tl.float16).to(tl.int16, bitcast=True)
    return (half.to(tl.int32) & 0xFFFF) * 0x00010001


@triton.jit
def _spread(value, ROWS: tl.constexpr, BKW: tl.constexpr):
    """[ROWS, BKW/16] -> [ROWS, BKW], every element 16 times."""
    return tl.reshape(tl.broadcast_to(value[:, :, None], (ROWS, BKW // 16, 16)), (ROWS, BKW))


@triton.jit
def e2m1_scales(
    word_i32, ROWS: tl.constexpr, BKW: tl.constexpr, X: tl.constexpr, NATIVE: tl.constexpr,
    SMALL_SCALES: tl.constexpr,
):  # fmt: skip
    """E4M3 scale words [ROWS, BKW/16] -> for each code position a tensor [ROWS, BKW].

    NATIVE: int32 holding the scaled scale in both halves; SMALL_SCALES takes zero and subnormal scales too, more
    slowly. Else float32.

    Made of views, broadcasts and elementwise operations on a load, without index arithmetic: then the compiler moves
    the whole decode into the register layout of the matrix operand, instead of passing decoded weights through shared
    memory. Words of 32 bits let it prefetch the load asynchronously, and keep the layout of 16-bit operands.
    """
    if NATIVE:
        if SMALL_SCALES:
            a = _any_scale(word_i32 & 0xFF, X)
            b = _any_scale((word_i32 >> 8) & 0xFF, X)
            c = _any_scale((word_i32 >> 16) & 0xFF, X)
            d = _any_scale((word_i32 >> 24) & 0xFF, X)
        elif X == "bf16":
            a, b, c, d = tl.inline_asm_elementwise(
                _SCALES_BF16,
                "=&r,=&r,=&r,=&r,r",
                [word_i32],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _SCALES_FP16,
                "=&r,=&r,=&r,=&r,r",
                [word_i32],
                dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
                is_pure=True,
                pack=1,
            )
    else:
        a = e4m3_value(word_i32 & 0xFF)
        b = e4m3_value((word_i32 >> 8) & 0xFF)
        c = e4m3_value((word_i32 >> 16) & 0xFF)
        d = e4m3_value((word_i32 >> 24) & 0xFF)
    a, b = _spread(a, ROWS, BKW), _spread(b, ROWS, BKW)
    c, d = _spread(c, ROWS, BKW), _spread(d, ROWS, BKW)
    return a, b, c, d


@triton.jit
def e2m1_operands(packed_i16, f0, f1, f2, f3, X: tl.constexpr, NATIVE: tl.constexpr, TWIDDLED: tl.constexpr):
    """Packed int16 and the spread scales of each code position -> four tensors of E2M1 x E4M3, exact in x's dtype.

    NATIVE: times 2^-9, see E2M1_DEFERRED.
    """
    if NATIVE:
        if X == "bf16":
            a, b, c, d = tl.inline_asm_elementwise(
                _E2M1_BF16,
                "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                [packed_i16, f0, f1, f2, f3],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True,
                pack=2,
            )
        else:
            a, b, c, d = tl.inline_asm_elementwise(
                _E2M1_FP16,
                "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
                [packed_i16, f0, f1, f2, f3],
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
