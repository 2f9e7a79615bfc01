"""The kernels' weight layout: an exact bijection with the canonical one, made once when a weight is bound.

Canonical: codes u8 [n, k/2] (low nibble first), scales as the format says. Packed, for a K block of ``4 * bkw``:

codes int16 [n_tiles, k_blocks, TILE_ROWS, bkw]
    Element (t, b, r, c) holds the four codes of row ``t * TILE_ROWS + r`` at columns ``b * 4 * bkw + j * bkw + c`` for
    j = 0..3. A tile is contiguous in memory, and every code position j of a tile is a K-contiguous matrix operand, so
    x needs no permutation. Within the element, code j is nibble j, or, twiddled, at the bits of ``TWIDDLE[j]``.
scales
    absmax7_tensor float32 [1]; absmax7_row float32 [n_pad]; absmax7_g128 float32 [n_tiles, groups, TILE_ROWS];
    nvfp4 u8 [n_tiles, k_blocks, TILE_ROWS, bkw/16, 4], read as int32 words: the scales of the four code positions.

n is padded to a multiple of ROW_PAD and k to a whole block, with weights that decode to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.errors import Unsupported

TILE_ROWS = 64
ROW_PAD = 128
#: name -> elements of K that share a scale (0: the whole tensor, -1: the whole row)
GROUPS = {"absmax7_tensor": 0, "absmax7_row": -1, "absmax7_g128": 128, "nvfp4": 16}
#: Bit of the 16-bit element for (mantissa, low exponent, high exponent, sign) of each code: see ``_fp4._E2M1_BF16``.
TWIDDLE = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))
#: code that decodes to zero
ZERO_CODE = {"absmax7_tensor": 8, "absmax7_row": 8, "absmax7_g128": 8, "nvfp4": 0}


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in the kernels' layout.

    Args:
        fmt: format name.
        n, k: the weight's own shape; the tensors are padded.
        bkw: columns of a packed tile; a K block is 4 times as wide.
        twiddled: E2M1 bits are at ``TWIDDLE`` instead of in nibble order.
        codes: int16 [n_tiles, k_blocks, TILE_ROWS, bkw].
        scale: see the module's text.
        global_scale: float32 [1].
        small_scales: nvfp4 only: some block scale is zero or subnormal in E4M3, which takes a slower decode.
    """

    fmt: str
    n: int
    k: int
    bkw: int
    twiddled: bool
    codes: Tensor
    scale: Tensor
    global_scale: Tensor
    small_scales: bool = False

    @property
    def n_pad(self) -> int:
        return int(self.codes.shape[0]) * TILE_ROWS

    @property
    def k_blocks(self) -> int:
        return int(self.codes.shape[1])

    @property
    def bytes(self) -> int:
        """Device memory of all three tensors."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scale, self.global_scale))


def _ceil(value: int, step: int) -> int:
    return -(-value // step) * step


def _pad(t: Tensor, rows: int, columns: int, value: int) -> Tensor:
    if t.shape == (rows, columns):
        return t
    out = torch.full((rows, columns), value, dtype=t.dtype, device=t.device)
    out[: t.shape[0], : t.shape[1]] = t
    return out


def _twiddle(codes_i32: Tensor) -> Tensor:
    """[..., 4] codes -> 16-bit words with E2M1 bits at TWIDDLE."""
    word = torch.zeros_like(codes_i32[..., 0])
    for j, bits in enumerate(TWIDDLE):
        for source, target in enumerate(bits):
            word |= ((codes_i32[..., j] >> source) & 1) << target
    return word


def _untwiddle(words_i32: Tensor) -> Tensor:
    codes = []
    for bits in TWIDDLE:
        code = torch.zeros_like(words_i32)
        for source, target in enumerate(bits):
            code |= ((words_i32 >> target) & 1) << source
        codes.append(code)
    return torch.stack(codes, dim=-1)


def has_small_scales(scale: Tensor) -> bool:
    """Whether some E4M3 scale is zero or subnormal; False for float32 scales, of which nothing depends on that."""
    return scale.dtype == torch.float8_e4m3fn and bool((scale.contiguous().view(torch.uint8) < 0x08).any())


def check_weight(fmt: str, weight: dict[str, Any] | Any, n: int, k: int) -> None:
    """Shapes, dtypes and scale bytes of a canonical weight.

    Raises:
        Unsupported: ``weight_shape``, ``weight_dtype``, or ``scale_not_finite_positive`` (E4M3 NaN or negative).
    """
    group = GROUPS[fmt]
    scale_shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    scale_dtype = torch.float8_e4m3fn if fmt == "nvfp4" else torch.float32
    for name, shape, dtype in (
        ("codes", (n, k // 2), torch.uint8),
        ("scale", scale_shape, scale_dtype),
        ("global_scale", (1,), torch.float32),
    ):
        t = weight[name]
        if tuple(t.shape) != shape:
            raise Unsupported("weight_shape", f"{name} is {tuple(t.shape)} but {fmt} of {n}x{k} needs {shape}")
        if t.dtype != dtype:
            raise Unsupported("weight_dtype", f"{name} is {t.dtype} but {fmt} needs {dtype}")
    if fmt == "nvfp4" and bool((weight["scale"].contiguous().view(torch.uint8) >= 0x7F).any()):
        raise Unsupported(
            "scale_not_finite_positive", "an nvfp4 block scale is NaN or negative; encode the weight again"
        )


def pack_weight(fmt: str, weight: dict[str, Any] | Any, n: int, k: int, bkw: int, twiddled: bool) -> PackedWeight:
    """Canonical -> packed. Any device. Temporary memory: 4 bytes a weight.

    Raises:
        Unsupported: see ``check_weight``.
    """
    check_weight(fmt, weight, n, k)
    n_pad, k_pad = _ceil(n, ROW_PAD), _ceil(k, 4 * bkw)
    n_tiles, k_blocks = n_pad // TILE_ROWS, k_pad // (4 * bkw)
    zero = ZERO_CODE[fmt] * 0x11
    packed = _pad(weight["codes"], n_pad, k_pad // 2, zero)
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    # [tile, row, block, j, column] -> [tile, block, row, column, j]
    codes = nibbles.reshape(n_tiles, TILE_ROWS, k_blocks, 4, bkw).permute(0, 2, 1, 4, 3).to(torch.int32)
    if twiddled:
        words = _twiddle(codes)
    else:
        words = codes[..., 0] | (codes[..., 1] << 4) | (codes[..., 2] << 8) | (codes[..., 3] << 12)
    words = ((words + 0x8000) % 0x10000 - 0x8000).to(torch.int16).contiguous()
    scale = weight["scale"]
    small_scales = has_small_scales(scale)
    if fmt == "absmax7_row":
        scale = _pad(scale.reshape(n, 1), n_pad, 1, 0).reshape(n_pad).clone()
    elif fmt == "absmax7_g128":
        groups = _ceil(k_pad, 128) // 128
        scale = _pad(scale, n_pad, groups, 0).reshape(n_tiles, TILE_ROWS, groups).permute(0, 2, 1).contiguous()
    elif fmt == "nvfp4":
        scale = _pad(scale.view(torch.uint8), n_pad, k_pad // 16, 0)
        scale = scale.reshape(n_tiles, TILE_ROWS, k_blocks, 4, bkw // 16).permute(0, 2, 1, 4, 3).contiguous()
    else:
        scale = scale.clone()
    return PackedWeight(fmt, n, k, bkw, twiddled, words, scale, weight["global_scale"].clone(), small_scales)


def unpack_weight(packed: PackedWeight) -> dict[str, Tensor]:
    """Packed -> canonical, the exact inverse of ``pack_weight``."""
    n, k, bkw = packed.n, packed.k, packed.bkw
    n_tiles, k_blocks = packed.codes.shape[:2]
    words = packed.codes.to(torch.int32) & 0xFFFF
    nibbles = torch.stack([(words >> (4 * j)) & 0xF for j in range(4)], dim=-1)
    codes = _untwiddle(words) if packed.twiddled else nibbles
    codes = codes.permute(0, 2, 1, 4, 3).reshape(n_tiles * TILE_ROWS, k_blocks * 4 * bkw)[:n, :k].to(torch.uint8)
    scale = packed.scale
    if packed.fmt == "absmax7_row":
        scale = scale[:n].clone()
    elif packed.fmt == "absmax7_g128":
        scale = scale.permute(0, 2, 1).reshape(packed.n_pad, -1)[:n, : k // 128].contiguous()
    elif packed.fmt == "nvfp4":
        scale = scale.permute(0, 2, 1, 4, 3).reshape(packed.n_pad, -1)[:n, : k // 16].contiguous()
        scale = scale.view(torch.float8_e4m3fn)
    else:
        scale = scale.clone()
    return {
        "codes": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "scale": scale,
        "global_scale": packed.global_scale.clone(),
    }
