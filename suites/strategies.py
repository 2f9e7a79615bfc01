"""Hypothesis strategies of small check cases, every parameter drawn, sizes fit for interpreters and simulators.

About one case in twelve breaks a rule of its op on purpose (odd k, NaN, nothing to compute) and must end UNSUPPORTED.
Imports Hypothesis, so the suites name these functions by text.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD, ATTENTION_DISTRIBUTIONS, LAYOUTS
from vbench.reference.ops.attention_extended import (
    ATTENTION_EXTENDED,
    ATTENTION_EXTENDED_BACKWARD,
    EXTENDED_MASKS,
    MASK_AXES,
)
from vbench.reference.ops.fetch import FETCH_DISTRIBUTIONS, RAW, TIER_FETCH
from vbench.reference.ops.fp4 import (
    ENCODINGS,
    FORMAT_GROUPS,
    FORMATS,
    FP4_DEQUANTIZE,
    FP4_LINEAR,
    FP4_QUANTIZE,
    WEIGHT_DISTRIBUTIONS,
    decoded_as,
)
from vbench.reference.ops.int8 import ACT_QUANTS, INT8_DISTRIBUTIONS, INT8_LINEAR
from vbench.reference.ops.masked import MASKED_BACKWARD, MASKS
from vbench.reference.ops.tiers import TIER_STACK
from vbench.reference.ops.types import DTYPES
from vbench.spec import Case, Frame, Op, size_class

#: Of any size, with an answer: trained weights come in two sizes.
FINITE_DISTRIBUTIONS = tuple(dist for dist in WEIGHT_DISTRIBUTIONS if dist not in ("nan", "inf", "trained"))

#: One case in this many is a bad one.
BAD_ONE_IN = 12

#: So many random outputs do not all agree with their mean to within bfloat16's budget.
MANY = 6

_seeds = st.integers(0, 7)


def _size(draw: st.DrawFn, frame: Frame | None, name: str, options: range | tuple[int, ...], block: int = 1) -> int:
    """``block`` times one of ``options``; in a frame, the fixed value or one of the fixed class (any, if none is)."""
    if frame is not None:
        fixed = dict(frame.fixed).get(name)
        if isinstance(fixed, int):
            return fixed
        wanted = dict(frame.sizes).get(name)
        options = tuple(v for v in options if size_class(v * block) == wanted) or options
    if isinstance(options, range):
        return block * draw(st.integers(options[0], options[-1]))
    return block * draw(st.sampled_from(options))


def _choice(draw: st.DrawFn, frame: Frame | None, name: str, options: tuple[str, ...]) -> str:
    """One of ``options``; in a frame that fixes it, the fixed value."""
    fixed = dict(frame.fixed).get(name) if frame is not None else None
    return fixed if isinstance(fixed, str) else draw(st.sampled_from(options))


def _keep_answerable(values: dict[str, Any], dtype_parameter: str) -> None:
    """Change the draws whose right answer a kernel that does no work could give too, or that has no finite answer.

    An outlier leaves nothing but zeros among the weights that share its absmax scale, so the answer hardly depends on
    the draw; very few weights repeat from draw to draw, and very few outputs may all lie near their mean, or all be
    negative, which relu makes zero. One output
    alone is tagged degenerate by the oracle; the fixed cases have it.
    """
    fmt, dist, act = values["fmt"], values["dist"], values.get("act")
    if dist == "outlier" and fmt == "absmax7_tensor":
        values["dist"] = "student5"
    elif dist == "outlier":
        values["n"] = max(values["n"], 2)
    if dist == "grid":
        values["n"] = max(values["n"], 4)
    values["n"] = max(values["n"], -(-16 // values["k"]))
    if act is not None and values["m"] * values["n"] < MANY:
        values["n"] = MANY
    if act == "relu" or (act in ("gelu", "silu") and dist == "grid"):
        values["n"] = max(values["n"], 24)
    if dist == "grid" and values[dtype_parameter] == "fp16" and act in ("gelu", "silu"):
        # Grid sums may exceed float16's 65504. Where the oracle rounds (none, relu) infinity is then the right answer;
        # its budgeted comparison, which gelu and silu need, has no infinity.
        values["act"] = "relu"


@st.composite
def _weights(
    draw: st.DrawFn,
    op: Op,
    dtype_parameter: str,
    frame: Frame | None,
    most: tuple[int, int, int] = (8, 64, 64),
    linear: bool = False,
) -> Case:
    """A case of an op on a weight [n, k]: format and k that fit each other, unless the case is a bad one.

    Args:
        most: largest m, n and k (in g128, k may be one block whatever it says, and n is a quarter).
        linear: with the parameters of the linear layer.
    """
    most_m, most_n, most_k = most
    fmt = _choice(draw, frame, "fmt", ENCODINGS if op is FP4_QUANTIZE else FORMATS)
    group = FORMAT_GROUPS[decoded_as(fmt)]
    block = group if group > 0 else 2
    values: dict[str, Any] = {
        "fmt": fmt,
        dtype_parameter: _choice(draw, frame, dtype_parameter, DTYPES),
        "dist": draw(st.sampled_from(FINITE_DISTRIBUTIONS)),
        "n": _size(draw, frame, "n", range(1, (most_n if group != 128 else most_n // 4) + 1)),
        "k": _size(draw, frame, "k", range(1, max(1, most_k // block) + 1), block),
    }
    if linear:
        values["act"] = _choice(draw, frame, "act", ("none", "relu", "gelu", "silu"))
        values["bias"] = _size(draw, frame, "bias", range(2))
        values["m"] = _size(draw, frame, "m", range(1, most_m + 1))
    _keep_answerable(values, dtype_parameter)
    if draw(st.integers(1, BAD_ONE_IN)) == BAD_ONE_IN:
        values |= draw(
            st.sampled_from(
                (
                    {"k": values["k"] + 1},
                    {"n": 0},
                    {"dist": "nan"},
                    {"dist": "inf"},
                    # Even, but half a block where there are blocks.
                    {"k": values["k"] + block // 2} if group > 0 else {"k": 0},
                    {"m": 0} if "m" in values else {"n": 0, "k": 0},
                )
            )
        )
    return op.case(seed=draw(_seeds), **values)


def fp4_quantize_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """fp4_quantize: n <= 64, k <= 64 (128 for g128)."""
    return _weights(FP4_QUANTIZE, "w", frame)


def fp4_dequantize_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """fp4_dequantize: n <= 64, k <= 64 (128 for g128)."""
    return _weights(FP4_DEQUANTIZE, "y", frame)


def fp4_linear_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """fp4_linear: as the codec, m <= 8, with every activation and bias; m = 0 is one of the bad ones."""
    return _weights(FP4_LINEAR, "x", frame, linear=True)


def large_fp4_linear_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """fp4_linear for a GPU: m <= 160, n <= 320, k <= 1024, so that every kind of tile, split and tail is met."""
    return _weights(FP4_LINEAR, "x", frame, (160, 320, 1024), linear=True)


#: Head dims of small cases: the usual ones, and any.
_SMALL_HEADS = (8, 16, 32, 40, *range(1, 41))
#: Head dims from 16 to 256 in steps of 8, the two of most models oftener.
_LARGE_HEADS = (*(64, 128) * 8, *range(16, 257, 8))
#: Types and head dims that kernels for one machine's matrix units are written for; one in thirty of all draws has them.
NARROW, FUSED_HEADS = ("bf16", "fp16"), (64, 128)


def _features(draw: st.DrawFn, frame: Frame | None) -> dict[str, Any]:
    """What the extended attention ops add; each off about half the time."""
    return {
        "alibi": _size(draw, frame, "alibi", range(2)),
        "sinks": _size(draw, frame, "sinks", range(2)),
        "mask": _choice(draw, frame, "mask", ("none", *EXTENDED_MASKS)),
        "maskdims": draw(st.sampled_from(MASK_AXES)),
        "packed": _size(draw, frame, "packed", (0, 0, 0, 1, 2, 5)),
    }


@st.composite
def _attention(
    draw: st.DrawFn, op: Op, frame: Frame | None, most: int, head_dims: tuple[int, ...], fused: bool = False
) -> Case:
    """``most``: largest sq and sk. ``fused``: 16 bits, and neither window nor softcap."""
    hk = _size(draw, frame, "hk", range(1, 3))
    values: dict[str, Any] = {
        "dtype": _choice(draw, frame, "dtype", NARROW if fused else DTYPES),
        "causal": _choice(draw, frame, "causal", ("none", "top_left", "bottom_right")),
        "dist": draw(st.sampled_from(ATTENTION_DISTRIBUTIONS)),
        "layout": _choice(draw, frame, "layout", LAYOUTS),
        "window": 0 if fused else _size(draw, frame, "window", (0, 0, 0, 1, 7, 20)),
        "softcap": 0 if fused else _size(draw, frame, "softcap", (0, 0, 0, 2, 30)),
        "b": _size(draw, frame, "b", range(1, 3)),
        "hq": _size(draw, frame, "hq", range(1, 4), hk),
        "hk": hk,
        "sq": _size(draw, frame, "sq", range(1, most + 1)),
        "sk": _size(draw, frame, "sk", range(1, most + 1)),
        "d": _size(draw, frame, "d", head_dims),
    }
    if op in (ATTENTION_BACKWARD, ATTENTION_EXTENDED_BACKWARD):
        values["dlse"] = _size(draw, frame, "dlse", range(2))
    if op in (ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD):
        values |= _features(draw, frame)
        if values["packed"]:
            values["b"] = 1
    if values["b"] * min(values["hq"] * values["sq"], hk * values["sk"]) == 1:
        # A few outputs may all lie near their mean, which a kernel returning the mean would then have right.
        values["d"] = max(values["d"], MANY)
    if values["window"] and values["dist"] in ("constant_v", "equal_keys"):
        # With few keys in sight, two draws of these may give answers within each other's budget.
        values["window"] = 20
    if draw(st.integers(1, BAD_ONE_IN)) == BAD_ONE_IN:
        values |= draw(st.sampled_from(({"hq": 3, "hk": 2}, {"sq": 0}, {"sk": 0}, {"d": 0}, {"b": 0}, {"hk": 0})))
    return op.case(seed=draw(_seeds), **values)


def attention_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention: sq, sk, d <= 40, up to 6 query heads, every layout, both alignments; some draws mask whole rows."""
    return _attention(ATTENTION, frame, 40, _SMALL_HEADS)


