"""What the FP4 kernels compile to: every table entry, and the codec, for the ahead-of-time gate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from vbench.backend import Configuration, Cubin, Effort, Unit
from vbench.kernels.triton import codec, linear, linear_stationary_host
from vbench.kernels.triton.aot import POINTERS, compile_kernel, cubin
from vbench.kernels.triton.linear import PART_COLUMNS, Plan
from vbench.kernels.triton.linear_fused import fused_linear_kernel
from vbench.kernels.triton.packing import BYTE_SCALES, GROUPS

#: Local memory allowed where it lies outside the loops, bytes a thread.
EPILOGUE_SPILL_BYTES = 256
EPILOGUE_SPILL_REASON = (
    "the epilogue's activation and bias, once a tile, outside every loop: loop_spills is held to 0 "
    "(docs/tuning/fp4.md, What the compiler makes of it)"
)
#: The tables are tuned on Hopper, whose warp-group instructions read an operand from shared memory. Before it, the
#: tiles of 32 tokens and more hold that operand in registers too: of their loops' instructions this part may access
#: local memory. nf4 decodes by a table of 16 values in registers.
AMPERE_CROWDED_TOKENS = 32
AMPERE_SPILL_SHARE = {"nf4": 0.07}
AMPERE_SPILL_SHARE_OTHERS = 0.03
AMPERE_SPILL_BYTES = 320
AMPERE_SPILL_REASON = (
    "a tile tuned on sm_90; on sm_80 both operands are in registers and ptxas spills in its loop too, held to 7 % of "
    "the loop for nf4 and 3 % for others (docs/tuning/fp4.md, What the compiler makes of it)"
)
#: Loops that fill the registers on purpose: tokens or sums stay in them while the next weights arrive.
LOOP_SPILL_SHARE = 0.02
GLUON_SPILL_REASON = (
    "registers are filled on purpose; what spills lies in the epilogue or is an address, and loops are held to 2 % of "
    "their instructions (docs/tuning/fp4.md, What the compiler makes of it)"
)
#: What ptxas keeps of the decoder of mxfp4 into float32 on sm_80: 80 registers a thread, and two that it puts aside.
DECODER_SPILL = (8, "one address, put aside once, outside any loop; tuned on sm_90 (docs/tuning/fp4.md)")
_AT_LEAST_ONE = (1.0, math.inf)


def unshared_scales(ptx: str) -> int:
    """Pairs of registers in the decoders' ``shared`` comments that are two different ones."""
    comments = re.findall(r"// shared: (.*)", ptx)
    pairs = [pair.split() for comment in comments for pair in comment.split(",")]
    return sum(first != second for first, second in pairs)


def wgmma_from_memory(ptx: str) -> int:
    """Warp-group products whose left operand is a descriptor of shared memory, not registers (PTX ISA, wgmma)."""
    lefts = re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\S)", ptx)
    return sum(left != "{" for left in lefts)


def _ptx_figures(compiled: Any) -> dict[str, float]:
    """What decides about speed or exactness and is not in the machine code.

    Layout conversions in the loop (trips through shared memory), the widest asynchronous copy, kinds of division,
    pairs of elements that a decoder takes to share a scale though they do not, and warp-group products whose decoded
    weights come from shared memory.
    """
    ir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    loop = ir[ir.find("scf.for") : ir.rfind("scf.yield")]
    widths = [int(w, 16) for w in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)]
    return {
        "conversions_in_loop": loop.count("convert_layout"),
        "unshared_scales": unshared_scales(ptx),
        "weights_from_memory": wgmma_from_memory(ptx),
        "widest_copy_bytes": max(widths, default=0),
        "ieee_divisions": ptx.count("div.rn.f32"),
        "approximate_divisions": ptx.count("div.full.f32") + ptx.count("div.approx"),
    }


def float_group(fmt: str, plan: Plan) -> int:
    """Columns that share a float32 scale, or 0."""
    return 0 if fmt in BYTE_SCALES and not plan.wide else max(GROUPS[fmt], 0)


