"""Element types by integer arithmetic: one text for the compiler and for the simulator, whose arrays are numpy's and
have neither bfloat16 nor E4M3. 16-bit floats travel as uint16, E4M3 as uint8.

Indices are cast to unsigned, since numba would add len to a negative signed one at every access.

Every function here is a device function and plain Python in the simulator; tests call them on numpy scalars.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vbench.kernels.numba_cuda.dialect import device_function

TWO_POW_126 = np.float32(2.0**126)
TWO_POW_112 = np.float32(2.0**112)
TWO_POW_M9 = np.float32(2.0**-9)
HALF = np.float32(0.5)
#: 2^23: one unit in its last place is 1, so its low bits hold a small integer as a float32 would.
TWO_POW_23_BITS = 0x4B000000
TWO_POW_23_PLUS_8 = np.float32(2.0**23 + 8)
#: NormalFloat4 by code (QLoRA, arXiv 2305.14314, appendix E), as bitsandbytes prints it; exact in float32.
NF4 = tuple(
    np.float32(value)
    for value in (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    )
)


@device_function
def float_of(bits: Any) -> Any:
    """float32 with these 32 bits."""
    return np.uint32(bits).view(np.float32)


@device_function
def bits_of(value: Any) -> Any:
    """The 32 bits of a float32."""
    return np.float32(value).view(np.uint32)


@device_function
def decode_bf16(half: Any) -> Any:
    """bfloat16 bits -> float32, exact."""
    return float_of(np.uint32(half) << np.uint32(16))


@device_function
def decode_fp16(half: Any) -> Any:
    """float16 bits -> float32, exact: exponent and fraction moved into place as a float32 that is 2^112 too small.

    That float32 may be subnormal, so this relies on subnormals not being flushed (numba: fastmath off).
    """
    wide = np.uint32(half)
    sign = np.uint32((wide & np.uint32(0x8000)) << np.uint32(16))
    rest = np.uint32((wide & np.uint32(0x7FFF)) << np.uint32(13))
    if rest >= np.uint32(0x0F800000):
        return float_of(sign | rest | np.uint32(0x7F800000))
    return float_of(sign | bits_of(float_of(rest) * TWO_POW_112))


@device_function
def decode_e4m3(byte: Any) -> Any:
    """float8_e4m3fn bits -> float32, exact (OCP 8-bit floating point v1.0: bias 7, no infinity, 0x7F is NaN)."""
    wide = np.uint32(byte)
    sign = np.uint32((wide & np.uint32(0x80)) << np.uint32(24))
    rest = np.uint32(wide & np.uint32(0x7F))
    if rest == np.uint32(0x7F):
        return float_of(np.uint32(0x7FC00000))
    if rest < np.uint32(8):
        return float_of(sign | bits_of(np.float32(rest) * TWO_POW_M9))
    return float_of(sign | np.uint32((rest << np.uint32(20)) + np.uint32(120 << 23)))


@device_function
def decode_e8m0(byte: Any) -> Any:
    """E8M0 byte b -> float32 2^(b - 127), the subnormal 2^-127 for 0, NaN for 255 (OCP Microscaling v1.0, 5.4.1)."""
    wide = np.uint32(byte)
    if wide == np.uint32(0):
        return float_of(np.uint32(0x00400000))
    if wide == np.uint32(255):
        return float_of(np.uint32(0x7FC00000))
    return float_of(wide << np.uint32(23))


@device_function
def encode_e8m0(absmax: Any, rounding: Any) -> Any:
    """float32 block maximum >= 0 -> E8M0 byte of its mxfp4 scale; ``rounding``: see formats.MXFP4_ROUNDING."""
    exponent = np.uint32(bits_of(absmax) + np.uint32(rounding)) >> np.uint32(23)
    return np.uint8(exponent - np.uint32(2)) if exponent > np.uint32(2) else np.uint8(0)


@device_function
def encode_e4m3_normal(value: Any) -> Any:
    """float32 in [2^-6, 448] -> E4M3 byte, round half to even. No other value may be passed."""
    bits = bits_of(value)
    kept = np.uint32((bits >> np.uint32(20)) & np.uint32(1))
    return np.uint8(np.uint32((bits + np.uint32(0x7FFFF) + kept) >> np.uint32(20)) - np.uint32(120 << 3))


@device_function
def encode_bf16(value: Any) -> Any:
    """float32 -> bfloat16 bits, round half to even; NaN gives the quiet NaN."""
    bits = bits_of(value)
    if np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    kept = np.uint32((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + kept) >> np.uint32(16))


@device_function
def encode_fp16(value: Any) -> Any:
    """float32 -> float16 bits, round half to even, subnormals included; NaN gives the quiet NaN."""
    bits = bits_of(value)
    sign = np.uint32((bits >> np.uint32(16)) & np.uint32(0x8000))
    rest = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if rest > np.uint32(0x7F800000):
        return np.uint16(0x7E00)
    if rest >= np.uint32(0x477FF000):  # 65520, halfway to 2^16, rounds to infinity
        return np.uint16(sign | np.uint32(0x7C00))
    if rest >= np.uint32(0x38800000):  # 2^-14, the smallest normal float16
        kept = np.uint32((rest >> np.uint32(13)) & np.uint32(1))
        rounded = np.uint32((rest + np.uint32(0xFFF) + kept) >> np.uint32(13))
        return np.uint16(sign | np.uint32(rounded - np.uint32(112 << 10)))
    # Units in the last place of a float32 in [0.5, 1) are float16's subnormal step, so the addition rounds.
    return np.uint16(sign | np.uint32(bits_of(float_of(rest) + HALF) - np.uint32(0x3F000000)))


@device_function
def decode_int4(code: Any) -> Any:
    """absmax7 code 0..15 -> float32 code - 8, without an integer-to-float conversion (a slow instruction)."""
    return float_of(np.uint32(TWO_POW_23_BITS) | np.uint32(code)) - TWO_POW_23_PLUS_8


@device_function
def decode_e2m1(code: Any) -> Any:
    """E2M1 code 0..15 -> float32: its bits in float32's place give the value times 2^-126, subnormal 0.5 included."""
    wide = np.uint32(code)
    sign = np.uint32((wide & np.uint32(8)) << np.uint32(28))
    rest = np.uint32((wide & np.uint32(7)) << np.uint32(22))
    return float_of(sign | rest) * TWO_POW_126


