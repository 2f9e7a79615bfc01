"""What the attention backward kernels compile to: every tile of the tables, for the ahead-of-time gate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from vbench.backend import Configuration, Cubin, Effort, Unit
from vbench.kernels.triton.aot import POINTERS, compile_kernel, cubin
from vbench.kernels.triton.attention_backward_tiles import table
from vbench.kernels.triton.attention_tiles import Tile, padded_head_dim

Part = Literal["queries", "keys"]

#: Pointers to float32 whatever the dtype.
FP32_POINTERS = ("exponent_ptr", "delta_ptr")
#: Innermost strides, 1 in contiguous tensors, which Triton then makes constants.
INNERMOST = ("_qd", "_kd", "_vd", "_gd", "_od", "_md", "_wd")

#: Local memory that a thread may have, bytes.
SPILL_BYTES = 32
SPILL_REASON = (
    "ptxas keeps a few addresses in local memory between the loops, inside which there is no access: at head dim 128 "
    "accumulators, scores and weights take 240 of 255 registers (docs/tuning/attention.md, Plain backward)"
)
FP32_SPILL_BYTES = 512
FP32_SPILL_REASON = (
    "an FMA product keeps whole rows of both operands in registers, more than there are at head dim 256 "
    "(docs/tuning/attention.md, Plain backward)"
)


def _compile(part: Part, dtype: str, d: int, tile: Tile, edges: bool, descriptors: bool, arch: int) -> Cubin:
    from vbench.kernels.triton.attention_backward_kernels import gradient_of_keys, gradient_of_queries

    function = gradient_of_queries if part == "queries" else gradient_of_keys
    width = padded_head_dim(d)
    constants: dict[str, Any] = {
        "D": d,
        "BLOCK_D": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BOUNDED": True,
        "WINDOW": edges,
        "SOFTCAP": edges,
        "DESCRIPTORS": descriptors,
        "EMULATE": False,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    names = function.arg_names
    constants |= {name: 1 for name in names if name.startswith("stride") and name.endswith(INNERMOST)}
    types = {name: POINTERS[dtype] for name in names if name.endswith(("_ptr", "_source"))}
    if descriptors:
        for name in ("q_source", "k_source", "v_source", "dout_source"):
            rows = tile.block_m if name in ("q_source", "dout_source") else tile.block_n
            types[name] = f"tensordesc<{dtype}[1, 1, {rows}, {width}]>"
    types |= dict.fromkeys(FP32_POINTERS, "*fp32")
    types |= dict.fromkeys(("exponent_scale", "cap_exponent", "scale"), "fp32")
    compiled = compile_kernel(
        function,
        arch,
        types=types,
        constants=constants,
        divisible=[name for name in names if name.startswith("stride")],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return cubin(compiled)


def configuration(
    part: Part,
    dtype: str,
    d: int,
    tile: Tile,
    *,
    descriptors: bool,
    arch: int,
    edges: bool = False,
    effort: Effort = "standard",
) -> Configuration:
    """One of the two large kernels with one tile and a causal mask; ``edges``: with a window and capped scores too."""
    # A warp group's product has 64 rows: query rows of dQ, keys of dK and dV.
    owned = tile.block_m if part == "queries" else tile.block_n
    unit: Unit = "ffma" if dtype == "fp32" else "hgmma" if arch == 90 and owned >= 64 else "hmma"
    bounds = {f"loop.{unit.upper()}": (1.0, math.inf)}
    allowed, reason = SPILL_BYTES, SPILL_REASON
    if dtype == "fp32" and d == 256 and part == "keys":
        allowed, reason = FP32_SPILL_BYTES, FP32_SPILL_REASON
    else:
        bounds["loop_spills"] = (0.0, 0.0)
    if descriptors:
        bounds["loop.UTMALDG"] = (1.0, math.inf)
    return Configuration(
        op="attention_backward",
        kernel=f"gradient_of_{part}",
        arch=arch,
        unit=unit,
        parameters={
            "dtype": dtype,
            "d": d,
            "block_m": tile.block_m,
            "block_n": tile.block_n,
            "warps": tile.warps,
            "stages": tile.stages,
            "edges": int(edges),
            "descriptors": int(descriptors),
        },
        compile=partial(_compile, part, dtype, d, tile, edges, descriptors, arch),
        bounds=bounds,
        spill_bytes_allowed=allowed,
        spill_reason=reason,
        effort=effort,
    )


#: (part, dtype, head dim, descriptors, architecture, edges) of effort quick: each unit, each architecture.
_SAMPLE = {
    ("queries", "bf16", 128, True, 90, False),
    ("keys", "bf16", 128, True, 90, False),
    ("keys", "fp16", 64, False, 80, False),
    ("queries", "fp32", 32, False, 80, False),
}


def configurations() -> Iterator[Configuration]:
    """Every tile of the tables on every architecture that reaches it."""
    parts: tuple[Part, ...] = ("queries", "keys")
    for arch in (80, 90):
        for dtype in ("bf16", "fp16", "fp32"):
            for descriptors in (False, True):
                if descriptors and (arch == 80 or dtype == "fp32"):
                    continue
                for edges in (False, True) if descriptors else (False,):
                    tables = table(dtype, descriptors=descriptors, shared_227kb=arch == 90, edges=edges)
                    for d, tiles in tables.items():
                        for part, tile in zip(parts, (tiles.queries, tiles.keys), strict=True):
                            sampled = (part, dtype, d, descriptors, arch, edges) in _SAMPLE
                            yield configuration(
                                part,
                                dtype,
                                d,
                                tile,
                                descriptors=descriptors,
                                arch=arch,
                                edges=edges,
                                effort="quick" if sampled else "standard",
                            )
