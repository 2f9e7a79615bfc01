"""Shapes of the linear layers and attentions of real models, each with the file and fields it comes from.

Sources are the ``config.json`` files published with the weights, by Hub repository. Layer shapes follow the models'
reference code: GPT-2 fuses q, k, v (``attn.c_attn``, 3 d wide) and has an MLP of 4 d where ``n_inner`` is null; LLaMA
has separate projections and a gated MLP.

Vocabulary heads and embeddings are left out: weight-only quantisers keep them in 16 bits, and in GPT-2 the head is the
embedding table itself (tied), which a lookup reads row by row.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A weight [n, k] (n output, k input features), once per transformer block."""

    model: str
    layer: str
    n: int
    k: int
    bias: bool
    source: str


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Self-attention of one block: hq query heads, hk key heads of dimension d, contexts of up to ``length`` tokens."""

    model: str
    hq: int
    hk: int
    d: int
    length: int
    source: str


@dataclass(frozen=True, slots=True)
class _Gpt2:
    name: str
    repository: str
    n_embd: int
    n_head: int


_GPT2 = (
    _Gpt2("GPT-2 small", "openai-community/gpt2", 768, 12),
    _Gpt2("GPT-2 medium", "openai-community/gpt2-medium", 1024, 16),
    _Gpt2("GPT-2 large", "openai-community/gpt2-large", 1280, 20),
    _Gpt2("GPT-2 XL", "openai-community/gpt2-xl", 1600, 25),
)


def _gpt2_linears(model: _Gpt2) -> tuple[LinearShape, ...]:
    d, where = model.n_embd, f"{model.repository} config.json: n_embd={model.n_embd}"
    return (
        LinearShape(model.name, "attn.c_attn", 3 * d, d, True, f"{where} (q, k, v fused: 3 n_embd)"),
        LinearShape(model.name, "attn.c_proj", d, d, True, where),
        LinearShape(model.name, "mlp.c_fc", 4 * d, d, True, f"{where}, n_inner=null (4 n_embd)"),
        LinearShape(model.name, "mlp.c_proj", d, 4 * d, True, f"{where}, n_inner=null (4 n_embd)"),
    )


def _llama_linears(
    model: str, repository: str, hidden: int, inner: int, kv: int, kv_why: str
) -> tuple[LinearShape, ...]:
    where = f"{repository} config.json: hidden_size={hidden}"
    mlp = f"{where}, intermediate_size={inner}"
    return (
        LinearShape(model, "q_proj", hidden, hidden, False, where),
        LinearShape(model, "k_proj", kv, hidden, False, f"{where}, {kv_why}"),
        LinearShape(model, "v_proj", kv, hidden, False, f"{where}, {kv_why}"),
        LinearShape(model, "o_proj", hidden, hidden, False, where),
        LinearShape(model, "gate_proj", inner, hidden, False, mlp),
        LinearShape(model, "up_proj", inner, hidden, False, mlp),
        LinearShape(model, "down_proj", hidden, inner, False, mlp),
    )


_LLAMA_7B = "huggyllama/llama-7b"
_LLAMA3_8B = "meta-llama/Meta-Llama-3-8B"

LINEARS: tuple[LinearShape, ...] = (
    *(shape for model in _GPT2 for shape in _gpt2_linears(model)),
    *_llama_linears("LLaMA-7B", _LLAMA_7B, 4096, 11008, 4096, "num_attention_heads=32 of 128, all with keys"),
    *_llama_linears("Llama-3-8B", _LLAMA3_8B, 4096, 14336, 1024, "num_key_value_heads=8 of 128"),
)

ATTENTIONS: tuple[AttentionShape, ...] = (
    *(
        AttentionShape(
            model.name,
            model.n_head,
            model.n_head,
            model.n_embd // model.n_head,
            1024,
            f"{model.repository} config.json: n_embd={model.n_embd}, n_head={model.n_head}, n_positions=1024",
        )
        for model in _GPT2
    ),
    AttentionShape(
        "LLaMA-7B",
        32,
        32,
        128,
        2048,
        f"{_LLAMA_7B} config.json: hidden_size=4096, num_attention_heads=32, max_position_embeddings=2048",
    ),
    AttentionShape(
        "Llama-3-8B",
        32,
        8,
        128,
        8192,
        f"{_LLAMA3_8B} config.json: num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192",
    ),
)


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One decoder block: width, heads, MLP width, and the base of its rotary angles (0: none)."""

    model: str
    family: str
    hidden: int
    hq: int
    hk: int
    inner: int
    theta: int
    source: str


BLOCKS: tuple[BlockShape, ...] = (
    *(
        BlockShape(
            m.name, "gpt2", m.n_embd, m.n_head, m.n_head, 4 * m.n_embd, 0,
            f"{m.repository} config.json: n_embd={m.n_embd}, n_head={m.n_head}, n_inner=null (4 n_embd)",
        )
        for m in _GPT2
    ),
    BlockShape(
        "LLaMA-7B", "llama", 4096, 32, 32, 11008, 10000,
        f"{_LLAMA_7B} config.json: hidden_size=4096, num_attention_heads=32, intermediate_size=11008; base 10000 of "
        "its reference code",
    ),
    BlockShape(
        "Llama-3-8B", "llama", 4096, 32, 8, 14336, 500000,
        f"{_LLAMA3_8B} config.json: hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, "
        "intermediate_size=14336, rope_theta=500000",
    ),
)  # fmt: skip

#: What effort ``standard`` times; the smaller GPT-2 add little that their big sister does not show.
STANDARD_MODELS = ("GPT-2 XL", "LLaMA-7B", "Llama-3-8B")


def distinct_linears(models: tuple[str, ...] | None = None) -> dict[tuple[int, int, bool], tuple[LinearShape, ...]]:
    """Shapes (n, k, bias) -> the layers that have it, of ``models`` (``None``: all); equal shapes are timed once."""
    out: dict[tuple[int, int, bool], tuple[LinearShape, ...]] = {}
    for shape in LINEARS:
        if models is None or shape.model in models:
            key = (shape.n, shape.k, shape.bias)
            out[key] = (*out.get(key, ()), shape)
    return out
