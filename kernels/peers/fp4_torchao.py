"""Peer ``torchao`` of ``fp4_linear``: its ``NVFP4Tensor`` built from the op's own codes and scales, weight-only.

Without rounded activations it dequantises the weight and calls ``F.linear`` (nvfp4_tensor.py, ``nvfp4_linear``). Its
``MXTensor`` refuses to be weight-only ("weight-only quant not yet supported", mx_tensor.py), and its int4 tensor is
torch's tinygemm kernel, which is the backend ``tinygemm`` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.dense_linear import ACTIVATIONS
from vbench.spec import Case, Numerics

BLOCK = 16


@dataclass(slots=True)
class Nvfp4Linear:
    """``F.linear(x, NVFP4Tensor, bias)``, then the activation."""

    act: str
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        x, bias = inputs["x"], inputs.get("bias")
        weight = NVFP4Tensor(
            inputs["codes"], inputs["scale"], BLOCK, x.dtype, per_tensor_scale=inputs["global_scale"].reshape(())
        )
        activation = ACTIVATIONS.get(self.act)

        def launch() -> Mapping[str, Any]:
            y = torch.nn.functional.linear(x, weight, bias)
            return {"y": y if activation is None else activation(y)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``fp4_linear``. Raises Unsupported: ``format_not_of_peer``."""
    x, act = case.text("x"), case.text("act")
    if case.text("fmt") != "nvfp4":
        raise Unsupported(
            "format_not_of_peer",
            f"fmt={case.text('fmt')}: weight-only it has nvfp4 (int4: backend tinygemm)",
        )
    # Scale times scale and their product with the value in float32, then once to x's dtype.
    roundings: tuple[str, ...] = ("fp32", "fp32") if x == "fp32" else ("fp32", "fp32", x)
    if x != "fp32" and device == "cuda":
        roundings += (x,)  # split-K partial sums
    stores = (x,) if act in ("gelu", "silu") else ()
    accumulate = "tensor_core" if device == "cuda" and x != "fp32" else "fp32"
    return Nvfp4Linear(act, Numerics(accumulate, roundings, stores=stores))
