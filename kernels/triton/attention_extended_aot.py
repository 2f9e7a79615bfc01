"""What the extended attention kernels compile to, with every feature on and off, for the ahead-of-time gate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from vbench.backend import Configuration, Cubin, Effort, Unit
from vbench.kernels.triton.aot import POINTERS, compile_kernel, cubin
from vbench.kernels.triton.attention_extended import FP32, HALF
from vbench.kernels.triton.attention_tiles import Tile

#: Pointers that are not to the case's dtype.
OTHER_POINTERS = {
    **dict.fromkeys(("slopes_ptr", "sink_ptr", "exponent_ptr", "delta_ptr", "lse_ptr"), "*fp32"),
    **dict.fromkeys(("cu_q_ptr", "cu_k_ptr", "table_ptr"), "*i32"),
}
#: Function -> (op, what its loop walks).
KERNELS = {
    "extended_forward": "attention_extended",
    "extended_gradient_of_queries": "attention_extended_backward",
    "extended_gradient_of_keys": "attention_extended_backward",
}
#: Local memory that a thread may have in fp32 at head dim 256, bytes.
FP32_SPILL_BYTES = 512
FP32_SPILL_REASON = (
    "an FMA product keeps whole rows of both operands in registers, more than there are at head dim 256 "
    "(docs/tuning/attention.md, Plain backward)"
)
#: Fewest rows of a warp-group instruction's left operand.
WARP_GROUP_ROWS = 64


def _compile(kernel: str, dtype: str, d: int, tile: Tile, features: bool, arch: int) -> Cubin:
    from vbench.kernels.triton import attention_extended_kernels

    function = getattr(attention_extended_kernels, kernel)
    names = function.arg_names
    constants: dict[str, Any] = {
        "D": d,
        "BLOCK_D": d,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        **dict.fromkeys(("ALIGNED_RIGHT", "SOFTCAP", "ALIBI", "MASK", "PACKED"), features),
        "EMULATE": False,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
    }
    if "SINK" in names:
        constants["SINK"] = features
    # Innermost strides are 1 in contiguous tensors, and Triton then makes them constants; so does it of None.
    constants |= {
        name: 1 for name in names if name in ("stride_mk", "stride_ls") or (name.endswith("d") and "stride" in name)
    }
    if not features:
        off = ("slopes_ptr", "sink_ptr", "mask_ptr", "cu_q_ptr", "cu_k_ptr", "table_ptr")
        constants |= {name: None for name in off if name in names}
    types = {name: OTHER_POINTERS.get(name, POINTERS[dtype]) for name in names if name.endswith("_ptr")}
    types |= {name: "fp32" for name in ("exponent_scale", "cap_exponent", "scale") if name in names}
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
    kernel: str, dtype: str, d: int, tile: Tile, *, features: bool, arch: int, effort: Effort = "standard"
) -> Configuration:
    """One kernel with one tile; ``features`` all on or all off. On Hopper 64 rows declare warp-group instructions."""
    owned = tile.block_n if kernel == "extended_gradient_of_keys" else tile.block_m
    unit: Unit = "hgmma" if arch == 90 and owned >= WARP_GROUP_ROWS else "hmma"
    if dtype == "fp32":
        unit = "ffma"
    wide = dtype == "fp32" and d == 256
    return Configuration(
        op=KERNELS[kernel],
        kernel=kernel,
        arch=arch,
        unit=unit,
        parameters={
            "dtype": dtype,
            "d": d,
            "block_m": tile.block_m,
            "block_n": tile.block_n,
            "warps": tile.warps,
            "stages": tile.stages,
            "features": int(features),
        },
        compile=partial(_compile, kernel, dtype, d, tile, features, arch),
        spill_bytes_allowed=FP32_SPILL_BYTES if wide else 0,
        spill_reason=FP32_SPILL_REASON if wide else "",
        bounds={f"loop.{unit.upper()}": (1.0, math.inf)},
        effort=effort,
    )


def configurations() -> Iterator[Configuration]:
    """Every tile on both architectures, with all features and with none."""
    for arch in (80, 90):
        for dtype, table in (("bf16", HALF), ("fp16", HALF), ("fp32", FP32)):
            for d, (forward, backward) in table.items():
                tiles = (forward, backward.queries, backward.keys)
                for kernel, tile in zip(KERNELS, tiles, strict=True):
                    for features in (True, False):
                        quick = features and arch == 90 and (dtype, d) == ("bf16", 64)
                        effort: Effort = "quick" if quick else "standard"
                        yield configuration(kernel, dtype, d, tile, features=features, arch=arch, effort=effort)
