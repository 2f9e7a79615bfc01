"""Suite ``attention``: softmax attention, forward with its log-sum-exp, and backward."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, Literal

from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD, ATTENTION_DISTRIBUTIONS
from vbench.reference.ops.attention_extended import ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD
from vbench.reference.ops.masked import MASKED_BACKWARD, MASKS
from vbench.reference.ops.types import DTYPES
from vbench.spec import BenchCase, Case, Generated, Op, Suite
from vbench.suites.data import REGRESSIONS, WAIVERS

Effort = Literal["quick", "standard", "full"]

op, backward = ATTENTION, ATTENTION_BACKWARD


def _checks() -> tuple[Case, ...]:
    masks = ("top_left", "bottom_right")
    return (
        # Both alignments with more queries than keys and the other way round; bottom_right with sq > sk has rows with
        # nothing to attend to (out 0, lse -inf).
        *(
            op.case(dtype=dtype, causal=causal, hq=2, hk=2, sq=sq, sk=sk, d=16)
            for dtype, causal, (sq, sk) in product(DTYPES, ("none", *masks), ((17, 33), (33, 17)))
        ),
        *(op.case(dtype="fp32", causal=causal, hq=1, hk=1, sq=32, sk=32, d=16) for causal in masks),
        # Grouped and single key heads, with a batch.
        *(op.case(dtype=dtype, causal="bottom_right", b=2, hq=4, hk=2, sq=9, sk=21, d=16) for dtype in DTYPES),
        op.case(dtype="fp32", causal="none", b=2, hq=4, hk=1, sq=7, sk=13, d=16),
        op.case(dtype="bf16", causal="top_left", b=1, hq=6, hk=2, sq=16, sk=16, d=8),
        # Every row but the last masked; one query against a cache; one key; one of everything.
        op.case(dtype="fp16", causal="bottom_right", hq=1, hk=1, sq=33, sk=1, d=16),
        op.case(dtype="bf16", causal="bottom_right", hq=4, hk=2, sq=1, sk=40, d=32),
        op.case(dtype="fp32", causal="none", hq=2, hk=2, sq=5, sk=1, d=16),
        op.case(dtype="fp32", causal="top_left", hq=1, hk=1, sq=1, sk=1, d=1),
        # Head dimensions that are no power of two, and lengths one past a tile.
        *(op.case(dtype=dtype, causal="none", hq=1, hk=1, sq=17, sk=19, d=40) for dtype in DTYPES),
        op.case(dtype="fp32", causal="none", hq=1, hk=1, sq=3, sk=5, d=3),
        op.case(dtype="fp16", causal="none", hq=1, hk=1, sq=65, sk=65, d=16),
        op.case(dtype="fp32", causal="bottom_right", hq=1, hk=1, sq=16, sk=129, d=16),
        *(
            op.case(dtype=dtype, causal="none", dist=dist, hq=2, hk=2, sq=8, sk=24, d=16)
            for dtype, dist in product(DTYPES, ATTENTION_DISTRIBUTIONS)
            if dist != "normal"
        ),
        # Rows apart from each other, and heads inside rows.
        *(
            op.case(dtype=dtype, causal="top_left", layout=layout, b=2, hq=2, hk=1, sq=17, sk=19, d=d)
            for dtype, (layout, d) in product(DTYPES, (("bshd", 16), ("padded", 16), ("padded", 20)))
        ),
        # Windows narrower and wider than a tile, with and without a causal mask; capped scores, some at the cap.
        *(
            op.case(dtype=dtype, causal=causal, window=window, softcap=softcap, hq=1, hk=1, sq=sq, sk=sk, d=16)
            for dtype, (causal, window, softcap, sq, sk) in product(
                DTYPES,
                (
                    ("none", 5, 0, 33, 40),
                    ("top_left", 40, 0, 70, 50),
                    ("bottom_right", 9, 2, 33, 70),
                    ("none", 0, 30, 20, 20),
                ),
            )
        ),
        op.case(dtype="fp32", dist="large_logits", softcap=50, hq=1, hk=1, sq=17, sk=33, d=16),
        # All of that at once, small enough for a simulator.
        *(
            op.case(dtype=dtype, causal=causal, layout="padded", hq=2, hk=1, sq=9, sk=5, d=6)
            for dtype, causal in zip(DTYPES, ("bottom_right", "top_left", "none"), strict=True)
        ),
        *(
            op.case(dtype=dtype, causal=causal, hq=1, hk=1, sq=sq, sk=sk, d=d)
            for dtype, d, causal, sq, sk in MATRIX_UNIT_SHAPES
        ),
        # What must be refused.
        op.case(hq=3, hk=2, sq=4, sk=4, d=16),
        op.case(hq=1, hk=1, sq=0, sk=4, d=16),
        op.case(hq=1, hk=1, sq=4, sk=0, d=16),
        # Large enough for the document's error figures to show.
        *(
            op.case(dtype="fp16", causal="none", dist=dist, b=1, hq=2, hk=2, sq=256, sk=256, d=64)
            for dist in ("normal", "large_logits")
        ),
    )


#: (dtype, d, causal, sq, sk): head dims and dtypes that kernels of matrix units are made for, with tails.
MATRIX_UNIT_SHAPES = (
    ("bf16", 64, "none", 70, 130),
    ("bf16", 128, "bottom_right", 65, 129),
    ("fp16", 64, "top_left", 128, 64),
    ("fp16", 128, "none", 64, 33),
)


def _backward_checks() -> tuple[Case, ...]:
    case = backward.case
    return (
        # Both alignments, longer and shorter queries; keys that no query sees, queries that see no key.
        *(
            case(dtype=dtype, causal=causal, hq=2, hk=2, sq=sq, sk=sk, d=16)
            for dtype, causal, (sq, sk) in product(DTYPES, ("none", "top_left", "bottom_right"), ((17, 33), (33, 17)))
        ),
        # Gradients summed over grouped heads, and one flowing into lse.
        *(
            case(dtype=dtype, causal="bottom_right", dlse=1, b=2, hq=4, hk=2, sq=9, sk=21, d=16, layout="bshd")
            for dtype in DTYPES
        ),
        case(dtype="fp32", dlse=1, b=2, hq=3, hk=1, sq=7, sk=13, d=16),
        case(dtype="fp16", causal="bottom_right", dlse=1, hq=1, hk=1, sq=33, sk=1, d=16),
        case(dtype="bf16", causal="bottom_right", hq=4, hk=2, sq=1, sk=40, d=32),
        case(dtype="fp32", hq=2, hk=2, sq=5, sk=1, d=16),
        # Head dimensions that are no power of two, rows apart from each other, lengths one past a tile.
        *(case(dtype=dtype, layout="padded", hq=1, hk=1, sq=17, sk=19, d=40) for dtype in DTYPES),
        case(dtype="fp32", causal="top_left", layout="padded", hq=1, hk=1, sq=9, sk=8, d=3),
        case(dtype="fp16", causal="top_left", hq=1, hk=1, sq=65, sk=65, d=16),
        case(dtype="fp32", causal="bottom_right", dlse=1, hq=1, hk=1, sq=16, sk=129, d=16),
        *(
            case(dtype=dtype, dist=dist, hq=2, hk=2, sq=8, sk=24, d=16)
            for dtype, dist in product(DTYPES, ATTENTION_DISTRIBUTIONS)
            if dist != "normal"
        ),
        # Windows and capped scores, as in the forward.
        *(
            case(dtype=dtype, causal=causal, window=window, softcap=softcap, dlse=1, hq=1, hk=1, sq=sq, sk=sk, d=16)
            for dtype, (causal, window, softcap, sq, sk) in product(
                DTYPES, (("none", 5, 0, 33, 40), ("top_left", 40, 0, 70, 50), ("bottom_right", 9, 2, 33, 70))
            )
        ),
        case(dtype="fp32", dist="large_logits", softcap=50, hq=1, hk=1, sq=17, sk=33, d=16),
        *(
            case(dtype=dtype, causal=causal, dlse=1, hq=1, hk=1, sq=sq, sk=sk, d=d)
            for dtype, d, causal, sq, sk in MATRIX_UNIT_SHAPES
        ),
        # What must be refused.
        case(hq=3, hk=2, sq=4, sk=4, d=16),
        case(hq=1, hk=1, sq=0, sk=4, d=16),
    )


#: Each feature alone, then all at once: masked rows, empty sequences, a mask a head. b=1 where sequences are packed.
EXTENDED: tuple[dict[str, int | str], ...] = (
    {"alibi": 1, "b": 2, "causal": "bottom_right"},
    {"alibi": 1, "causal": "none"},
    {"sinks": 1, "b": 2, "causal": "bottom_right"},
    {"mask": "normal", "maskdims": "bhqk", "b": 2, "causal": "none"},
    {"mask": "blocked", "maskdims": "hqk", "causal": "top_left"},
    {"mask": "shifted", "maskdims": "bqk", "b": 2, "causal": "none"},
    {"packed": 3, "causal": "bottom_right"},
    {"packed": 5, "causal": "none"},
    {"packed": 4, "alibi": 1, "sinks": 1, "mask": "blocked", "softcap": 2, "window": 9, "causal": "top_left"},
    {"alibi": 1, "sinks": 1, "mask": "normal", "maskdims": "hqk", "b": 2, "causal": "bottom_right", "layout": "padded"},
)
EXTENDED_SHAPE: dict[str, int | str] = {"hq": 2, "hk": 1, "sq": 19, "sk": 40, "d": 16}
#: Lengths of the shifted masks that a fused backward failed on: pytorch/pytorch#196678 (cuDNN, since torch 2.11, NaN in
#: dq where a mask is given, the length leaves 64 over 128, and lse is below ln of the smallest normal float32).
SHIFTED_LENGTHS = (192, 256, 320)


def _extended_case(kind: Op, dtype: str, features: Mapping[str, int | str]) -> Case:
    values: dict[str, Any] = {"dtype": dtype, **EXTENDED_SHAPE, **features}
    return kind.case(**values)


def _extended_checks() -> tuple[Case, ...]:
    ops = (ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD)
    return (
        *(_extended_case(op, dtype, features) for op, dtype, features in product(ops, DTYPES, EXTENDED)),
        # More queries than keys; a gradient of lse with sinks.
        *(op.case(sinks=1, causal="bottom_right", hq=2, hk=1, sq=40, sk=19, d=16) for op in ops),
        ATTENTION_EXTENDED_BACKWARD.case(dtype="fp16", sinks=1, alibi=1, dlse=1, hq=2, hk=2, sq=20, sk=33, d=20),
        *(ATTENTION_EXTENDED_BACKWARD.case(mask="shifted", hq=1, hk=1, sq=s, sk=s, d=64) for s in SHIFTED_LENGTHS),
        # What must be refused.
        *(op.case(packed=2, b=2, hq=1, hk=1, sq=8, sk=8, d=16) for op in ops),
        *(op.case(alibi=1, hq=3, hk=2, sq=8, sk=8, d=16) for op in ops),
    )


#: The FlashAttention papers' sweep: 16384 tokens a batch, hidden size 2048.
TOKENS, HIDDEN = 16384, 2048
#: The lengths that speed is asked for at, in the order in which a limited run takes them: what fits on a few
#: rows then says something of short and of long sequences.
STANDARD_LENGTHS = (4096, 1024, 16384, 512, 8192, 2048)
LENGTHS = (*STANDARD_LENGTHS, 256, 128)
#: Shortest length at which the backward is timed.
BACKWARD_FROM = 512
#: Ours, and the best there is elsewhere.
CONTENDERS = ("triton", "torch_native[sdpa_cudnn]", "flash_attn_4")
#: Timed on one cell unless the effort is full: several times slower than the contenders on all of them.
SLOW = ("as_written", "numba_cuda", "torch_native[sdpa_math]", "torch_native[sdpa_efficient]")
#: Timed at one length unless the effort is full.
BEHIND = ("torch_native[sdpa_flash]",)
LENGTH_OF_ALL = 4096
PAPERS = "FlashAttention-2 and -3 papers, section on speed: 16k tokens, hidden dimension 2048"
LLAMA3 = (
    "Llama-3-8B (meta-llama/Meta-Llama-3-8B config.json: num_attention_heads=32, num_key_value_heads=8), 16k tokens"
)


def _benches() -> tuple[BenchCase, ...]:
    out: list[BenchCase] = []

    def add(case: Case, source: str, effort: Effort) -> None:
        one = case.axis("sq") == LENGTH_OF_ALL
        all_of_them = one and case.axis("d") == 128 and case.text("causal") == "none"
        later = () if all_of_them else SLOW if one else (*SLOW, *BEHIND)
        out.append(BenchCase(case, source, effort, first=CONTENDERS, later=later))

    for s, causal in product(LENGTHS, ("none", "bottom_right")):
        effort: Effort = "quick" if s == 4096 else "standard" if s in STANDARD_LENGTHS else "full"
        for d in (64, 128):
            heads = HIDDEN // d
            sizes: dict[str, int] = {"b": TOKENS // s, "hq": heads, "hk": heads, "sq": s, "sk": s, "d": d}
            add(op.case(causal=causal, **sizes), PAPERS, effort)
            if s >= BACKWARD_FROM:
                # Of the backward, quick times the pair at head dim 128.
                own: Effort = "standard" if effort == "quick" and d == 64 else effort
                add(backward.case(causal=causal, **sizes), PAPERS, own)
    for s, causal in product(LENGTHS, ("none", "bottom_right")):
        grouped: dict[str, int] = {"b": TOKENS // s, "hq": 32, "hk": 8, "sq": s, "sk": s, "d": 128}
        for kind in (op, backward):
            if kind is op or s >= BACKWARD_FROM:
                effort = "standard" if s == 4096 else "full"
                out.append(BenchCase(kind.case(causal=causal, **grouped), LLAMA3, effort, later=SLOW))
    return tuple(out)


def _masked_checks() -> tuple[Case, ...]:
    op = MASKED_BACKWARD
    return (
        *(op.case(dtype=dtype, mask=mask, h=2, sq=17, sk=24, d=16) for dtype, mask in product(DTYPES, MASKS)),
        # A shift of every score under which cuDNN's dq was NaN (pytorch issue 196678), and lengths at which it was not.
        *(op.case(mask="shift", h=2, sq=s, sk=s, d=64) for s in (128, 192, 256, 320)),
        op.case(h=1, sq=0, sk=8, d=16),
    )


#: What a kernel is compiled for; strides are multiples of head counts.
COMPILED_FOR = ("dtype", "causal", "layout", "hq", "hk", "d")
EXTENDED_FOR = (*COMPILED_FOR, "alibi", "sinks", "mask", "packed")

SUITE = Suite(
    name="attention",
    summary=(
        "attention forward with log-sum-exp, and backward: both causal alignments, grouped heads, masked rows, "
        "strides; 16k-token sweep"
    ),
    checks=_checks() + _backward_checks() + _masked_checks() + _extended_checks(),
    generated=(
        Generated("vbench.suites.strategies:attention_cases", (15, 100, 1000), COMPILED_FOR),
        Generated("vbench.suites.strategies:attention_backward_cases", (12, 100, 1000), (*COMPILED_FOR, "dlse")),
        Generated("vbench.suites.strategies:extended_attention_cases", (6, 60, 600), EXTENDED_FOR),
        Generated("vbench.suites.strategies:extended_attention_backward_cases", (6, 60, 600), (*EXTENDED_FOR, "dlse")),
        Generated("vbench.suites.strategies:attention_masked_backward_cases", (12, 60, 400)),
    ),
    searched=(
        Generated("vbench.suites.strategies:large_attention_cases", (0, 0, 0), COMPILED_FOR, "cuda"),
        Generated(
            "vbench.suites.strategies:large_attention_backward_cases", (0, 0, 0), (*COMPILED_FOR, "dlse"), "cuda"
        ),
        Generated("vbench.suites.strategies:fused_attention_cases", (0, 0, 0), COMPILED_FOR, "cuda"),
        Generated(
            "vbench.suites.strategies:fused_attention_backward_cases", (0, 0, 0), (*COMPILED_FOR, "dlse"), "cuda"
        ),
        Generated("vbench.suites.strategies:large_attention_masked_backward_cases", (0, 0, 0), device="cuda"),
    ),
    benches=_benches(),
    regressions=REGRESSIONS,
    waivers=WAIVERS,
)
