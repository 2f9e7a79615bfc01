"""Suite ``model``: every linear layer, attention and whole block of the models of ``models.py``, in the format nvfp4.

tokens m: 1 (decoding), 16 (a small batch), 4096 (a prompt). Layers of equal shape are timed once and name all owners.
A block has no cache of keys, so it is timed on prompts of 128 and 1024 tokens. Its check cases are the smallest that
have every step: they run interpreted, a dozen launches each.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

from vbench.reference.ops.attention import ATTENTION
from vbench.reference.ops.block import DECODER_BLOCK, DENSE
from vbench.reference.ops.fp4 import FORMAT_GROUPS, FORMATS, FP4_LINEAR
from vbench.reference.ops.types import DTYPES
from vbench.spec import BenchCase, Case, Suite
from vbench.suites.models import ATTENTIONS, BLOCKS, STANDARD_MODELS, LinearShape, distinct_linears

Effort = Literal["quick", "standard", "full"]

TOKENS = (1, 16, 4096)

#: The one shape of effort quick: the largest layer, decoding one token.
QUICK = (14336, 4096, False, 1)


def _owners(shapes: tuple[LinearShape, ...]) -> str:
    layers: dict[str, list[LinearShape]] = {}
    for shape in shapes:
        layers.setdefault(shape.model, []).append(shape)
    return "; ".join(
        f"{model} {', '.join(s.layer for s in owned)} ({owned[0].source})" for model, owned in layers.items()
    )


def _linears() -> tuple[BenchCase, ...]:
    standard = distinct_linears(STANDARD_MODELS)
    out: list[BenchCase] = []
    for (n, k, bias), shapes in distinct_linears().items():
        for m in TOKENS:
            effort: Effort = "standard" if (n, k, bias) in standard and m == TOKENS[0] else "full"
            if (n, k, bias, m) == QUICK:
                effort = "quick"
            case = FP4_LINEAR.case(fmt="nvfp4", x="bf16", bias=int(bias), m=m, n=n, k=k)
            out.append(BenchCase(case, _owners(shapes), effort))
    return tuple(out)


def _attentions() -> tuple[BenchCase, ...]:
    """A whole context at once, and its last token alone against a full cache."""
    out: list[BenchCase] = []
    for shape in ATTENTIONS:
        effort: Effort = "standard" if shape.model in STANDARD_MODELS else "full"
        for sq in (shape.length, 1):
            case = ATTENTION.case(
                dtype="bf16", causal="bottom_right", hq=shape.hq, hk=shape.hk, sq=sq, sk=shape.length, d=shape.d
            )
            out.append(BenchCase(case, f"{shape.model} ({shape.source})", effort))
    return tuple(out)


#: Tokens of the prompts a block is timed on; the longer one at effort standard for the largest models only.
PROMPTS = (128, 1024)


def _blocks() -> tuple[BenchCase, ...]:
    """The largest first: a run that times a limited number of rows takes them in this order."""
    out: list[BenchCase] = []
    for shape in reversed(BLOCKS):
        for s in reversed(PROMPTS):
            effort: Effort = "standard" if s == PROMPTS[0] or shape.model in STANDARD_MODELS else "full"
            case = DECODER_BLOCK.case(
                family=shape.family, fmt="nvfp4", x="bf16", theta=shape.theta, s=s,
                hidden=shape.hidden, hq=shape.hq, hk=shape.hk, inner=shape.inner,
            )  # fmt: skip
            out.append(BenchCase(case, f"{shape.model} ({shape.source})", effort))
    return tuple(out)


def _block_checks() -> tuple[Case, ...]:
    """Every format in every dtype, the families in turn; then what a small case does not show."""
    op = DECODER_BLOCK
    gpt2: dict[str, Any] = {"family": "gpt2", "theta": 0}
    grid = []
    for i, (fmt, x) in enumerate(product((DENSE, *FORMATS), DTYPES)):
        width = max(32, FORMAT_GROUPS.get(fmt, 0))
        family: dict[str, Any] = gpt2 if i % 2 else {"family": "llama"}
        grid.append(op.case(**family, fmt=fmt, x=x, s=3, hidden=width, hq=2, hk=1 + i % 2, inner=width + i % 2 * width))
    return (
        *grid,
        op.case(**gpt2, fmt="absmax7_row", x="fp32", b=2, s=3, hidden=34, hq=2, hk=2, inner=30),
        op.case(**gpt2, fmt="nvfp4", x="bf16", s=9, hidden=80, hq=4, hk=4, inner=64),
        op.case(family="llama", fmt="nvfp4", x="bf16", theta=500000, s=11, hidden=64, hq=4, hk=2, inner=80),
        op.case(family="llama", fmt="absmax7_tensor", x="bf16", b=2, s=1, hidden=24, hq=3, hk=1, inner=40),
        # What must be refused.
        op.case(family="llama", fmt="nvfp4", s=4, hidden=48, hq=4, hk=3, inner=64),
        op.case(**gpt2, fmt="nvfp4", s=4, hidden=40, hq=4, hk=4, inner=64),
        op.case(**gpt2, fmt="dense", s=4, hidden=64, hq=4, hk=2, inner=64),
    )


SUITE = Suite(
    name="model",
    summary="every linear layer, attention and block of GPT-2 small to XL, LLaMA-7B and Llama-3-8B",
    checks=_block_checks(),
    benches=_linears() + _attentions() + _blocks(),
)
