"""Ahead-of-time compilation of the FP4 kernels with no GPU: what each table entry compiles to, read from its cubin.

    python -m vbench.kernels.triton.linear_aot [all]

prints JSON, one object an entry: unit, registers, stack, spills inside loops, shared memory, load widths. Needs a
process without TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import triton

from vbench.kernels.triton import codec, linear, linear_stationary_host
from vbench.kernels.triton.linear import Plan
from vbench.kernels.triton.linear_fused import fused_linear_kernel
from vbench.kernels.triton.packing import BYTE_SCALES, GROUPS

TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def float_group(fmt: str, plan: Plan) -> int:
    """Columns that share a float32 scale, or 0."""
    return 0 if fmt in BYTE_SCALES and not plan.wide else max(GROUPS[fmt], 0)


def scale_type(fmt: str, plan: Plan) -> str:
    return "*i32" if fmt in BYTE_SCALES and not plan.wide else "*fp32"


def compile_stationary(plan: Plan, fmt: str, x: str, act: str = "none", bias: bool = False, k: int = 4096) -> Any:
    """The stationary kernel of a plan, compiled ahead of time for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as compile_source
    from triton.experimental.gluon._runtime import GluonASTSource

    from vbench.kernels.triton.linear_stationary import stationary_kernel

    on = linear_stationary_host.mapping(k, plan.split)
    constants: dict[str, Any] = {
        "FORMAT": fmt, "X": x, "ACT": act, "HAS_BIAS": bias, "BM": plan.bm, "W": on.warps, "PART": on.part,
        "PARTS": on.parts, "SPLIT": on.split, "GROUPS": 256 // float_group(fmt, plan) if float_group(fmt, plan) else 0,
        "DEPENDENT": plan.dependent,
    }  # fmt: skip
    types = {
        "x_ptr": TYPES[x], "words_ptr": "*i32", "scale_ptr": scale_type(fmt, plan), "global_ptr": "*fp32",
        "bias_ptr": TYPES[x], "y_ptr": TYPES[x], "partial_ptr": "*fp32", "ticket_ptr": "*i32",
    }  # fmt: skip
    names = stationary_kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = (*types, "N", "K", "stride_xm", "stride_ym")
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    source = GluonASTSource(fn=stationary_kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": on.warps, "launch_pdl": plan.dependent}
    return compile_source(source, target=GPUTarget("cuda", 90, 32), options=options)


def compile_fused(plan: Plan, fmt: str, x: str, capability: int, act: str = "none", bias: bool = False) -> Any:
    """The fused kernel of a plan, compiled ahead of time for a capability; all sizes divisible by 16."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    constants: dict[str, Any] = {
        "FORMAT": fmt, "GROUP": float_group(fmt, plan), "X": x, "ACT": act, "HAS_BIAS": bias, "BN": plan.bn,
        "BM": plan.bm, "BKW": plan.bkw,
        "SPLIT": plan.split, "EVEN_K": True, "NATIVE": x != "fp32", "INTERPRETED": False,
        "TWIDDLED": fmt in BYTE_SCALES and x == "bf16", "GROUP_M": 8, "BLOCK_SUMS": plan.block_sums,
        "SMALL_SCALES": False,
    }  # fmt: skip
    pointers = {
        "x_ptr": TYPES[x], "codes_ptr": "*i16", "scale_ptr": scale_type(fmt, plan),
        "global_ptr": "*fp32", "table_ptr": "*fp32", "bias_ptr": TYPES[x], "y_ptr": TYPES[x], "partial_ptr": "*fp32",
        "ticket_ptr": "*i32",
    }  # fmt: skip
    sizes = ("M", "N", "K", "stride_xm", "stride_ym", "k_blocks", "blocks_per_split")
    signature = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    unspecialised = ("M", "k_blocks", "blocks_per_split")
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate((*pointers, *sizes)) if name not in unspecialised
    }
    source = ASTSource(fn=fused_linear_kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    return compile_source(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_gluon(plan: Plan, fmt: str, x: str, act: str = "none", bias: bool = False) -> Any:
    """The Gluon kernel of a plan, compiled ahead of time for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile as compile_source
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from vbench.kernels.triton.linear_gluon import gluon_linear_kernel
    from vbench.kernels.triton.linear_gluon_host import REGISTERS

    rows = plan.bn // 2
    constants: dict[str, Any] = {
        "FORMAT": fmt, "GROUP": float_group(fmt, plan), "X": x, "ACT": act, "HAS_BIAS": bias, "ROWS": rows,
        "BM": plan.bm, "STAGES": plan.stages, "GROUP_M": 8, "BLOCK_SUMS": plan.block_sums, "SPLIT": plan.split > 1,
        "REGISTERS": REGISTERS,
    }  # fmt: skip
    tile = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    result = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    types = {
        "x_desc": f"tensordesc<{x}[{plan.bm}, 32],{tile!r}>",
        "codes_desc": f"tensordesc<i16[64, 32],{tile!r}>",
        "y_desc": f"tensordesc<{x}[{plan.bm}, {rows}],{result!r}>",
        "scale_ptr": scale_type(fmt, plan),
        "global_ptr": "*fp32",
        "bias_ptr": TYPES[x],
        "partial_ptr": "*fp32",
        "ticket_ptr": "*i32",
    }
    names = gluon_linear_kernel.arg_names
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith("_ptr")}
    source = GluonASTSource(fn=gluon_linear_kernel, signature=signature, constexprs=constants, attrs=attributes)
    return compile_source(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def compile_codec(kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int) -> Any:
    """A codec kernel, compiled ahead of time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_source

    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    return compile_source(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def spills_in_loop(sass: str) -> int:
    """Local-memory accesses inside the innermost loops that hold matrix or FMA work.

    A loop ends in a predicated backward branch; the unpredicated ones lead back from the spin loops of barriers.
    """
    line = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);", re.MULTILINE)
    code = [(int(m[1], 16), bool(m[2]), m[3].partition(".")[0], m[4]) for m in line.finditer(sass)]
    work = [address for address, _, name, _ in code if name in ("HGMMA", "HMMA", "FFMA")]
    spans = []
    for address, predicated, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name == "BRA" and predicated and target and int(target[1], 16) < address:
            begin = int(target[1], 16)
            if any(begin <= w <= address for w in work):
                spans.append((begin, address))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return sum(name in ("LDL", "STL") and any(b <= a <= e for b, e in inner) for a, _, name, _ in code)


def read_code(compiled: Any) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction counts of a compiled kernel, from its cubin and IR."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([tool, "-res-usage", f.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([tool, "-sass", f.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    assert found is not None, usage.stdout + usage.stderr
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.MULTILINE)
    count = Counter(op.partition(".")[0] for op in operations)
    ir, ptx = compiled.asm["ttgir"], compiled.asm["ptx"]
    loop = ir[ir.find("scf.for") : ir.rfind("scf.yield")]
    widths = [int(w, 16) for w in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, 0x([0-9a-f]+)", ptx)]
    return {
        "registers": int(found.group(1)),
        "stack": int(found.group(2)),
        "spills_in_loop": spills_in_loop(sass),
        "shared": int(compiled.metadata.shared),
        "instructions": len(operations),
        "conversions_in_loop": loop.count("convert_layout"),
        "widest_copy_bytes": max(widths, default=0),
        "unit": next((u for u in ("HGMMA", "HMMA", "FFMA") if count[u]), "none"),
        "counts": dict(count.most_common(14)),
        "ieee_divisions": ptx.count("div.rn.f32"),
        "approximate_divisions": ptx.count("div.full.f32") + ptx.count("div.approx"),
    }


def _linear_report(plan: Plan, fmt: str, x: str, capability: int, unit: str) -> dict[str, Any]:
    if plan.path == "gluon":
        compiled = compile_gluon(plan, fmt, x, "gelu", True)
    elif plan.path == "stationary":
        compiled = compile_stationary(plan, fmt, x, "gelu", True)
    else:
        compiled = compile_fused(plan, fmt, x, capability, "gelu", True)
    head = {"kernel": plan.path, "capability": capability, "fmt": fmt, "x": x, "declared_unit": unit}
    return head | asdict(plan) | read_code(compiled)


def hopper_plans(everything: bool) -> list[tuple[str, Plan]]:
    """Every plan that the tables take on Hopper at layers of three shapes and 1 to 4096 tokens, by format."""
    shapes = ((14336, 4096), (4096, 14336), (4096, 4096))
    tokens = (1, 16, 32, 64, 256, 1024, 4096) if everything else (16, 64)
    found: dict[tuple[str, Plan], None] = {}
    for fmt in GROUPS if everything else ("absmax7_g128", "nvfp4"):
        for n, k in shapes if everything else shapes[:1]:
            for m in tokens:
                plan = linear.choose_plan(m, n, k, fmt, "bf16", "gelu", "cuda", hopper=True)
                found[fmt, plan] = None
    return list(found)


def compiled_table(everything: bool) -> list[dict[str, Any]]:
    """What the dispatch tables' entries and the encoders compile to. ``everything``: else a sample of each kind."""
    reports: list[dict[str, Any]] = []
    for fmt, table in linear.TABLES.items():
        for limit, plan in table:
            sampled = (fmt, limit) in (("absmax7_row", 8), ("nvfp4", 16), ("absmax7_g128", 64))
            if everything or sampled:
                split = 4 if limit <= linear.SPLIT_MAX_M else 1
                unit = "HMMA" if plan.bm < 16 or plan.warps % 4 else "HGMMA"
                reports.append(_linear_report(replace(plan, split=split), fmt, "bf16", 90, unit))
    reports.append(_linear_report(linear.TABLES["nvfp4"][1][1], "nvfp4", "fp16", 80, "HMMA"))
    for _, plan in linear.TABLE_FP32 if everything else linear.TABLE_FP32[-1:]:
        reports.append(_linear_report(plan, "absmax7_row", "fp32", 90, "FFMA"))
    reports += [
        _linear_report(plan, fmt, "bf16", 90, "HMMA" if plan.path == "stationary" else "HGMMA")
        for fmt, plan in hopper_plans(everything)
    ]
    int_signature = {
        "w_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*fp32", "global_ptr": "*fp32", "partial_ptr": "*fp32",
        "count": "i32", "n": "i32", "k": "i32",
    }  # fmt: skip
    encoders = ((0, 256, 16), (-1, 1024, 1), (128, 128, 32))
    for group, block, rows in encoders if everything else encoders[1:2]:
        constants = {"GROUP": group, "BLOCK_K": block, "ROWS": rows, "COUNT": 1024}
        compiled = compile_codec(codec.encode_int_kernel, int_signature, constants, 90)
        reports.append({"kernel": "encode", "capability": 90, **constants} | read_code(compiled))
    for fmt in ("nvfp4", "mxfp4", "nf4") if everything else ("nvfp4",):
        block_signature = {
            "w_ptr": "*bf16", "codes_ptr": "*u8", "scale_ptr": "*u8" if fmt in BYTE_SCALES else "*fp32",
            "global_ptr": "*fp32", "partial_ptr": "*fp32", "count": "i32", "blocks": "i32",
        }  # fmt: skip
        group = GROUPS[fmt]
        block_constants = {"FORMAT": fmt, "GROUP": group, "ROUNDING": 0, "BLOCKS": 4096 // group, "COUNT": 1024}
        compiled = compile_codec(codec.encode_blocks_kernel, block_signature, block_constants, 90)
        reports.append({"kernel": "encode", "capability": 90, **block_constants} | read_code(compiled))
    return reports


if __name__ == "__main__":
    print(json.dumps(compiled_table("all" in sys.argv[1:])))
