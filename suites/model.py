"""Suite ``model``: every linear layer, attention and whole block of the models of ``models.py``, in the format nvfp4;
and what is done with whole models: a training step, and generation.

tokens m: 1 (decoding), 16 (a small batch), 4096 (a prompt). Layers of equal shape are timed once and name all owners.
A block has no cache of keys, so it is timed on prompts of 128 and 1024 tokens. Its check cases are the smallest that
have every step: they run interpreted, a dozen launches each.

Whole models are run under budgets of 8 and 24 GB (in the document's decimal GB, emulated by the allocator's limit) and
without one. That one does not fit is a result of this suite (OUT_OF_MEMORY, or ``over_budget``), not a failure.
"""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

from vbench.reference.ops.attention import ATTENTION
from vbench.reference.ops.block import DECODER_BLOCK, DENSE
from vbench.reference.ops.fp4 import FORMAT_GROUPS, FORMATS, FP4_LINEAR
from vbench.reference.ops.model import GENERATE, TRAIN_STEP
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


GB = 10**9
#: Name with its source, smallest effort, and the model part of a case; the first is small, for a CPU to time.
WHOLE: tuple[tuple[str, Effort, dict[str, Any]], ...] = (
    (
        "a GPT of 10 M parameters",
        "quick",
        {"family": "gpt", "layers": 4, "width": 448, "heads": 7, "inner": 1792, "vocab": 512},
    ),
    (
        "GPT-2 small (openai-community/gpt2, config.json)",
        "standard",
        {"family": "gpt", "layers": 12, "width": 768, "heads": 12, "inner": 3072, "vocab": 50257},
    ),
    (
        "GPT-2 XL (openai-community/gpt2-xl, config.json)",
        "standard",
        {"family": "gpt", "layers": 48, "width": 1600, "heads": 25, "inner": 6400, "vocab": 50257},
    ),
    (
        "LLaMA-7B (arXiv 2302.13971, table 2)",
        "standard",
        {"family": "llama", "layers": 32, "width": 4096, "heads": 32, "inner": 11008, "vocab": 32000},
    ),
)


def _whole() -> tuple[BenchCase, ...]:
    """Largest last: it takes the longest to make."""
    out: list[BenchCase] = []
    for name, effort, sizes in WHOLE:
        small = effort == "quick"
        budgets = (0,) if small else (0, 8 * GB) if "small" in name else (0, 8 * GB, 24 * GB)
        for gpu_bytes in budgets:
            batch, seq = (1, 128) if small else (2, 1024)
            at = f"{name}, {gpu_bytes / GB:.0f} GB" if gpu_bytes else f"{name}, no budget"
            device: Literal["any", "cuda"] = "any" if small else "cuda"
            # Llama under 24 GB is the one that claims do not rest on.
            where: Effort = effort if gpu_bytes < 24 * GB or sizes["family"] == "gpt" else "full"
            step = TRAIN_STEP.case(**sizes, batch=batch, seq=seq, gpu_bytes=gpu_bytes)
            out.append(BenchCase(step, at, where, device))
            for codec in ("raw", "nvfp4"):
                text = GENERATE.case(**sizes, batch=1, seq=128, new=4, gpu_bytes=gpu_bytes, codec=codec)
                out.append(BenchCase(text, at, where if codec == "raw" else "full", device))
    return tuple(out)


#: What two slots of the largest unit of the check cases take, with room for small ones.
LEAST_BYTES = {"bf16": 24_000, "fp32": 48_000}


def _whole_checks() -> tuple[Case, ...]:
    """Both families in both dtypes: without a budget, streamed, and with some layers resident; codes beside them."""
    sizes: dict[str, Any] = {"layers": 3, "width": 32, "heads": 2, "inner": 64, "vocab": 40, "batch": 2, "seq": 5}
    out: list[Case] = []
    for family, dtype in product(("gpt", "llama"), ("bf16", "fp32")):
        one: dict[str, Any] = {**sizes, "family": family, "dtype": dtype}
        least = LEAST_BYTES[dtype]
        out += [TRAIN_STEP.case(**one, gpu_bytes=gpu) for gpu in (0, least, 3 * least)]
        out += [GENERATE.case(**one, new=3, gpu_bytes=gpu) for gpu in (0, least)]
        out += [GENERATE.case(**one, new=3, gpu_bytes=gpu, codec="nvfp4") for gpu in (0, 3 * least)]
    one_token: dict[str, Any] = {**sizes, "layers": 1, "heads": 1, "batch": 1, "seq": 1}
    return (
        *out,
        TRAIN_STEP.case(**one_token, family="llama", dtype="fp32", seed=1),
        # What must be refused: a budget too small for one layer; heads that do not divide; nothing; odd codes.
        TRAIN_STEP.case(**sizes, family="gpt", dtype="fp32", gpu_bytes=1000),
        TRAIN_STEP.case(**{**sizes, "heads": 3}, family="gpt"),
        GENERATE.case(**sizes, family="llama", new=0),
        GENERATE.case(**{**sizes, "inner": 40}, family="llama", new=1, codec="nvfp4"),
    )


SUITE = Suite(
    name="model",
    summary="linear layers, attention, blocks of GPT-2, LLaMA-7B, Llama-3-8B; training and generation under budgets",
    checks=_block_checks() + _whole_checks(),
    benches=_linears() + _attentions() + _blocks() + _whole(),
)
