"""All that the numba backend compiles to, for the ahead-of-time gate (``vbench run --suite compile``).

Needs a process without NUMBA_ENABLE_CUDASIM=1, numba-cuda[cu13] and no GPU: NVVM makes PTX, nvJitLink machine code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from types import SimpleNamespace
from typing import Any

from vbench.backend import Configuration, Cubin, Effort, Unit
from vbench.kernels.numba_cuda import attention_kernels as attention
from vbench.kernels.numba_cuda import codec_kernels as codec
from vbench.kernels.numba_cuda import fetch_kernels as fetch
from vbench.kernels.numba_cuda import linear_kernels as linear
from vbench.kernels.numba_cuda.formats import FORMATS as FACTS
from vbench.kernels.numba_cuda.formats import MXFP4_ROUNDING
from vbench.kernels.numba_cuda.program import Program

ARCHITECTURES = (80, 90)
FORMATS = tuple(FACTS)
#: What ``encode_group`` encodes to: the formats with a scale a group, and mxfp4 by its other scale rules.
GROUP_ENCODINGS = tuple(
    dict.fromkeys((*(name for name, fmt in FACTS.items() if fmt.scaling == "group"), *MXFP4_ROUNDING))
)
DTYPES = ("bf16", "fp16", "fp32")
ACTIVATIONS = ("none", "relu", "gelu", "silu")

_NONE, _SOME = (0.0, 0.0), (1.0, math.inf)
#: Every kernel sums in a fixed order, so none may use atomics.
_EVERY: Mapping[str, tuple[float, float]] = {"atomics": _NONE}
#: Exact codecs divide as IEEE says and keep subnormals.
_EXACT = {"approximate_divisions": _NONE, "flushed_operations": _NONE}
_DIVIDES = {**_EXACT, "ieee_divisions": _SOME}
_SHUFFLES = {"warp_shuffles": _SOME}


def compile_function(function: Callable[..., None], signature: str, arch: int, fastmath: bool = False) -> Cubin:
    """Compile a kernel function to machine code.

    Args:
        signature: as ``numba.cuda.jit`` takes it.
        arch: compute capability times ten.
        fastmath: for controls only; no kernel of ours is compiled so.
    """
    import numba.cuda.dispatcher
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from numba import cuda

    capability = divmod(arch, 10)
    # Device functions are compiled for "the current device": stand in for one, so that none is needed.
    numba.cuda.dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    ptx, _ = cuda.compile(
        function, signature, cc=capability, device=False, abi="numba", output="ptx", fastmath=fastmath
    )
    text = ptx.decode() if isinstance(ptx, bytes) else ptx
    linked = Linker(ObjectCode.from_ptx(text.encode()), options=LinkerOptions(arch=f"sm_{arch}")).link("cubin")
    return Cubin(
        bytes(linked.code),
        0,
        {
            "ieee_divisions": text.count("div.rn.f32"),
            "approximate_divisions": len(re.findall(r"div\.(full|approx)\S*f32|rcp\.approx\S*f32", text)),
            "flushed_operations": len(re.findall(r"(?:add|mul|fma|div)\S*\.ftz", text)),
            "atomics": len(re.findall(r"\b(?:atom|red)\.", text)),
            "warp_shuffles": text.count("shfl.sync"),
        },
    )


def configuration(
    op: str,
    build: Callable[[], Program],
    kernel: str,
    arch: int,
    parameters: Mapping[str, int | str],
    *,
    unit: Unit = "none",
    bounds: Mapping[str, tuple[float, float]] | None = None,
    instructions: tuple[str, ...] = (),
    effort: Effort = "full",
) -> Configuration:
    """One program for one architecture. ``build`` makes it, not before it is compiled."""

    def compile() -> Cubin:
        program = build()
        return compile_function(program.function, program.signature, arch)

    return Configuration(
        op=op,
        kernel=kernel,
        arch=arch,
        unit=unit,
        parameters=parameters,
        compile=compile,
        instructions=instructions,
        bounds={**_EVERY, **(bounds or {})},
        effort=effort,
    )


#: Of effort quick: every kernel, with every format, dtype and activation somewhere; on sm_80 the ones marked so.
_SAMPLE: Mapping[tuple[Any, ...], tuple[int, ...]] = {
    ("finish_tensor", "nvfp4"): (90,),
    ("absmax_partials", "bf16"): (90,),
    ("encode_tensor", "fp16"): (90,),
    ("encode_row", "fp32"): (90,),
    ("encode_group", "nvfp4", "bf16"): (80, 90),
    ("encode_group", "absmax7_g128", "fp32"): (90,),
    ("encode_group", "mxfp4_even", "fp32"): (90,),
    ("encode_group", "nf4", "bf16"): (90,),
    ("decode", "absmax7_tensor", "fp32"): (90,),
    ("decode", "nvfp4", "bf16"): (90,),
    ("decode", "mxfp4", "fp32"): (90,),
    ("decode", "nf4", "fp16"): (90,),
    ("gemv_words", "absmax7_row", "fp16", "gelu", 0, 1): (90,),
    ("gemv_words", "nvfp4", "bf16", "silu", 1, 8): (80, 90),
    ("gemv_bytes", "absmax7_tensor", "fp32", "silu", 1, 8): (90,),
    ("tiled", "absmax7_g128", "fp32", "none", 0): (90,),
    ("tiled", "nvfp4", "fp16", "silu", 1): (80, 90),
    ("gemv_words", "nf4", "bf16", "silu", 1, 8): (90,),
    ("gemv_bytes", "mxfp4", "bf16", "none", 0, 1): (90,),
    ("attention", "fp32", 8, 1): (80, 90),
    ("attention", "fp16", 16, 0): (90,),
}


def _effort(arch: int, *key: int | str) -> Effort:
    """quick: the sample. standard: every kernel with every format, dtype and token count, the epilogues in turn."""
    if arch in _SAMPLE.get(key, ()):
        return "quick"
    if key[0] not in ("tiled", "gemv_words", "gemv_bytes"):
        return "standard"
    fmt, dtype, act, bias = key[1:5]
    turn = FORMATS.index(str(fmt)) + DTYPES.index(str(dtype)) + (int(key[5]) if len(key) > 5 else 0)
    return "standard" if (act, bias) == (ACTIVATIONS[turn % 4], turn // 4 % 2) else "full"


def _codecs(arch: int) -> Iterator[Configuration]:
    for fmt in ("absmax7_tensor", "nvfp4"):
        build: Callable[[], Program] = partial(codec.finish_tensor, fmt)
        kind = _effort(arch, "finish_tensor", fmt)
        yield configuration("fp4_quantize", build, "finish_tensor", arch, {"fmt": fmt}, bounds=_DIVIDES, effort=kind)
    for dtype in DTYPES:
        for kernel, bounds in (("absmax_partials", _EXACT), ("encode_tensor", _DIVIDES), ("encode_row", _DIVIDES)):
            build = partial(getattr(codec, kernel), dtype)
            kind = _effort(arch, kernel, dtype)
            yield configuration("fp4_quantize", build, kernel, arch, {"w": dtype}, bounds=bounds, effort=kind)
        for fmt in GROUP_ENCODINGS:
            build = partial(codec.encode_group, fmt, dtype)
            kind = _effort(arch, "encode_group", fmt, dtype)
            shape: dict[str, int | str] = {"fmt": fmt, "w": dtype}
            limits = {**_DIVIDES, **_SHUFFLES}
            yield configuration("fp4_quantize", build, "encode_group", arch, shape, bounds=limits, effort=kind)
        for fmt in FORMATS:
            build = partial(codec.decode, fmt, dtype)
            kind = _effort(arch, "decode", fmt, dtype)
            yield configuration(
                "fp4_dequantize", build, "decode", arch, {"fmt": fmt, "y": dtype}, bounds=_EXACT, effort=kind
            )


def _linears(arch: int) -> Iterator[Configuration]:
    for fmt, dtype, act, bias in product(FORMATS, DTYPES, ACTIVATIONS, (False, True)):
        key = (fmt, dtype, act, int(bias))
        shape: dict[str, int | str] = {"fmt": fmt, "x": dtype, "act": act, "bias": int(bias)}
        build: Callable[[], Program] = partial(linear.tiled, fmt, dtype, act, bias)
        yield configuration("fp4_linear", build, "tiled", arch, shape, unit="ffma", effort=_effort(arch, "tiled", *key))
        for kernel, wide in (("gemv_words", ("LDG.E.128",)), ("gemv_bytes", ())):
            for tokens in linear.TOKEN_COUNTS:
                build = partial(getattr(linear, kernel), fmt, dtype, act, bias, tokens)
                kind = _effort(arch, kernel, *key, tokens)
                yield configuration(
                    "fp4_linear",
                    build,
                    kernel,
                    arch,
                    {**shape, "tokens": tokens},
                    unit="ffma",
                    bounds=_SHUFFLES,
                    instructions=wide,
                    effort=kind,
                )


def _attentions(arch: int) -> Iterator[Configuration]:
    for dtype, columns, causal in product(DTYPES, (1, 2, 4, 8, 16), (False, True)):
        build = partial(attention.forward, dtype, columns, causal)
        kind = _effort(arch, "attention", dtype, columns, int(causal))
        shape: dict[str, int | str] = {"dtype": dtype, "columns_a_thread": columns, "causal": int(causal)}
        limits = {"flushed_operations": _NONE, **_SHUFFLES}
        yield configuration("attention", build, "forward", arch, shape, unit="ffma", bounds=limits, effort=kind)


def configurations() -> Iterator[Configuration]:
    """Every program there is, about 1400 for each architecture."""
    for arch in ARCHITECTURES:
        yield from _codecs(arch)
        yield from _linears(arch)
        yield from _attentions(arch)
        for held in ("uint16", "uint32"):
            effort: Effort = "quick" if (arch, held) == (90, "uint32") else "standard"
            yield configuration("tier_fetch", partial(fetch.copy, held), "copy", arch, {"held": held}, effort=effort)
