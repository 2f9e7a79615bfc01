"""Definition of one transformer decoder block. Imports no torch.

Sizes: ``b`` sequences of ``s`` tokens, width ``hidden``, ``hq`` query and ``hk`` key heads of ``hidden / hq``, an MLP
of width ``inner``.
"""

from __future__ import annotations

from dataclasses import dataclass

from vbench.reference.ops.attention import attended_pairs
from vbench.reference.ops.fp4 import FORMAT_GROUPS, FORMATS, packed_bytes
from vbench.reference.ops.types import DTYPES, ITEMSIZE
from vbench.spec import Case, Op, Output, Param

#: Weights in dtype x instead of a 4-bit format.
DENSE = "dense"
FAMILIES = ("gpt2", "llama")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer of a block: weight [n, k], with a bias or without."""

    name: str
    n: int
    k: int
    bias: bool


def layers(case: Case) -> tuple[Layer, ...]:
    """The block's linear layers in the order of use, named as the models' reference code names them."""
    hidden, hq, hk, inner = (case.axis(name) for name in ("hidden", "hq", "hk", "inner"))
    if case.text("family") == "gpt2":
        return (
            Layer("c_attn", 3 * hidden, hidden, True),
            Layer("c_proj", hidden, hidden, True),
            Layer("mlp_c_fc", inner, hidden, True),
            Layer("mlp_c_proj", hidden, inner, True),
        )
    kv = hk * (hidden // hq)
    return (
        Layer("q_proj", hidden, hidden, False),
        Layer("k_proj", kv, hidden, False),
        Layer("v_proj", kv, hidden, False),
        Layer("o_proj", hidden, hidden, False),
        Layer("gate_proj", inner, hidden, False),
        Layer("up_proj", inner, hidden, False),
        Layer("down_proj", hidden, inner, False),
    )


def _reject(case: Case) -> tuple[str, str] | None:
    for name in ("b", "s", "hidden", "hq", "hk", "inner"):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: nothing to compute; skip the block instead"
    hidden, hq, hk = case.axis("hidden"), case.axis("hq"), case.axis("hk")
    if hidden % hq or hq % hk:
        return "heads_not_multiple", f"hidden={hidden}, hq={hq}, hk={hk}: hq must divide hidden and hk must divide hq"
    if case.text("family") == "gpt2" and hk != hq:
        return "gpt2_has_no_groups", f"hq={hq}, hk={hk}: GPT-2 has a key head for every query head"
    if case.text("family") == "llama" and (hidden // hq) % 2:
        return "head_dim_odd", f"head dim {hidden // hq}: rotary embedding turns pairs of elements"
    group = 1 if case.text("fmt") == DENSE else FORMAT_GROUPS[case.text("fmt")]
    for layer in layers(case):
        if case.text("fmt") != DENSE and layer.k % 2:
            return "k_odd", f"{layer.name}: k={layer.k}: two codes share a byte, so k must be even"
        if group > 0 and layer.k % group:
            return "k_not_multiple_of_block", f"{layer.name}: k={layer.k} is no multiple of the block of {group}"
    return None


def _flops(case: Case) -> int:
    tokens, s = case.axis("b") * case.axis("s"), case.axis("s")
    linear = sum(2 * tokens * layer.n * layer.k for layer in layers(case))
    return linear + 4 * case.axis("b") * case.axis("hidden") * attended_pairs("top_left", s, s)


def _bytes(case: Case) -> int:
    """Weights, biases, norms and cosines once, x in and y out; what lies between need not leave the chip."""
    item, fmt = ITEMSIZE[case.text("x")], case.text("fmt")
    total = 0
    for layer in layers(case):
        total += layer.n * layer.k * item if fmt == DENSE else packed_bytes(fmt, layer.n, layer.k)
        total += layer.n * item * layer.bias
    gpt2 = case.text("family") == "gpt2"
    hidden = case.axis("hidden")
    total += hidden * item * (4 if gpt2 else 2)
    if not gpt2:
        total += case.axis("s") * (hidden // case.axis("hq")) * 4
    return total + 2 * case.axis("b") * case.axis("s") * hidden * item


DECODER_BLOCK = Op(
    name="decoder_block",
    summary=(
        "y = r + mlp(norm(r)), r = x + attention(norm(x)), causal. gpt2: LayerNorm (eps 1e-5), fused q, k, v, biases, "
        "gelu (tanh form). llama: RMSNorm (eps 1e-5), rotary positions (half-split, tables cos and sin given), grouped "
        "heads, silu(gate) * up, no biases"
    ),
    params=(
        Param("family", "choice", "which block", FAMILIES),
        Param("fmt", "choice", "4-bit format of all linear weights, or dense (dtype x)", (DENSE, *FORMATS), "nvfp4"),
        Param("x", "choice", "dtype of x, y, biases and norm weights", DTYPES, "bf16"),
        Param("theta", "axis", "llama: base of the rotary angles (unused in gpt2)", default=10000),
        Param("b", "axis", "sequences", default=1),
        Param("s", "axis", "tokens of a sequence"),
        Param("hidden", "axis", "width"),
        Param("hq", "axis", "query heads"),
        Param("hk", "axis", "key and value heads"),
        Param("inner", "axis", "width of the MLP"),
    ),
    outputs=(Output("y", "x", "b * s, hidden"),),
    inputs="vbench.reference.block:block_inputs",
    oracle="vbench.reference.block:block_oracle",
    reject=_reject,
    flops=_flops,
    bytes=_bytes,
)

OPS: tuple[Op, ...] = (DECODER_BLOCK,)
