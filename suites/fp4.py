"""Suite ``fp4``: the codec and the linear layer on 4-bit weights.

Check cases are small, since they also run interpreted and simulated on a CPU; those of 512 rows or columns exist for
the metrics (accuracy by distribution and shape) that claims and docs/accuracy.md read, and are not interpreted.
"""

from __future__ import annotations

from itertools import product
from typing import Literal

from vbench.reference.ops.fp4 import (
    ENCODINGS,
    FORMAT_GROUPS,
    FORMATS,
    FP4_DEQUANTIZE,
    FP4_LINEAR,
    FP4_QUANTIZE,
    MXFP4_ENCODINGS,
    TRAINED_SHAPES,
)
from vbench.reference.ops.types import DTYPES
from vbench.spec import BenchCase, Case, Generated, Suite
from vbench.suites.data import REGRESSIONS, WAIVERS

Effort = Literal["quick", "standard", "full"]

#: Smallest k that every format's block divides.
K = 128

#: The accuracy claims' distributions and size: 262144 weights are 16384 nvfp4 blocks, enough for three digits.
METRIC_DISTRIBUTIONS = ("normal", "uniform", "laplace", "student5")
METRIC_SIZE = 512
#: Columns at which the accuracy of a normal weight is looked at too: scales a row or a tensor depend on it.
METRIC_COLUMNS = (128, 2048)


def _quantize_checks() -> tuple[Case, ...]:
    op = FP4_QUANTIZE
    return (
        *(op.case(fmt=fmt, w=w, n=5, k=K) for fmt, w in product(FORMATS, DTYPES)),
        *(
            op.case(fmt=fmt, w="fp32", dist=dist, n=3, k=K)
            for fmt, dist in product(FORMATS, ("student5", "grid", "zeros", "outlier"))
        ),
        # The other scale rules of mxfp4: grid has every tie of the elements, normal has absmax on both sides of each
        # rule's threshold.
        *(
            op.case(fmt=fmt, w="fp32", dist=dist, n=5, k=K)
            for fmt, dist in product(MXFP4_ENCODINGS, ("normal", "grid"))
        ),
        *(op.case(fmt=fmt, w=w, n=3, k=K) for fmt, w in product(MXFP4_ENCODINGS, ("bf16", "fp16"))),
        # Tails: one row, one pair, one block, a prime number of rows, k no power of two.
        op.case(fmt="absmax7_tensor", w="fp32", n=1, k=2),
        op.case(fmt="absmax7_row", w="bf16", n=7, k=2),
        op.case(fmt="absmax7_row", w="fp32", n=19, k=34),
        op.case(fmt="absmax7_g128", w="fp16", n=1, k=K),
        op.case(fmt="nvfp4", w="bf16", n=1, k=16),
        op.case(fmt="nvfp4", w="fp32", n=17, k=48),
        op.case(fmt="mxfp4", w="fp16", n=19, k=32),
        op.case(fmt="nf4", w="fp32", n=7, k=64),
        # What must be refused.
        op.case(fmt="absmax7_row", n=2, k=3),
        op.case(fmt="nvfp4", n=2, k=24),
        op.case(fmt="absmax7_g128", n=2, k=64),
        op.case(fmt="mxfp4_even", n=2, k=16),
        op.case(fmt="nf4", n=2, k=32),
        op.case(fmt="nvfp4", dist="nan", n=2, k=16),
        op.case(fmt="absmax7_tensor", dist="inf", n=2, k=16),
        op.case(fmt="nvfp4", dist="trained", n=128, k=128),
        *_metric_checks(),
    )


