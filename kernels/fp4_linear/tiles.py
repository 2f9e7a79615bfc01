"""The Triton kernels behind ``FP4Linear``: one packed layout for every token count, and which kernel reads it.

The layout is ``packing``'s ``rows`` with the tile width that the kernels for many tokens take (16 columns for float32
x). The kernels for few tokens are fastest on other layouts; the fused one reads this too, and no second copy is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from vbench.errors import Unsupported
from vbench.kernels.fp4_linear.codec import decode_rows, slices
from vbench.kernels.triton.packing import (
    BYTE_SCALES,
    GROUPS,
    ROW_PAD,
    TILE_ROWS,
    PackedWeight,
    has_wide_scales,
    pack_weight,
    unpack_weight,
)
from vbench.spec import TORCH_DTYPE_NAMES

NAMES = {getattr(torch, TORCH_DTYPE_NAMES[name]): name for name in ("bf16", "fp16", "fp32")}


def check_device(device: torch.device, dtype: torch.dtype, n: int, k: int) -> None:
    """Raises Unsupported: ``too_large``, ``needs_triton``, ``not_interpreted``, ``interpreted_on_gpu``,
    ``gpu_too_old``."""
    if (n + ROW_PAD) * (k + 256) // 4 >= 2**31:
        raise Unsupported("too_large", f"n={n}, k={k}: packed offsets must fit 31 bits; split the layer")
    try:
        from vbench.kernels.triton import probe
    except ImportError as error:
        raise Unsupported("needs_triton", "pip install 'vbench-kernels[triton]', or engine='torch'") from error
    probe.check_device("cuda" if device.type == "cuda" else "cpu")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < probe.MIN_CAPABILITY:
            has = f"{capability[0]}.{capability[1]}"
            raise Unsupported(
                "gpu_too_old", f"{dtype}: the kernels need compute capability 8.0, {device} has {has}; engine='torch'"
            )


def pack(
    fmt: str, weight: Mapping[str, Tensor], n: int, k: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[int]]:
    """A canonical weight as the kernels' tensors, and the layout's parameters for ``packed``."""
    name = NAMES[dtype]
    wide = fmt == "mxfp4" and (name == "fp16" or has_wide_scales(weight["scale"]))
    tiles = pack_weight(fmt, weight, n, k, 16 if name == "fp32" else 32, fmt in BYTE_SCALES and name == "bf16", wide)
    tensors = {"codes": tiles.codes, "scale": tiles.scale, "global_scale": tiles.global_scale}
    return tensors, [tiles.bkw, int(tiles.twiddled), int(tiles.small_scales), int(tiles.wide)]


def packed(fmt: str, tensors: Mapping[str, Tensor], n: int, k: int, layout: Sequence[int]) -> PackedWeight:
    """The inverse of ``pack`` as far as the packed form; ``unpack`` goes on to the canonical one."""
    bkw, twiddled, small, wide = layout
    codes, scale, global_scale = (tensors[name] for name in ("codes", "scale", "global_scale"))
    return PackedWeight(fmt, n, k, bkw, bool(twiddled), codes, scale, global_scale, bool(small), bool(wide))


def unpack(fmt: str, tensors: Mapping[str, Tensor], n: int, k: int, layout: Sequence[int]) -> dict[str, Tensor]:
    """The exact inverse of ``pack``."""
    return unpack_weight(packed(fmt, tensors, n, k, layout))


def dense(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The decoded weight [n, k], by slices of whole tiles, so that no canonical copy of it all is made."""
    out = torch.empty(weight.n, weight.k, dtype=dtype, device=weight.codes.device)
    group = GROUPS[weight.fmt]
    for start, stop in slices(weight.n, weight.k, TILE_ROWS):
        first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
        scale = weight.scale
        if group == -1:
            scale = scale[first * TILE_ROWS : last * TILE_ROWS]
        elif group > 0:
            scale = scale[first:last]
        part = replace(weight, n=stop - start, codes=weight.codes[first:last], scale=scale)
        decode_rows(weight.fmt, unpack_weight(part), out[start:stop])
    return out


def launch(weight: PackedWeight, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """y [m, n] = x [m, k] times the weight, plus bias. Scratch memory is allocated by the call."""
    from vbench.kernels.triton import linear, linear_gluon_host

    m, name = x.shape[0], NAMES[x.dtype]
    n, k, fmt = weight.n, weight.k, weight.fmt
    # The weight's own rule (no subnormal scale) was settled when it was packed: no scales are looked at here.
    aligned = linear_gluon_host.takes_tensors({"scale": weight.global_scale}, x, y)
    hopper = (
        x.is_cuda and linear_gluon_host.available() and aligned and not weight.wide and not weight.small_scales
    )  # fmt: skip
    if hopper and m > linear.SPLIT_MAX_M and linear_gluon_host.takes(fmt, name, n, k):
        plan = linear.choose_gluon(m, n, k, fmt)
    else:
        # "cpu": the tables without the vendor's product, which reads the canonical layout.
        plan = linear.choose_plan(m, n, k, fmt, name, "none", "cpu", False, weight.wide)
        plan = replace(plan, bkw=weight.bkw)
    linear.bind_packed(weight, x, bias, y, name, "none", plan)()