def attention_backward_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention_backward: as the forward, with and without a gradient of lse."""
    return _attention(ATTENTION_BACKWARD, frame, 40, _SMALL_HEADS)


def large_attention_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention for a GPU: sq, sk <= 400, which holds several tiles of every kernel and tails; d from 16 to 256."""
    return _attention(ATTENTION, frame, 400, _LARGE_HEADS)


def large_attention_backward_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention_backward for a GPU, as the forward."""
    return _attention(ATTENTION_BACKWARD, frame, 400, _LARGE_HEADS)


def fused_attention_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention for a GPU, as large, of what kernels written for one machine take: see ``FUSED_HEADS``."""
    return _attention(ATTENTION, frame, 400, FUSED_HEADS, fused=True)


def fused_attention_backward_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention_backward for a GPU, as the forward."""
    return _attention(ATTENTION_BACKWARD, frame, 400, FUSED_HEADS, fused=True)


def extended_attention_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention_extended: as attention, with ALiBi, sinks, masks and packed sequences, some of them empty."""
    return _attention(ATTENTION_EXTENDED, frame, 40, _SMALL_HEADS)


def extended_attention_backward_cases(frame: Frame | None = None) -> SearchStrategy[Case]:
    """attention_extended_backward: as the forward, with and without a gradient of lse."""
    return _attention(ATTENTION_EXTENDED_BACKWARD, frame, 40, _SMALL_HEADS)


