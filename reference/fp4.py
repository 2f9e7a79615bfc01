"""Meaning of the 4-bit formats: encode, pack, decode. Plain torch, any device, obvious before fast.

Formats (elements sharing a scale in brackets)
    absmax7_tensor [whole tensor], absmax7_row [row], absmax7_g128 [128 along k]: integers -7..7 times a float32 scale.
        scale = max(absmax / 7, 2^-126) in IEEE float32 division; code = clamp(round-half-even(w / scale), -7, 7) + 8.
        Code 0 is never written by the encoder and decodes to -8.
    nvfp4 [16 along k]: E2M1 times an E4M3 block scale times one float32 global scale.
        g = max(absmax(tensor) / 2688, 2^-126); s = E4M3(clamp(absmax(block) / 6 / g, 2^-6, 448));
        code = E2M1(w / (s g)), nearest, ties to the even code, saturating at 6, sign of zero kept.
        (torchao NVFP4Tensor.to_nvfp4 gives the same scales; OCP Microscaling v1.0 defines E2M1.)
    mxfp4 [32 along k]: E2M1 times an E8M0 block scale: byte b is 2^(b - 127), 255 is NaN and no encoder writes it.
        b = max(0, biased exponent of round(absmax) - 2); code = E2M1(w / 2^(b - 127)). OCP Microscaling v1.0 section
        6.3 takes absmax as it is (floor: it then clips, since absmax / scale reaches 8); see MXFP4_ROUNDING for the
        other rules. A zero block has b = 0.
    nf4 [64 along k]: one of 16 values (NF4_TABLE) times a float32 scale.
        scale = max(absmax, 2^-126); code = number of NF4_THRESHOLDS strictly below w / scale, IEEE float32 division, so
        that a tie goes to the lower value. (QLoRA, arXiv 2305.14314, appendix E; bitsandbytes csrc/kernels.cu
        dQuantizeNF4, which multiplies by fl32(1 / absmax) instead and so may differ next to a threshold.)
        The floor keeps the division defined for a zero block, whose code 7 decodes to zeros under any scale; blocks of
        subnormal numbers lose precision relative to themselves.

Element 0 of a pair sits in the low nibble (bitsandbytes: in the high one). Weights are [n, k] with k contiguous.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vbench.errors import Unsupported
from vbench.reference.ops.fp4 import FORMAT_GROUPS, decoded_as, packed_bytes
from vbench.reference.sampling import generator, seeded, torch_dtype
from vbench.reference.trained import trained_weight
from vbench.spec import Case, Expected, Numerics

E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_TABLE = E2M1_MAGNITUDES + tuple(-v for v in E2M1_MAGNITUDES)
ABSMAX7_TABLE = tuple(float(code - 8) for code in range(16))
#: QLoRA's NormalFloat4 as published: quantiles of a normal distribution scaled to [-1, 1], each exact in float32.
NF4_TABLE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
#: Midpoints of neighbours, rounded to float32 as bitsandbytes has them (nine do not fit).
NF4_THRESHOLDS = torch.tensor([(low + high) / 2 for low, high in pairwise(NF4_TABLE)], dtype=torch.float64).to(
    torch.float32
)
#: Added to the float32 bits of a block's absmax before its exponent is taken (torchao ScaleCalculationMode).
#: floor: nothing. even: up to the next power of two from a significand of 1.75, which is rounding to E2M1's one
#: fraction bit. rceil: from above 1.5, the smallest scale with absmax / scale <= 6. ceil: from above 1.
#: torchao forms rceil as fl32(absmax fl32(1/6)), the same but for scales below 2^-126; and its even gives NaN from
#: 1.75 x 2^127 on, where this keeps to the formula.
MXFP4_ROUNDING = {"mxfp4": 0, "mxfp4_even": 1 << 21, "mxfp4_rceil": (1 << 22) - 1, "mxfp4_ceil": (1 << 23) - 1}
E4M3_MAX = 448.0
E4M3_MIN_SCALE = 2.0**-6
MIN_NORMAL = 2.0**-126


def table(fmt: str) -> tuple[float, ...]:
    """Value of each of the 16 codes of ``fmt``, before scaling."""
    if fmt == "nf4":
        return NF4_TABLE
    return E2M1_TABLE if fmt in ("nvfp4", "mxfp4") else ABSMAX7_TABLE


def pack(codes: Tensor) -> Tensor:
    """Codes u8 [n, k] in 0..15 -> bytes u8 [n, k/2], element 0 in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Bytes u8 [n, k/2] -> codes u8 [n, k]."""
    n, half = packed.shape
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(n, 2 * half)


def e2m1_codes(value: Tensor) -> Tensor:
    """float32 -> E2M1 codes u8: nearest, ties to the even code, saturating, sign (also of zero) in bit 3."""
    a = value.abs()
    code = torch.zeros_like(value, dtype=torch.uint8)
    # A tie goes to the even code: midpoints below an even code round up (>=), below an odd code stay down (>).
    for above, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), start=1):
        code += (a >= midpoint).to(torch.uint8) if above % 2 == 0 else (a > midpoint).to(torch.uint8)
    return code | (torch.signbit(value).to(torch.uint8) << 3)


def nf4_codes(value: Tensor) -> Tensor:
    """float32 in [-1, 1] -> NF4 codes u8: the number of thresholds strictly below."""
    code = torch.zeros_like(value, dtype=torch.uint8)
    for threshold in NF4_THRESHOLDS.to(value.device):
        code += (value > threshold).to(torch.uint8)
    return code


def e8m0_bytes(absmax: Tensor, rounding: int) -> Tensor:
    """float32 block maxima >= 0 -> E8M0 bytes u8 of their mxfp4 scales, by integer arithmetic on the bits.

    Args:
        rounding: see MXFP4_ROUNDING.
    """
    biased_exponent = (absmax.contiguous().view(torch.int32) + rounding) >> 23
    return (biased_exponent - 2).clamp(min=0).to(torch.uint8)


def e8m0_values(scale: Tensor) -> Tensor:
    """E8M0 bytes u8 -> float32: 2^(b - 127), the subnormal 2^-127 for b = 0, NaN for b = 255."""
    bits = scale.to(torch.int32) << 23
    bits = torch.where(scale == 0, 1 << 22, bits)
    return torch.where(scale == 255, 0x7FC00000, bits).view(torch.float32)


def scale_values(fmt: str, scale: Tensor) -> Tensor:
    """The scales of a weight in ``fmt`` as float32, exact."""
    return e8m0_values(scale) if fmt == "mxfp4" else scale.to(torch.float32)


def _groups(w: Tensor, group: int) -> Tensor:
    """[n, k] -> [..., elements sharing one scale]."""
    n, k = w.shape
    if group == 0:
        return w.reshape(1, n * k)
    if group == -1:
        return w
    return w.reshape(n, k // group, group)


def quantize(fmt: str, w: Tensor) -> dict[str, Tensor]:
    """Encode w [n, k] (float32, bfloat16 or float16) to ``fmt``, one of ENCODINGS.

    Returns:
        codes u8 [n, k/2]; scale float32 [1], [n], [n, k/128] or [n, k/64], float8_e4m3fn [n, k/16], or u8 [n, k/32];
        global_scale float32 [1] (1.0 but for nvfp4).

    Raises:
        Unsupported: a value that is NaN or infinite.
    """
    if not bool(torch.isfinite(w).all()):
        raise Unsupported("nonfinite_weight", "the weight holds NaN or Inf and FP4 has no code for them")
    w32 = w.to(torch.float32)
    n, k = w32.shape
    groups = _groups(w32, FORMAT_GROUPS[decoded_as(fmt)])
    absmax = groups.abs().amax(dim=-1)
    one = torch.ones(1, dtype=torch.float32, device=w.device)
    if fmt == "nvfp4":
        # Divisors are tensors: dividing by a Python number may be turned into multiplying by its reciprocal.
        g = torch.clamp(w32.abs().amax().reshape(1) / (one * 6.0 * E4M3_MAX), min=MIN_NORMAL)
        scale = torch.clamp(absmax / (one * 6.0) / g, E4M3_MIN_SCALE, E4M3_MAX).to(torch.float8_e4m3fn)
        codes = e2m1_codes(groups / (scale.to(torch.float32) * g).unsqueeze(-1))
        return {"codes": pack(codes.reshape(n, k)), "scale": scale, "global_scale": g}
    if fmt in MXFP4_ROUNDING:
        scale = e8m0_bytes(absmax, MXFP4_ROUNDING[fmt])
        codes = e2m1_codes(groups / e8m0_values(scale).unsqueeze(-1))
        return {"codes": pack(codes.reshape(n, k)), "scale": scale, "global_scale": one}
    if fmt == "nf4":
        scale = torch.clamp(absmax, min=MIN_NORMAL)
        codes = nf4_codes(groups / scale.unsqueeze(-1))
        return {"codes": pack(codes.reshape(n, k)), "scale": scale, "global_scale": one}
    scale = torch.clamp(absmax / (one * 7.0), min=MIN_NORMAL)
    q = torch.clamp(torch.round(groups / scale.unsqueeze(-1)), -7, 7)
    return {"codes": pack((q + 8).to(torch.uint8).reshape(n, k)), "scale": scale, "global_scale": one}


def _scale_per_element(fmt: str, scale: Tensor, n: int, k: int) -> Tensor:
    group = FORMAT_GROUPS[fmt]
    s = scale_values(fmt, scale)
    if group == 0:
        return s.reshape(1, 1).expand(n, k)
    if group == -1:
        return s.reshape(n, 1).expand(n, k)
    return s.repeat_interleave(group, dim=1)


def decode_float64(fmt: str, weight: dict[str, Any]) -> Tensor:
    """The exact weight [n, k] in float64: table value x scale x global scale needs at most 48 significant bits."""
    codes = unpack(weight["codes"])
    n, k = codes.shape
    values = torch.tensor(table(fmt), dtype=torch.float64, device=codes.device)[codes.long()]
    exact: Tensor = values * _scale_per_element(fmt, weight["scale"], n, k).double() * weight["global_scale"].double()
    return exact


def dequantize(fmt: str, weight: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """fl_y(fl32(value x scale x global)) [n, k]: the float32 product first (value x E4M3 or E8M0 scale is exact in it).

    mxfp4 may overflow float32 (6 x 2^127) and then gives infinity; its NaN scale gives NaN for every code, zero too.
    """
    codes = unpack(weight["codes"])
    n, k = codes.shape
    values = torch.tensor(table(fmt), dtype=torch.float32, device=codes.device)[codes.long()]
    product = values * _scale_per_element(fmt, weight["scale"], n, k)
    if fmt == "nvfp4":
        product = product * weight["global_scale"]
    return product.to(dtype)


@functools.lru_cache(maxsize=1)
def _draw_weight(fmt: str, dist: str, n: int, k: int, seed: int) -> Tensor:
    """float32 [n, k] on the CPU. Kept for the next case: a sweep over tokens asks for one weight again and again."""
    gen = seeded("weight", dist, n, k, seed)
    if dist == "zeros":
        w = torch.zeros(n, k)
    elif dist == "uniform":
        w = (torch.rand(n, k, generator=gen) * 2 - 1) * k**-0.5
    elif dist == "laplace":
        e = torch.rand(n, k, generator=gen).clamp_(1e-7, 1 - 1e-7) - 0.5
        w = -0.02 * torch.sign(e) * torch.log1p(-2 * e.abs())
    elif dist == "student5":
        chi2 = torch.randn(5, n, k, generator=gen).square().sum(dim=0)
        w = 0.02 * torch.randn(n, k, generator=gen) / torch.sqrt(chi2 / 5)
    elif dist == "trained":
        w = trained_weight(n, k, seed)
    elif dist == "grid":
        group = FORMAT_GROUPS[fmt]
        if fmt == "nf4":
            top = 1.0
            up, down = (torch.nextafter(NF4_THRESHOLDS, torch.tensor(side)) for side in (2.0, -2.0))
            points = torch.cat((NF4_THRESHOLDS, up, down, torch.tensor(NF4_TABLE)))
            w = points[torch.randint(0, len(points), (n, k), generator=gen)]
        else:
            top = max(table(fmt)) if fmt in ("nvfp4", "mxfp4") else 7.0
            w = torch.randint(-4 * int(top), 4 * int(top) + 1, (n, k), generator=gen).to(torch.float32) / 4
        w[:, 0 :: group if group > 0 else k] = top
    else:
        w = torch.randn(n, k, generator=gen) * 0.02
        if dist == "outlier":
            rows = torch.randint(0, n, (max(1, n // 16),), generator=gen)
            w[rows, 0] = 3.0 + torch.rand(len(rows), generator=gen)
        elif dist in ("nan", "inf"):
            w[n // 2, k // 2] = float(dist)
    return w


def make_weight(case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """w [n, k] of the case's distribution, drawn on the CPU so that every device sees the same values.

    The same for every format and token count (grid: every token count). Grid values are multiples of a quarter (nf4:
    thresholds, their neighbours and table values) with the format's largest value in each block, so that every tie
    occurs.
    """
    dist = case.text("dist")
    fmt = decoded_as(case.text("fmt")) if dist == "grid" else ""
    return _draw_weight(fmt, dist, case.axis("n"), case.axis("k"), case.seed).to(device, dtype, copy=True)


def degenerate(case: Case, elements: int) -> str:
    """Why a kernel that does no work may be right: nothing but zeros, or a single element that is its own mean."""
    if case.text("dist") == "zeros":
        return "an all-zero weight"
    return "a single element is its own mean" if elements == 1 else ""


def quantize_inputs(case: Case, device: str) -> dict[str, Any]:
    """``w`` [n, k] in the case's dtype."""
    return {"w": make_weight(case, torch_dtype(case.text("w")), device)}


