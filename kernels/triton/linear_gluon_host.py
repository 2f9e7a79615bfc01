"""Host side of the Gluon linear: what it takes, and the launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from vbench.backend import Launch
from vbench.kernels.triton.packing import FRAGMENT_COLUMNS, GROUPS, PackedWeight, has_small_scales
from vbench.kernels.triton.probe import INTERPRETED

#: Gluon is experimental and its names move (3.9 removed ``tma.async_copy_global_to_shared``). Compiled with these two.
TRITON_VERSIONS = ((3, 6), (3, 7))
#: x dtype -> formats whose decode into it the kernel has.
FORMATS = {
    "bf16": ("absmax7_tensor", "absmax7_row", "absmax7_g128", "nvfp4", "mxfp4", "nf4"),
    "fp16": ("absmax7_tensor", "absmax7_row", "absmax7_g128", "nvfp4"),
    "fp32": (),
}
#: Packed columns that the kernel reads; a K block is four times as wide.
BKW = 32
#: Registers of a consumer thread: what 65536 leave beside the producer's.
REGISTERS = 240


def available() -> bool:
    """Whether this process can run the kernel: a Hopper GPU, not interpreted, a known Triton."""
    if INTERPRETED or not torch.cuda.is_available():
        return False
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return torch.cuda.get_device_capability() == (9, 0) and version in TRITON_VERSIONS


def takes(fmt: str, x: str, n: int, k: int) -> bool:
    """Whether the case's format, dtype and row lengths suit it: rows of x and y must be whole 16-byte units."""
    return fmt in FORMATS[x] and n % 8 == 0 and k % 8 == 0


def takes_tensors(inputs: Mapping[str, Any], x: Any, y: Any) -> bool:
    """Whether the copy engine can address x and y (16-byte base and row stride), and no scale is zero or subnormal."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(1) == 1 for t in (x, y))
    return aligned and not has_small_scales(inputs["scale"])


def gluon_call(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, tile: tuple[int, int, int], parts: int,
    block_sums: bool, scaled: bool = False,
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """Grid, arguments and constants. Allocates the workspace of sums that cross programs, and their tickets.

    Args:
        tile: features of a program, half of them a consumer's; tokens; stages.
        parts: parts of K, each whole blocks of 256 columns.
        scaled: groups of 128: scales multiply weights, both rounded to x's dtype.
        block_sums: add the sums of 256 columns in float32: the order of sums up to ``linear.SPLIT_MAX_M`` tokens.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    m, n = y.shape
    bn, bm, stages = tile
    rows = bn // 2
    tiles = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    result = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flat = weight.codes.view(-1, BKW)
    x_desc = TensorDescriptor(x, list(x.shape), list(x.stride()), [bm, BKW], tiles)
    codes_desc = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [64, BKW], tiles)
    y_desc = TensorDescriptor(y, list(y.shape), list(y.stride()), [bm, rows], result)
    floats = weight.scale.dtype == torch.float32
    scale = weight.scale if floats else weight.scale.reshape(-1).view(torch.int32)
    blocks = weight.k_blocks * 4 * BKW // FRAGMENT_COLUMNS
    part_blocks = triton.cdiv(blocks, parts) * (FRAGMENT_COLUMNS // (4 * BKW))
    m_tiles, n_tiles = triton.cdiv(m, bm), triton.cdiv(n, bn)
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    tiles = m_tiles * n_tiles
    partial = torch.empty(tiles * parts * bn * bm if parts > 1 else 4, dtype=torch.float32, device=x.device)
    tickets = torch.zeros(2 * tiles, dtype=torch.int32, device=x.device)
    arguments = (
        x_desc, codes_desc, y_desc, scale, weight.global_scale, x if bias is None else bias, partial, tickets,
        m, n, weight.k_blocks, part_blocks, parts, m_tiles, n_tiles,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "FORMAT": weight.fmt,
        "GROUP": max(GROUPS[weight.fmt], 0) if floats else 0,
        "X": x_name,
        "ACT": act,
        "HAS_BIAS": bias is not None,
        "ROWS": rows,
        "BM": bm,
        "STAGES": stages,
        "GROUP_M": 8,
        "BLOCK_SUMS": block_sums,
        "SPLIT": parts > 1,
        "SCALED": scaled,
        "REGISTERS": REGISTERS,
        "num_warps": 4,
    }
    return (min(processors, tiles * parts),), arguments, constants


def bind_gluon(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, tile: tuple[int, int, int], parts: int,
    block_sums: bool, scaled: bool = False,
) -> Launch:  # fmt: skip
    """A launch that writes y [m, n]. The caller has asked ``available``, ``takes`` and ``takes_tensors``.

    With several parts the launch owns a workspace: it must not run on two streams at once.
    """
    from vbench.kernels.triton.linear_gluon import gluon_linear_kernel

    grid, arguments, constants = gluon_call(weight, x, bias, y, x_name, act, tile, parts, block_sums, scaled)

    def launch() -> None:
        gluon_linear_kernel[grid](*arguments, **constants)

    return launch