@st.composite
def _masked(draw: st.DrawFn, lengths: SearchStrategy[int], head_dims: tuple[int, ...]) -> Case:
    values: dict[str, Any] = {
        "dtype": draw(st.sampled_from(DTYPES)),
        "mask": draw(st.sampled_from(MASKS)),
        "b": draw(st.integers(1, 2)),
        "h": draw(st.integers(1, 3)),
        "sq": draw(lengths),
        "sk": draw(lengths),
        "d": draw(st.sampled_from(head_dims)),
    }
    if draw(st.integers(1, BAD_ONE_IN)) == BAD_ONE_IN:
        values |= draw(st.sampled_from(({"sq": 0}, {"sk": 0}, {"d": 0}, {"h": 0})))
    return MASKED_BACKWARD.case(seed=draw(_seeds), **values)


def attention_masked_backward_cases() -> SearchStrategy[Case]:
    """attention_masked_backward: every mask; sq, sk <= 32, since beyond that torch's flash backward on a CPU exceeds
    its budget under random masks (up to 1.2 times; that it rounds dv between blocks of rows is a guess). A GPU is
    searched with larger ones.
    """
    return _masked(st.integers(2, 32), (8, 16, 32))


def large_attention_masked_backward_cases() -> SearchStrategy[Case]:
    """attention_masked_backward for a GPU: multiples of 64 up to 320, on which fused kernels have paths of their own,
    and any length up to that."""
    return _masked(st.one_of(st.sampled_from((64, 128, 192, 256, 320)), st.integers(2, 320)), (16, 64, 128))


