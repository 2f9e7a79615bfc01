"""The kernel of attention forward: online softmax over tiles of keys, all arithmetic in float32.

A block takes BLOCK_M query rows of one head. Thread (ty, tx) of TY x TX computes the scores of rows ty, ty + TY, ...
with keys tx and tx + TX of each tile, and of the same rows the output columns tx, tx + TX, ... One shared buffer holds
the tile of K and then that of V; another, a chunk of Q and then the weights. See Milakov & Gimelshein, "Online
normalizer calculation for softmax" (arXiv 1805.02867) for the running maximum and sum.

Sums run in an order that depends on sk and d alone, never on b, heads or sq; no atomics.
Device functions that use ``cuda`` sit here, in the module of their kernels (see ``dialect.device_function``).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from vbench.kernels.numba_cuda import bits
from vbench.kernels.numba_cuda.codec_kernels import larger
from vbench.kernels.numba_cuda.dialect import SIMULATED, cuda, device_function
from vbench.kernels.numba_cuda.program import Program

# The simulator runs each thread as an operating-system thread, so there the same kernel is built smaller.
TX, TY = (4, 2) if SIMULATED else (16, 16)
THREADS = TX * TY
#: Keys a tile; also the columns of Q staged at a time, so that weights and a chunk of Q fit the same buffer.
BLOCK_N = 2 * TX
ROW_PITCH = BLOCK_N + 1
#: Neighbouring threads that load neighbouring columns, and the rows loaded at once.
LOAD_LANES = 4 if SIMULATED else 32
LOAD_LINES = THREADS // LOAD_LANES
#: Scratch of the simulator's reductions; natively they are warp shuffles.
SCRATCH = THREADS if SIMULATED else 1
MAX_HEAD_DIM = 256

ZERO = np.float32(0)
ONE = np.float32(1)
MINUS_INFINITY = np.float32(-math.inf)


def columns_of(d: int) -> int:
    """Output columns a thread computes for head dim d: the power of two that covers it."""
    return 1 << max(0, -(-d // TX) - 1).bit_length()


def rows_of(columns: int) -> int:
    """Query rows a thread computes: its sums and what else it keeps stay within the registers."""
    return 4 if columns * TX <= MAX_HEAD_DIM // 2 else 2


@device_function
def row_max_shuffle(buffer: Any, value: Any) -> Any:
    """Largest over the TX threads of a row, in all of them, by butterfly; ``buffer`` unused."""
    offset = TX // 2
    while offset > 0:
        value = larger(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, offset))
        offset //= 2
    return value


@device_function
def row_sum_shuffle(buffer: Any, value: Any) -> Any:
    """Sum over the TX threads of a row, in all of them, by butterfly; ``buffer`` unused."""
    offset = TX // 2
    while offset > 0:
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, offset)
        offset //= 2
    return value


@device_function
def row_max_shared(buffer: Any, value: Any) -> Any:
    """The same butterfly through shared memory, one float32 a thread, for the simulator, which has no shuffles."""
    tid = cuda.threadIdx.x
    offset = TX // 2
    while offset > 0:
        buffer[tid] = value
        cuda.syncthreads()
        value = larger(value, buffer[tid ^ offset])
        cuda.syncthreads()
        offset //= 2
    return value


@device_function
def row_sum_shared(buffer: Any, value: Any) -> Any:
    """As ``row_max_shared``, adding."""
    tid = cuda.threadIdx.x
    offset = TX // 2
    while offset > 0:
        buffer[tid] = value
        cuda.syncthreads()
        value += buffer[tid ^ offset]
        cuda.syncthreads()
        offset //= 2
    return value


row_max = row_max_shared if SIMULATED else row_max_shuffle
row_sum = row_sum_shared if SIMULATED else row_sum_shuffle


@cache
def forward(dtype: str, columns: int, causal: bool) -> Program:
    """(q, k, v, out, lse, sizes, strides of q, k and v); grid b * hq * ceil(sq / BLOCK_M).

    Sizes: hq, query heads a key head, sq, sk, d <= columns * TX, shift (row i sees keys j <= i + shift when causal).
    Strides in elements: batch, head, row, column. out and lse are contiguous.
    """
    load, store = bits.LOAD[dtype], bits.STORE[dtype]
    rows_a_thread = rows_of(columns)
    block_m = TY * rows_a_thread
    pitch = columns * TX + 1
    # numba takes array sizes from plain names only
    kv_size, row_size = BLOCK_N * pitch, block_m * ROW_PITCH
    sums, scores = rows_a_thread * columns, rows_a_thread * 2

    def kernel(
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        hq: int,
        group: int,
        sq: int,
        sk: int,
        d: int,
        shift: int,
        scale: Any,
        q_batch: int,
        q_head: int,
        q_row: int,
        q_column: int,
        k_batch: int,
        k_head: int,
        k_row: int,
        k_column: int,
        v_batch: int,
        v_head: int,
        v_row: int,
        v_column: int,
    ) -> None:
        kv = cuda.shared.array(kv_size, np.float32)
        staged = cuda.shared.array(row_size, np.float32)
        buffer = cuda.shared.array(SCRATCH, np.float32)
        total = cuda.local.array(sums, np.float32)
        score = cuda.local.array(scores, np.float32)
        largest = cuda.local.array(rows_a_thread, np.float32)
        weights = cuda.local.array(rows_a_thread, np.float32)
        tid = cuda.threadIdx.x
        tx = tid % TX
        ty = tid // TX
        lane = tid % LOAD_LANES
        line = tid // LOAD_LANES
        tiles = (sq + block_m - 1) // block_m
        block = np.int64(cuda.blockIdx.x)
        row0 = (block % tiles) * block_m
        batch_head = block // tiles
        batch = batch_head // hq
        head = batch_head % hq
        q_at = batch * q_batch + head * q_head + row0 * q_row
        k_at = batch * k_batch + (head // group) * k_head
        v_at = batch * v_batch + (head // group) * v_head
        end: Any = sk
        if causal:
            # No row of the block sees a key from here on.
            end = min(sk, row0 + block_m + shift)
        for a in range(rows_a_thread):
            largest[a] = MINUS_INFINITY
            weights[a] = ZERO
        for i in range(sums):
            total[i] = ZERO
        key0 = np.int64(0)
        while key0 < end:
            r = line
            while r < BLOCK_N:
                c = lane
                while c < d:
                    x = ZERO
                    if key0 + r < sk:
                        x = load(k, k_at + (key0 + r) * k_row + c * k_column)
                    kv[np.uint64(r * pitch + c)] = x
                    c += LOAD_LANES
                r += LOAD_LINES
            for i in range(scores):
                score[i] = ZERO
            c0 = np.int64(0)
            while c0 < d:
                width = min(np.int64(BLOCK_N), d - c0)
                r = line
                while r < block_m:
                    c = lane
                    while c < width:
                        x = ZERO
                        if row0 + r < sq:
                            x = load(q, q_at + r * q_row + (c0 + c) * q_column)
                        staged[np.uint64(r * ROW_PITCH + c)] = x
                        c += LOAD_LANES
                    r += LOAD_LINES
                cuda.syncthreads()
                for c in range(width):
                    near = kv[np.uint64(tx * pitch + c0 + c)]
                    far = kv[np.uint64((tx + TX) * pitch + c0 + c)]
                    for a in range(rows_a_thread):
                        x = staged[np.uint64((ty + a * TY) * ROW_PITCH + c)]
                        score[2 * a] += x * near
                        score[2 * a + 1] += x * far
                cuda.syncthreads()
                c0 += BLOCK_N
            for a in range(rows_a_thread):
                visible = sk
                if causal:
                    visible = min(sk, row0 + ty + a * TY + shift + 1)
                near = score[2 * a] * scale
                far = score[2 * a + 1] * scale
                if key0 + tx >= visible:
                    near = MINUS_INFINITY
                if key0 + tx + TX >= visible:
                    far = MINUS_INFINITY
                top = larger(largest[a], row_max(buffer, larger(near, far)))
                # A row that has seen no key yet: any finite number makes its weights exp(-inf) = 0.
                base = top if top > MINUS_INFINITY else ZERO
                shrink = np.float32(math.exp(largest[a] - base))
                near = np.float32(math.exp(near - base))
                far = np.float32(math.exp(far - base))
                largest[a] = top
                weights[a] = weights[a] * shrink + (near + far)
                for c in range(columns):
                    total[a * columns + c] *= shrink
                staged[np.uint64((ty + a * TY) * ROW_PITCH + tx)] = near
                staged[np.uint64((ty + a * TY) * ROW_PITCH + tx + TX)] = far
            r = line
            while r < BLOCK_N:
                c = lane
                while c < d:
                    # Zero beyond the last key: what lies there may be NaN, and its weight of 0 would not hide that.
                    x = ZERO
                    if key0 + r < sk:
                        x = load(v, v_at + (key0 + r) * v_row + c * v_column)
                    kv[np.uint64(r * pitch + c)] = x
                    c += LOAD_LANES
                r += LOAD_LINES
            cuda.syncthreads()
            for j in range(BLOCK_N):
                for c in range(columns):
                    x = kv[np.uint64(j * pitch + tx + c * TX)]
                    for a in range(rows_a_thread):
                        total[a * columns + c] += staged[np.uint64((ty + a * TY) * ROW_PITCH + j)] * x
            cuda.syncthreads()
            key0 += BLOCK_N
        for a in range(rows_a_thread):
            row = row0 + ty + a * TY
            normaliser = row_sum(buffer, weights[a])
            # The largest weight is 1, so only a row with nothing to attend to has none.
            inverse = ZERO
            logarithm = MINUS_INFINITY
            if normaliser > ZERO:
                inverse = ONE / normaliser
                logarithm = largest[a] + np.float32(math.log(normaliser))
            if row < sq:
                at = batch_head * sq + row
                if tx == 0:
                    lse[np.uint64(at)] = logarithm
                for c in range(columns):
                    if tx + c * TX < d:
                        store(out, at * d + tx + c * TX, total[a * columns + c] * inverse)

    held = f"{bits.HELD_AS[dtype]}[::1]"
    arguments = (held,) * 4 + ("float32[::1]",) + ("int64",) * 6 + ("float32",) + ("int64",) * 12
    return Program(f"attention_{dtype}_{columns * TX}{'_causal' * causal}", kernel, arguments, THREADS)
