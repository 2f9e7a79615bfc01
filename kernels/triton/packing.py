"""The kernels' weight layouts: exact bijections with the canonical one, made once when a weight is bound.

Canonical: codes u8 [n, k/2] (low nibble first), scales as the format says. Both layouts gather four codes in an int16
element; code j of the element in column c of a K block stands ``j * bkw + c`` columns into it. Every code position of a
tile is then a K-contiguous matrix operand, so x needs no permutation. Code j is nibble j of the element or, twiddled,
at the bits of ``TWIDDLE[j]``.

``rows`` (a K block is 4 * bkw columns; n padded to ROW_PAD, k to 256 or, for bkw 16, to a block)
    codes int16 [n_tiles, k_blocks, TILE_ROWS, bkw]: a tile is contiguous in memory.
    scales: absmax7_tensor float32 [1]; absmax7_row float32 [n_pad]; absmax7_g128, nf4 and wide mxfp4 float32
    [n_tiles, groups, TILE_ROWS]; nvfp4, mxfp4 u8 [n_tiles, k_blocks, TILE_ROWS, words, 4], read as int32 words whose
    byte j is the scale of code position j, for 16 (nvfp4) or up to 32 (mxfp4) columns a word.

``fragments`` (bkw 16; four such blocks form a K block of 256 columns; n padded to ROW_PAD, k to a block)
    codes int16 [n_pad/16, k_blocks, 4, 32, 8]: for each 64 columns, what each of the 32 lanes of a warp holds of the
    left operand of a 16 x 16 matrix product: [row 0..7][column pair 0..3][column + 8][row + 8][column of the pair].
    scales: u8 [n_pad/16, k_blocks, 16, 256/group] in K order; float32 [n_pad/16, k_blocks, 256/group, 16].

Padding decodes to zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vbench.errors import Unsupported

TILE_ROWS = 64
ROW_PAD = 128
FRAGMENT_ROWS = 16
FRAGMENT_COLUMNS = 256
#: name -> elements of K that share a scale (0: the whole tensor, -1: the whole row)
GROUPS = {"absmax7_tensor": 0, "absmax7_row": -1, "absmax7_g128": 128, "nvfp4": 16, "mxfp4": 32, "nf4": 64}
#: formats whose scales are one byte, and the dtype they come in
BYTE_SCALES = {"nvfp4": torch.float8_e4m3fn, "mxfp4": torch.uint8}
#: Bit of the 16-bit element for (mantissa, low exponent, high exponent, sign) of each code: see ``_fp4._E2M1_BF16``.
TWIDDLE = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (10, 11, 13, 14))
#: code that decodes to zero
ZERO_CODE = {"absmax7_tensor": 8, "absmax7_row": 8, "absmax7_g128": 8, "nvfp4": 0, "mxfp4": 0, "nf4": 7}
#: Largest E8M0 byte whose scale (times 2^126, which undoes the decoder's exponent) fits bfloat16.
E8M0_NARROW_MAX = 128
#: float32 scales that the decoder of integers times scale takes into bfloat16: it holds a scale times 2^114, and its
#: products times 2^-19, as normal numbers.
SCALED_RANGE = (2.0**-100, 2.0**13)
Order = Literal["rows", "fragments"]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in a kernels' layout.

    Args:
        fmt: format name.
        n, k: the weight's own shape; the tensors are padded.
        bkw: columns of a packed tile.
        twiddled: E2M1 bits are at ``TWIDDLE`` instead of in nibble order.
        codes, scale: see the module's text.
        global_scale: float32 [1].
        small_scales: some scale takes a slower decode: nvfp4's that are zero or subnormal in E4M3, and absmax7_g128's
            outside SCALED_RANGE.
        wide: mxfp4 only: scales are kept as float32 and multiply sums instead of weights, because some scale is beyond
            ``E8M0_NARROW_MAX`` or x's dtype has not their range.
        order: layout.
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
    wide: bool = False
    order: Order = "rows"

    @property
    def n_pad(self) -> int:
        return int(self.codes.shape[0]) * (TILE_ROWS if self.order == "rows" else FRAGMENT_ROWS)

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
    """Whether some E4M3 scale is zero or subnormal; False for other scales, of which nothing depends on that."""
    return scale.dtype == torch.float8_e4m3fn and bool((scale.contiguous().view(torch.uint8) < 0x08).any())


def has_wide_scales(scale: Tensor) -> bool:
    """Whether some E8M0 scale does not fit a bfloat16 operand; False for other scales."""
    return scale.dtype == torch.uint8 and bool((scale > E8M0_NARROW_MAX).any())


def has_far_scales(scale: Tensor) -> bool:
    """Whether some float32 scale is outside SCALED_RANGE and not zero, so that it cannot multiply integer weights."""
    low, high = SCALED_RANGE
    return scale.dtype == torch.float32 and bool(((scale != 0) & ~((scale >= low) & (scale <= high))).any())


def e8m0_float(scale: Tensor) -> Tensor:
    """E8M0 bytes (no NaN) -> float32 2^(b - 127), exact; 2^-127 is subnormal."""
    bits = scale.to(torch.int32) << 23
    value: Tensor = torch.where(scale == 0, 1 << 22, bits).view(torch.float32)
    return value


def check_weight(fmt: str, weight: dict[str, Any] | Any, n: int, k: int, nan_scales: bool = False) -> None:
    """Shapes, dtypes and scale bytes of a canonical weight. ``nan_scales``: mxfp4's NaN scale is taken.

    Raises:
        Unsupported: ``weight_shape``, ``weight_dtype``, or ``scale_not_finite_positive`` (E4M3 NaN or negative,
            E8M0 NaN).
    """
    group = GROUPS[fmt]
    scale_shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    scale_dtype = BYTE_SCALES.get(fmt, torch.float32)
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
    if fmt == "mxfp4" and not nan_scales and bool((weight["scale"] == 0xFF).any()):
        raise Unsupported("scale_not_finite_positive", "an mxfp4 block scale is NaN (0xFF); encode the weight again")


def _words(codes_i32: Tensor, twiddled: bool) -> Tensor:
    """[..., 4] codes -> int16 elements."""
    if twiddled:
        words: Tensor = _twiddle(codes_i32)
    else:
        words = codes_i32[..., 0] | (codes_i32[..., 1] << 4) | (codes_i32[..., 2] << 8) | (codes_i32[..., 3] << 12)
    signed: Tensor = (words + 0x8000) % 0x10000 - 0x8000
    elements: Tensor = signed.to(torch.int16)
    return elements


def _to_fragments(elements: Tensor) -> Tensor:
    """Elements of bkw 16, [n_pad, k_pad/64, 16] -> [n_pad/16, k_pad/256, 4, 32, 8]."""
    n, quarters, _ = elements.shape
    # [tile, row + 8, row, block, quarter, column + 8, pair, column of the pair]
    parts = elements.reshape(n // 16, 2, 8, quarters // 4, 4, 2, 4, 2)
    return parts.permute(0, 3, 4, 2, 6, 5, 1, 7).reshape(n // 16, quarters // 4, 4, 32, 8).contiguous()


def _from_fragments(fragments: Tensor) -> Tensor:
    """The inverse of ``_to_fragments``."""
    tiles, blocks = fragments.shape[:2]
    parts = fragments.reshape(tiles, blocks, 4, 8, 4, 2, 2, 2)
    return parts.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(tiles * 16, blocks * 4, 16)


def _byte_words(scale: Tensor, bkw: int, k_blocks: int) -> Tensor:
    """Byte scales [n_pad, k_pad/group] -> [n_tiles, k_blocks, TILE_ROWS, words, 4]; see the module's text.

    Where a group spans code positions (mxfp4, bkw 16) its byte stands at each of them.
    """
    n_pad = scale.shape[0]
    per_block = scale.reshape(n_pad // TILE_ROWS, TILE_ROWS, k_blocks, -1)
    if per_block.shape[-1] < 4:
        per_block = per_block.repeat_interleave(4 // per_block.shape[-1], dim=-1)
    words: Tensor = per_block.unflatten(-1, (4, -1)).permute(0, 2, 1, 4, 3).contiguous()
    return words


def _pack_scale(fmt: str, scale: Tensor, n_pad: int, k_pad: int, bkw: int, wide: bool, order: Order) -> Tensor:
    group = GROUPS[fmt]
    if fmt == "absmax7_tensor":
        return scale.clone()
    if fmt == "absmax7_row":
        return _pad(scale.reshape(-1, 1), n_pad, 1, 0).reshape(n_pad).clone()
    if fmt in BYTE_SCALES and not wide:
        scale = _pad(scale.view(torch.uint8), n_pad, k_pad // group, 0)
        if order == "fragments":
            blocks = k_pad // FRAGMENT_COLUMNS
            return scale.reshape(n_pad // 16, 16, blocks, -1).permute(0, 2, 1, 3).contiguous()
        return _byte_words(scale, bkw, k_pad // (4 * bkw))
    groups = _ceil(k_pad, group) // group
    scale = _pad(e8m0_float(scale) if wide else scale, n_pad, groups, 0)
    if order == "fragments":
        blocks = k_pad // FRAGMENT_COLUMNS
        return scale.reshape(n_pad // 16, 16, blocks, -1).permute(0, 2, 3, 1).contiguous()
    return scale.reshape(n_pad // TILE_ROWS, TILE_ROWS, groups).permute(0, 2, 1).contiguous()


def pack_weight(
    fmt: str,
    weight: dict[str, Any] | Any,
    n: int,
    k: int,
    bkw: int,
    twiddled: bool,
    wide: bool = False,
    order: Order = "rows",
) -> PackedWeight:
    """Canonical -> packed. Any device. Temporary memory: 4 bytes a weight.

    Raises:
        Unsupported: see ``check_weight``.
    """
    check_weight(fmt, weight, n, k)
    step = 64 if order == "rows" and bkw == 16 else FRAGMENT_COLUMNS
    n_pad, k_pad = _ceil(n, ROW_PAD), _ceil(k, step)
    zero = ZERO_CODE[fmt] * 0x11
    packed = _pad(weight["codes"], n_pad, k_pad // 2, zero)
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1)
    # [row, block, j, column] -> [row, block, column, j]
    codes = nibbles.reshape(n_pad, k_pad // (4 * bkw), 4, bkw).permute(0, 1, 3, 2).to(torch.int32)
    elements = _words(codes, twiddled)
    if order == "fragments":
        elements = _to_fragments(elements)
    else:
        elements = elements.reshape(n_pad // TILE_ROWS, TILE_ROWS, -1, bkw).permute(0, 2, 1, 3).contiguous()
    scale = _pack_scale(fmt, weight["scale"], n_pad, k_pad, bkw, wide, order)
    small = has_small_scales(weight["scale"]) or (fmt == "absmax7_g128" and has_far_scales(weight["scale"]))
    return PackedWeight(fmt, n, k, bkw, twiddled, elements, scale, weight["global_scale"].clone(), small, wide, order)


def _unpack_scale(packed: PackedWeight) -> Tensor:
    fmt, n, scale = packed.fmt, packed.n, packed.scale
    group = GROUPS[fmt]
    if group == 0:
        return scale.clone()
    if group == -1:
        return scale[:n].clone()
    if fmt in BYTE_SCALES and not packed.wide:
        if packed.order == "fragments":
            scale = scale.permute(0, 2, 1, 3)
        else:
            scale = scale.permute(0, 2, 1, 4, 3)
            if 4 * packed.bkw // group < 4:
                scale = scale[:, :, :, :: 4 * group // (4 * packed.bkw)]
        scale = scale.reshape(packed.n_pad, -1)[:n, : packed.k // group].contiguous()
        return scale.view(BYTE_SCALES[fmt])
    scale = scale.permute(0, 3, 1, 2) if packed.order == "fragments" else scale.permute(0, 2, 1)
    scale = scale.reshape(packed.n_pad, -1)[:n, : packed.k // group].contiguous()
    if packed.wide:
        # A power of two: its exponent is the byte, and the subnormal one has exponent 0.
        scale = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return scale


def unpack_weight(packed: PackedWeight) -> dict[str, Tensor]:
    """Packed -> canonical, the exact inverse of ``pack_weight``."""
    n, k, bkw = packed.n, packed.k, packed.bkw
    if packed.order == "fragments":
        elements = _from_fragments(packed.codes)
    else:
        elements = packed.codes.permute(0, 2, 1, 3).reshape(packed.n_pad, -1, bkw)
    words = elements.to(torch.int32) & 0xFFFF
    nibbles = torch.stack([(words >> (4 * j)) & 0xF for j in range(4)], dim=-1)
    codes = _untwiddle(words) if packed.twiddled else nibbles
    codes = codes.permute(0, 1, 3, 2).reshape(packed.n_pad, -1)[:n, :k].to(torch.uint8)
    return {
        "codes": codes[:, 0::2] | (codes[:, 1::2] << 4),
        "scale": _unpack_scale(packed),
        "global_scale": packed.global_scale.clone(),
    }
