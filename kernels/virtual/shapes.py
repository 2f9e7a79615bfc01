"""What a transformer's size is made of: shapes, presets and Hugging Face configurations. Standard library only.

Presets of the document under test carry the prefix ``vb-``, because its "medium" and "large" are not GPT-2's: it gives
them 163M and 406M parameters, which are GPT-2 small and medium counted with an output layer of their own. ``vb-tiny``
and ``vb-small`` are ours, for the document gives no sizes: byte vocabulary, small enough for a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from vbench.errors import DataError, Unsupported, UsageError

Family = Literal["gpt", "llama"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A decoder-only transformer.

    Args:
        name: preset or file it comes from.
        family: ``gpt`` (learned positions, LayerNorm, fused q k v, GELU MLP, biases) or ``llama`` (rotary positions,
            RMSNorm, separate projections, gated SiLU MLP, no biases).
        layers, width: blocks, and features of the residual stream.
        heads, kv_heads, head_dim: query heads, key and value heads, features of each.
        inner: features inside the MLP.
        vocabulary: ids, and rows of the embedding.
        context: longest sequence.
        tied: the output layer is the embedding table.
        qkv_bias: ``llama`` only: biases on q, k and v (Qwen2).
        source: where the figures come from.
    """

    name: str
    family: Family
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int
    context: int
    tied: bool
    qkv_bias: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for field_name in ("layers", "width", "heads", "kv_heads", "head_dim", "inner", "vocabulary", "context"):
            value = getattr(self, field_name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"{self.name}: {field_name}={value!r} must be a positive integer")
        if self.heads % self.kv_heads:
            raise DataError(f"{self.name}: {self.heads} query heads do not divide among {self.kv_heads} key heads")
        if self.family == "gpt" and (self.kv_heads != self.heads or self.heads * self.head_dim != self.width):
            raise DataError(f"{self.name}: a gpt's heads all have keys and together are as wide as the model")
        if self.family == "llama" and self.head_dim % 2:
            raise DataError(f"{self.name}: rotary positions need an even head_dim, not {self.head_dim}")

    @property
    def block_linears(self) -> tuple[tuple[str, int, int, bool], ...]:
        """Each linear layer of a block: (name, output features, input features, has a bias)."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.family == "gpt":
            return (
                ("attn.qkv", 3 * self.width, self.width, True),
                ("attn.proj", self.width, self.width, True),
                ("mlp.up", self.inner, self.width, True),
                ("mlp.down", self.width, self.inner, True),
            )
        return (
            ("attn.q", q, self.width, self.qkv_bias),
            ("attn.k", kv, self.width, self.qkv_bias),
            ("attn.v", kv, self.width, self.qkv_bias),
            ("attn.proj", self.width, q, False),
            ("mlp.gate", self.inner, self.width, False),
            ("mlp.up", self.inner, self.width, False),
            ("mlp.down", self.width, self.inner, False),
        )

    @property
    def norm_parameters(self) -> int:
        """Parameters of one norm: weight and, in a gpt, bias."""
        return self.width * (2 if self.family == "gpt" else 1)

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        return sum(n * k + (n if bias else 0) for _, n, k, bias in self.block_linears) + 2 * self.norm_parameters

    @property
    def linear_weights(self) -> int:
        """Elements of the blocks' weight matrices, biases and the output layer left out: what FP4 may hold."""
        return self.layers * sum(n * k for _, n, k, _ in self.block_linears)

    @property
    def embedding_parameters(self) -> int:
        """The token table and, in a gpt, the position table."""
        positions = self.context * self.width if self.family == "gpt" else 0
        return self.vocabulary * self.width + positions

    @property
    def head_parameters(self) -> int:
        """The output layer, 0 where it is the embedding table."""
        return 0 if self.tied else self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """All parameters; a tied table counts once."""
        return (
            self.embedding_parameters
            + self.layers * self.block_parameters
            + self.norm_parameters
            + self.head_parameters
        )

    def flops_per_token(self, sequence: int) -> int:
        """Floating-point operations of a forward pass for one token of a causal ``sequence``.

        Two for each weight met, the output layer included, and for attention two products with half of the keys on
        average (Korthikanti et al. 2022, appendix A, with the causal half that it leaves out).
        """
        matrices = self.linear_weights + self.vocabulary * self.width
        return 2 * matrices + self.layers * 2 * sequence * self.heads * self.head_dim


def _gpt(
    name: str, layers: int, width: int, heads: int, *, tied: bool, source: str, vocabulary: int = 50257
) -> ModelShape:
    return ModelShape(
        name, "gpt", layers, width, heads, heads, width // heads, 4 * width, vocabulary, 1024, tied, source=source
    )


_VB = "Virtual Blackwell document, scenarios"
_OURS = "ours: the document names the preset and gives no size"

