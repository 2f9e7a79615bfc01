"""CUDA kernels, written with numba, whose faults only a GPU or its sanitizer shows. Imported by what launches them.

``python -m vbench.controls.gpu_kernels NAME`` launches one by itself, on arrays of numba's own and without torch, whose
caching allocator would hide a read past an array's end: ``vbench.controls.sanitize`` runs that under compute-sanitizer.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np
from numba import float32

from vbench.kernels.numba_cuda.dialect import cuda

#: Threads of a block, and elements of x in shared memory at a time.
TILE = 128
WARP = 32
#: Turns of a loop that make the first warp late.
LATE = 400
#: Parts that K is summed in by blocks of their own.
PARTS = 16


@functools.cache
def staged(tile: int, barrier: bool) -> Any:
    """y[m, n] = x[m, k] @ w[n, k]^T, float32; a block a row, ``tile`` elements of it in shared memory at a time.

    Without ``barrier`` the other warps read the first one's part of the buffer before it is filled.
    """

    @cuda.jit
    def kernel(x, w, y):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # numba types it
        buffer = cuda.shared.array(tile, float32)
        row, t, k, n = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1], w.shape[0]
        for column in range(t, n, tile):
            y[row, column] = 0.0
        for base in range(0, k, tile):
            late = float32(0.0)
            if t < WARP:
                for turn in range(LATE):
                    late = late * float32(0.5) + x[row, (base + turn) % k]
            # Never so, but the loop above must not be optimised away.
            if late == float32(1e30):
                y[row, 0] = late
            buffer[t] = x[row, base + t] if base + t < k else float32(0.0)
            if barrier:
                cuda.syncthreads()
            for column in range(t, n, tile):
                total = y[row, column]
                for i in range(min(tile, k - base)):
                    total += buffer[i] * w[column, base + i]
                y[row, column] = total
            cuda.syncthreads()

    return kernel


@functools.cache
def prefetching(guarded: bool) -> Any:
    """As ``staged``, a thread an element; x comes flat. Each reads the first element of the next row of x, times 0.

    Unless ``guarded`` the last row reads past the end of x.
    """

    @cuda.jit
    def kernel(x_flat, w, y):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # numba types it
        at = cuda.grid(1)
        m, n, k = y.shape[0], y.shape[1], w.shape[1]
        if at >= m * n:
            return
        row, column = at // n, at % n
        total = float32(0.0)
        for i in range(k):
            total += x_flat[row * k + i] * w[column, i]
        if not guarded or row + 1 < m:
            total += float32(0.0) * x_flat[(row + 1) * k]
        y[row, column] = total

    return kernel


@functools.cache
def split(atomic: bool) -> Any:
    """As ``staged``, K summed in PARTS by blocks of their own, into y, which is zero before; a thread a column.

    Unless ``atomic`` two blocks may read the same sum, and one addition is lost.
    """

    @cuda.jit
    def kernel(x, w, y):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202  # numba types it
        row, part, k = cuda.blockIdx.x, cuda.blockIdx.y, x.shape[1]
        step = (k + PARTS - 1) // PARTS
        for column in range(cuda.threadIdx.x, w.shape[0], cuda.blockDim.x):
            for i in range(part * step, min((part + 1) * step, k)):
                if atomic:
                    cuda.atomic.add(y, (row, column), x[row, i] * w[column, i])
                else:
                    y[row, column] += x[row, i] * w[column, i]

    return kernel


#: What ``main`` launches: the kernel as it should be and as it is wrong.
CHECKED = {
    "missing_barrier": lambda: staged(TILE, False),
    "missing_barrier+honest": lambda: staged(TILE, True),
    "read_past_x": lambda: prefetching(False),
    "read_past_x+honest": lambda: prefetching(True),
}


def main(argv: list[str]) -> int:
    """Launch the kernel named; exit code 0 unless the launch itself fails."""
    (name,) = argv
    kernel = CHECKED[name]()
    m, n, k = 4, TILE, 4 * TILE
    random = np.random.default_rng(0)
    x, w = (cuda.to_device(random.standard_normal((rows, k), dtype=np.float32)) for rows in (m, n))
    y = cuda.device_array((m, n), dtype=np.float32)
    if name.startswith("read"):
        kernel[(m * n + TILE - 1) // TILE, TILE](x.reshape(m * k), w, y)
    else:
        kernel[m, TILE](x, w, y)
    cuda.synchronize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