@st.composite
def _tier(draw: st.DrawFn) -> Case:
    keys, item_bytes = draw(st.integers(1, 6)), draw(st.integers(1, 48))
    capacity = st.integers(1, 4 * item_bytes)
    return TIER_STACK.case(
        seed=draw(_seeds),
        trace=draw(st.sampled_from(("mixed", "cyclic", "palindrome", "resident"))),
        keys=keys,
        item_bytes=item_bytes,
        steps=draw(st.integers(1, 48)),
        gpu_bytes=draw(capacity),
        host_bytes=draw(capacity),
        # Room for every key, so that no trace fills the stack.
        file_bytes=keys * item_bytes + draw(st.integers(0, 16)),
    )


def tier_cases() -> SearchStrategy[Case]:
    """tier_stack: up to 6 keys of up to 48 bytes, 48 steps; capacities from one byte, so items may pass levels by."""
    return _tier()


@st.composite
def _fetch(draw: st.DrawFn) -> Case:
    bad = draw(st.integers(1, BAD_ONE_IN)) == BAD_ONE_IN
    fmt = draw(st.sampled_from((RAW, *FORMATS)))
    group = 1 if fmt == RAW else FORMAT_GROUPS[fmt]
    block = group if group > 0 else 2
    values: dict[str, Any] = {
        "fmt": fmt,
        "y": draw(st.sampled_from(DTYPES)),
        # A few weights repeat from draw to draw, and a few may all lie near their mean.
        "n": draw(st.integers(4, 16)),
        "k": block * draw(st.integers(max(1, 8 // block), max(2, 64 // block))),
        "dist": draw(st.sampled_from(FETCH_DISTRIBUTIONS)),
    }
    if bad:
        values |= draw(st.sampled_from(({"n": 0}, {"k": 0}, {"k": values["k"] + 1} if fmt != RAW else {"n": 0})))
    return TIER_FETCH.case(seed=draw(_seeds), **values)


def tier_fetch_cases() -> SearchStrategy[Case]:
    """tier_fetch: n <= 16, k <= 64 (two blocks of 128 for g128)."""
    return _fetch()


@st.composite
def _int8_linear(draw: st.DrawFn) -> Case:
    bad = draw(st.integers(1, BAD_ONE_IN)) == BAD_ONE_IN
    values: dict[str, Any] = {
        "x": draw(st.sampled_from(DTYPES)),
        "act_quant": draw(st.sampled_from(tuple(ACT_QUANTS))),
        "bias": draw(st.integers(0, 1)),
        "dist": draw(st.sampled_from(INT8_DISTRIBUTIONS)),
        "m": draw(st.integers(1, 24)),
        "n": draw(st.integers(MANY, 48)),
        "k": draw(st.integers(4, 96)),
    }
    if bad:
        values |= draw(st.sampled_from(({"m": 0}, {"n": 0}, {"k": 0})))
    return INT8_LINEAR.case(seed=draw(_seeds), **values)


def int8_linear_cases() -> SearchStrategy[Case]:
    """int8_linear: m <= 24, n <= 48, k <= 96."""
    return _int8_linear()
