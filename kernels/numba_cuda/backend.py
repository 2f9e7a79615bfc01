"""Entry point of the backend ``numba_cuda``. Imports neither torch nor numba."""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="numba_cuda",
    role="own",
    summary="FP4 codec, fused FP4 linear and attention in Python through numba.cuda; on a CPU its simulator",
    ops={
        "fp4_quantize": "vbench.kernels.numba_cuda.codec:quantize",
        "fp4_dequantize": "vbench.kernels.numba_cuda.codec:dequantize",
        "fp4_linear": "vbench.kernels.numba_cuda.linear:linear",
        "attention": "vbench.kernels.numba_cuda.attention:attention",
        "tier_fetch": "vbench.kernels.numba_cuda.fetch:fetch",
    },
    probe_function="vbench.kernels.numba_cuda.probe:probe",
    environment={
        "cpu": {"NUMBA_ENABLE_CUDASIM": "1"},
        # Small check cases have small grids on purpose; numba would warn about each of them.
        "cuda": {"NUMBA_ENABLE_CUDASIM": "0", "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "0"},
        "compile": {"NUMBA_ENABLE_CUDASIM": "0"},
    },
    configurations="vbench.kernels.numba_cuda.configurations:configurations",
)
