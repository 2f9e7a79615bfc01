"""Wrong linear layers and wrong codecs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vbench.control import Corpus
from vbench.controls.kit import BY_NAME, Register, Setting, finish, linear, weight32, worst_order_product
from vbench.reference import fp4
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE, FP4_LINEAR, FP4_QUANTIZE
from vbench.reference.sampling import torch_dtype
from vbench.spec import Numerics

control = Register()

LINEAR: dict[str, int | str] = {"fmt": "nvfp4", "x": "bf16", "m": 8, "n": 32, "k": 128}
GRID = LINEAR | {"dist": "grid"}
FP32 = LINEAR | {"x": "fp32"}
TILE = 64

# -- accumulation ------------------------------------------------------------------------------------------------------


def _bits(t: Tensor, kept: int) -> Tensor:
    """float32 rounded to nearest with ``kept`` significant bits (ties away)."""
    drop = 24 - kept
    raw = t.contiguous().view(torch.int32)
    return ((raw + (1 << (drop - 1))) & ~((1 << drop) - 1)).view(torch.float32)


@control(
    FP4_LINEAR,
    FP32,
    FP32 | {"dist": "grid"},
    family="accumulation",
    oracle="value",
    fault="operands are rounded to TF32 though fp32 is declared",
)
def tf32_for_fp32(s: Setting) -> Mapping[str, Any]:
    x, w = s.inputs["x"].float(), weight32(s)
    return {"y": finish(s, _bits(x, 11) @ _bits(w, 11).T if s.wrong else worst_order_product(x, w.T))}


def _chunked(s: Setting, dtype: torch.dtype, step: int) -> Tensor:
    """Sums over K in steps, rounded to ``dtype`` after each."""
    x, w = s.inputs["x"].float(), weight32(s)
    total = torch.zeros(len(x), len(w))
    for k in range(0, x.shape[1], step):
        total = (total + x[:, k : k + step] @ w[:, k : k + step].T).to(dtype).float()
    return total


@control(
    FP4_LINEAR,
    LINEAR | {"x": "fp16", "k": 1024},
    LINEAR | {"x": "fp16", "dist": "grid"},
    family="accumulation",
    oracle="value",
    fault="sums are kept in fp16 though fp32 is declared",
)
def fp16_accumulator(s: Setting) -> Mapping[str, Any]:
    return {"y": finish(s, _chunked(s, torch.float16 if s.wrong else torch.float32, 16))}


@control(
    FP4_LINEAR,
    LINEAR | {"k": 1024},
    family="accumulation",
    oracle="value",
    fault="partial sums of split K are stored in bf16",
)
def bf16_split_k(s: Setting) -> Mapping[str, Any]:
    return {"y": finish(s, _chunked(s, torch.bfloat16 if s.wrong else torch.float32, 256))}


@control(
    FP4_LINEAR,
    LINEAR,
    family="accumulation",
    oracle="precision",
    fault="declares the fp16 accumulator it has, to be given fp16's budget",
    declares_wrongly={"numerics": Numerics("fp16")},
)
def declared_coarse(s: Setting) -> Mapping[str, Any]:
    return {"y": finish(s, _chunked(s, torch.float16 if s.wrong else torch.float32, 32))}


def _stored(t: Tensor, how: str) -> Tensor:
    """float32 -> bf16 by cutting bits off, or rounding ties away from zero."""
    raw = t.contiguous().view(torch.int32) + (0x8000 if how == "away" else 0)
    return (raw & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


@control(
    FP4_LINEAR,
    *(GRID | {"seed": seed} for seed in range(3)),
    family="rounding",
    oracle="exact_grid",
    fault="the store rounds ties away from zero",
)
def ties_away_store(s: Setting) -> Mapping[str, Any]:
    sums = s.inputs["x"].float() @ weight32(s).T
    return {"y": _stored(sums, "away") if s.wrong else finish(s, sums)}


@control(
    FP4_LINEAR,
    LINEAR,
    GRID,
    family="rounding",
    oracle="value",
    fault="the store to bf16 cuts bits off instead of rounding",
)
def truncating_store(s: Setting) -> Mapping[str, Any]:
    sums = s.inputs["x"].float() @ weight32(s).T
    return {"y": _stored(sums, "cut") if s.wrong else finish(s, sums)}


@control(
    FP4_LINEAR,
    LINEAR | {"x": "fp16", "bias": 1},
    family="rounding",
    oracle="value",
    fault="the product is rounded to bf16 before the bias is added",
)
def undeclared_store(s: Setting) -> Mapping[str, Any]:
    sums = s.inputs["x"].float() @ weight32(s).T
    return {"y": finish(s, sums.bfloat16().float() if s.wrong else sums)}


@control(
    FP4_DEQUANTIZE,
    {"fmt": "mxfp4", "y": "fp32", "dist": "grid", "n": 8, "k": 64},
    family="rounding",
    oracle="value",
    fault="subnormal products are flushed to zero",
)
def flushed_subnormals(s: Setting) -> Mapping[str, Any]:
    w = weight32(s)
    return {"weight": torch.where(w.abs() < 2.0**-126, 0.0 * w, w) if s.wrong else w}


# -- tiles -------------------------------------------------------------------------------------------------------------


def _over_tiles(s: Setting, tiles: list[slice]) -> Tensor:
    x, w = s.inputs["x"].float(), weight32(s)
    return finish(s, sum((x[:, t] @ w[:, t].T for t in tiles), torch.zeros(len(x), len(w))))


@control(
    FP4_LINEAR,
    LINEAR | {"k": 1024},
    family="tiles",
    oracle="value",
    fault="the last tile of K is dropped",
)
def dropped_last_tile(s: Setting) -> Mapping[str, Any]:
    k = s.case.axis("k")
    tiles = [slice(at, at + TILE) for at in range(0, k, TILE)]
    return {"y": _over_tiles(s, tiles[:-1] if s.wrong else tiles)}


@control(
    FP4_LINEAR,
    LINEAR,
    LINEAR | {"k": 144},
    family="tiles",
    oracle="value",
    fault="what is left of K after whole tiles is ignored",
)
def ignored_tail(s: Setting) -> Mapping[str, Any]:
    k = s.case.axis("k")
    tiles = [slice(at, min(at + TILE, k)) for at in range(0, k // TILE * TILE if s.wrong else k, TILE)]
    return {"y": _over_tiles(s, tiles)}


@control(
    FP4_LINEAR,
    LINEAR | {"m": 20},
    family="tiles",
    oracle="poison",
    fault="rows after the last whole tile of 16 are left as they were",
)
def uninitialised_rows(s: Setting) -> None:
    m = s.case.axis("m")
    rows = m // 16 * 16 if s.wrong else m
    s.out["y"][:rows] = linear(s)[:rows]


@control(
    FP4_LINEAR,
    LINEAR | {"m": 17, "n": 24},
    family="tiles",
    oracle="value",
    fault="rows and columns of the output are told apart by the wrong stride",
)
def wrong_output_stride(s: Setting) -> Mapping[str, Any]:
    y = linear(s)
    return {"y": y.T.reshape(y.shape) if s.wrong else y}


@control(
    FP4_LINEAR,
    LINEAR | {"k": 192},
    family="tiles",
    oracle="value",
    fault="a double buffer's slot is read before it is filled: the first tile is used twice, the last never",
)
def missing_barrier_model(s: Setting) -> Mapping[str, Any]:
    tiles = [slice(at, at + TILE) for at in range(0, s.case.axis("k"), TILE)]
    return {"y": _over_tiles(s, [tiles[0], *tiles[:-1]] if s.wrong else tiles)}


# -- bounds ------------------------------------------------------------------------------------------------------------


@control(
    FP4_LINEAR,
    LINEAR,
    family="bounds",
    oracle="red_zones",
    fault="one element past the end of the output is written, with a right answer before it",
    imitates="flashinfer-ai/flashinfer#3978",
)
def write_past_end(s: Setting) -> None:
    y = s.out["y"]
    y.copy_(linear(s))
    if s.wrong:
        y.as_strided((1,), (1,), y.storage_offset() + y.numel()).fill_(1.0)


@control(
    FP4_LINEAR,
    LINEAR,
    family="bounds",
    oracle="red_zones",
    fault="the row before the first is written: an unsigned index underflows",
)
def write_before_start(s: Setting) -> None:
    y = s.out["y"]
    y.copy_(linear(s))
    if s.wrong:
        y.as_strided((1,), (1,), y.storage_offset() - 1).zero_()


@control(
    FP4_LINEAR,
    LINEAR,
    family="bounds",
    oracle="red_zones",
    fault="a masked load is not masked: what lies past the last row of x is added, times zero",
)
def read_past_end(s: Setting) -> Mapping[str, Any]:
    y, x = linear(s), s.inputs["x"]
    if s.wrong:
        beyond = x.as_strided((16,), (1,), x.storage_offset() + x.numel()).float()
        y = y + (0.0 * beyond.sum()).to(y.dtype)
    return {"y": y}


@control(
    FP4_LINEAR,
    LINEAR,
    family="bounds",
    oracle="red_zones",
    fault="scratch is written past the end of an input",
)
def write_past_input(s: Setting) -> Mapping[str, Any]:
    x = s.inputs["x"]
    if s.wrong:
        x.as_strided((4,), (1,), x.storage_offset() + x.numel()).fill_(3.0)
    return {"y": linear(s)}


# -- epilogue ----------------------------------------------------------------------------------------------------------


@control(
    FP4_LINEAR,
    FP32 | {"act": "gelu", "dist": "uniform", "m": 32},
    family="epilogue",
    oracle="value",
    fault="gelu in its tanh form where the erf form is meant",
)
def tanh_gelu(s: Setting) -> Mapping[str, Any]:
    x, w = s.inputs["x"].float(), weight32(s)
    return {
        "y": torch.nn.functional.gelu(x @ w.T, approximate="tanh")
        if s.wrong
        else finish(s, worst_order_product(x, w.T))
    }


@control(
    FP4_LINEAR,
    LINEAR | {"act": "relu", "bias": 1},
    family="epilogue",
    oracle="value",
    fault="the bias is added after the activation",
)
def late_bias(s: Setting) -> Mapping[str, Any]:
    sums = s.inputs["x"].float() @ weight32(s).T
    y = torch.relu(sums) + s.inputs["bias"].float()
    return {"y": y.to(torch.bfloat16) if s.wrong else finish(s, sums)}


@control(
    FP4_LINEAR,
    LINEAR | {"bias": 1},
    family="fallback",
    oracle="value",
    fault="a parameter the kernel does not know is ignored in silence: no bias",
)
def ignored_bias(s: Setting) -> Mapping[str, Any]:
    sums = s.inputs["x"].float() @ weight32(s).T
    return {"y": sums.to(torch.bfloat16) if s.wrong else finish(s, sums)}


@control(
    FP4_LINEAR,
    LINEAR | {"k": 160},
    family="fallback",
    oracle="value",
    fault="an exception (K is no multiple of 128) is swallowed and zeros are returned",
)
def swallowed_exception(s: Setting) -> Mapping[str, Any]:
    try:
        if s.wrong and s.case.axis("k") % 128:
            raise RuntimeError("K must be a multiple of 128")
        return {"y": linear(s)}
    except RuntimeError:
        return {"y": torch.zeros(s.case.axis("m"), s.case.axis("n"))}


# -- decoding ----------------------------------------------------------------------------------------------------------

DECODE: dict[str, int | str] = {"fmt": "nvfp4", "y": "fp32", "n": 8, "k": 128}


def _decoded(s: Setting, **changed: Tensor) -> Tensor:
    return fp4.dequantize(s.case.text("fmt"), {**s.inputs, **changed}, torch_dtype(s.case.text("y")))


@control(
    FP4_DEQUANTIZE,
    DECODE,
    family="decode",
    oracle="value",
    fault="element 0 of a pair is taken from the high nibble",
)
def swapped_nibbles(s: Setting) -> Mapping[str, Any]:
    codes = s.inputs["codes"]
    return {"weight": _decoded(s, codes=codes << 4 | codes >> 4 if s.wrong else codes)}


@control(
    FP4_DEQUANTIZE,
    DECODE,
    family="decode",
    oracle="value",
    fault="each block is multiplied by the scale of the block before it",
)
def shifted_scale(s: Setting) -> Mapping[str, Any]:
    scale = s.inputs["scale"]
    rolled = scale.view(torch.uint8).roll(1, dims=1).view(scale.dtype)
    return {"weight": _decoded(s, scale=rolled if s.wrong else scale)}


@control(
    FP4_DEQUANTIZE,
    DECODE | {"fmt": "absmax7_g128", "k": 256},
    family="decode",
    oracle="value",
    fault="the group of an element is (column + 1) // 128: the last of each group has its neighbour's scale",
)
def off_by_one_group(s: Setting) -> Mapping[str, Any]:
    k = s.case.axis("k")
    group = ((torch.arange(k) + (1 if s.wrong else 0)) // 128).clamp(max=k // 128 - 1)
    values = fp4.unpack(s.inputs["codes"]).float() - 8.0
    return {"weight": values * s.inputs["scale"][:, group]}


@control(
    FP4_DEQUANTIZE,
    DECODE,
    family="decode",
    oracle="value",
    fault="the global scale of NVFP4 is forgotten",
)
def forgotten_global_scale(s: Setting) -> Mapping[str, Any]:
    g = s.inputs["global_scale"]
    return {"weight": _decoded(s, global_scale=torch.ones_like(g) if s.wrong else g)}


@control(
    FP4_DEQUANTIZE,
    DECODE | {"fmt": "mxfp4", "dist": "grid"},
    family="decode",
    oracle="value",
    fault="E8M0's NaN (255) is decoded as a number",
)
def e8m0_nan_as_number(s: Setting) -> Mapping[str, Any]:
    w = _decoded(s)
    return {"weight": torch.nan_to_num(w, nan=0.0) if s.wrong else w}


@control(
    FP4_DEQUANTIZE,
    DECODE | {"dist": "grid"},
    family="decode",
    oracle="value",
    fault="codes from 8 on are taken for negative integers instead of sign and magnitude",
)
def two_complement_codes(s: Setting) -> Mapping[str, Any]:
    codes = s.inputs["codes"]
    if s.wrong:
        wide = fp4.unpack(codes)
        codes = fp4.pack(torch.where(wide >= 8, 24 - wide, wide) & 15)
    return {"weight": _decoded(s, codes=codes)}


@control(
    FP4_DEQUANTIZE,
    DECODE | {"fmt": "nf4"},
    family="decode",
    oracle="value",
    fault="NF4's table is a printed one with four digits",
)
def rounded_table(s: Setting) -> Mapping[str, Any]:
    table = torch.tensor(fp4.NF4_TABLE)
    if s.wrong:
        table = torch.round(table * 1e4) / 1e4
    scale = s.inputs["scale"].repeat_interleave(64, dim=1)
    return {"weight": table[fp4.unpack(s.inputs["codes"]).long()] * scale}


# -- encoding ----------------------------------------------------------------------------------------------------------

ENCODE: dict[str, int | str] = {"fmt": "nvfp4", "w": "fp32", "dist": "grid", "n": 8, "k": 128}


def _encoded(s: Setting, codes: Tensor | None = None, **changed: Tensor) -> dict[str, Tensor]:
    right = fp4.quantize(s.case.text("fmt"), s.inputs["w"])
    return right | changed | ({} if codes is None else {"codes": fp4.pack(codes)})


def _quotients(s: Setting, right: Mapping[str, Tensor]) -> Tensor:
    scale = right["scale"].float() * right["global_scale"]
    quotients: Tensor = s.inputs["w"].float() / scale.repeat_interleave(s.case.axis("k") // scale.shape[1], dim=1)
    return quotients


@control(
    FP4_QUANTIZE,
    ENCODE,
    family="encode",
    oracle="value",
    fault="ties go away from zero instead of to the even code",
)
def ties_away_codes(s: Setting) -> Mapping[str, Any]:
    right = _encoded(s)
    if not s.wrong:
        return right
    value = _quotients(s, right)
    midpoints = torch.tensor((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    code = (value.abs()[..., None] >= midpoints).sum(-1).to(torch.uint8)
    return _encoded(s, code | (torch.signbit(value).to(torch.uint8) << 3))


@control(
    FP4_QUANTIZE,
    ENCODE | {"dist": "normal"},
    ENCODE,
    family="encode",
    oracle="value",
    fault="the sign of zero is lost",
)
def lost_negative_zero(s: Setting) -> Mapping[str, Any]:
    right = _encoded(s)
    codes = fp4.unpack(right["codes"])
    return _encoded(s, torch.where(codes == 8, 0, codes) if s.wrong else codes)


@control(
    FP4_QUANTIZE,
    ENCODE | {"fmt": "absmax7_row", "dist": "normal", "n": 64},
    family="encode",
    oracle="value",
    fault="absmax is multiplied by fl(1/7) instead of divided by 7",
)
def reciprocal_scale(s: Setting) -> Mapping[str, Any]:
    absmax = s.inputs["w"].float().abs().amax(dim=1)
    return _encoded(s, scale=absmax * (torch.ones(1) / 7.0) if s.wrong else absmax / torch.full((1,), 7.0))


@control(
    FP4_QUANTIZE,
    ENCODE | {"fmt": "absmax7_row", "dist": "zeros"},
    family="encode",
    oracle="nonfinite",
    fault="the scale of a zero row is 0/0",
)
def zero_block(s: Setting) -> Mapping[str, Any]:
    right = _encoded(s)
    return right | ({"scale": torch.full_like(right["scale"], torch.nan)} if s.wrong else {})


@control(
    FP4_QUANTIZE,
    ENCODE | {"fmt": "mxfp4", "dist": "normal"},
    family="encode",
    oracle="value",
    fault="MXFP4's scale is rounded up where the format's rule is floor",
)
def ceil_for_floor(s: Setting) -> Mapping[str, Any]:
    return fp4.quantize("mxfp4_ceil" if s.wrong else "mxfp4", s.inputs["w"])


make = control.factory(BY_NAME)
CORPUS = Corpus(
    "controls_products", "wrong linear layers and codecs", control.controls, "vbench.controls.products:make"
)