def quantize_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """Bitwise: the encoder has one right answer. All rows, since scales depend on all elements."""
    want = quantize(case.text("fmt"), inputs["w"])
    why = degenerate(case, want["codes"].numel())
    return {name: Expected(t, None, t.dtype, tuple(t.shape), degenerate=why) for name, t in want.items()}


def quantize_metrics(
    case: Case, inputs: dict[str, Any], outputs: dict[str, Any], expected: dict[str, Expected]
) -> dict[str, float]:
    """Accuracy of the decoded weight against the unquantised one, and storage.

    rel_frobenius = |dq - w|_F / |w|_F; sqnr_db = -20 log10 of it; cosine of the flattened tensors; max_abs_error over
    the tensor's absmax; bits_per_weight with all scales; savings are of bytes, scales included.
    """
    fmt = decoded_as(case.text("fmt"))
    w = inputs["w"].double()
    dq = decode_float64(fmt, outputs)
    n, k = w.shape
    bits = 8 * packed_bytes(fmt, n, k) / (n * k)
    out = {
        "bits_per_weight": bits,
        "saving_over_fp32": 1 - bits / 32,
        "saving_over_bf16": 1 - bits / 16,
    }
    norm = float(w.norm())
    if norm > 0:
        rel = float((dq - w).norm()) / norm
        out["rel_frobenius"] = rel
        out["one_minus_rel_frobenius"] = 1 - rel
        out["max_abs_error_over_absmax"] = float((dq - w).abs().max() / w.abs().max())
        if rel > 0:
            out["sqnr_db"] = -20 * float(torch.log10(torch.tensor(rel, dtype=torch.float64)))
            out["cosine"] = float((dq * w).sum() / (dq.norm() * w.norm()))
    return out


