"""Definitions of the 4-bit codec and of the linear layer on 4-bit weights. Imports no torch.

Sizes: ``m`` tokens, ``n`` output features, ``k`` input features.
"""

from __future__ import annotations

from vbench.reference.ops.types import DTYPES, ITEMSIZE
from vbench.spec import Case, Op, Output, Param

#: name -> elements of K that share a scale (0: the whole tensor, -1: the whole row)
FORMAT_GROUPS = {"absmax7_tensor": 0, "absmax7_row": -1, "absmax7_g128": 128, "nvfp4": 16, "mxfp4": 32, "nf4": 64}
FORMATS = tuple(FORMAT_GROUPS)
#: mxfp4 with another rule for the block's scale than OCP's floor: encoders only, what they write decodes as mxfp4
MXFP4_ENCODINGS = ("mxfp4_rceil", "mxfp4_even", "mxfp4_ceil")
#: what ``fp4_quantize`` encodes to
ENCODINGS = (*FORMATS, *MXFP4_ENCODINGS)
#: bytes of one scale, where it is no float32
SCALE_BYTES = {"nvfp4": 1, "mxfp4": 1}
#: distributions of generated values; ``nan`` and ``inf`` plant one such value and must be refused
WEIGHT_DISTRIBUTIONS = (
    "normal", "uniform", "laplace", "student5", "grid", "zeros", "outlier", "nan", "inf", "trained",
)  # fmt: skip
#: (n, k) of the weights of a trained model that ``trained`` names: see reference/trained.py
TRAINED_SHAPES = ((512, 128), (128, 512))


def decoded_as(encoding: str) -> str:
    """The format whose decoder reads what the encoder ``encoding`` wrote."""
    return "mxfp4" if encoding in MXFP4_ENCODINGS else encoding


def packed_bytes(fmt: str, n: int, k: int) -> int:
    """Bytes of an n x k weight in ``fmt``, one of ENCODINGS: codes and all scales (nvfp4's global one too)."""
    fmt = decoded_as(fmt)
    group = FORMAT_GROUPS[fmt]
    scales = 1 if group == 0 else n if group == -1 else n * k // group
    return n * k // 2 + SCALE_BYTES.get(fmt, 4) * scales + (4 if fmt == "nvfp4" else 0)


def reject_weight(case: Case) -> tuple[str, str] | None:
    """Why no weight [n, k] in format ``fmt`` of distribution ``dist`` exists, or ``None``."""
    n, k, fmt = case.axis("n"), case.axis("k"), case.text("fmt")
    if n == 0 or k == 0:
        return "zero_size", f"n={n}, k={k}: a weight needs at least one element; skip the layer instead"
    if k % 2:
        return "k_odd", f"k={k}: two codes share a byte, so k must be even; pad the weight"
    group = FORMAT_GROUPS[decoded_as(fmt)]
    if group > 0 and k % group:
        return "k_not_multiple_of_block", f"k={k} is no multiple of {fmt}'s block of {group}; pad the weight"
    if case.text("dist") == "trained" and (n, k) not in TRAINED_SHAPES:
        return "no_such_trained_weight", f"n={n}, k={k}: the trained weights are {TRAINED_SHAPES}"
    if case.text("dist") in ("nan", "inf"):
        return "nonfinite_weight", f"the weight holds {case.text('dist')}: FP4 has no code for it; clean the weight"
    return None


def _reject_linear(case: Case) -> tuple[str, str] | None:
    if case.axis("m") == 0:
        return "zero_size", "m=0: no tokens; skip the call instead"
    return reject_weight(case)


_FMT = Param("fmt", "choice", "4-bit weight format", FORMATS)
_ENCODING = Param("fmt", "choice", "4-bit weight format, or mxfp4 with another scale rule", ENCODINGS)
_N = Param("n", "axis", "output features")
_K = Param("k", "axis", "input features")
_W_DTYPE = Param("w", "choice", "dtype of the unquantised weight", DTYPES, "bf16")
_W_DIST = Param("dist", "choice", "distribution of the values", WEIGHT_DISTRIBUTIONS, "normal")

FP4_QUANTIZE = Op(
    name="fp4_quantize",
    summary="w[n,k] -> codes u8[n,k/2] (low nibble first), scale, global_scale: the exact encoder of each format",
    params=(_ENCODING, _W_DTYPE, _W_DIST, _N, _K),
    outputs=(
        Output("codes", "u8", "n, k/2"),
        Output("scale", "fp32 (absmax7, nf4), e4m3 (nvfp4) or u8 (mxfp4: E8M0)", "1 | n | n, k/group"),
        Output("global_scale", "fp32", "1"),
    ),
    inputs="vbench.reference.fp4:quantize_inputs",
    oracle="vbench.reference.fp4:quantize_oracle",
    reject=reject_weight,
    metrics="vbench.reference.fp4:quantize_metrics",
    bytes=lambda c: (
        c.axis("n") * c.axis("k") * ITEMSIZE[c.text("w")] + packed_bytes(c.text("fmt"), c.axis("n"), c.axis("k"))
    ),
)

FP4_DEQUANTIZE = Op(
    name="fp4_dequantize",
    summary="codes, scale, global_scale -> w[n,k] in dtype y: table value times scales in float32, rounded once to y",
    params=(_FMT, Param("y", "choice", "output dtype", DTYPES, "bf16"), _W_DIST, _N, _K),
    outputs=(Output("weight", "y", "n, k"),),
    inputs="vbench.reference.fp4:dequantize_inputs",
    oracle="vbench.reference.fp4:dequantize_oracle",
    reject=reject_weight,
    bytes=lambda c: (
        c.axis("n") * c.axis("k") * ITEMSIZE[c.text("y")] + packed_bytes(c.text("fmt"), c.axis("n"), c.axis("k"))
    ),
)

FP4_LINEAR = Op(
    name="fp4_linear",
    summary="y[m,n] = act(x[m,k] @ decode(codes, scales)[n,k]^T + bias[n]), y in x's dtype; gelu is the erf form",
    params=(
        _FMT,
        Param("x", "choice", "dtype of x, bias and y", DTYPES, "bf16"),
        Param("act", "choice", "activation", ("none", "relu", "gelu", "silu"), "none"),
        Param("bias", "flag", "1 adds a bias", default=0),
        _W_DIST,
        Param("m", "axis", "tokens"),
        _N,
        _K,
    ),
    outputs=(Output("y", "x", "m, n"),),
    inputs="vbench.reference.linear:linear_inputs",
    oracle="vbench.reference.linear:linear_oracle",
    reject=_reject_linear,
    flops=lambda c: 2 * c.axis("m") * c.axis("n") * c.axis("k"),
    bytes=lambda c: (
        packed_bytes(c.text("fmt"), c.axis("n"), c.axis("k"))
        + (c.axis("m") * (c.axis("n") + c.axis("k")) + c.axis("bias") * c.axis("n")) * ITEMSIZE[c.text("x")]
    ),
)

OPS: tuple[Op, ...] = (FP4_QUANTIZE, FP4_DEQUANTIZE, FP4_LINEAR)