def _metric_checks() -> tuple[Case, ...]:
    """What claims and docs/accuracy.md read of a codec: by distribution, by columns, of weights that were trained."""
    op = FP4_QUANTIZE
    return (
        *(
            op.case(fmt=fmt, w="fp32", dist=dist, n=METRIC_SIZE, k=METRIC_SIZE)
            for fmt, dist in product(ENCODINGS, METRIC_DISTRIBUTIONS)
        ),
        *(op.case(fmt=fmt, w="fp32", n=METRIC_SIZE, k=k) for fmt, k in product(ENCODINGS, METRIC_COLUMNS)),
        *(op.case(fmt=fmt, w="fp32", dist="trained", n=n, k=k) for fmt, (n, k) in product(ENCODINGS, TRAINED_SHAPES)),
    )


def _dequantize_checks() -> tuple[Case, ...]:
    op = FP4_DEQUANTIZE
    return (
        *(op.case(fmt=fmt, y=y, n=5, k=K) for fmt, y in product(FORMATS, DTYPES)),
        # Grid draws the codes themselves, so that the one no encoder writes (absmax7's 0) and -0 (E2M1's 8) occur, and
        # for mxfp4 the ends of the scale's range: subnormal, overflowing and NaN products.
        *(op.case(fmt=fmt, y=y, dist="grid", n=3, k=K) for fmt, y in product(FORMATS, ("bf16", "fp32"))),
        *(op.case(fmt=fmt, y="fp16", dist="outlier", n=17, k=K) for fmt in FORMATS),
        op.case(fmt="nvfp4", y="fp32", dist="zeros", n=2, k=16),
        op.case(fmt="absmax7_tensor", y="bf16", n=1, k=2),
        op.case(fmt="nvfp4", y="bf16", n=33, k=48),
        op.case(fmt="mxfp4", y="fp16", dist="grid", n=7, k=96),
        op.case(fmt="absmax7_row", y="bf16", n=2, k=5),
    )


def _linear_checks() -> tuple[Case, ...]:
    op = FP4_LINEAR
    # Every activation with and without bias for every format; the dtype cycles so that each meets each activation.
    epilogues = (
        op.case(fmt=fmt, x=DTYPES[(i + j) % 3], act=act, bias=bias, m=2, n=9, k=max(32, FORMAT_GROUPS[fmt]))
        for i, fmt in enumerate(FORMATS)
        for j, (act, bias) in enumerate(product(("none", "relu", "gelu", "silu"), (0, 1)))
    )
    return (
        *epilogues,
        # Exact sums: zero tolerance whatever the order; more than 11 significant bits in float32 catch TF32.
        *(op.case(fmt=fmt, x=x, dist="grid", m=2, n=16, k=K) for fmt, x in product(FORMATS, DTYPES)),
        op.case(fmt="nvfp4", x="fp32", act="relu", bias=1, dist="grid", m=5, n=9, k=32),
        # One token, one output, one block, primes.
        op.case(fmt="nvfp4", x="bf16", m=1, n=1, k=16),
        op.case(fmt="absmax7_row", x="fp16", m=1, n=31, k=2),
        op.case(fmt="absmax7_tensor", x="fp32", m=1, n=32, k=64),
        op.case(fmt="absmax7_g128", x="bf16", m=1, n=13, k=2 * K),
        op.case(fmt="nvfp4", x="fp16", m=17, n=3, k=80),
        op.case(fmt="absmax7_row", x="bf16", m=33, n=3, k=34),
        op.case(fmt="mxfp4", x="bf16", m=17, n=5, k=96),
        op.case(fmt="nf4", x="fp16", m=1, n=13, k=192),
        *(op.case(fmt=fmt, x="bf16", dist="outlier", m=2, n=8, k=K) for fmt in FORMATS),
        op.case(fmt="nvfp4", x="bf16", bias=1, dist="zeros", m=2, n=8, k=16),
        # What must be refused.
        op.case(fmt="nvfp4", m=0, n=8, k=16),
        op.case(fmt="nvfp4", m=1, n=0, k=16),
        op.case(fmt="absmax7_row", m=1, n=8, k=7),
        op.case(fmt="nvfp4", m=1, n=8, k=40),
    )


