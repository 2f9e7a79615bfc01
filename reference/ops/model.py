"""Definitions of what a user does with a whole language model: a training step, and generation. Imports no torch."""

from __future__ import annotations

from vbench.reference.ops.types import ITEMSIZE
from vbench.spec import Case, Op, Output, Param

#: Weights as they are.
RAW = "raw"


def linears(case: Case) -> tuple[tuple[int, int], ...]:
    """(out, in) of the linear layers of one block."""
    width, inner = case.axis("width"), case.axis("inner")
    if case.text("family") == "gpt":
        return (3 * width, width), (width, width), (inner, width), (width, inner)
    return *((width, width),) * 4, (inner, width), (inner, width), (width, inner)


def parameters(case: Case) -> int:
    """Elements of all weights; the output layer is the embedding in a gpt and one of its own in a llama."""
    gpt = case.text("family") == "gpt"
    width, vocab = case.axis("width"), case.axis("vocab")
    block = sum(n * k + (n if gpt else 0) for n, k in linears(case)) + 2 * width * (2 if gpt else 1)
    table = vocab * width * (1 if gpt else 2) + (positions(case) * width if gpt else 0)
    return case.axis("layers") * block + table + width * (2 if gpt else 1)


def positions(case: Case) -> int:
    """Longest sequence of the case."""
    return case.axis("seq") + (case.axis("new") if case.op == "generate" else 0)


def _reject(case: Case) -> tuple[str, str] | None:
    for name in (
        "layers",
        "width",
        "heads",
        "inner",
        "vocab",
        "batch",
        "seq",
        *(("new",) if case.op == "generate" else ()),
    ):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: a model needs all of its sizes"
    width, heads = case.axis("width"), case.axis("heads")
    if width % heads or width // heads % 2:
        return "head_dim", f"width={width} over heads={heads} must be a whole, even number"
    if case.op == "generate" and case.text("codec") != RAW and (width % 16 or case.axis("inner") % 16):
        return "k_not_multiple_of_block", f"width={width} and inner={case.axis('inner')} must be multiples of 16"
    return None


def _flops(case: Case) -> int:
    """2 a weight of a linear layer and token, 4 width a pair of positions in attention; backward twice the forward."""
    width, seq, batch = case.axis("width"), case.axis("seq"), case.axis("batch")
    head = case.axis("vocab") * width
    weights = case.axis("layers") * sum(n * k for n, k in linears(case))

    def forward(length: int, logits: int) -> int:
        pairs = length * length
        return batch * (2 * weights * length + 4 * width * case.axis("layers") * pairs + 2 * head * logits)

    if case.op == "train_step":
        return 3 * forward(seq, seq)
    return sum(forward(seq + i, 1) for i in range(case.axis("new")))


def _bytes(case: Case) -> int:
    """Each weight read once a pass; a training step reads it twice and writes its gradient."""
    passes = 3 if case.op == "train_step" else case.axis("new")
    return parameters(case) * ITEMSIZE[case.text("dtype")] * passes


_MODEL = (
    Param(
        "family",
        "choice",
        "gpt: learned positions, LayerNorm, biases, GELU, tied output; llama: rotary, RMSNorm, gated SiLU",
        ("gpt", "llama"),
    ),
    Param("dtype", "choice", "of weights and activations", ("bf16", "fp32"), "bf16"),
    Param("layers", "axis", "blocks"),
    Param("width", "axis", "features of the residual stream"),
    Param("heads", "axis", "attention heads"),
    Param("inner", "axis", "features inside the MLP"),
    Param("vocab", "axis", "ids"),
    Param("batch", "axis", "sequences"),
    Param("seq", "axis", "tokens of each; of the prompt in generate"),
)
_BUDGET = Param(
    "gpu_bytes",
    "axis",
    "device bytes for weights, gradients and activations, on cuda enforced by the allocator's limit; 0 for no limit",
    default=0,
)

TRAIN_STEP = Op(
    name="train_step",
    summary=(
        "losses[b s] of a language model by token, and, by backward of their mean, the gradients of every weight, of "
        "which three are compared; ready for an optimizer, which is not run"
    ),
    params=(*_MODEL, _BUDGET),
    outputs=(
        Output("losses", "fp32", "batch * seq"),
        Output("grad_first", "dtype", "inner, width: of the first block's up projection"),
        Output("grad_last", "dtype", "width, inner: of the last block's down projection"),
        Output("grad_norm", "dtype", "width: of the last norm's gain"),
    ),
    inputs="vbench.reference.model:train_inputs",
    oracle="vbench.reference.model:train_oracle",
    reject=_reject,
    flops=_flops,
    bytes=_bytes,
)

GENERATE = Op(
    name="generate",
    summary=(
        "logits[b, new, vocab] of new passes over a growing text, the whole of it each time; the token appended after "
        "each pass is given, so that a near tie does not change all that follows"
    ),
    params=(
        *_MODEL,
        Param("new", "axis", "tokens to generate"),
        _BUDGET,
        Param(
            "codec",
            "choice",
            "nvfp4: the blocks' linear layers have the weights decode(encode(w)), encoded as fp4_quantize does",
            (RAW, "nvfp4"),
            RAW,
        ),
    ),
    outputs=(Output("logits", "fp32", "batch, new, vocab"),),
    inputs="vbench.reference.model:generate_inputs",
    oracle="vbench.reference.model:generate_oracle",
    reject=_reject,
    flops=_flops,
    bytes=_bytes,
)

OPS: tuple[Op, ...] = (TRAIN_STEP, GENERATE)