def scale_type(fmt: str, plan: Plan) -> str:
    """What the scales are read as: words of four bytes, or float32."""
    return "*i32" if fmt in BYTE_SCALES and not plan.wide else "*fp32"


def compile_stationary(plan: Plan, fmt: str, x: str, k: int, act: str = "none", bias: bool = False) -> Any:
    """The stationary kernel of a plan for k columns, compiled ahead of time for sm_90."""
    from vbench.kernels.triton.linear_stationary import stationary_kernel

    on, group = linear_stationary_host.mapping(k, plan.split), float_group(fmt, plan)
    constants: dict[str, Any] = {
        "FORMAT": fmt, "X": x, "ACT": act, "HAS_BIAS": bias, "BM": plan.bm, "W": on.warps, "PART": on.part,
        "PARTS": on.parts, "SPLIT": on.split, "GROUPS": PART_COLUMNS // group if group else 0,
        "DEPENDENT": plan.dependent,
    }  # fmt: skip
    types = {
        "x_ptr": POINTERS[x], "words_ptr": "*i32", "scale_ptr": scale_type(fmt, plan), "global_ptr": "*fp32",
        "bias_ptr": POINTERS[x], "y_ptr": POINTERS[x], "partial_ptr": "*fp32", "ticket_ptr": "*i32",
    }  # fmt: skip
    return compile_kernel(
        stationary_kernel,
        90,
        types=types,
        constants=constants,
        divisible=("N", "K", "stride_xm", "stride_ym"),
        gluon=True,
        num_warps=on.warps,
        launch_pdl=plan.dependent,
        maxnreg=65536 // (32 * linear_stationary_host.WARPS),
    )


def compile_fused(plan: Plan, fmt: str, x: str, arch: int, act: str = "none", bias: bool = False) -> Any:
    """The fused kernel of a plan, compiled ahead of time; all sizes divisible by 16."""
    constants: dict[str, Any] = {
        "FORMAT": fmt, "GROUP": float_group(fmt, plan), "X": x, "ACT": act, "HAS_BIAS": bias, "BN": plan.bn,
        "BM": plan.bm, "BKW": plan.bkw, "SPLIT": 1 if plan.walk else plan.split,
        "WALK": plan.split if plan.walk else 1, "EVEN_K": True, "NATIVE": x != "fp32",
        "INTERPRETED": False, "TWIDDLED": fmt in BYTE_SCALES and x == "bf16", "GROUP_M": 8,
        "BLOCK_SUMS": plan.block_sums, "SMALL_SCALES": False,
    }  # fmt: skip
    types = {
        "x_ptr": POINTERS[x], "codes_ptr": "*i16", "scale_ptr": scale_type(fmt, plan),
        "global_ptr": "*fp32", "table_ptr": "*fp32", "bias_ptr": POINTERS[x], "y_ptr": POINTERS[x],
        "partial_ptr": "*fp32",
        "ticket_ptr": "*i32",
    }  # fmt: skip
    divisible = ("N", "K", "stride_xm", "stride_ym")
    return compile_kernel(
        fused_linear_kernel,
        arch,
        types=types,
        constants=constants,
        divisible=divisible,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )


def compile_gluon(plan: Plan, fmt: str, x: str, act: str = "none", bias: bool = False) -> Any:
    """The Gluon kernel of a plan, compiled ahead of time for sm_90."""
    from triton.experimental.gluon import language as gl

    from vbench.kernels.triton.linear_gluon import gluon_linear_kernel
    from vbench.kernels.triton.linear_gluon_host import REGISTERS

    rows = plan.bn // 2
    constants: dict[str, Any] = {
        "FORMAT": fmt, "GROUP": float_group(fmt, plan), "X": x, "ACT": act, "HAS_BIAS": bias, "ROWS": rows,
        "BM": plan.bm, "STAGES": plan.stages, "GROUP_M": 8, "BLOCK_SUMS": plan.block_sums, "SPLIT": plan.split > 1,
        "SCALED": plan.scaled, "REGISTERS": REGISTERS,
    }  # fmt: skip
    tile = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    result = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    types = {
        "x_desc": f"tensordesc<{x}[{plan.bm}, 32],{tile!r}>",
        "codes_desc": f"tensordesc<i16[64, 32],{tile!r}>",
        "y_desc": f"tensordesc<{x}[{plan.bm}, {rows}],{result!r}>",
        "scale_ptr": scale_type(fmt, plan),
        "global_ptr": "*fp32",
        "bias_ptr": POINTERS[x],
        "partial_ptr": "*fp32",
        "ticket_ptr": "*i32",
    }
    return compile_kernel(gluon_linear_kernel, 90, types=types, constants=constants, gluon=True, num_warps=4)


