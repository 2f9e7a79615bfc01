"""Meaning of ``train_step`` and ``generate``: a plain torch model, run eagerly with everything on the device.

The module itself is an input: a kernel is handed what a user has, an ``nn.Module``, and runs it as its way of running
models says. Kernels that change no arithmetic are held to the eager result bit for bit. One that orders sums otherwise
(``Numerics.stores`` says which type it stores in) is held to float64, with a budget that eager's own rounding errors
give (docs/adr/0023): LAMBDA times their standard deviation, and twice the element's own. A gradient's is propagated
from the errors of what its layer read and was handed back (``flow_variance``), since no two rows of it err alike.
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


#: What a layer read and the gradient it was handed, float64 [tokens, in] and [tokens, out]; of a norm, [tokens, width]
#: both, what its gain multiplied in the place of what it read.
Flow = tuple[Tensor, Tensor]


def watched_step(
    model: nn.Module, recipe: Recipe, inputs: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Flow]]:
    """``train_step``, and what flowed through the layer of each gradient that is an output."""
    read: dict[str, Tensor] = {}
    handed: dict[str, Tensor] = {}
    hooks = []
    for name in SAMPLED:
        layer = model.get_submodule(recipe.sampled(name).removesuffix(".weight"))

        def reads(layer: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
            x = given[0].detach().flatten(0, -2).double()
            if isinstance(layer, nn.LayerNorm):
                x = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            elif isinstance(layer, nn.RMSNorm):
                x = F.rms_norm(x, layer.normalized_shape, eps=layer.eps)
            read[name] = x

        def is_handed(_: nn.Module, __: Any, given: Any, name: str = name) -> None:
            handed[name] = given[0].detach().flatten(0, -2).double()

        hooks += [layer.register_forward_pre_hook(reads), layer.register_full_backward_hook(is_handed)]
    outputs = train_step(model, recipe, inputs)
    for hook in hooks:
        hook.remove()
    return outputs, {name: (read[name], handed[name]) for name in SAMPLED}


def flow_variance(eager: Flow, exact: Flow, shape: torch.Size) -> Tensor:
    """Variance of the rounding error of the gradient of a weight [out, in], or of a gain [width].

    The gradient sums y_to x_ti over tokens t. To first order its error is the sum of dy_to x_ti + y_to dx_ti, so that,
    where errors of different tokens are independent, the variance is that of dy times x squared and the other way
    round, summed. The variances of dy and dx are taken from one sample of them, the difference of eager and exact,
    pooled over tokens and over features: mean square of the row times that of the column over that of all.
    """
    (x, y), (dx, dy) = exact, (eager[0] - exact[0], eager[1] - exact[1])
    if len(shape) == 1:
        return (_pooled(dy) * x.square() + y.square() * _pooled(dx)).sum(0)
    return _pooled(dy).T @ x.square() + y.square().T @ _pooled(dx)


def _pooled(error: Tensor) -> Tensor:
    """See ``flow_variance``; zero where there is no error at all."""
    square = error.square()
    mean = square.mean()
    return square.mean(1, keepdim=True) * square.mean(0, keepdim=True) / mean if mean > 0 else square


def _expected(
    eager: Mapping[str, Tensor], exact: Mapping[str, Tensor] | None, variance: Mapping[str, Tensor] | None = None
) -> dict[str, Expected]:
    """``variance``: of errors, by element, where it is known; it counts where it exceeds the tensor's mean square."""
    if exact is None:
        return {name: Expected(t, None, t.dtype, tuple(t.shape)) for name, t in eager.items()}
    out = {}
    for name, t in eager.items():
        error = (t.double() - exact[name]).abs()
        square = error.square().mean()
        if variance is not None and name in variance:
            square = square.maximum(variance[name])
        out[name] = Expected(exact[name], LAMBDA * square.sqrt() + 2 * error, t.dtype, tuple(t.shape))
    return out


def train_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """Bitwise for kernels that store in no type of their own, all elements."""
    recipe: Recipe = inputs["model"]
    if not numerics.stores:
        return _expected(train_step(recipe.make(recipe.device), recipe, inputs), None)
    eager, flows = watched_step(recipe.make(recipe.device), recipe, inputs)
    exact, exact_flows = watched_step(recipe.make(recipe.device).double(), recipe, inputs)
    variance = {name: flow_variance(flows[name], exact_flows[name], exact[name].shape) for name in SAMPLED}
    return _expected(eager, exact, variance)


def generate_oracle(
    case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None
) -> dict[str, Expected]:
    """As ``train_oracle``."""
    recipe: Recipe = inputs["model"]
    model = recipe.decoded()
    eager = generate(model, inputs)
    return _expected(eager, generate(model.double(), inputs) if numerics.stores else None)
