"""The models that are estimated and trained, in plain torch: one GPT and one LLaMA, built from a ``ModelShape``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vbench.errors import Unsupported
from vbench.kernels.virtual.program import Attention
from vbench.kernels.virtual.shapes import ModelShape


class LanguageModel(nn.Module):
    """A decoder-only transformer.

    Args:
        shape: sizes.
        attention: ``eager`` or ``sdpa``.
        checkpointing: run each block again in the backward instead of keeping what it saved.
        dropout: probability, 0 for none; gpt only.
    """

    def __init__(
        self, shape: ModelShape, *, attention: Attention = "sdpa", checkpointing: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if dropout and shape.family != "gpt":
            raise ValueError("only the gpt family has dropout")
        self.shape = shape
        self.attention: Attention = attention
        self.checkpointing = checkpointing
        self.dropout = dropout
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        if shape.family == "gpt":
            self.positions = nn.Parameter(torch.empty(shape.context, shape.width))
        self.blocks = nn.ModuleList(Block(shape, attention, dropout) for _ in range(shape.layers))
        self.norm = _norm(shape)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), projections into the residual stream scaled by 1/sqrt(2 layers)."""
        deep = 0.02 / math.sqrt(2 * self.shape.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=deep if name.endswith(("proj.weight", "down.weight")) else 0.02)

    def forward(self, ids_BS: Tensor, targets_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, vocabulary], or, where targets are given, the mean cross entropy in nats (fp32 scalar).

        Args:
            ids_BS: int64, S at most ``shape.context``.
            targets_BS: int64, same shape.
        """
        sequence = ids_BS.shape[1]
        x = self.embedding(ids_BS)
        if self.shape.family == "gpt":
            x = _dropout(x + self.positions[:sequence], self.dropout, self.training)
        shared = self._shared(sequence, x)
        for block in self.blocks:
            x = checkpoint(block, x, shared, use_reentrant=False) if self.checkpointing else block(x, shared)
        del shared
        logits = self.head(self.norm(x))
        del x
        if targets_BS is None:
            return logits  # type: ignore[no-any-return]
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets_BS.reshape(-1))

    def _shared(self, sequence: int, x: Tensor) -> dict[str, Tensor]:
        out = {}
        if self.attention == "eager":
            out["mask"] = torch.ones(sequence, sequence, dtype=torch.bool, device=x.device).triu_(1)
        if self.shape.family == "llama":
            where = x.device.type
            dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else x.dtype
            out["cos"], out["sin"] = rotary_angles(sequence, self.shape.head_dim, x.device, dtype)
        return out


def rotary_angles(sequence: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [sequence, head_dim] of rotary positions, base 10000 (Su et al. 2021, arXiv 2104.09864)."""
    with torch.no_grad():
        rates = 10000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
        angles = torch.arange(sequence, device=device, dtype=torch.float32)[:, None] * rates
        angles = torch.cat((angles, angles), -1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class Block(nn.Module):
    """Norm, attention, norm, MLP, with residuals around both pairs."""

    def __init__(self, shape: ModelShape, attention: Attention, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(shape)
        self.attn = SelfAttention(shape, attention, dropout)
        self.norm2 = _norm(shape)
        self.mlp: nn.Module = GeluMlp(shape) if shape.family == "gpt" else GatedMlp(shape)
        self.dropout = dropout

    def forward(self, x_BSE: Tensor, shared: dict[str, Tensor]) -> Tensor:
        """Same shape as ``x_BSE``."""
        x_BSE = x_BSE + _dropout(self.attn(self.norm1(x_BSE), shared), self.dropout, self.training)
        return x_BSE + _dropout(self.mlp(self.norm2(x_BSE)), self.dropout, self.training)


class SelfAttention(nn.Module):
    """Causal self-attention; fused q k v in a gpt, rotary and grouped heads in a llama.

    ``kernel``, where given, computes it instead of torch: (q, k, v, rule of the mask) -> out like q, groups and all.
    """

    qkv: nn.Linear
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    proj: nn.Linear

    def __init__(self, shape: ModelShape, attention: Attention, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.attention = attention
        self.dropout = dropout
        self.kernel: Callable[[Tensor, Tensor, Tensor, str], Tensor] | None = None
        for name, n_out, n_in, bias in shape.block_linears:
            owner, _, part = name.partition(".")
            if owner == "attn":
                setattr(self, part, nn.Linear(n_in, n_out, bias=bias))

    def forward(self, h_BSE: Tensor, shared: dict[str, Tensor]) -> Tensor:
        """Same shape as ``h_BSE``."""
        batch, sequence, _ = h_BSE.shape
        shape = self.shape
        if shape.family == "gpt":
            q, k, v = (
                t.view(batch, sequence, shape.heads, shape.head_dim).transpose(1, 2)
                for t in self.qkv(h_BSE).split(shape.width, -1)
            )
        else:
            q, k, v = (
                linear(h_BSE).view(batch, sequence, -1, shape.head_dim).transpose(1, 2)
                for linear in (self.q, self.k, self.v)
            )
            q, k = _rotate(q, shared), _rotate(k, shared)
        group = shape.heads // shape.kv_heads
        native = self.kernel is not None or (
            self.attention == "sdpa" and q.dtype != torch.float32
        )  # the fp32 kernel on a GPU has no groups
        if group > 1 and not native:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        dropout = self.dropout if self.training else 0.0
        if self.kernel is not None:
            if dropout:
                raise Unsupported(
                    "dropout", f"the replaced attention has no dropout, and dropout={dropout}: set it to 0"
                )
            context = self.kernel(q, k, v, "top_left")
        elif self.attention == "sdpa":
            context = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=group > 1 and native
            )
        else:
            context = self._eager(q, k, v, shared["mask"], dropout)
        del q, k, v
        return self.proj(context.transpose(1, 2).reshape(batch, sequence, -1))  # type: ignore[no-any-return]

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
        # Contiguous by our own hand: matmul copies transposed operands except at batch 1 or with one head, where it
        # keeps views of all of q, k, v alive instead.
        q, k = (q * q.shape[-1] ** -0.5).contiguous(), k.contiguous()
        scores = torch.matmul(q, k.transpose(-2, -1)).masked_fill(mask, -math.inf)
        return torch.matmul(_dropout(torch.softmax(scores, -1), dropout, True), v.contiguous())


class GeluMlp(nn.Module):
    """down(gelu(up(h)))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.inner)
        self.down = nn.Linear(shape.inner, shape.width)

    def forward(self, h: Tensor) -> Tensor:
        """Same shape as ``h``."""
        return self.down(F.gelu(self.up(h), approximate="tanh"))  # type: ignore[no-any-return]


class GatedMlp(nn.Module):
    """down(silu(gate(h)) · up(h))."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.inner, bias=False)
        self.up = nn.Linear(shape.width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Same shape as ``h``."""
        return self.down(F.silu(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]


def _norm(shape: ModelShape) -> nn.Module:
    return nn.LayerNorm(shape.width) if shape.family == "gpt" else nn.RMSNorm(shape.width, eps=1e-5)


def _dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout whose mask is one byte an element on every device (F.dropout's is as wide as x on a CPU)."""
    if not probability or not training:
        return x
    kept: Any = torch.native_dropout(x, probability, True)
    return kept[0]  # type: ignore[no-any-return]


def _rotate(x_BHSD: Tensor, shared: dict[str, Tensor]) -> Tensor:
    half = x_BHSD.shape[-1] // 2
    turned = torch.cat((-x_BHSD[..., half:], x_BHSD[..., :half]), -1)
    return x_BHSD * shared["cos"] + turned * shared["sin"]