def _fused_cubin(plan: Plan, fmt: str, x: str, arch: int) -> Cubin:
    compiled = compile_fused(plan, fmt, x, arch, "gelu", True)
    return cubin(compiled, **_ptx_figures(compiled))


def _gluon_cubin(plan: Plan, fmt: str, x: str) -> Cubin:
    compiled = compile_gluon(plan, fmt, x, "gelu", True)
    return cubin(compiled, **_ptx_figures(compiled))


def _stationary_cubin(plan: Plan, fmt: str, x: str, k: int) -> Cubin:
    compiled = compile_stationary(plan, fmt, x, k, "gelu", True)
    figures = _ptx_figures(compiled)
    # Conversions that the kernel asserts, when it is compiled, to rename registers only.
    del figures["conversions_in_loop"]
    return cubin(compiled, **figures)


def _codec_cubin(kernel: Any, arch: int, types: Mapping[str, str], constants: Mapping[str, Any], warps: int) -> Cubin:
    compiled = compile_kernel(kernel, arch, types=types, constants=constants, num_warps=warps)
    return cubin(compiled, **_ptx_figures(compiled))


def _tile(plan: Plan) -> dict[str, int | str]:
    names = ("bn", "bm", "bkw", "warps", "stages", "split")
    flags = {name: int(getattr(plan, name)) for name in ("walk", "scaled", "block_sums")}
    return {**{name: getattr(plan, name) for name in names}, **flags}


def fused(plan: Plan, fmt: str, x: str, arch: int, effort: Effort = "standard") -> Configuration:
    """The fused kernel: 16-byte copies, no layout conversion and no spill in its loops; warp-group instructions on
    Hopper where a tile has 16 tokens and whole warp groups."""
    unit: Unit = "ffma" if x == "fp32" else "hgmma" if arch == 90 and plan.bm >= 16 and plan.warps % 4 == 0 else "hmma"
    bounds = {f"loop.{unit.upper()}": _AT_LEAST_ONE, "conversions_in_loop": (0.0, 0.0)}
    bounds |= {"unshared_scales": (0.0, 0.0), "weights_from_memory": (0.0, 0.0)}
    large = x != "fp32" and plan.bm >= 128
    crowded = x != "fp32" and plan.bm >= AMPERE_CROWDED_TOKENS and arch < 90
    share = AMPERE_SPILL_SHARE.get(fmt, AMPERE_SPILL_SHARE_OTHERS)
    bounds |= {"loop_spill_share": (0.0, share)} if crowded else {"loop_spills": (0.0, 0.0)}
    allowed = AMPERE_SPILL_BYTES if crowded else EPILOGUE_SPILL_BYTES if large else 0
    if x != "fp32":
        bounds["widest_copy_bytes"] = (16.0, 16.0)
    return Configuration(
        op="fp4_linear",
        kernel="fused_linear_kernel",
        arch=arch,
        unit=unit,
        parameters={"fmt": fmt, "x": x, **_tile(plan)},
        compile=partial(_fused_cubin, plan, fmt, x, arch),
        bounds=bounds,
        spill_bytes_allowed=allowed,
        spill_reason=AMPERE_SPILL_REASON if crowded else EPILOGUE_SPILL_REASON if allowed else "",
        effort=effort,
    )