def dequantize_inputs(case: Case, device: str) -> dict[str, Any]:
    """``codes``, ``scale``, ``global_scale`` of an encoded weight.

    With ``grid`` every code incl. those no encoder writes, and for mxfp4 the scale bytes at the ends of its range too
    (in the last blocks, at most half of them): 0 and 1 (subnormal products), 254 (overflow) and 255 (NaN).
    """
    fmt = case.text("fmt")
    if case.text("dist") != "grid":
        return packed_weight(case, device)
    weight = _grid_weight(case, tuple(range(16)))
    if fmt == "mxfp4":
        scale = weight["scale"].view(-1)
        ends = torch.tensor((0, 255, 254, 1, 253, 2), dtype=torch.uint8)[: scale.numel() // 2]
        scale[scale.numel() - ends.numel() :] = ends
    return {name: t.to(device) for name, t in weight.items()}


#: nf4 codes whose values are integers, so that grid sums are exact: -1, 0 and 1.
NF4_INTEGER_CODES = tuple(code for code, value in enumerate(NF4_TABLE) if value.is_integer())


def packed_weight(case: Case, device: str) -> dict[str, Any]:
    """An encoded weight for the case.

    ``grid`` draws codes and power-of-two scales directly, so that every decoded value and every sum of few products
    is exact in float32 whatever the order (the bitwise cross-backend cases). nf4's table lies on no grid: of it only
    the codes for -1, 0 and 1 are drawn there; the others are for the cases with a budget.
    """
    if case.text("dist") != "grid":
        return dict(quantize(case.text("fmt"), make_weight(case, torch.float32, device)))
    codes = NF4_INTEGER_CODES if case.text("fmt") == "nf4" else tuple(range(16))
    return {name: t.to(device) for name, t in _grid_weight(case, codes).items()}


def _grid_weight(case: Case, drawn: tuple[int, ...]) -> dict[str, Tensor]:
    """Codes out of ``drawn`` and scales 1/2, 1 or 2, on the CPU."""
    fmt, n, k = case.text("fmt"), case.axis("n"), case.axis("k")
    gen = generator(case, "codes")
    index = torch.randint(0, len(drawn), (n, k), generator=gen)
    codes = pack(torch.tensor(drawn, dtype=torch.uint8)[index])
    group = FORMAT_GROUPS[fmt]
    shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    exponent = torch.randint(-1, 2, shape, generator=gen)
    if fmt == "mxfp4":
        scale = (exponent + 127).to(torch.uint8)
    else:
        scale = torch.exp2(exponent.to(torch.float32))
        scale = scale.to(torch.float8_e4m3fn) if fmt == "nvfp4" else scale
    return {"codes": codes, "scale": scale, "global_scale": torch.ones(1, dtype=torch.float32)}


def dequantize_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """Bitwise: decoding rounds at most twice, in a fixed order."""
    want = dequantize(case.text("fmt"), inputs, torch_dtype(case.text("y")))
    return {"weight": Expected(want, None, want.dtype, tuple(want.shape), degenerate=degenerate(case, want.numel()))}
