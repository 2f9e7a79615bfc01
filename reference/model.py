"""Meaning of ``train_step`` and ``generate``: a plain torch model, run eagerly with everything on the device.

The module itself is an input: a kernel is handed what a user has, an ``nn.Module``, and runs it as its way of running
models says. Kernels that change no arithmetic are held to the eager result bit for bit. One that orders sums otherwise
(``Numerics.stores`` says which type it stores in) is held to float64, with a budget that eager's own rounding errors
give (docs/adr/0023): LAMBDA times their root mean square over the tensor, and twice the element's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vbench.reference.fp4 import dequantize, quantize
from vbench.reference.ops.model import RAW, positions
from vbench.reference.sampling import generator, seeded, torch_dtype
from vbench.spec import Case, Expected, Numerics

#: As for sums: docs/adr/0005.
LAMBDA = 6.0
#: Output of train_step -> the parameter whose gradient it is; -1 stands for the last block.
SAMPLED = {"grad_first": "blocks.0.mlp.up.weight", "grad_last": "blocks.-1.mlp.down.weight", "grad_norm": "norm.weight"}


class Block(nn.Module):
    """Norm, causal attention, norm, MLP, residuals around both pairs."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width, inner = case.axis("width"), case.axis("inner")
        self.gpt = case.text("family") == "gpt"
        self.heads = case.axis("heads")
        self.norm1, self.norm2 = _norm(case), _norm(case)
        if self.gpt:
            self.qkv = nn.Linear(width, 3 * width)
        else:
            self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.proj = nn.Linear(width, width, bias=self.gpt)
        self.mlp = nn.ModuleDict(
            {"up": nn.Linear(width, inner, bias=self.gpt), "down": nn.Linear(inner, width, bias=self.gpt)}
        )
        if not self.gpt:
            self.mlp["gate"] = nn.Linear(width, inner, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        """Same shape."""
        h = self.norm1(x_BSE)
        q, k, v = self.qkv(h).chunk(3, -1) if self.gpt else (self.q(h), self.k(h), self.v(h))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if not self.gpt:
            q, k = _rotated(q), _rotated(k)
        length = q.shape[2]
        hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf)
        context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x_BSE = x_BSE + self.proj(context)
        h = self.norm2(x_BSE)
        up = self.mlp["up"](h)
        opened = F.gelu(up, approximate="tanh") if self.gpt else F.silu(self.mlp["gate"](h)) * up
        y: Tensor = x_BSE + self.mlp["down"](opened)
        return y


class Transformer(nn.Module):
    """A decoder-only language model: logits [B, S, vocab] of ids [B, S]."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        width, vocab = case.axis("width"), case.axis("vocab")
        self.gpt = case.text("family") == "gpt"
        self.embedding = nn.Embedding(vocab, width)
        if self.gpt:
            self.positions = nn.Parameter(torch.empty(positions(case), width))
        self.blocks = nn.ModuleList(Block(case) for _ in range(case.axis("layers")))
        self.norm = _norm(case)
        self.head = nn.Linear(width, vocab, bias=False)
        if self.gpt:
            self.head.weight = self.embedding.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Logits in the model's dtype."""
        x = self.embedding(ids_BS)
        if self.gpt:
            x = x + self.positions[: ids_BS.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _norm(case: Case) -> nn.Module:
    width = case.axis("width")
    return nn.LayerNorm(width) if case.text("family") == "gpt" else nn.RMSNorm(width, eps=1e-5)


def _rotated(x_BHSD: Tensor) -> Tensor:
    """Rotary positions, base 10000, halves paired (Su et al. 2021, arXiv 2104.09864); angles in float32 at least."""
    half = x_BHSD.shape[-1] // 2
    wide = torch.promote_types(x_BHSD.dtype, torch.float32)
    rates = 10000.0 ** (-torch.arange(half, dtype=wide, device=x_BHSD.device) / half)
    angles = torch.arange(x_BHSD.shape[2], dtype=wide, device=x_BHSD.device)[:, None] * rates
    cos, sin = angles.cos().to(x_BHSD.dtype), angles.sin().to(x_BHSD.dtype)
    low, high = x_BHSD[..., :half], x_BHSD[..., half:]
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The model by seed, not its weights: several GB are made where and when a kernel wants them.

    ``make`` may be called as often as one likes, in ``bind`` only; each gives a module of its own with equal values.
    """

    case: Case
    device: str

    @property
    def layers(self) -> int:
        return self.case.axis("layers")

    @property
    def codec(self) -> str:
        """How linear weights of the blocks may lie: ``raw`` or a format; ``make`` gives the weights before it."""
        return self.case.text("codec") if self.case.op == "generate" else RAW

    def make(self, home: str) -> nn.Module:
        """The model in the case's dtype with its weights on ``home``; each was drawn on the case's device.

        Matrices are normal with variance 1 / in features (embeddings: 1), gains near 1, biases and positions small.
        """
        dtype = torch_dtype(self.case.text("dtype"))
        with torch.device("meta"):
            model = Transformer(self.case).to(dtype)
        shape = [f"{name}={value}" for name, value in self.case.params if name in _SHAPE]
        drawn: dict[int, nn.Parameter] = {}
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if id(parameter) not in drawn:
                gen = torch.Generator(self.device).manual_seed(seeded(*shape, self.case.seed, name).initial_seed())
                value = torch.randn(parameter.shape, generator=gen, device=self.device, dtype=dtype)
                if parameter.dim() == 1:
                    value = value.mul_(0.1).add_(float(name.endswith("weight")))
                else:
                    value.mul_(0.1 if name == "positions" else parameter.shape[1] ** -0.5)
                drawn[id(parameter)] = nn.Parameter(value.to(home))
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, drawn[id(parameter)])
        return model

    def decoded(self) -> nn.Module:
        """``make`` on the device, with what is left of the blocks' linear weights after the codec."""
        model = self.make(self.device)
        if self.codec == RAW:
            return model
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, nn.Linear) and name.startswith("blocks."):
                    module.weight.copy_(
                        dequantize(self.codec, quantize(self.codec, module.weight), module.weight.dtype)
                    )
        return model

    def sampled(self, output: str) -> str:
        """Name of the parameter whose gradient ``output`` is."""
        return SAMPLED[output].replace("-1", str(self.layers - 1))