def gluon(plan: Plan, fmt: str, x: str, effort: Effort = "standard") -> Configuration:
    """The Gluon kernel: loads by the copy engine, registers moved from the producer to the consumers."""
    return Configuration(
        op="fp4_linear",
        kernel="gluon_linear_kernel",
        arch=90,
        unit="hgmma",
        parameters={"fmt": fmt, "x": x, **_tile(plan)},
        compile=partial(_gluon_cubin, plan, fmt, x),
        instructions=("UTMALDG", "USETMAXREG"),
        bounds={
            "loop.HGMMA": _AT_LEAST_ONE,
            "loop_spill_share": (0.0, LOOP_SPILL_SHARE),
            "conversions_in_loop": (0.0, 0.0),
            "unshared_scales": (0.0, 0.0),
            "weights_from_memory": (0.0, 0.0),
        },
        spill_bytes_allowed=EPILOGUE_SPILL_BYTES,
        spill_reason=GLUON_SPILL_REASON,
        effort=effort,
    )


def stationary(plan: Plan, fmt: str, x: str, k: int, effort: Effort = "standard") -> Configuration:
    """The stationary kernel: 16-byte loads straight into fragments."""
    return Configuration(
        op="fp4_linear",
        kernel="stationary_kernel",
        arch=90,
        unit="hmma",
        parameters={"fmt": fmt, "x": x, "k": k, **_tile(plan), "dependent": int(plan.dependent)},
        compile=partial(_stationary_cubin, plan, fmt, x, k),
        bounds={
            "loop.HMMA": _AT_LEAST_ONE,
            "loop.LDG.E.128": (4.0, math.inf),
            "loop_spill_share": (0.0, LOOP_SPILL_SHARE),
            "unshared_scales": (0.0, 0.0),
        },
        spill_bytes_allowed=EPILOGUE_SPILL_BYTES,
        spill_reason=GLUON_SPILL_REASON,
        effort=effort,
    )


def _linears() -> Iterator[Configuration]:
    sample = {("absmax7_row", 8, "bf16", 90), ("nvfp4", 16, "bf16", 90), ("absmax7_g128", 64, "bf16", 90)}
    sample |= {("nvfp4", 16, "fp16", 80)}
    for arch, x, (fmt, table) in product((80, 90), ("bf16", "fp16"), linear.TABLES.items()):
        for limit, plan in table:
            # Up to SPLIT_MAX_M tokens K is split by the layer's size; the code of every split count is alike.
            few = limit <= linear.SPLIT_MAX_M
            effort: Effort = "quick" if (fmt, limit, x, arch) in sample else "standard"
            yield fused(replace(plan, split=4 if few else 1, walk=False), fmt, x, arch, effort)
            if plan.walk:
                yield fused(replace(plan, split=2), fmt, x, arch, effort)
    for arch, (limit, plan), fmt in product((80, 90), linear.TABLE_FP32, linear.TABLES):
        quick = (arch, limit, fmt) == (90, linear.TABLE_FP32[-1][0], "absmax7_row")
        yield fused(plan, fmt, "fp32", arch, "quick" if quick else "standard")
    for fmt, plan in hopper_plans():
        quick = fmt == "nvfp4" and plan.split == 2 and plan.bm in (8, 64)
        effort = "quick" if quick else "standard"
        if plan.path == "stationary":
            yield stationary(plan, fmt, "bf16", 4096, effort)
        else:
            yield gluon(plan, fmt, "bf16", effort)
    for _, plan in linear.TABLE_WIDE:
        for x in ("bf16", "fp16"):
            yield fused(plan, "mxfp4", x, 90)


def hopper_plans() -> list[tuple[str, Plan]]:
    """Every plan of a Gluon kernel that the tables take at three layers' shapes and 1 to 1024 tokens, by format."""
    found: dict[tuple[str, Plan], None] = {}
    shapes = ((14336, 4096), (4096, 14336), (4096, 4096))
    for fmt, (n, k), m in product(GROUPS, shapes, (1, 16, 32, 64, 256, 1024)):
        plan = linear.choose_plan(m, n, k, fmt, "bf16", "gelu", "cuda", hopper=True)
        if plan.path in ("gluon", "stationary"):
            # The code of every split count is alike, but for whether there is one.
            found[fmt, replace(plan, split=min(plan.split, 2))] = None
    return list(found)