@device_function
def _pick(bit: Any, clear: Any, set_: Any) -> Any:
    return set_ if bit else clear


@device_function
def decode_nf4(code: Any) -> Any:
    """NF4 code 0..15 -> float32: a tree of selects. A table would have to sit in shared memory, or be fetched from
    constant memory once for each distinct code of a warp."""
    wide = np.uint32(code)
    b0 = np.uint32(wide & np.uint32(1)) != np.uint32(0)
    b1 = np.uint32(wide & np.uint32(2)) != np.uint32(0)
    b2 = np.uint32(wide & np.uint32(4)) != np.uint32(0)
    b3 = np.uint32(wide & np.uint32(8)) != np.uint32(0)
    v0 = _pick(b1, _pick(b0, NF4[0], NF4[1]), _pick(b0, NF4[2], NF4[3]))
    v1 = _pick(b1, _pick(b0, NF4[4], NF4[5]), _pick(b0, NF4[6], NF4[7]))
    v2 = _pick(b1, _pick(b0, NF4[8], NF4[9]), _pick(b0, NF4[10], NF4[11]))
    v3 = _pick(b1, _pick(b0, NF4[12], NF4[13]), _pick(b0, NF4[14], NF4[15]))
    return _pick(b3, _pick(b2, v0, v1), _pick(b2, v2, v3))


@device_function
def load_bf16(array: Any, index: Any) -> Any:
    """Element of a bfloat16 array held as uint16, as float32."""
    return decode_bf16(array[np.uint64(index)])


@device_function
def load_fp16(array: Any, index: Any) -> Any:
    """Element of a float16 array held as uint16, as float32."""
    return decode_fp16(array[np.uint64(index)])


@device_function
def load_fp32(array: Any, index: Any) -> Any:
    """Element of a float32 array."""
    return array[np.uint64(index)]


@device_function
def store_bf16(array: Any, index: Any, value: Any) -> None:
    """Round a float32 to bfloat16 and store it in an array of uint16."""
    array[np.uint64(index)] = encode_bf16(value)


@device_function
def store_fp16(array: Any, index: Any, value: Any) -> None:
    """Round a float32 to float16 and store it in an array of uint16."""
    array[np.uint64(index)] = encode_fp16(value)


@device_function
def store_fp32(array: Any, index: Any, value: Any) -> None:
    """Store a float32."""
    array[np.uint64(index)] = value


@device_function
def store_pair_bf16(words: Any, pair: Any, low: Any, high: Any) -> None:
    """Round two float32 to bfloat16 and store them as one uint32, the first in the low half."""
    words[np.uint64(pair)] = np.uint32(encode_bf16(low)) | np.uint32(np.uint32(encode_bf16(high)) << np.uint32(16))


@device_function
def store_pair_fp16(words: Any, pair: Any, low: Any, high: Any) -> None:
    """Round two float32 to float16 and store them as one uint32, the first in the low half."""
    words[np.uint64(pair)] = np.uint32(encode_fp16(low)) | np.uint32(np.uint32(encode_fp16(high)) << np.uint32(16))


@device_function
def store_pair_fp32(array: Any, pair: Any, low: Any, high: Any) -> None:
    """Store two float32."""
    array[np.uint64(2 * pair)] = low
    array[np.uint64(2 * pair + 1)] = high


@device_function
def load_scale_e4m3(array: Any, index: Any) -> Any:
    """E4M3 scale held as uint8, as float32."""
    return decode_e4m3(array[np.uint64(index)])


@device_function
def load_scale_e8m0(array: Any, index: Any) -> Any:
    """E8M0 scale held as uint8, as float32."""
    return decode_e8m0(array[np.uint64(index)])


#: element type of a format -> value of a code; scale type -> load of a scale
VALUE_OF = {"int4": decode_int4, "e2m1": decode_e2m1, "nf4": decode_nf4}
LOAD_SCALE = {"fp32": load_fp32, "e4m3": load_scale_e4m3, "e8m0": load_scale_e8m0}
LOAD = {"bf16": load_bf16, "fp16": load_fp16, "fp32": load_fp32}
STORE = {"bf16": store_bf16, "fp16": store_fp16, "fp32": store_fp32}
STORE_PAIR = {"bf16": store_pair_bf16, "fp16": store_pair_fp16, "fp32": store_pair_fp32}
#: numba's name of the array element each dtype is held as, alone and in pairs
HELD_AS = {"bf16": "uint16", "fp16": "uint16", "fp32": "float32"}
PAIR_HELD_AS = {"bf16": "uint32", "fp16": "uint32", "fp32": "float32"}
