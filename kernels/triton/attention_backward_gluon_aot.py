"""What the Hopper attention backward compiles to: every tile of its tables, for the ahead-of-time gate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from vbench.backend import Configuration, Cubin, Effort
from vbench.kernels.triton.aot import POINTERS, compile_kernel, cubin
from vbench.kernels.triton.attention_backward_gluon_host import (
    BLOCK_N,
    DETERMINISTIC_TILES,
    DQ_BLOCK_M,
    DQ_TILES,
    TILES,
    WARPS,
    GluonBackwardTile,
)
from vbench.kernels.triton.attention_backward_tiles import PREPARE_ROWS

_AT_LEAST_ONE = (1.0, math.inf)
#: Groups of wgmma that one warp's step may wait for: dQ, S, dP and dV. Where ptxas cannot keep several in flight (its
#: notes C7510 to C7515) it waits for each of the 16 or more instructions of a step.
WAITS_PER_STEP = 4
#: Local memory that a thread may have, bytes, and the share of a step's instructions that may access it, by head dim.
SPILL_BYTES = {64: 128, 128: 64}
SPILL_SHARE = {64: 0.05, 128: 0.005}
SPILL_REASON = (
    "accumulators, scores and dP take 192 to 224 of a thread's 240 or 255 registers, and ptxas keeps addresses, at "
    "head dim 64 some weights too, in local memory (docs/tuning/attention.md, Backward on Hopper)"
)


def _descriptor(dtype: str, block: list[int], swizzle: int) -> str:
    from triton.experimental.gluon import language as gl

    bits = 32 if dtype == "fp32" else 16
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=len(block))
    return f"tensordesc<{dtype}{block},{layout!r}>"


def _compile(
    kernel: Any, blocks: Mapping[str, tuple[str, list[int], int]], constants: Mapping[str, Any], warps: int
) -> Cubin:
    """``blocks``: descriptor argument -> dtype, block and swizzle in bytes. Other pointers are float32."""
    types = {name: _descriptor(*block) for name, block in blocks.items()}
    types |= {name: POINTERS["fp32"] for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"exponent_scale": "fp32", "scale": "fp32"}
    return cubin(compile_kernel(kernel, 90, types=types, constants=constants, gluon=True, num_warps=warps))


def _compile_products(dtype: str, d: int, tile: GluonBackwardTile, causal: bool, deterministic: bool) -> Cubin:
    from vbench.kernels.triton.attention_backward_gluon import attention_backward_hopper
    from vbench.kernels.triton.attention_backward_gluon_pair import attention_backward_pair_hopper

    constants: dict[str, Any] = {
        "D": d, "BLOCK_M": tile.block_m, "Q_STAGES": tile.q_stages, "DO_STAGES": 2, "CAUSAL": causal,
    }  # fmt: skip
    keys = BLOCK_N // 2 if tile.consumers else BLOCK_N
    blocks = dict.fromkeys(("k_desc", "v_desc", "dk_desc", "dv_desc"), (dtype, [1, 1, keys, d], 128))
    blocks |= dict.fromkeys(("q_desc", "do_desc"), (dtype, [1, 1, tile.block_m, d], 128))
    blocks["stats_desc"] = ("fp32", [2, 1, tile.block_m], 0)
    if not tile.consumers:
        return _compile(attention_backward_hopper, blocks, constants, WARPS)
    if deterministic:
        blocks["dq_desc"] = blocks["dk_desc"]
    else:
        blocks["dq_desc"] = ("fp32", [32, 128], 0)
    constants |= {"COMPUTE_DQ": not deterministic, "EARLY": tile.early}
    return _compile(attention_backward_pair_hopper, blocks, constants, 4)


def _compile_dq(dtype: str, d: int, keys: int, stages: int, causal: bool) -> Cubin:
    from vbench.kernels.triton.attention_backward_gluon_dq import attention_backward_dq_hopper

    blocks = dict.fromkeys(("q_desc", "do_desc", "dq_desc"), (dtype, [1, 1, DQ_BLOCK_M // 2, d], 128))
    blocks |= dict.fromkeys(("k_desc", "v_desc"), (dtype, [1, 1, keys, d], 128))
    constants = {"D": d, "BLOCK_N": keys, "STAGES": stages, "CAUSAL": causal}
    return _compile(attention_backward_dq_hopper, blocks, constants, 4)


def _compile_finish(dtype: str, d: int) -> Cubin:
    from vbench.kernels.triton.attention_backward_finish import finish_dq

    types = {"sums_ptr": POINTERS["fp32"], "dq_ptr": POINTERS[dtype], "scale": "fp32"}
    strides = ("stride_qb", "stride_qh", "stride_qs")
    return cubin(compile_kernel(finish_dq, 90, types=types, constants={"D": d}, divisible=strides, num_warps=4))


def _compile_rows(dtype: str, d: int) -> Cubin:
    from vbench.kernels.triton.attention_backward_kernels import prepare_rows

    names = prepare_rows.arg_names
    types = dict.fromkeys(("out_ptr", "dout_ptr"), POINTERS[dtype])
    types |= dict.fromkeys(("lse_ptr", "dlse_ptr", "exponent_ptr", "delta_ptr"), POINTERS["fp32"])
    constants: dict[str, Any] = {"D": d, "BLOCK_D": d, "BLOCK_M": PREPARE_ROWS, "DLSE": True, "EMULATE": False}
    constants |= dict.fromkeys(("stride_od", "stride_gd", "stride_ls", "stride_es"), 1)
    strides = [name for name in names if name.startswith("stride") and name not in constants]
    return cubin(compile_kernel(prepare_rows, 90, types=types, constants=constants, divisible=strides, num_warps=4))


def products(
    dtype: str, d: int, tile: GluonBackwardTile, *, causal: bool, deterministic: bool, effort: Effort = "standard"
) -> Configuration:
    """The kernel of dK and dV (and, not ``deterministic``, dQ) with one tile."""
    waits = WAITS_PER_STEP * max(1, tile.consumers)
    copies = ("UTMALDG", "UTMASTG") + (() if deterministic else ("UTMAREDG",))
    return Configuration(
        op="attention_backward",
        kernel="attention_backward_pair_hopper" if tile.consumers else "attention_backward_hopper",
        arch=90,
        unit="hgmma",
        parameters={
            "dtype": dtype,
            "d": d,
            "block_m": tile.block_m,
            "q_stages": tile.q_stages,
            "early": int(tile.early),
            "causal": int(causal),
            "dq": int(not deterministic),
        },
        compile=partial(_compile_products, dtype, d, tile, causal, deterministic),
        instructions=(*copies, "USETMAXREG") if tile.consumers else copies,
        bounds={
            "loop.HGMMA": _AT_LEAST_ONE,
            "loop.WARPGROUP.DEPBAR": (1.0, waits),
            "loop_spill_share": (0.0, SPILL_SHARE[d]),
        },
        spill_bytes_allowed=SPILL_BYTES[d],
        spill_reason=SPILL_REASON,
        effort=effort,
    )


def dq(dtype: str, d: int, *, causal: bool, effort: Effort = "standard") -> Configuration:
    """The kernel of dQ alone."""
    keys, stages = DQ_TILES[d]
    return Configuration(
        op="attention_backward",
        kernel="attention_backward_dq_hopper",
        arch=90,
        unit="hgmma",
        parameters={"dtype": dtype, "d": d, "block_n": keys, "stages": stages, "causal": int(causal)},
        compile=partial(_compile_dq, dtype, d, keys, stages, causal),
        instructions=("UTMALDG", "UTMASTG", "USETMAXREG"),
        # S and dP, in two partitions.
        bounds={"loop.HGMMA": _AT_LEAST_ONE, "loop.WARPGROUP.DEPBAR": (1.0, 4.0), "loop_spills": (0.0, 0.0)},
        effort=effort,
    )


def _around(kernel: str, dtype: str, d: int, compile: Any, effort: Effort, **parameters: int) -> Configuration:
    return Configuration(
        op="attention_backward",
        kernel=kernel,
        arch=90,
        unit="none",
        parameters={"dtype": dtype, "d": d, **parameters},
        compile=compile,
        instructions=("LDG.E.128",),
        effort=effort,
    )


def configurations() -> Iterator[Configuration]:
    """Every tile of the tables, and the kernels around them; of effort quick the ones in use, once each."""
    for dtype in ("bf16", "fp16"):
        for d in (64, 128):
            for causal in (False, True):
                sampled = dtype == "bf16" and causal == (d == 64)
                for deterministic, table in ((False, TILES), (True, DETERMINISTIC_TILES)):
                    for index, tile in enumerate(table[d]):
                        effort: Effort = "quick" if sampled and index == 0 else "standard"
                        yield products(dtype, d, tile, causal=causal, deterministic=deterministic, effort=effort)
                yield dq(dtype, d, causal=causal, effort="quick" if sampled and d == 128 else "standard")
            around: Effort = "quick" if (dtype, d) == ("bf16", 128) else "standard"
            yield _around("prepare_rows", dtype, d, partial(_compile_rows, dtype, d), around)
            yield _around("finish_dq", dtype, d, partial(_compile_finish, dtype, d), around)