#: Parameters of a case on which its weights depend.
_SHAPE = ("family", "dtype", "layers", "width", "heads", "inner", "vocab")


def _ids(case: Case, device: str, stream: str, length: int) -> Tensor:
    gen = generator(case, stream)
    return torch.randint(case.axis("vocab"), (case.axis("batch"), length), generator=gen).to(device)


def train_inputs(case: Case, device: str) -> dict[str, Any]:
    """``ids`` and ``targets`` int64 [batch, seq], and ``model``, a ``Recipe``."""
    length = case.axis("seq")
    return {
        "ids": _ids(case, device, "ids", length),
        "targets": _ids(case, device, "targets", length),
        "model": Recipe(case, device),
    }


def generate_inputs(case: Case, device: str) -> dict[str, Any]:
    """``ids`` int64 [batch, seq], ``given`` int64 [batch, new], the tokens to append, and ``model``, a ``Recipe``."""
    return {
        "ids": _ids(case, device, "ids", case.axis("seq")),
        "given": _ids(case, device, "given", case.axis("new")),
        "model": Recipe(case, device),
    }


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross entropy in nats of each token, float32 (float64 for float64 logits) [B S]."""
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    return F.cross_entropy(logits_BSV.flatten(0, 1).to(wide), targets_BS.flatten(), reduction="none")


def train_step(model: nn.Module, recipe: Recipe, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The op's outputs, by a model whose gradients are empty."""
    losses = token_losses(model(inputs["ids"]), inputs["targets"])
    torch.autograd.backward(losses.mean())
    outputs = {"losses": losses.detach()}
    for name in SAMPLED:
        gradient = model.get_parameter(recipe.sampled(name)).grad
        assert gradient is not None
        outputs[name] = gradient
    return outputs


@torch.no_grad()
def generate(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The op's output."""
    ids, given = inputs["ids"], inputs["given"]
    logits = []
    for i in range(given.shape[1]):
        # A new tensor each time, so that every pass sees the same strides as any other way of growing a text.
        logits.append(
            model(torch.cat((ids, given[:, :i]), 1))[:, -1].to(torch.promote_types(_dtype(model), torch.float32))
        )
    return {"logits": torch.stack(logits, 1)}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _expected(eager: Mapping[str, Tensor], exact: Mapping[str, Tensor] | None) -> dict[str, Expected]:
    if exact is None:
        return {name: Expected(t, None, t.dtype, tuple(t.shape)) for name, t in eager.items()}
    out = {}
    for name, t in eager.items():
        error = (t.double() - exact[name]).abs()
        budget = LAMBDA * error.square().mean().sqrt() + 2 * error
        out[name] = Expected(exact[name], budget, t.dtype, tuple(t.shape))
    return out


def train_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """Bitwise for kernels that store in no type of their own, all elements."""
    recipe: Recipe = inputs["model"]
    eager = train_step(recipe.make(recipe.device), recipe, inputs)
    if not numerics.stores:
        return _expected(eager, None)
    return _expected(eager, train_step(recipe.make(recipe.device).double(), recipe, inputs))


def generate_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """As ``train_oracle``."""
    recipe: Recipe = inputs["model"]
    model = recipe.decoded()
    eager = generate(model, inputs)
    return _expected(eager, generate(model.double(), inputs) if numerics.stores else None)
