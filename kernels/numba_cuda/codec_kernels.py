"""Kernels of the codec: absmax, encode, decode. Reductions are trees of fixed shape; no atomics.

Device functions that use ``cuda`` sit here, in the module of their kernels (see ``dialect.device_function``).
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from vbench.kernels.numba_cuda import bits
from vbench.kernels.numba_cuda.bits import bits_of
from vbench.kernels.numba_cuda.dialect import SIMULATED, cuda, device_function
from vbench.kernels.numba_cuda.formats import FORMATS, MXFP4_ROUNDING, Format
from vbench.kernels.numba_cuda.program import Program

#: Threads a block. The simulator runs each as an operating-system thread, so few of them there.
THREADS = 8 if SIMULATED else 256
#: Blocks of the tensor-wide absmax, at most: enough to fill any GPU, few enough for one block to finish.
MAX_PARTIALS = 4 if SIMULATED else 1024

ZERO = np.float32(0)
ONE = np.float32(1)
SIX = np.float32(6)
SEVEN = np.float32(7)
GLOBAL_DIVISOR = np.float32(6 * 448)
E4M3_MIN_SCALE = np.float32(2.0**-6)
E4M3_MAX = np.float32(448)
MIN_NORMAL = np.float32(2.0**-126)
#: 1.5 * 2^23: adding it rounds a small float32 to an integer, half to even, and leaves it in the low bits.
ROUNDER = np.float32(12582912)
#: Bits of ROUNDER, less the 8 that absmax7 adds to a code.
ROUNDER_BITS_M8 = 0x4B400000 - 8
#: Midpoints of neighbouring NF4 values, rounded to float32 as bitsandbytes has them.
NF4_THRESHOLDS = tuple(np.float32((float(low) + float(high)) / 2) for low, high in pairwise(bits.NF4))


@device_function
def encode_int4(value: Any, scale: Any) -> Any:
    """clamp(round-half-even(value / scale), -7, 7) + 8 as uint32; IEEE division."""
    q = np.float32(value) / np.float32(scale)
    if q > SEVEN:
        q = SEVEN
    if q < -SEVEN:
        q = -SEVEN
    return np.uint32(bits_of(np.float32(q) + ROUNDER) - np.uint32(ROUNDER_BITS_M8))


@device_function
def encode_e2m1(value: Any, scale: Any) -> Any:
    """E2M1 code of value / scale as uint32: nearest, ties to the even code, saturating, sign of zero kept."""
    q_bits = bits_of(np.float32(value) / np.float32(scale))
    a = bits.float_of(q_bits & np.uint32(0x7FFFFFFF))
    code = np.uint32(q_bits >> np.uint32(31)) << np.uint32(3)
    # Midpoints below an odd code stay down, those below an even code go up.
    if a > np.float32(0.25):
        code += np.uint32(1)
    if a >= np.float32(0.75):
        code += np.uint32(1)
    if a > np.float32(1.25):
        code += np.uint32(1)
    if a >= np.float32(1.75):
        code += np.uint32(1)
    if a > np.float32(2.5):
        code += np.uint32(1)
    if a >= np.float32(3.5):
        code += np.uint32(1)
    if a > np.float32(5.0):
        code += np.uint32(1)
    return np.uint32(code)


@device_function
def _above(value: Any, threshold: Any) -> Any:
    return np.uint32(1) if value > threshold else np.uint32(0)


@device_function
def encode_nf4(value: Any, scale: Any) -> Any:
    """Number of NF4_THRESHOLDS strictly below value / scale as uint32: the nearest value's code, ties down."""
    q = np.float32(value) / np.float32(scale)
    t = NF4_THRESHOLDS
    code = _above(q, t[0]) + _above(q, t[1]) + _above(q, t[2]) + _above(q, t[3]) + _above(q, t[4])
    code += _above(q, t[5]) + _above(q, t[6]) + _above(q, t[7]) + _above(q, t[8]) + _above(q, t[9])
    code += _above(q, t[10]) + _above(q, t[11]) + _above(q, t[12]) + _above(q, t[13]) + _above(q, t[14])
    return np.uint32(code)


@device_function
def absmax7_scale(absmax: Any) -> Any:
    """max(absmax / 7, 2^-126) in IEEE float32 division."""
    scale = np.float32(absmax) / SEVEN
    return scale if scale > MIN_NORMAL else MIN_NORMAL


@device_function
def nf4_scale(absmax: Any) -> Any:
    """max(absmax, 2^-126)."""
    return larger(np.float32(absmax), MIN_NORMAL)


@device_function
def nvfp4_scale_byte(absmax: Any, global_scale: Any) -> Any:
    """E4M3(clamp(absmax / 6 / global, 2^-6, 448)) as its byte."""
    scale = np.float32(absmax) / SIX / np.float32(global_scale)
    if scale < E4M3_MIN_SCALE:
        scale = E4M3_MIN_SCALE
    if scale > E4M3_MAX:
        scale = E4M3_MAX
    return bits.encode_e4m3_normal(scale)


