"""Meaning of ``attention_masked_backward``: gradients in float64 from the rounded inputs, and the elementwise budget.

A constant added to every score changes no gradient; cuDNN's backward gave NaN dq under one of -100 in bf16 with d = 64
and lengths of 192 or 320 (pytorch issue 196678), which is why there is an operation that takes a mask as a tensor.
The budget is that of ``attention_backward`` for a kernel with a forward of its own, on scores that hold the mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vbench.reference.attention import ScoreRule
from vbench.reference.attention_backward import _Bound, _Head
from vbench.reference.sampling import generator, torch_dtype
from vbench.spec import Case, Expected, Numerics

SHIFT = -100.0


def masked_inputs(case: Case, device: str) -> dict[str, Any]:
    """``q`` and ``dout`` [b, h, sq, d], ``k`` and ``v`` [b, h, sk, d], all standard normal, ``mask`` [sq, sk]."""
    b, h, sq, sk, d = (case.axis(name) for name in ("b", "h", "sq", "sk", "d"))
    gen, dtype = generator(case, "masked"), torch_dtype(case.text("dtype"))
    lengths = {"q": sq, "k": sk, "v": sk, "dout": sq}
    inputs = {n: torch.randn(b, h, s, d, generator=gen).to(dtype).to(device) for n, s in lengths.items()}
    mask = torch.zeros(sq, sk)
    if case.text("mask") == "shift":
        mask.fill_(SHIFT)
    elif case.text("mask") == "random":
        mask = 2 * torch.randn(sq, sk, generator=gen)
    elif case.text("mask") == "padding":
        mask[:, sk - sk // 3 :] = -torch.inf
    return {**inputs, "mask": mask.to(dtype).to(device)}


@dataclass(frozen=True, slots=True)
class _MaskedRule(ScoreRule):
    """Scores of all rows and keys, the mask [sq, sk] (float64) added."""

    mask: Tensor | None = None

    def seen(self, rows: Tensor, sq: int, sk: int) -> Tensor:
        assert self.mask is not None
        return self.mask[rows] > -torch.inf

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        assert self.mask is not None
        scaled: Tensor = (q @ k.T) * q.shape[1] ** -0.5
        return scaled + self.mask


def _with_forward(rule: _MaskedRule, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``inputs`` with the forward's ``out`` and ``lse`` in float64."""
    q, k, v = (inputs[name].double() for name in ("q", "k", "v"))
    z = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + rule.mask
    return {**inputs, "out": torch.softmax(z, dim=-1) @ v, "lse": torch.logsumexp(z, dim=-1)}


def masked_float64(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """dq, dk, dv in float64."""
    rule = _MaskedRule("none", mask=inputs["mask"].double())
    whole = _with_forward(rule, inputs)
    q, k, v, dout = (inputs[name].double() for name in ("q", "k", "v", "dout"))
    z = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 + rule.mask
    p = torch.exp(z - whole["lse"][..., None])
    t = dout @ v.transpose(-1, -2) - (whole["out"] * dout).sum(dim=-1, keepdim=True)
    ds, scale = p * t, q.shape[-1] ** -0.5
    return {"dq": scale * (ds @ k), "dk": scale * (ds.transpose(-1, -2) @ q), "dv": p.transpose(-1, -2) @ dout}


def masked_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """dq, dk and dv in float64 with the budgets of ``attention_backward``, ``own_forward`` whatever is declared.

    All rows, whatever ``max_rows``: no case of this operation is timed.
    """
    b, h, sq, sk, d = (case.axis(name) for name in ("b", "h", "sq", "sk", "d"))
    rule = _MaskedRule("none", mask=inputs["mask"].double())
    whole, values = _with_forward(rule, inputs), masked_float64(inputs)
    bound = _Bound(replace(numerics, own_forward=True), case.text("dtype"), True)
    rows, keys = (torch.arange(n, device=inputs["q"].device) for n in (sq, sk))
    budgets = {name: torch.zeros_like(value) for name, value in values.items()}
    scale = d**-0.5
    for i in range(b):
        for j in range(h):
            head = _Head.of(rule, whole, i, j)
            worst = bound.row_worst(head)
            seen, z, p, t = head.block(rows, keys)
            p_error, ds_error = bound.errors(head, worst, rows, keys, seen, z, p, t)
            ds = p * t
            budgets["dq"][i, j] = scale * bound.products(sk, ds, ds_error, seen, head.k)
            budgets["dk"][i, j] = scale * bound.products(sq, ds.T, ds_error.T, seen.T, head.q)
            budgets["dv"][i, j] = bound.products(sq, p.T, p_error.T, seen.T, head.dout)
    why = "one key: its weight is 1, and dq and dk are 0" if sk == 1 and sq * d == 1 else ""
    dtype = torch_dtype(case.text("dtype"))
    return {
        name: Expected(value, bound.stored(budgets[name], value), dtype, tuple(value.shape), None, why)
        for name, value in values.items()
    }
