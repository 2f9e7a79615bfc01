"""Host side of the Gluon linear: what it takes, and the launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from vbench.backend import Launch
from vbench.kernels.triton.packing import PackedWeight, has_small_scales
from vbench.kernels.triton.probe import INTERPRETED

#: Gluon is experimental and its names move (3.9 removed ``tma.async_copy_global_to_shared``). Compiled with these two.
TRITON_VERSIONS = ((3, 6), (3, 7))
FORMATS = ("absmax7_tensor", "absmax7_row", "nvfp4")
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
    return fmt in FORMATS and x in ("bf16", "fp16") and n % 8 == 0 and k % 8 == 0


def takes_tensors(inputs: Mapping[str, Any], x: Any, y: Any) -> bool:
    """Whether the copy engine can address x and y (16-byte base and row stride), and no scale is zero or subnormal."""
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 and t.stride(1) == 1 for t in (x, y))
    return aligned and not has_small_scales(inputs["scale"])


def gluon_call(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, bn: int, bm: int, stages: int
) -> tuple[tuple[int], tuple[Any, ...], dict[str, Any]]:
    """Grid, arguments and constants. ``bn``: features of a program, half of them a consumer's."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    m, n = y.shape
    rows = bn // 2
    tiles = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)
    result = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    flat = weight.codes.view(-1, BKW)
    x_desc = TensorDescriptor(x, list(x.shape), list(x.stride()), [bm, BKW], tiles)
    codes_desc = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [64, BKW], tiles)
    y_desc = TensorDescriptor(y, list(y.shape), list(y.stride()), [bm, rows], result)
    scale = weight.scale.reshape(-1).view(torch.int32) if weight.fmt == "nvfp4" else weight.scale
    m_tiles, n_tiles = triton.cdiv(m, bm), triton.cdiv(n, bn)
    processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    arguments = (
        x_desc, codes_desc, y_desc, scale, weight.global_scale, x if bias is None else bias,
        m, n, weight.k_blocks, m_tiles, n_tiles,
    )  # fmt: skip
    constants: dict[str, Any] = {
        "FORMAT": weight.fmt,
        "X": x_name,
        "ACT": act,
        "HAS_BIAS": bias is not None,
        "ROWS": rows,
        "BM": bm,
        "STAGES": stages,
        "GROUP_M": 8,
        "REGISTERS": REGISTERS,
        "num_warps": 4,
    }
    return (min(processors, m_tiles * n_tiles),), arguments, constants


def bind_gluon(
    weight: PackedWeight, x: Any, bias: Any, y: Any, x_name: str, act: str, bn: int, bm: int, stages: int
) -> Launch:
    """A launch that writes y [m, n]. The caller has asked ``available``, ``takes`` and ``takes_tensors``."""
    from vbench.kernels.triton.linear_gluon import gluon_linear_kernel

    grid, arguments, constants = gluon_call(weight, x, bias, y, x_name, act, bn, bm, stages)

    def launch() -> None:
        gluon_linear_kernel[grid](*arguments, **constants)

    return launch
