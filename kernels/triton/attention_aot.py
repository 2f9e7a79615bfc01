"""Compile the attention kernels ahead of time and read what a GPU would get. Needs no GPU, but a process without
TRITON_INTERPRET=1 (there ``@triton.jit`` makes no compilable function).

    python -m vbench.kernels.triton.attention_aot [bf16|fp16|fp32|gluon ...]    # one line a configuration

Read from the cubin with the ``cuobjdump`` that ships in Triton's wheel: registers at entry, stack (spills), and how
many of each instruction, in all and inside the loops that multiply matrices.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vbench.kernels.triton.attention_tiles import GluonTile, Tile, gluon_tiles, padded_head_dim, plain_tiles

#: Shared memory a program may have, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_BYTES = {80: 166912, 90: 232448}
TENSOR_CORE = ("HGMMA", "HMMA")
#: Local-memory accesses a Gluon loop may hold, as a share of its instructions. Accumulator, scores and weights of a
#: consumer take 224 of 240 registers (144 of 160), and ptxas keeps some addresses of the tile in local memory. Plain
#: kernels may hold none.
GLUON_SPILL_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Configuration:
    """One compilation: a dtype, head dim and tile on an architecture (``arch`` 80 or 90)."""

    dtype: str
    d: int
    tile: Tile | GluonTile
    causal: bool
    descriptors: bool
    arch: int


@dataclass(frozen=True, slots=True)
class Report:
    """What came out. ``loop`` counts the instructions of the innermost loops that hold matrix or FMA work."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    total: Counter[str]
    loop: Counter[str]


def configurations() -> Iterator[Configuration]:
    """Every tile of the tables on every architecture that reaches it."""
    for arch in (80, 90):
        for dtype in ("bf16", "fp16", "fp32"):
            for descriptors in (False, True):
                if descriptors and (arch == 80 or dtype == "fp32"):
                    continue
                for d, tiles in plain_tiles(dtype, descriptors=descriptors, shared_227kb=arch == 90).items():
                    for tile in tiles:
                        yield Configuration(dtype, d, tile, True, descriptors, arch)
    for dtype in ("bf16", "fp16"):
        for d in (64, 128):
            for causal in (False, True):
                for gluon_tile in gluon_tiles(d, causal=causal):
                    yield Configuration(dtype, d, gluon_tile, causal, True, 90)


