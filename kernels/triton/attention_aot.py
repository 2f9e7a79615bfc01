"""What the attention kernels compile to: every tile of the tables, for the ahead-of-time gate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from vbench.backend import Configuration, Cubin, Effort, Unit
from vbench.kernels.triton.aot import POINTERS, compile_kernel, cubin
from vbench.kernels.triton.attention_tiles import GluonTile, Tile, gluon_tiles, padded_head_dim, plain_tiles

#: Local memory that a thread of the Gluon kernel may have, bytes, and the share of its loops' instructions that may
#: access it. Plain kernels may have none.
GLUON_SPILL_BYTES = 64
GLUON_SPILL_SHARE = 0.02
GLUON_SPILL_REASON = (
    "accumulator, scores and weights of a consumer take 224 of 240 registers (144 of 160), and ptxas keeps some "
    "addresses of the tile in local memory (docs/tuning/attention.md, What the compiler makes of it)"
)


def _compile_plain(dtype: str, d: int, tile: Tile, causal: bool, descriptors: bool, arch: int) -> Cubin:
    from vbench.kernels.triton.attention_forward import attention_forward

    width = padded_head_dim(d)
    constants: dict[str, Any] = {
        "D": d,
        "BLOCK_D": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BOUNDED": causal,
        "WINDOW": False,
        "SOFTCAP": False,
        "DESCRIPTORS": descriptors,
        "EMULATE": False,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    # Innermost strides are 1 in contiguous tensors, and Triton then makes them constants.
    constants |= dict.fromkeys(("stride_qd", "stride_kd", "stride_vd", "stride_od", "stride_ls"), 1)
    names = attention_forward.arg_names
    types = {name: POINTERS[dtype] for name in names if name.endswith(("_ptr", "_source"))}
    if descriptors:
        block = f"tensordesc<{dtype}[1, 1, {tile.block_n}, {width}]>"
        types |= {name: block for name in names if name.endswith("_source")}
    types |= {"lse_ptr": "*fp32", "exponent_scale": "fp32", "cap_exponent": "fp32"}
    compiled = compile_kernel(
        attention_forward,
        arch,
        types=types,
        constants=constants,
        divisible=[name for name in names if name.startswith("stride")],
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return cubin(compiled)


def _compile_gluon(dtype: str, d: int, tile: GluonTile, causal: bool) -> Cubin:
    from triton.experimental.gluon import language as gl

    from vbench.kernels.triton.attention_gluon import attention_forward_hopper

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    constants: dict[str, Any] = {
        "D": d,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.stages,
        "WORKERS": tile.workers,
        "WORKER_REGISTERS": tile.registers,
        "ROUND_EARLY": tile.round_early,
        "POLYNOMIAL": tile.polynomial,
        "KEEP_PEAK": tile.keep_peak,
        "CAUSAL": causal,
    }
    types = {"lse_ptr": "*fp32", "exponent_scale": "fp32"}
    for name in attention_forward_hopper.arg_names:
        if name.endswith("_desc"):
            rows = tile.block_n if name in ("k_desc", "v_desc") else 64
            types[name] = f"tensordesc<{dtype}[1, 1, {rows}, {d}],{layout!r}>"
    compiled = compile_kernel(attention_forward_hopper, 90, types=types, constants=constants, gluon=True, num_warps=4)
    return cubin(compiled)


def plain(
    dtype: str, d: int, tile: Tile, *, causal: bool, descriptors: bool, arch: int, effort: Effort = "standard"
) -> Configuration:
    """The plain kernel with one tile. On Hopper 16-bit tiles of 64 rows or more declare warp-group instructions."""
    unit: Unit = "ffma" if dtype == "fp32" else "hgmma" if arch == 90 and tile.block_m >= 64 else "hmma"
    bounds = {f"loop.{unit.upper()}": (1.0, math.inf)}
    if descriptors:
        bounds["loop.UTMALDG"] = (1.0, math.inf)
    return Configuration(
        op="attention",
        kernel="attention_forward",
        arch=arch,
        unit=unit,
        parameters={
            "dtype": dtype,
            "d": d,
            "block_m": tile.block_m,
            "block_n": tile.block_n,
            "warps": tile.warps,
            "stages": tile.stages,
            "causal": int(causal),
            "descriptors": int(descriptors),
        },
        compile=partial(_compile_plain, dtype, d, tile, causal, descriptors, arch),
        bounds=bounds,
        effort=effort,
    )


def gluon(dtype: str, d: int, tile: GluonTile, *, causal: bool, effort: Effort = "standard") -> Configuration:
    """The Gluon kernel with one tile: loads by the copy engine, registers moved from the producer to the consumers."""
    full = d == 128 or tile.workers == 3
    levers = {"polynomial": tile.polynomial, "keep_peak": int(tile.keep_peak)}
    return Configuration(
        op="attention",
        kernel="attention_forward_hopper",
        arch=90,
        unit="hgmma",
        parameters={
            "dtype": dtype,
            "d": d,
            "block_n": tile.block_n,
            "stages": tile.stages,
            "workers": tile.workers,
            "registers": tile.registers,
            "round_early": int(tile.round_early),
            "causal": int(causal),
            **{name: value for name, value in levers.items() if value},
        },
        compile=partial(_compile_gluon, dtype, d, tile, causal),
        instructions=("UTMALDG", "USETMAXREG"),
        bounds={"loop.HGMMA": (1.0, math.inf), "loop_spill_share": (0.0, GLUON_SPILL_SHARE)},
        spill_bytes_allowed=GLUON_SPILL_BYTES if full else 0,
        spill_reason=GLUON_SPILL_REASON if full else "",
        effort=effort,
    )


#: (dtype, head dim, descriptors, architecture) of the plain kernel, and (dtype, head dim, causal) of the Gluon one, of
#: effort quick: each unit, each architecture, few and many rows.
_SAMPLE = {("bf16", 128, True, 90), ("bf16", 64, False, 80), ("fp16", 64, False, 90), ("fp32", 32, False, 80)}
_GLUON_SAMPLE = {("bf16", 128, True), ("fp16", 64, False)}


def configurations() -> Iterator[Configuration]:
    """Every tile of the tables on every architecture that reaches it."""
    for arch in (80, 90):
        for dtype in ("bf16", "fp16", "fp32"):
            for descriptors in (False, True):
                if descriptors and (arch == 80 or dtype == "fp32"):
                    continue
                for d, tiles in plain_tiles(dtype, descriptors=descriptors, shared_227kb=arch == 90).items():
                    effort: Effort = "quick" if (dtype, d, descriptors, arch) in _SAMPLE else "standard"
                    for tile in dict.fromkeys(tiles):
                        yield plain(dtype, d, tile, causal=True, descriptors=descriptors, arch=arch, effort=effort)
    for dtype in ("bf16", "fp16"):
        for d in (64, 128):
            for causal in (False, True):
                gluon_effort: Effort = "quick" if (dtype, d, causal) in _GLUON_SAMPLE else "standard"
                for gluon_tile in gluon_tiles(d, causal=causal):
                    yield gluon(dtype, d, gluon_tile, causal=causal, effort=gluon_effort)
