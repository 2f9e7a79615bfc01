"""What the kernels between the products of a block, and the raw fetch, compile to, for the ahead-of-time gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from vbench.backend import Configuration, Cubin, Effort
from vbench.kernels.triton import block, fetch
from vbench.kernels.triton.aot import POINTERS, compile_kernel, cubin
from vbench.kernels.triton.block_kernels import add_kernel, add_norm_kernel, gate_kernel, rotate_kernel

#: Widths of the norms: GPT-2 small (768, rounded up) and the LLaMA models; and head dims of the rotary embedding.
NORM_BLOCKS = (1024, 4096)
HALVES = (32, 64)


def _compile(kernel: Any, arch: int, types: Mapping[str, str], constants: Mapping[str, Any], warps: int) -> Cubin:
    # Sizes of models are multiples of 16, and so are their products.
    sizes = [name for name in ("width", "count", "half") if name in kernel.arg_names]
    compiled = compile_kernel(kernel, arch, types=types, constants=constants, divisible=sizes, num_warps=warps)
    return cubin(compiled)


def _configuration(
    op: str,
    kernel: Any,
    arch: int,
    types: Mapping[str, str],
    constants: Mapping[str, int | str | bool],
    warps: int,
    effort: Effort,
) -> Configuration:
    shown = {name.lower(): int(v) if isinstance(v, bool) else v for name, v in constants.items()}
    return Configuration(
        op=op,
        kernel=kernel.fn.__name__,
        arch=arch,
        unit="none",
        parameters={**shown, "warps": warps},
        compile=partial(_compile, kernel, arch, types, constants, warps),
        effort=effort,
    )


def _glue(arch: int, x: str) -> Iterator[Configuration]:
    effort: Effort = "quick" if (arch, x) == (90, "bf16") else "standard"
    common: dict[str, int | str | bool] = {"X": x, "NATIVE": True}

    def pointers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, POINTERS[x])

    def make(
        kernel: Any, types: Mapping[str, str], constants: Mapping[str, int | str | bool], warps: int
    ) -> Configuration:
        # Quick: one of each kernel, the norm with all it can do.
        whole = kernel is not add_norm_kernel or all(constants.values())
        least = effort if whole else "standard"
        return _configuration("decoder_block", kernel, arch, types, {**constants, **common}, warps, least)

    norm = pointers("x_ptr", "branch_ptr", "sum_ptr", "gain_ptr", "shift_ptr", "y_ptr") | {"eps": "fp32"}
    for width, add, centred in product(NORM_BLOCKS, (False, True), (False, True)):
        constants: dict[str, int | str | bool] = {"ADD": add, "CENTRED": centred, "BLOCK": width}
        yield make(add_norm_kernel, norm, constants, block.norm_warps(width))
    tables = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    for half in HALVES:
        yield make(rotate_kernel, pointers("t_ptr", "turned_ptr") | tables, {"BLOCK": half}, block.ROTATE_WARPS)
    for gated in (False, True):
        constants = {"GATED": gated, "BLOCK": block.ELEMENTS}
        yield make(gate_kernel, pointers("gate_ptr", "up_ptr", "y_ptr"), constants, block.ELEMENT_WARPS)
    yield make(add_kernel, pointers("a_ptr", "b_ptr", "y_ptr"), {"BLOCK": block.ELEMENTS}, block.ELEMENT_WARPS)


def configurations() -> Iterator[Configuration]:
    """Every dtype on every architecture; the norms at two widths."""
    for arch in (80, 90):
        for x in POINTERS:
            yield from _glue(arch, x)
        for word in ("*i16", "*i32"):
            types = {"source_ptr": word, "target_ptr": word}
            constants: dict[str, int | str | bool] = {"BLOCK": fetch.COPY_WORDS}
            effort: Effort = "quick" if (arch, word) == (90, "*i32") else "standard"
            made = _configuration("tier_fetch", fetch.copy_kernel, arch, types, constants, fetch.COPY_WARPS, effort)
            # Sixteen bytes a load keep enough of the link's reads in flight.
            wide = ("LDG.E.128",) if word == "*i32" else ()
            yield replace(made, parameters={**made.parameters, "word": word.removeprefix("*")}, instructions=wide)