@device_function
def larger(a: Any, b: Any) -> Any:
    """The larger of two finite float32."""
    return a if a > b else b


@device_function
def block_max(buffer: Any, value: Any) -> Any:
    """Largest ``value`` of the block, in every thread. ``buffer``: shared, one float32 a thread."""
    tid = cuda.threadIdx.x
    buffer[tid] = value
    cuda.syncthreads()
    width = THREADS // 2
    while width > 0:
        if tid < width:
            buffer[tid] = larger(buffer[tid], buffer[tid + width])
        cuda.syncthreads()
        width //= 2
    result = buffer[0]
    cuda.syncthreads()
    return result


def _make_lane_max(lanes: int) -> Any:
    """-> device function (buffer, value): largest value of each run of ``lanes`` neighbouring threads, in all of them.

    Natively warp shuffles, and ``buffer`` is unused; the simulator has none, so there a butterfly in shared memory.
    """

    @device_function
    def lane_max_shuffle(buffer: Any, value: Any) -> Any:
        offset = lanes // 2
        while offset > 0:
            value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, offset))
            offset //= 2
        return value

    @device_function
    def lane_max_shared(buffer: Any, value: Any) -> Any:
        tid = cuda.threadIdx.x
        offset = lanes // 2
        while offset > 0:
            buffer[tid] = value
            cuda.syncthreads()
            value = larger(value, buffer[tid ^ offset])
            cuda.syncthreads()
            offset //= 2
        return value

    return lane_max_shared if SIMULATED else lane_max_shuffle


@cache
def absmax_partials(dtype: str) -> Program:
    """(w, partials, count): absmax of w[count] over each block's share; the grid strides over w."""
    load = bits.LOAD[dtype]

    def kernel(w: Any, partials: Any, count: int) -> None:
        buffer = cuda.shared.array(THREADS, np.float32)
        largest = ZERO
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        while i < count:
            largest = larger(largest, abs(load(w, i)))
            i += cuda.gridDim.x * THREADS
        largest = block_max(buffer, largest)
        if cuda.threadIdx.x == 0:
            partials[cuda.blockIdx.x] = largest

    return Program(
        f"absmax_partials_{dtype}", kernel, (f"{bits.HELD_AS[dtype]}[::1]", "float32[::1]", "int64"), THREADS
    )


@cache
def finish_tensor(name: str) -> Program:
    """(partials, scale, global_scale, count), one block: tensor-wide scale (absmax7_tensor) or global scale (nvfp4)."""
    fmt = FORMATS[name]
    nvfp4 = fmt.scale == "e4m3"

    def kernel(partials: Any, scale: Any, global_scale: Any, count: int) -> None:
        buffer = cuda.shared.array(THREADS, np.float32)
        largest = ZERO
        i = cuda.threadIdx.x
        while i < count:
            largest = larger(largest, partials[i])
            i += THREADS
        largest = block_max(buffer, largest)
        if cuda.threadIdx.x == 0:
            if nvfp4:
                global_scale[0] = larger(np.float32(largest) / GLOBAL_DIVISOR, MIN_NORMAL)
            else:
                scale[0] = absmax7_scale(largest)
                global_scale[0] = ONE

    arguments = ("float32[::1]", f"{fmt.scale_held}[::1]", "float32[::1]", "int64")
    return Program(f"finish_tensor_{name}", kernel, arguments, THREADS)


@cache
def encode_tensor(dtype: str) -> Program:
    """(w, codes, scale, pairs): absmax7 codes under one known scale; a thread a byte."""
    load = bits.LOAD[dtype]

    def kernel(w: Any, codes: Any, scale: Any, pairs: int) -> None:
        pair = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if pair < pairs:
            s = scale[0]
            low = encode_int4(load(w, 2 * pair), s)
            high = encode_int4(load(w, 2 * pair + 1), s)
            codes[np.uint64(pair)] = np.uint8(low | np.uint32(high << np.uint32(4)))

    arguments = (f"{bits.HELD_AS[dtype]}[::1]", "uint8[::1]", "float32[::1]", "int64")
    return Program(f"encode_tensor_{dtype}", kernel, arguments, THREADS)