def _codec(
    op: str,
    kernel: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, int | str | bool],
    warps: int,
    effort: Effort,
    divides: bool,
    spills: tuple[int, str] = (0, ""),
) -> Configuration:
    """A codec kernel. ``divides``: by IEEE division, never an approximation of it."""
    pointer = types.get("w_ptr", types.get("y_ptr", "*fp32"))
    shown = {name.lower(): int(v) if isinstance(v, bool | int) else v for name, v in constants.items()}
    return Configuration(
        op=op,
        kernel=kernel.fn.__name__,
        arch=arch,
        unit="none",
        parameters={"dtype": pointer.removeprefix("*"), **shown, "warps": warps},
        compile=partial(_codec_cubin, kernel, arch, types, constants, warps),
        bounds={"ieee_divisions": _AT_LEAST_ONE if divides else (0.0, 0.0), "approximate_divisions": (0.0, 0.0)},
        spill_bytes_allowed=spills[0],
        spill_reason=spills[1],
        effort=effort,
    )


def _codecs() -> Iterator[Configuration]:
    outputs = {"codes_ptr": "*u8", "scale_ptr": "*fp32", "global_ptr": "*fp32", "partial_ptr": "*fp32"}
    for arch, dtype in product((80, 90), POINTERS):
        w = {"w_ptr": POINTERS[dtype]}
        effort: Effort = "quick" if (arch, dtype) == (90, "bf16") else "standard"
        absmax = w | {"partial_ptr": "*fp32"}
        quantize = "fp4_quantize"
        yield _codec(quantize, codec.absmax_partials_kernel, arch, absmax, {"BLOCK": 4096}, 8, effort, False)
        # One scale a tensor, a row, a group: the launch's own blocks.
        for group, block, rows in ((0, 256, 16), (-1, 1024, 1), (128, 128, 32)):
            constants = {"GROUP": group, "BLOCK_K": block, "ROWS": rows, "COUNT": codec.MAX_PARTIALS}
            kind = effort if group == -1 else "standard"
            yield _codec(quantize, codec.encode_int_kernel, arch, w | outputs, constants, 4, kind, True)
        for fmt in ("nvfp4", "mxfp4", "nf4"):
            types = w | outputs | ({"scale_ptr": "*u8"} if fmt in BYTE_SCALES else {})
            blocks: dict[str, int | str | bool] = {
                "FORMAT": fmt,
                "GROUP": GROUPS[fmt],
                "ROUNDING": 0,
                "BLOCKS": 4096 // GROUPS[fmt],
                "COUNT": codec.MAX_PARTIALS,
            }
            kind = effort if fmt == "nvfp4" else "standard"
            yield _codec(quantize, codec.encode_blocks_kernel, arch, types, blocks, 4, kind, True)
        types = {"codes_ptr": "*u8", "global_ptr": "*fp32", "table_ptr": "*fp32", "y_ptr": POINTERS[dtype]}
        for fmt, group in GROUPS.items():
            rows, pairs, warps = (2048 // group, group // 2, 4) if group > 0 else (2, 512, 8)
            decode: dict[str, int | str | bool] = {
                "ONE_SCALE": group == 0,
                "FORMAT": fmt,
                "Y": dtype,
                "INTERPRETED": False,
            }
            scale = {"scale_ptr": "*u8" if fmt in BYTE_SCALES else "*fp32"}
            decode |= {"ROWS": rows, "PAIRS": pairs}
            kind = effort if fmt == "nvfp4" else "standard"
            spills = DECODER_SPILL if (arch, dtype, fmt) == (80, "fp32", "mxfp4") else (0, "")
            yield _codec("fp4_dequantize", codec.decode_kernel, arch, types | scale, decode, warps, kind, False, spills)


def configurations() -> Iterator[Configuration]:
    """Every entry of the dispatch tables with gelu and bias, and the encoders and decoders."""
    yield from _linears()
    yield from _codecs()
