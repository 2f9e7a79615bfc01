"""Suite ``model``: every linear layer and attention of the models of ``models.py``, timed in the format nvfp4.

tokens m: 1 (decoding), 16 (a small batch), 4096 (a prompt). Layers of equal shape are timed once and name all owners.
"""

from __future__ import annotations

from typing import Literal

from vbench.reference.ops.attention import ATTENTION
from vbench.reference.ops.fp4 import FP4_LINEAR
from vbench.spec import BenchCase, Suite
from vbench.suites.models import ATTENTIONS, STANDARD_MODELS, LinearShape, distinct_linears

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


SUITE = Suite(
    name="model",
    summary="every linear layer and attention of GPT-2 small to XL, LLaMA-7B and Llama-3-8B",
    benches=_linears() + _attentions(),
)