PRESETS: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        replace(_gpt("vb-tiny", 4, 128, 4, tied=True, source=_OURS, vocabulary=256), context=256),
        replace(_gpt("vb-small", 8, 512, 8, tied=True, source=_OURS, vocabulary=256), context=512),
        _gpt("vb-medium", 12, 768, 12, tied=False, source=f"{_VB}: 163M = GPT-2 small, head untied"),
        _gpt("vb-large", 24, 1024, 16, tied=False, source=f"{_VB}: 406M = GPT-2 medium, head untied"),
        _gpt("gpt2", 12, 768, 12, tied=True, source="openai-community/gpt2 config.json"),
        _gpt("gpt2-medium", 24, 1024, 16, tied=True, source="openai-community/gpt2-medium config.json"),
        _gpt("gpt2-large", 36, 1280, 20, tied=True, source="openai-community/gpt2-large config.json"),
        _gpt("gpt2-xl", 48, 1600, 25, tied=True, source="openai-community/gpt2-xl config.json"),
        ModelShape(
            "llama-7b", "llama", 32, 4096, 32, 32, 128, 11008, 32000, 2048, False,
            source="huggyllama/llama-7b config.json",
        ),
        ModelShape(
            "llama-13b", "llama", 40, 5120, 40, 40, 128, 13824, 32000, 2048, False,
            source="huggyllama/llama-13b config.json",
        ),
        ModelShape(
            "llama-3-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192, False,
            source="meta-llama/Meta-Llama-3-8B config.json",
        ),
        ModelShape(
            "llama-3-70b", "llama", 80, 8192, 64, 8, 128, 28672, 128256, 8192, False,
            source="meta-llama/Meta-Llama-3-70B config.json",
        ),
    )
}  # fmt: skip

#: ``model_type`` of a Hugging Face config.json -> family it is built like
_HF_FAMILIES: Mapping[str, Family] = {"gpt2": "gpt", "llama": "llama", "mistral": "llama", "qwen2": "llama"}


def find_shape(model: str) -> ModelShape:
    """The preset ``model``, or the shape in the config.json that ``model`` is the path of (or the folder of).

    Raises:
        UsageError: neither a preset nor a file.
        DataError: the file is unreadable or malformed.
        Unsupported: its architecture is none of ours.
    """
    if model in PRESETS:
        return PRESETS[model]
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
    if path.is_file():
        return read_hf_config(path)
    raise UsageError(
        f"unknown model {model!r}: it is neither a file nor one of {', '.join(PRESETS)}. Give one of these, or the "
        "path of a Hugging Face config.json"
    )


def read_hf_config(path: Path) -> ModelShape:
    """The shape in a Hugging Face ``config.json``.

    Raises:
        DataError: unreadable, or a field missing or of the wrong kind.
        Unsupported: an architecture that is none of ours.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: not a readable JSON file: {error}") from error
    if not isinstance(body, dict):
        raise DataError(f"{path}: a config.json holds one object")
    kind = body.get("model_type")
    if not isinstance(kind, str) or kind not in _HF_FAMILIES:
        raise Unsupported(
            "another_architecture",
            f"{path}: model_type {kind!r} is not built like {', '.join(_HF_FAMILIES)}; with --implementation "
            "transformers the model's own code is traced (package transformers), and "
            "vbench.kernels.virtual.trace.estimate_module takes any nn.Module",
        )

    def number(*names: str, default: int | None = None) -> int:
        for field_name in names:
            value = body.get(field_name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"{path}: {field_name}={value!r} must be a positive integer")
            return value
        if default is None:
            raise DataError(f"{path}: {names[0]} is missing")
        return default

    def flag(field_name: str, default: bool) -> bool:
        value: Any = body.get(field_name, default)
        if not isinstance(value, bool):
            raise DataError(f"{path}: {field_name}={value!r} must be true or false")
        return value

    family = _HF_FAMILIES[kind]
    if family == "gpt":
        # The gpt family here fixes what GPT-2's code does by default; its other switches change what is saved.
        width, heads = number("n_embd", default=768), number("n_head", default=12)
        if width % heads:
            raise DataError(f"{path}: n_embd={width} does not divide among n_head={heads}")
        return ModelShape(
            str(path), "gpt", number("n_layer", default=12), width, heads, heads, width // heads,
            number("n_inner", default=4 * width), number("vocab_size", default=50257),
            number("n_positions", "n_ctx", default=1024), flag("tie_word_embeddings", True), source=str(path),
        )  # fmt: skip
    width, heads = number("hidden_size"), number("num_attention_heads")
    if body.get("head_dim") is None and width % heads:
        raise DataError(f"{path}: hidden_size={width} does not divide among num_attention_heads={heads}")
    if flag("mlp_bias", False):
        raise Unsupported("mlp_bias", f"{path}: mlp_bias=true is not modelled; use --implementation transformers")
    if kind != "qwen2" and flag("attention_bias", False):
        raise DataError(
            f"{path}: attention_bias=true is not supported; use vbench.kernels.virtual.trace.estimate_module"
        )
    return ModelShape(
        str(path), "llama", number("num_hidden_layers"), width, heads, number("num_key_value_heads", default=heads),
        number("head_dim", default=width // heads), number("intermediate_size"), number("vocab_size"),
        number("max_position_embeddings"), flag("tie_word_embeddings", False), qkv_bias=kind == "qwen2",
        source=str(path),
    )  # fmt: skip