LLAMA3 = "Llama-3-8B (meta-llama/Meta-Llama-3-8B config.json: hidden_size=4096, intermediate_size=14336)"
BENCH_SHAPES = {
    (14336, 4096): f"gate_proj, up_proj of {LLAMA3}",
    (4096, 14336): f"down_proj of {LLAMA3}",
    (4096, 4096): f"q_proj, o_proj of {LLAMA3}",
}
BENCH_TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
#: The shapes that speed is asked for at, in every format.
STANDARD_SHAPES = ((14336, 4096), (4096, 14336))
#: Formats that effort quick and the codec's timings take at standard.
STANDARD_FORMATS = ("absmax7_row", "absmax7_g128", "nvfp4")
#: Ours, and what a linear layer costs that keeps its weight in 16 bits.
CONTENDERS = ("triton", "torch_native[cublas_bf16]")
#: Compiled anew for each number of tokens, three seconds a row.
COMPILED = ("torch_native[torch_compile]",)
#: Slower than the contenders at every number of tokens.
SLOW = (*COMPILED, "torch_native[eager_dequant]", "as_written", "numba_cuda")


def _linear(fmt: str, n: int, k: int, m: int, source: str) -> BenchCase:
    """quick: a taste, where every kernel is timed. standard: two shapes whole. full: every shape, every kernel."""
    case = FP4_LINEAR.case(fmt=fmt, x="bf16", m=m, n=n, k=k)
    claimed = (n, k) == (14336, 4096)
    if claimed and fmt in ("absmax7_row", "nvfp4") and m in (1, 16, 1024):
        return BenchCase(case, source, "quick", first=CONTENDERS)
    later = COMPILED if claimed and m in (1, 4, 16) else SLOW
    return BenchCase(case, source, "standard" if (n, k) in STANDARD_SHAPES else "full", first=CONTENDERS, later=later)


def _benches() -> tuple[BenchCase, ...]:
    linear = (
        _linear(fmt, n, k, m, source)
        for (n, k), source in BENCH_SHAPES.items()
        for m in BENCH_TOKENS
        for fmt in FORMATS
    )
    n, k = 14336, 4096
    # What a reader calls standard PyTorch may be fp32 or fp16: baselines for ratios that name their dtype.
    wider = (
        BenchCase(FP4_LINEAR.case(fmt="nvfp4", x=x, m=m, n=n, k=k), BENCH_SHAPES[n, k], "standard", later=COMPILED)
        for x in ("fp16", "fp32")
        for m in (1, 4, 16)
    )
    codec = (
        BenchCase(case, BENCH_SHAPES[n, k], "standard" if fmt in STANDARD_FORMATS else "full")
        for fmt in FORMATS
        for case in (
            FP4_QUANTIZE.case(fmt=fmt, w="bf16", n=n, k=k),
            FP4_DEQUANTIZE.case(fmt=fmt, y="bf16", n=n, k=k),
        )
    )
    return (*linear, *wider, *codec)


#: What a fused kernel is compiled for, besides its tile.
COMPILED_FOR = ("fmt", "x", "act", "bias")

SUITE = Suite(
    name="fp4",
    summary="4-bit codec and linear layer: exact encoders, fused decode and multiply, speed at Llama-3-8B shapes",
    checks=(*_quantize_checks(), *_dequantize_checks(), *_linear_checks()),
    generated=(
        Generated("vbench.suites.strategies:fp4_quantize_cases", (15, 100, 1000), ("fmt", "w")),
        Generated("vbench.suites.strategies:fp4_dequantize_cases", (15, 100, 1000), ("fmt", "y")),
        Generated("vbench.suites.strategies:fp4_linear_cases", (15, 100, 1000), COMPILED_FOR),
    ),
    searched=(Generated("vbench.suites.strategies:large_fp4_linear_cases", (0, 0, 0), COMPILED_FOR, "cuda"),),
    benches=_benches(),
    native=frozenset(_metric_checks()),
    regressions=REGRESSIONS,
    waivers=WAIVERS,
)
