"""The kernel that copies a raw weight out of mapped host memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from vbench.kernels.numba_cuda.dialect import cuda
from vbench.kernels.numba_cuda.program import Program

THREADS = 256
#: Enough threads to keep the link's reads in flight on every multiprocessor; each strides over the rest.
MAX_BLOCKS = 1056


@cache
def copy(held: str) -> Program:
    """(source, target, count): target[i] = source[i], elements of ``held``."""

    def kernel(source: Any, target: Any, count: int) -> None:
        i = np.int64(cuda.blockIdx.x) * THREADS + np.int64(cuda.threadIdx.x)
        step = np.int64(cuda.gridDim.x) * THREADS
        while i < count:
            target[i] = source[i]
            i += step

    return Program(f"copy_{held}", kernel, (f"{held}[::1]", f"{held}[::1]", "int64"), THREADS)
