"""Compile the attention backward kernels ahead of time; see attention_aot.py, whose reading of cubins this shares.

python -m vbench.kernels.triton.attention_backward_aot [bf16|fp16|fp32 ...]    # one line a configuration
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vbench.kernels.triton.attention_aot import SHARED_BYTES, TENSOR_CORE, Report, read
from vbench.kernels.triton.attention_backward_tiles import table
from vbench.kernels.triton.attention_tiles import Tile, padded_head_dim

#: Pointers to float32 whatever the dtype.
FP32_POINTERS = ("lse_ptr", "dlse_ptr", "exponent_ptr", "delta_ptr")
#: Two accumulators, scores and weights of 64 x 64 take 240 of a thread's 255 registers at head dim 128, and ptxas then
#: keeps a few addresses in local memory between the loops. Inside a loop there may be none.
STACK_OUTSIDE_LOOPS_BYTES = 32
#: Innermost strides, 1 in contiguous tensors, which Triton then makes constants.
INNERMOST = ("_qd", "_kd", "_vd", "_gd", "_od", "_md", "_wd", "_ls", "_es")


@dataclass(frozen=True, slots=True)
class BackwardConfiguration:
    """One compilation of one of the two large kernels on an architecture (``arch`` 80 or 90)."""

    kernel: Literal["queries", "keys"]
    dtype: str
    d: int
    tile: Tile
    causal: bool
    descriptors: bool
    arch: int


def configurations() -> Iterator[BackwardConfiguration]:
    """Every tile of the tables on every architecture that reaches it."""
    for arch in (80, 90):
        for dtype in ("bf16", "fp16", "fp32"):
            for descriptors in (False, True):
                if descriptors and (arch == 80 or dtype == "fp32"):
                    continue
                for d, tiles in table(dtype, descriptors=descriptors, shared_227kb=arch == 90).items():
                    yield BackwardConfiguration("queries", dtype, d, tiles.queries, True, descriptors, arch)
                    yield BackwardConfiguration("keys", dtype, d, tiles.keys, True, descriptors, arch)


def compile_configuration(config: BackwardConfiguration) -> Any:
    """Triton's compiled kernel. Needs no GPU, but a process without TRITON_INTERPRET=1."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vbench.kernels.triton.attention_backward_kernels import gradient_of_keys, gradient_of_queries

    function = gradient_of_queries if config.kernel == "queries" else gradient_of_keys
    tile, width = config.tile, padded_head_dim(config.d)
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
    constants |= {name: 1 for name in function.arg_names if name.startswith("stride") and name.endswith(INNERMOST)}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_source") and config.descriptors:
            rows = tile.block_m if name in ("q_source", "dout_source") else tile.block_n
            signature[name] = f"tensordesc<{config.dtype}[1, 1, {rows}, {width}]>"
        elif name.endswith(("_ptr", "_source")):
            signature[name] = "*fp32" if name in FP32_POINTERS else f"*{config.dtype}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif name in ("exponent_scale", "scale"):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if name.startswith("stride"):
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return compile(source, target=GPUTarget("cuda", config.arch, 32), options=options)


def may_spill(config: BackwardConfiguration) -> bool:
    """fp32 at head dim 256: an FMA product keeps whole rows of 256 of both operands, more than there are registers."""
    return config.dtype == "fp32" and config.d == 256 and config.kernel == "keys"


def inspect(config: BackwardConfiguration) -> Report:
    """Compile one configuration and read its cubin."""
    return read(compile_configuration(config))


def faults(config: BackwardConfiguration, report: Report) -> list[str]:
    """What a configuration in the table must not do; empty when it is sound."""
    found = []
    if report.shared_bytes > SHARED_BYTES[config.arch]:
        found.append(f"{report.shared_bytes} B of shared memory, {SHARED_BYTES[config.arch]} exist")
    # A warp group's product has 64 rows: query rows of dQ, keys of dK and dV.
    owned = config.tile.block_m if config.kernel == "queries" else config.tile.block_n
    unit = "FFMA" if config.dtype == "fp32" else "HGMMA" if config.arch == 90 and owned >= 64 else "HMMA"
    if not report.loop[unit]:
        found.append(f"no {unit} in any loop")
    if config.dtype == "fp32" and any(report.total[name] for name in TENSOR_CORE):
        found.append("fp32 reached the tensor core: operands were rounded to tf32")
    if config.descriptors and not report.loop["UTMALDG"]:
        found.append("no UTMALDG in any loop")
    spills = report.loop["LDL"] + report.loop["STL"]
    if (spills or report.stack_bytes > STACK_OUTSIDE_LOOPS_BYTES) and not may_spill(config):
        found.append(f"{report.stack_bytes} B of stack, {spills} local accesses in the inner loops: registers spill")
    return found


def main() -> int:
    """Print every configuration (or those of the dtypes named); exit status 1 if one is faulty."""
    status = 0
    wanted = sys.argv[1:]
    for config in configurations():
        if wanted and config.dtype not in wanted:
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