@cache
def encode_row(dtype: str) -> Program:
    """(w, codes, scale, global_scale, k): absmax7 with a scale a row; a block a row."""
    load = bits.LOAD[dtype]

    def kernel(w: Any, codes: Any, scale: Any, global_scale: Any, k: int) -> None:
        buffer = cuda.shared.array(THREADS, np.float32)
        row = np.int64(cuda.blockIdx.x)
        tid = cuda.threadIdx.x
        largest = ZERO
        i = tid
        while i < k:
            largest = larger(largest, abs(load(w, row * k + i)))
            i += THREADS
        s = absmax7_scale(block_max(buffer, largest))
        if tid == 0:
            scale[row] = s
            if row == 0:
                global_scale[0] = ONE
        first = row * (k // 2)
        i = tid
        while i < k // 2:
            low = encode_int4(load(w, 2 * (first + i)), s)
            high = encode_int4(load(w, 2 * (first + i) + 1), s)
            codes[np.uint64(first + i)] = np.uint8(low | np.uint32(high << np.uint32(4)))
            i += THREADS

    arguments = (f"{bits.HELD_AS[dtype]}[::1]", "uint8[::1]", "float32[::1]", "float32[::1]", "int64")
    return Program(f"encode_row_{dtype}", kernel, arguments, THREADS)


def group_lanes(fmt: Format) -> int:
    """Neighbouring threads that share a group in ``encode_group``: a pair each, or two pairs each (g128)."""
    return 4 if SIMULATED else min(fmt.group // 2, 32)


@cache
def encode_group(encoding: str, dtype: str) -> Program:
    """(w, codes, scale, global_scale, groups): a scale a group; some lanes of a warp a group.

    nvfp4 reads the global scale that ``finish_tensor`` left there; the others write global_scale = 1.

    Args:
        encoding: a format with scaling ``group``, or one of MXFP4_ROUNDING.
    """
    fmt = FORMATS["mxfp4" if encoding in MXFP4_ROUNDING else encoding]
    nvfp4, mxfp4, lanes = fmt.scale == "e4m3", fmt.scale == "e8m0", group_lanes(fmt)
    rounding = MXFP4_ROUNDING.get(encoding, 0)
    load, lane_max = bits.LOAD[dtype], _make_lane_max(lanes)
    encode = {"int4": encode_int4, "e2m1": encode_e2m1, "nf4": encode_nf4}[fmt.element]
    float_scale = nf4_scale if fmt.element == "nf4" else absmax7_scale
    half = fmt.group // 2
    scratch = THREADS if SIMULATED else 1

    def kernel(w: Any, codes: Any, scale: Any, global_scale: Any, groups: int) -> None:
        buffer = cuda.shared.array(scratch, np.float32)
        thread = np.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        lane = thread % lanes
        g = thread // lanes
        largest = ZERO
        if g < groups:
            for step in range(half // lanes):
                pair = g * half + step * lanes + lane
                largest = larger(largest, abs(load(w, 2 * pair)))
                largest = larger(largest, abs(load(w, 2 * pair + 1)))
        # Every thread takes part, also beyond the last group: shuffles and barriers need all of them.
        largest = lane_max(buffer, largest)
        if g < groups:
            if nvfp4:
                byte = nvfp4_scale_byte(largest, global_scale[0])
                if lane == 0:
                    scale[g] = byte
                s = bits.decode_e4m3(byte) * global_scale[0]
            elif mxfp4:
                byte = bits.encode_e8m0(largest, rounding)
                if lane == 0:
                    scale[g] = byte
                s = bits.decode_e8m0(byte)
            else:
                s = float_scale(largest)
                if lane == 0:
                    scale[g] = s
            if thread == 0 and not nvfp4:
                global_scale[0] = ONE
            for step in range(half // lanes):
                pair = g * half + step * lanes + lane
                low = encode(load(w, 2 * pair), s)
                high = encode(load(w, 2 * pair + 1), s)
                codes[np.uint64(pair)] = np.uint8(low | np.uint32(high << np.uint32(4)))

    arguments = (f"{bits.HELD_AS[dtype]}[::1]", "uint8[::1]", f"{fmt.scale_held}[::1]", "float32[::1]", "int64")
    return Program(f"encode_group_{encoding}_{dtype}", kernel, arguments, THREADS)


@cache
def decode(name: str, dtype: str) -> Program:
    """(codes, scale, global_scale, weight, k): table value x scale (x global scale) in float32, rounded once; a block
    a row, so that finding the scale of a row needs no division."""
    fmt = FORMATS[name]
    value_of, load_scale = bits.VALUE_OF[fmt.element], bits.LOAD_SCALE[fmt.scale]
    store_pair = bits.STORE_PAIR[dtype]
    nvfp4, whole_tensor, whole_row = fmt.scale == "e4m3", fmt.scaling == "tensor", fmt.scaling == "row"
    half_group = max(1, fmt.group // 2)

    def kernel(codes: Any, scale: Any, global_scale: Any, weight: Any, k: int) -> None:
        row = np.int64(cuda.blockIdx.x)
        pairs = k // 2
        i = np.int64(cuda.threadIdx.x)
        while i < pairs:
            pair = row * pairs + i
            if whole_tensor:
                s = load_scale(scale, 0)
            elif whole_row:
                s = load_scale(scale, row)
            else:
                s = load_scale(scale, pair // half_group)
            byte = np.uint32(codes[np.uint64(pair)])
            low = value_of(byte & np.uint32(15)) * s
            high = value_of(byte >> np.uint32(4)) * s
            if nvfp4:
                low *= global_scale[0]
                high *= global_scale[0]
            store_pair(weight, pair, low, high)
            i += THREADS

    arguments = ("uint8[::1]", f"{fmt.scale_held}[::1]", "float32[::1]", f"{bits.PAIR_HELD_AS[dtype]}[::1]", "int64")
    return Program(f"decode_{name}_{dtype}", kernel, arguments, THREADS)
