"""Kernels of ``fp4_linear``: y = act(x W^T + bias), W decoded on the fly, sums in float32.

    gemv_words  few tokens, k a multiple of 32: a warp computes ROWS output features; 16-byte loads of codes, x staged
                in shared memory, partial sums joined by warp shuffles.
    gemv_bytes  few tokens, any even k: a warp a feature, byte loads, x straight from global memory.
    tiled       more tokens: a block computes BLOCK_M x BLOCK_N outputs from shared tiles, TILE_M x TILE_N a thread.

Sums run in an order that depends on k alone within each kernel, never on m or n; no atomics.
Indices are cast to unsigned: numba adds len to a negative signed index, which costs six instructions a shared read.
Device functions that use ``cuda`` sit here, in the module of their kernels (see ``dialect.device_function``).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from vbench.kernels.numba_cuda import bits
from vbench.kernels.numba_cuda.dialect import SIMULATED, cuda, device_function, divide_near_one, load_words
from vbench.kernels.numba_cuda.formats import FORMATS, Format
from vbench.kernels.numba_cuda.program import Program

# The simulator runs each thread as an operating-system thread, so there the same kernels are built smaller.
#: Threads that share an output feature in the gemv kernels: a warp.
LANES = 4 if SIMULATED else 32
WARPS = 2 if SIMULATED else 8
GEMV_THREADS = LANES * WARPS
#: Output features a warp computes in gemv_words: each value of x read from shared memory serves all of them.
ROWS = 2
#: Codes in one 16-byte load.
SPAN = 32
#: Row pitch of the x stage: lane l's element j sits at j * PITCH + l, so that neither side meets bank conflicts.
PITCH = LANES + 1
#: Tokens a block may handle in the gemv kernels; the smallest that holds m is built.
TOKEN_COUNTS = (1, 2, 4, 8)

BLOCK_M, BLOCK_N, BLOCK_K = (4, 8, 16) if SIMULATED else (64, 128, 32)
TILE_M, TILE_N = (2, 2) if SIMULATED else (4, 8)
COLUMNS = BLOCK_N // TILE_N
TILED_THREADS = (BLOCK_M // TILE_M) * COLUMNS
PITCH_M, PITCH_N = BLOCK_M + 1, BLOCK_N + 1
#: Array sizes: numba takes them from plain names only.
X_TILE, W_TILE, TILE_SUMS = BLOCK_K * PITCH_M, BLOCK_K * PITCH_N, TILE_M * TILE_N

ZERO = np.float32(0)
ONE = np.float32(1)
HALF = np.float32(0.5)
SQRT_HALF = np.float32(math.sqrt(0.5))


@device_function
def act_none(v: Any) -> Any:
    """Identity."""
    return v


@device_function
def act_relu(v: Any) -> Any:
    """max(v, 0), NaN kept."""
    return ZERO if v < ZERO else v


@device_function
def act_gelu(v: Any) -> Any:
    """v (1 + erf(v / sqrt 2)) / 2, the erf form."""
    return HALF * v * (ONE + np.float32(math.erf(v * SQRT_HALF)))


@device_function
def act_silu(v: Any) -> Any:
    """v / (1 + exp(-v)), with exp only of numbers at or below zero, so that the divisor is in 1..2."""
    if v < ZERO:
        e = np.float32(math.exp(v))
        return divide_near_one(v * e, ONE + e)
    return divide_near_one(v, ONE + np.float32(math.exp(-v)))


ACTIVATIONS = {"none": act_none, "relu": act_relu, "gelu": act_gelu, "silu": act_silu}


@device_function
def lane_sum_shuffle(buffer: Any, value: Any) -> Any:
    """Sum over a warp, in every lane, by butterfly; ``buffer`` unused."""
    offset = LANES // 2
    while offset > 0:
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, offset)
        offset //= 2
    return value


@device_function
def lane_sum_shared(buffer: Any, value: Any) -> Any:
    """The same butterfly through shared memory, one float32 a thread, for the simulator, which has no shuffles."""
    tid = cuda.threadIdx.x
    offset = LANES // 2
    while offset > 0:
        buffer[tid] = value
        cuda.syncthreads()
        value += buffer[tid ^ offset]
        cuda.syncthreads()
        offset //= 2
    return value


lane_sum = lane_sum_shared if SIMULATED else lane_sum_shuffle
SCRATCH = GEMV_THREADS if SIMULATED else 1


def _make_finish(fmt: Format, dtype: str, act: str, bias: bool) -> Any:
    """-> device function (sum, row, scale, global_scale, bias): the output before rounding.

    Scales of a whole tensor or row and nvfp4's global scale are applied here, once per output.
    """
    activate, load = ACTIVATIONS[act], bits.LOAD[dtype]
    whole_tensor, whole_row = fmt.scaling == "tensor", fmt.scaling == "row"

    @device_function
    def finish(total: Any, row: Any, scale: Any, global_scale: Any, bias_values: Any) -> Any:
        v = total
        if whole_tensor:
            v = v * scale[0]
        if whole_row:
            v = v * scale[np.uint64(row)]
        v = v * global_scale[0]
        if bias:
            v = v + load(bias_values, row)
        return activate(v)

    return finish


def _arguments(fmt: Format, dtype: str, codes: str) -> tuple[str, ...]:
    held = f"{bits.HELD_AS[dtype]}[::1]"
    return (held, codes, f"{fmt.scale_held}[::1]", "float32[::1]", held, held, "int64", "int64", "int64")


@cache
def gemv_words(name: str, dtype: str, act: str, bias: bool, tokens: int) -> Program:
    """(x, codes as uint32, scale, global_scale, bias, y, m, n, k); grid (n / (WARPS ROWS), m / tokens).

    Each step covers SPAN * LANES columns: lane l takes the 32 codes from column 32 l on. Codes are loaded before the
    barrier, so that they are on their way while the block stages x.
    """
    fmt = FORMATS[name]
    load, store = bits.LOAD[dtype], bits.STORE[dtype]
    value_of, load_scale = bits.VALUE_OF[fmt.element], bits.LOAD_SCALE[fmt.scale]
    finish = _make_finish(fmt, dtype, act, bias)
    grouped = fmt.scaling == "group"
    group = fmt.group if grouped else SPAN
    #: columns summed before a scale is applied: a group, or one load where the group is longer
    run = min(group, SPAN)
    runs, words_a_run = SPAN // run, run // 8
    chunk = SPAN * LANES
    # numba takes array sizes from plain names only
    stage_size, packed_size, sums = tokens * SPAN * PITCH, ROWS * 4, ROWS * tokens

    def kernel(
        x: Any, codes: Any, scale: Any, global_scale: Any, bias_values: Any, y: Any, m: int, n: int, k: int
    ) -> None:
        stage = cuda.shared.array(stage_size, np.float32)
        buffer = cuda.shared.array(SCRATCH, np.float32)
        packed = cuda.local.array(packed_size, np.uint32)
        total = cuda.local.array(sums, np.float32)
        part = cuda.local.array(sums, np.float32)
        tid = cuda.threadIdx.x
        lane = tid % LANES
        row0 = (np.int64(cuda.blockIdx.x) * WARPS + tid // LANES) * ROWS
        token0 = np.int64(cuda.blockIdx.y) * tokens
        for i in range(sums):
            total[i] = ZERO
        k0 = np.int64(0)
        while k0 < k:
            column = k0 + SPAN * lane
            for r in range(ROWS):
                if row0 + r < n and column < k:
                    w0, w1, w2, w3 = load_words(codes, ((row0 + r) * k + column) // 8)
                    packed[4 * r] = w0
                    packed[4 * r + 1] = w1
                    packed[4 * r + 2] = w2
                    packed[4 * r + 3] = w3
                else:
                    for c in range(4):
                        packed[4 * r + c] = np.uint32(0)
            cuda.syncthreads()
            for t in range(tokens):
                i = tid
                while i < chunk:
                    v = ZERO
                    if token0 + t < m and k0 + i < k:
                        v = load(x, (token0 + t) * k + k0 + i)
                    stage[np.uint64((t * SPAN + i % SPAN) * PITCH + i // SPAN)] = v
                    i += GEMV_THREADS
            cuda.syncthreads()
            for u in range(runs):
                for i in range(sums):
                    part[i] = ZERO
                for c in range(words_a_run):
                    for j in range(8):
                        element = u * run + 8 * c + j
                        for r in range(ROWS):
                            w = value_of(np.uint32(packed[4 * r] >> np.uint32(4 * j)) & np.uint32(15))
                            for t in range(tokens):
                                part[r * tokens + t] += stage[np.uint64((t * SPAN + element) * PITCH + lane)] * w
                    # Moved down rather than indexed by c, which would put them in local memory where the loop over c
                    # is not unrolled.
                    for r in range(ROWS):
                        packed[4 * r] = packed[4 * r + 1]
                        packed[4 * r + 1] = packed[4 * r + 2]
                        packed[4 * r + 2] = packed[4 * r + 3]
                for r in range(ROWS):
                    s = ONE
                    if grouped:
                        s = ZERO
                        if row0 + r < n and column < k:
                            s = load_scale(scale, ((row0 + r) * k + column + u * run) // group)
                    for t in range(tokens):
                        total[r * tokens + t] += part[r * tokens + t] * s
            k0 += chunk
        for r in range(ROWS):
            for t in range(tokens):
                v = lane_sum(buffer, total[r * tokens + t])
                if lane == 0 and row0 + r < n and token0 + t < m:
                    out = finish(v, row0 + r, scale, global_scale, bias_values)
                    store(y, (token0 + t) * n + row0 + r, out)

    label = f"gemv_words_{name}_{dtype}_{act}_bias{int(bias)}_m{tokens}"
    return Program(label, kernel, _arguments(fmt, dtype, "uint32[::1]"), GEMV_THREADS)


@cache
def gemv_bytes(name: str, dtype: str, act: str, bias: bool, tokens: int) -> Program:
    """(x, codes as uint8, scale, global_scale, bias, y, m, n, k); grid (n / WARPS, m / tokens)."""
    fmt = FORMATS[name]
    load, store = bits.LOAD[dtype], bits.STORE[dtype]
    value_of, load_scale = bits.VALUE_OF[fmt.element], bits.LOAD_SCALE[fmt.scale]
    finish = _make_finish(fmt, dtype, act, bias)
    grouped, half_group = fmt.scaling == "group", max(1, fmt.group // 2)

    def kernel(
        x: Any, codes: Any, scale: Any, global_scale: Any, bias_values: Any, y: Any, m: int, n: int, k: int
    ) -> None:
        buffer = cuda.shared.array(SCRATCH, np.float32)
        total = cuda.local.array(tokens, np.float32)
        tid = cuda.threadIdx.x
        lane = tid % LANES
        row = np.int64(cuda.blockIdx.x) * WARPS + tid // LANES
        token0 = np.int64(cuda.blockIdx.y) * tokens
        for t in range(tokens):
            total[t] = ZERO
        pairs = k // 2
        i = np.int64(lane)
        while i < pairs and row < n:
            byte = np.uint32(codes[np.uint64(row * pairs + i)])
            low = value_of(byte & np.uint32(15))
            high = value_of(byte >> np.uint32(4))
            s = ONE
            if grouped:
                s = load_scale(scale, (row * pairs + i) // half_group)
            for t in range(tokens):
                if token0 + t < m:
                    at = (token0 + t) * k + 2 * i
                    total[t] += (load(x, at) * low + load(x, at + 1) * high) * s
            i += LANES
        for t in range(tokens):
            v = lane_sum(buffer, total[t])
            if lane == 0 and row < n and token0 + t < m:
                store(y, (token0 + t) * n + row, finish(v, row, scale, global_scale, bias_values))

    label = f"gemv_bytes_{name}_{dtype}_{act}_bias{int(bias)}_m{tokens}"
    return Program(label, kernel, _arguments(fmt, dtype, "uint8[::1]"), GEMV_THREADS)


@cache
def tiled(name: str, dtype: str, act: str, bias: bool) -> Program:
    """(x, codes as uint8, scale, global_scale, bias, y, m, n, k); grid (n / BLOCK_N, m / BLOCK_M).

    Group scales are multiplied into the decoded weight in float32 (exact for nvfp4 and mxfp4, else one rounding).
    A thread's outputs lie COLUMNS apart along n, so that shared reads of a warp are neighbours or the same word.
    """
    fmt = FORMATS[name]
    load, store = bits.LOAD[dtype], bits.STORE[dtype]
    value_of, load_scale = bits.VALUE_OF[fmt.element], bits.LOAD_SCALE[fmt.scale]
    finish = _make_finish(fmt, dtype, act, bias)
    grouped, half_group = fmt.scaling == "group", max(1, fmt.group // 2)
    rows_apart = BLOCK_M // TILE_M

    def kernel(
        x: Any, codes: Any, scale: Any, global_scale: Any, bias_values: Any, y: Any, m: int, n: int, k: int
    ) -> None:
        x_tile = cuda.shared.array(X_TILE, np.float32)
        w_tile = cuda.shared.array(W_TILE, np.float32)
        total = cuda.local.array(TILE_SUMS, np.float32)
        x_part = cuda.local.array(TILE_M, np.float32)
        tid = cuda.threadIdx.x
        tn = tid % COLUMNS
        tm = tid // COLUMNS
        row0 = np.int64(cuda.blockIdx.x) * BLOCK_N
        token0 = np.int64(cuda.blockIdx.y) * BLOCK_M
        for i in range(TILE_SUMS):
            total[i] = ZERO
        pairs = k // 2
        k0 = np.int64(0)
        while k0 < k:
            i = tid
            while i < BLOCK_M * BLOCK_K:
                kk = i % BLOCK_K
                mm = i // BLOCK_K
                v = ZERO
                if token0 + mm < m and k0 + kk < k:
                    v = load(x, (token0 + mm) * k + k0 + kk)
                x_tile[np.uint64(kk * PITCH_M + mm)] = v
                i += TILED_THREADS
            i = tid
            while i < BLOCK_N * BLOCK_K // 2:
                kk = i % (BLOCK_K // 2)
                nn = i // (BLOCK_K // 2)
                low = ZERO
                high = ZERO
                if row0 + nn < n and k0 // 2 + kk < pairs:
                    pair = (row0 + nn) * pairs + k0 // 2 + kk
                    byte = np.uint32(codes[np.uint64(pair)])
                    low = value_of(byte & np.uint32(15))
                    high = value_of(byte >> np.uint32(4))
                    if grouped:
                        s = load_scale(scale, pair // half_group)
                        low *= s
                        high *= s
                w_tile[np.uint64(2 * kk * PITCH_N + nn)] = low
                w_tile[np.uint64((2 * kk + 1) * PITCH_N + nn)] = high
                i += TILED_THREADS
            cuda.syncthreads()
            for kk in range(BLOCK_K):
                for a in range(TILE_M):
                    x_part[a] = x_tile[np.uint64(kk * PITCH_M + tm + a * rows_apart)]
                for b in range(TILE_N):
                    w = w_tile[np.uint64(kk * PITCH_N + tn + b * COLUMNS)]
                    for a in range(TILE_M):
                        total[a * TILE_N + b] += x_part[a] * w
            cuda.syncthreads()
            k0 += BLOCK_K
        for a in range(TILE_M):
            token = token0 + tm + a * rows_apart
            for b in range(TILE_N):
                row = row0 + tn + b * COLUMNS
                if token < m and row < n:
                    v = finish(total[b], row, scale, global_scale, bias_values)
                    store(y, token * n + row, v)
            # The next token's sums move down, for the reason given in gemv_words.
            for i in range(TILE_SUMS - TILE_N):
                total[i] = total[i + TILE_N]

    label = f"tiled_{name}_{dtype}_{act}_bias{int(bias)}"
    return Program(label, kernel, _arguments(fmt, dtype, "uint8[::1]"), TILED_THREADS)
