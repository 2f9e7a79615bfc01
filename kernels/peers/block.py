"""Peers of ``decoder_block``: the block as a user of plain torch writes it.

Variants
    cublas: every weight is decoded once, outside the clock, to dtype x (fmt ``dense``: is in it already).
    eager_dequant: the weights stay packed; every launch decodes each with eager torch before it multiplies.
Attention is ``scaled_dot_product_attention`` with the backend torch itself picks; rotary positions are turned in
float32, as in the models' reference code (facebookresearch/llama, model.py, apply_rotary_emb).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.dense_linear import TABLES, decoder
from vbench.spec import Case, Numerics

VARIANTS = ("cublas", "eager_dequant")
EPS = 1e-5


def turned(t_BSHD: Tensor, cos_SD2: Tensor, sin_SD2: Tensor) -> Tensor:
    """Half-split rotary embedding in float32, rounded once to the input's dtype."""
    a, b = t_BSHD.float().chunk(2, dim=-1)
    cos, sin = cos_SD2[:, None], sin_SD2[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(t_BSHD.dtype)


@dataclass(slots=True)
class TorchBlock:
    """One block of a case; returns its own output tensor."""

    case: Case
    each_launch: bool
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; inputs as the op names them."""
        case = self.case
        b, s, hq, hk = (case.axis(name) for name in ("b", "s", "hq", "hk"))
        fmt, x = case.text("fmt"), inputs["x"]
        if x.device.type == "cuda":
            torch.set_float32_matmul_precision("highest")
        decode = None if fmt == "dense" else decoder(fmt, x.device)

        def weight_of(name: str) -> Tensor:
            if decode is None:
                dense: Tensor = inputs[f"{name}.weight"]
                return dense
            codes, scale, global_scale = (inputs[f"{name}.{field}"] for field in ("codes", "scale", "global_scale"))
            return decode(codes, scale, global_scale, x.dtype)

        stems = {
            name.rsplit(".", 1)[0] for name in inputs if name.endswith(".codes" if decode is not None else ".weight")
        }
        once = {} if self.each_launch else {name: weight_of(name) for name in stems if not name.startswith("norm")}

        def linear(name: str, t: Tensor) -> Tensor:
            weight = once[name] if name in once else weight_of(name)
            return F.linear(t, weight, inputs.get(f"{name}.bias"))

        def norm(name: str, t: Tensor) -> Tensor:
            gain = inputs[f"{name}.weight"]
            if f"{name}.bias" in inputs:
                return F.layer_norm(t, gain.shape, gain, inputs[f"{name}.bias"], EPS)
            return F.rms_norm(t, gain.shape, gain, EPS)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=hk != hq)
            return y.transpose(1, 2).reshape(b * s, -1)

        def gpt2() -> Mapping[str, Tensor]:
            parts = linear("c_attn", norm("norm_1", x)).chunk(3, dim=-1)
            r = x + linear("c_proj", attend(*(t.reshape(b, s, hq, -1) for t in parts)))
            wide = F.gelu(linear("mlp_c_fc", norm("norm_2", r)), approximate="tanh")
            return {"y": r + linear("mlp_c_proj", wide)}

        def llama() -> Mapping[str, Tensor]:
            h = norm("norm_1", x)
            q = turned(linear("q_proj", h).reshape(b, s, hq, -1), inputs["cos"], inputs["sin"])
            k = turned(linear("k_proj", h).reshape(b, s, hk, -1), inputs["cos"], inputs["sin"])
            r = x + linear("o_proj", attend(q, k, linear("v_proj", h).reshape(b, s, hk, -1)))
            h = norm("norm_2", r)
            return {"y": r + linear("down_proj", F.silu(linear("gate_proj", h)) * linear("up_proj", h))}

        return gpt2 if case.text("family") == "gpt2" else llama


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``decoder_block``.

    Raises:
        Unsupported: ``unknown_variant``; ``unknown_format``; ``nothing_to_decode``: eager_dequant of dense weights.
    """
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(VARIANTS)}")
    fmt, x = case.text("fmt"), case.text("x")
    if fmt != "dense" and fmt not in TABLES:
        raise Unsupported("unknown_format", f"fmt={fmt} is not one of {', '.join(TABLES)}")
    if fmt == "dense" and variant == "eager_dequant":
        raise Unsupported("nothing_to_decode", "dense weights have nothing to decode; take variant cublas")
    roundings: tuple[str, ...] = () if fmt in ("dense", "mxfp4") else ("fp32",) if x == "fp32" else ("fp32", x)
    if x != "fp32" and device == "cuda":
        roundings += (x,)  # split-K partial sums, see dense_linear.py
    accumulate = "tensor_core" if device == "cuda" and x != "fp32" else "fp32"
    # Two roundings a step: RMSNorm rounds before its weight, silu before the product.
    numerics = Numerics(accumulate, roundings, probabilities=x, stores=(x, x))
    return TorchBlock(case, variant == "eager_dequant", numerics)
