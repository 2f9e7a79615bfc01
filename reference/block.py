"""Meaning of ``decoder_block``: every step in float64 with the error it may carry (see ``uncertain.py``).

Steps, and where a result is stored (in each dtype of ``Numerics.stores``, or not at all):
    norm_1 *; q, k, v *; rotary * (llama); attention *; projection *; r = x + projection *; norm_2 *;
    gpt2: gelu(c_fc *) *; llama: silu(gate *) * up * (the silu alone * too where stores names two roundings); last
    projection *; y = r + that, rounded to dtype x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vbench.reference import uncertain
from vbench.reference.budget import UNDERFLOW, UNIT_ROUNDOFF
from vbench.reference.fp4 import decode_float64, quantize
from vbench.reference.ops.block import DENSE, Layer, layers
from vbench.reference.sampling import sample_rows, seeded, torch_dtype
from vbench.reference.uncertain import Uncertain
from vbench.spec import Case, Expected, Numerics

EPS = 1e-5
FIELDS = ("codes", "scale", "global_scale")


def _draw_layer(case: Case, layer: Layer, device: str) -> dict[str, Tensor]:
    """Weights N(0, 1/k), so that the block's tensors stay of order 1; the same for every format and token count."""
    gen = seeded("block", layer.name, layer.n, layer.k, case.seed)
    dtype = torch_dtype(case.text("x"))
    w = (torch.randn(layer.n, layer.k, generator=gen) * layer.k**-0.5).to(device)
    if case.text("fmt") == DENSE:
        tensors = {f"{layer.name}.weight": w.to(dtype)}
    else:
        packed = quantize(case.text("fmt"), w)
        tensors = {f"{layer.name}.{name}": packed[name] for name in FIELDS}
    if layer.bias:
        tensors[f"{layer.name}.bias"] = (torch.randn(layer.n, generator=gen) * 0.1).to(device, dtype)
    return tensors