def _compile_plain(config: Configuration, tile: Tile) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vbench.kernels.triton.attention_forward import attention_forward

    width = padded_head_dim(config.d)
    constants: dict[str, Any] = {
        "D": config.d,
        "BLOCK_D": width,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CAUSAL": config.causal,
        "DESCRIPTORS": config.descriptors,
        "EMULATE": False,
        "PRECISION": "ieee" if config.dtype == "fp32" else "tf32",
    }
    # Innermost strides are 1 in contiguous tensors, and Triton then makes them constants.
    constants |= dict.fromkeys(("stride_qd", "stride_kd", "stride_vd", "stride_od", "stride_ls"), 1)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(attention_forward.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_source") and config.descriptors:
            signature[name] = f"tensordesc<{config.dtype}[1, 1, {tile.block_n}, {width}]>"
        elif name.endswith(("_ptr", "_source")):
            signature[name] = "*fp32" if name == "lse_ptr" else f"*{config.dtype}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name == "exponent_scale":
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=attention_forward, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compile(source, target=GPUTarget("cuda", config.arch, 32), options=options)


def _compile_gluon(config: Configuration, tile: GluonTile) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from vbench.kernels.triton.attention_gluon import attention_forward_hopper

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    constants: dict[str, Any] = {
        "D": config.d,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.stages,
        "WORKERS": tile.workers,
        "WORKER_REGISTERS": tile.registers,
        "ROUND_EARLY": tile.round_early,
        "CAUSAL": config.causal,
    }
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(attention_forward_hopper.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_desc"):
            rows = tile.block_n if name in ("k_desc", "v_desc") else 64
            signature[name] = f"tensordesc<{config.dtype}[1, 1, {rows}, {config.d}],{layout!r}>"
        elif name == "lse_ptr":
            signature[name] = "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "exponent_scale" else "i32"
    source = GluonASTSource(fn=attention_forward_hopper, signature=signature, constexprs=constants, attrs=attributes)
    return compile(source, target=GPUTarget("cuda", config.arch, 32), options={"num_warps": 4})


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS. ``predicated``: it starts with @P or @!P."""

    address: int
    predicated: bool
    opcode: str
    operands: str


def instructions(sass: str) -> list[Instruction]:
    """The instructions of a ``cuobjdump -sass`` listing."""
    pattern = r"^\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?(\S+)(.*?);"
    return [Instruction(int(m[1], 16), bool(m[2]), m[3], m[4]) for m in re.finditer(pattern, sass, re.MULTILINE)]


def inner_loops(listing: list[Instruction]) -> list[list[str]]:
    """Opcodes of the body of every loop that holds tensor-core or FMA work and no other such loop.

    A loop ends in a backward branch. So does the way back from the spin loops of barriers, which ptxas puts behind the
    kernel (test, branch back to the test, branch back into the kernel): an unpredicated branch right after a predicated
    one is that, and no loop.
    """
    spans = []
    for before, last in pairwise(listing):
        target = re.search(r"0x([0-9a-f]+)", last.operands)
        returns = not last.predicated and before.predicated and before.opcode.startswith("BRA")
        if last.opcode.startswith("BRA") and not returns and target and int(target[1], 16) < last.address:
            begin, address = int(target[1], 16), last.address
            body = [line.opcode for line in listing if begin <= line.address <= address]
            if any(code.startswith(TENSOR_CORE) for code in body) or sum(code.startswith("FFMA") for code in body) > 64:
                spans.append((begin, address, body))
    return [
        body
        for begin, end, body in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e, _ in spans)
    ]


def _count(opcodes: list[str]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for opcode in opcodes:
        parts = opcode.split(".")
        counted[".".join(parts[:2]) if parts[0] in ("MUFU", "WARPGROUP") else parts[0]] += 1
    return counted


def inspect(config: Configuration) -> Report:
    """Compile one configuration and read its cubin."""
    tile = config.tile
    return read(_compile_gluon(config, tile) if isinstance(tile, GluonTile) else _compile_plain(config, tile))


def read(compiled: Any) -> Report:
    """What is in the cubin of a compiled kernel."""
    import triton

    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    listing = instructions(sass)
    loops = inner_loops(listing)
    return Report(
        registers=int(match[1]),
        stack_bytes=int(match[2]),
        shared_bytes=compiled.metadata.shared,
        total=_count([line.opcode for line in listing]),
        loop=_count([opcode for body in loops for opcode in body]),
    )


def faults(config: Configuration, report: Report) -> list[str]:
    """What a configuration in the table must not do; empty when it is sound."""
    found = []
    if report.shared_bytes > SHARED_BYTES[config.arch]:
        found.append(f"{report.shared_bytes} B of shared memory, {SHARED_BYTES[config.arch]} exist")
    unit = "FFMA" if config.dtype == "fp32" else "HMMA"
    hopper_unit = config.arch == 90 and config.dtype != "fp32"
    if hopper_unit and (isinstance(config.tile, GluonTile) or config.tile.block_m >= 64):
        unit = "HGMMA"
    if not report.loop[unit]:
        found.append(f"no {unit} in any loop")
    if config.dtype == "fp32" and any(report.total[name] for name in TENSOR_CORE):
        found.append("fp32 reached the tensor core: operands were rounded to tf32")
    if config.descriptors and not report.loop["UTMALDG"] and not isinstance(config.tile, GluonTile):
        found.append("no UTMALDG in any loop")
    if isinstance(config.tile, GluonTile):
        spills = report.loop["LDL"] + report.loop["STL"]
        if spills > GLUON_SPILL_SHARE * report.loop.total():
            found.append(f"{spills} of {report.loop.total()} instructions in the inner loops are spills")
        if report.total["USETMAXREG"] == 0:
            found.append("registers are not moved from the producer to the consumers")
    elif report.stack_bytes:
        found.append(f"{report.stack_bytes} B of stack: registers spill")
    return found


def main() -> int:
    """Print every configuration (or those of the dtypes named); exit status 1 if one is faulty."""
    status = 0
    wanted = sys.argv[1:]
    for config in configurations():
        kind = "gluon" if isinstance(config.tile, GluonTile) else config.dtype
        if wanted and kind not in wanted:
            continue
        report = inspect(config)
        found = faults(config, report)
        status = 1 if found else status
        loop = {name: report.loop[name] for name in ("HGMMA", "HMMA", "WARPGROUP.DEPBAR", "FFMA") if report.loop[name]}
        used = f"registers {report.registers} stack {report.stack_bytes} shared {report.shared_bytes}"
        print(config, used, loop, "; ".join(found) or "ok", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