def rotary_tables(theta: int, s: int, d: int) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [s, d/2] of position / theta^(2i/d), computed in float64 (Su et al. 2021, RoFormer)."""
    frequency = float(theta) ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = torch.arange(s, dtype=torch.float64)[:, None] * frequency
    return torch.cos(angle).float(), torch.sin(angle).float()


def block_inputs(case: Case, device: str) -> dict[str, Any]:
    """A flat dict of tensors.

    ``x`` [b s, hidden]; for each layer of ``ops.block.layers`` ``NAME.codes``, ``NAME.scale``, ``NAME.global_scale`` or
    ``NAME.weight``, and ``NAME.bias`` in gpt2; ``norm_1.weight``, ``norm_2.weight`` [hidden], in gpt2 with ``.bias``;
    llama: ``cos``, ``sin`` float32 [s, d/2], as models cache them, so that no kernel is charged for large angles.
    """
    tokens, hidden = case.axis("b") * case.axis("s"), case.axis("hidden")
    dtype = torch_dtype(case.text("x"))
    gen = seeded("block_x", case.id)
    inputs: dict[str, Any] = {"x": torch.randn(tokens, hidden, generator=gen).to(device, dtype)}
    for layer in layers(case):
        inputs |= _draw_layer(case, layer, device)
    for norm in ("norm_1", "norm_2"):
        inputs[f"{norm}.weight"] = (1 + 0.1 * torch.randn(hidden, generator=gen)).to(device, dtype)
        if case.text("family") == "gpt2":
            inputs[f"{norm}.bias"] = (0.1 * torch.randn(hidden, generator=gen)).to(device, dtype)
    if case.text("family") == "llama":
        cos, sin = rotary_tables(case.axis("theta"), case.axis("s"), hidden // case.axis("hq"))
        inputs["cos"], inputs["sin"] = cos.to(device), sin.to(device)
    return inputs


class _Block:
    """The block on uncertain numbers."""

    def __init__(self, case: Case, inputs: dict[str, Any], numerics: Numerics) -> None:
        self.case, self.inputs, self.numerics = case, inputs, numerics
        self.gpt2 = case.text("family") == "gpt2"

    def store(self, t: Uncertain) -> Uncertain:
        return uncertain.rounded(t, self.numerics.stores)

    def linear(self, name: str, a: Uncertain) -> Uncertain:
        fmt = self.case.text("fmt")
        if fmt == DENSE:
            weight = self.inputs[f"{name}.weight"]
        else:
            weight = decode_float64(fmt, {field: self.inputs[f"{name}.{field}"] for field in FIELDS})
        y = uncertain.product(a, weight, self.numerics)
        if f"{name}.bias" in self.inputs:
            y = uncertain.add(y, Uncertain.exact(self.inputs[f"{name}.bias"]))
        return self.store(y)

    def norm(self, name: str, t: Uncertain) -> Uncertain:
        shift = self.inputs.get(f"{name}.bias")
        return self.store(uncertain.normalise(t, self.inputs[f"{name}.weight"], shift, EPS))

    def heads(self, t: Uncertain, count: int, *, turn: bool) -> Uncertain:
        """[b s, count d] -> [b, s, count, d], turned by position where the family does."""
        b, s = self.case.axis("b"), self.case.axis("s")
        shaped = Uncertain(t.value.reshape(b * s, count, -1), t.variance.reshape(b * s, count, -1))
        if turn and not self.gpt2:
            cos, sin = (self.inputs[name].repeat(b, 1) for name in ("cos", "sin"))
            shaped = self.store(uncertain.rotate(shaped, cos, sin))
        shape = (b, s, *shaped.value.shape[1:])
        return Uncertain(shaped.value.reshape(shape), shaped.variance.reshape(shape))

    def attention(self, h: Uncertain, rows: Tensor | None) -> Uncertain:
        """[b s, hidden] -> [len(rows), hidden]."""
        case, numerics = self.case, self.numerics
        b, s, hq, hk, hidden = (case.axis(name) for name in ("b", "s", "hq", "hk", "hidden"))
        if self.gpt2:
            fused = self.linear("c_attn", h)
            q, k, v = map(Uncertain, fused.value.chunk(3, dim=1), fused.variance.chunk(3, dim=1))
        else:
            q, k, v = (self.linear(name, h) for name in ("q_proj", "k_proj", "v_proj"))
        q, k, v = self.heads(q, hq, turn=True), self.heads(k, hk, turn=True), self.heads(v, hk, turn=False)
        wanted = torch.arange(b * s, device=h.value.device) if rows is None else rows
        value = torch.empty(len(wanted), hidden, dtype=torch.float64, device=h.value.device)
        variance = torch.empty_like(value)
        d = hidden // hq
        for i in range(b):
            here = (wanted // s == i).nonzero().reshape(-1)
            positions = wanted[here] % s
            for head in range(hq):
                kv = head // (hq // hk)
                out = uncertain.attend(
                    Uncertain(q.value[i, positions, head], q.variance[i, positions, head]),
                    Uncertain(k.value[i, :, kv], k.variance[i, :, kv]),
                    Uncertain(v.value[i, :, kv], v.variance[i, :, kv]),
                    positions,
                    numerics,
                )
                value[here, head * d : (head + 1) * d] = out.value
                variance[here, head * d : (head + 1) * d] = out.variance
        return self.store(Uncertain(value, variance))

    def mlp(self, h: Uncertain) -> Uncertain:
        if self.gpt2:
            return self.linear("mlp_c_proj", self.store(uncertain.gelu_tanh(self.linear("mlp_c_fc", h))))
        gate = uncertain.silu(self.linear("gate_proj", h))
        # A composition that stores twice at each step does so between silu and the product as well.
        gate = uncertain.rounded(gate, self.numerics.stores[1:])
        return self.linear("down_proj", self.store(uncertain.multiply(gate, self.linear("up_proj", h))))

    def run(self, rows: Tensor | None) -> Uncertain:
        """y [len(rows), hidden] before its last rounding."""
        x = Uncertain.exact(self.inputs["x"])
        attended = self.attention(self.norm("norm_1", x), rows)
        projected = self.linear("c_proj" if self.gpt2 else "o_proj", attended)
        r = self.store(uncertain.add(x.rows(rows), projected))
        return uncertain.add(r, self.mlp(self.norm("norm_2", r)))


def block_float64(case: Case, inputs: dict[str, Any]) -> Tensor:
    """y [b s, hidden] in float64."""
    return _Block(case, inputs, Numerics("fp64", probabilities="fp64")).run(None).value


def block_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """y in float64 and its budget: LAMBDA sqrt(variance) of all that came before, and the rounding to dtype x."""
    name = case.text("x")
    tokens = case.axis("b") * case.axis("s")
    picked = sample_rows(case, tokens, max_rows)
    rows = None if picked is None else picked.to(inputs["x"].device)
    y = _Block(case, inputs, numerics).run(rows)
    budget = y.bound + UNIT_ROUNDOFF[name] * (y.value.abs() + y.bound) + UNDERFLOW[name]

    def take(t: Tensor) -> Tensor:
        return t if rows is None else t[rows.to(t.device)]

    return {"y": Expected(y.value, budget, torch_dtype(name), (tokens, case.axis("hidden")), take)}
