"""Peer ``bitsandbytes`` of ``fp4_linear``: ``matmul_4bit`` on the op's own NF4 weight, as its ``Linear4bit`` calls it.

Its NF4 is the op's (blocks of 64, float32 absmax, the same table) but for the order of a byte's two codes: the first is
in the high nibble (bitsandbytes csrc/kernels.cu, kDequantizeBlockwise). Its "fp4" is another table than E2M1 and has no
format in the op.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.dense_linear import ACTIVATIONS, NF4
from vbench.spec import Case, Numerics

BLOCK = 64


@dataclass(slots=True)
class Nf4Linear:
    """``matmul_4bit``, then the activation."""

    act: str
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; codes change places outside the clock."""
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        x, codes, bias = inputs["x"], inputs["codes"], inputs.get("bias")
        n, half = codes.shape
        packed = ((codes << 4) | (codes >> 4)).reshape(-1, 1)
        state = QuantState(
            inputs["scale"].reshape(-1).clone(),
            shape=torch.Size((n, 2 * half)),
            code=torch.tensor(NF4, dtype=torch.float32, device=x.device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=x.dtype,
        )
        activation = ACTIVATIONS.get(self.act)

        def launch() -> Mapping[str, Any]:
            y = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state, bias=bias)
            return {"y": y if activation is None else activation(y)}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``fp4_linear``.

    Raises:
        Unsupported: ``format_not_of_peer``.
    """
    x, act = case.text("x"), case.text("act")
    if case.text("fmt") != "nf4":
        raise Unsupported("format_not_of_peer", f"fmt={case.text('fmt')}: it decodes nf4 (its fp4 is no E2M1)")
    # Table, absmax and their product are each rounded to x's dtype; for many tokens cuBLAS may round split sums too.
    roundings = ("fp32",) if x == "fp32" else (x, x, x, x) if device == "cuda" else (x, x, x)
    # The sum is stored before the bias and the activation read it.
    stores = (x,) if case.axis("bias") or act in ("gelu", "silu") else ()
    accumulate = "tensor_core" if device == "cuda" and x != "fp32" else "fp32"
    return Nf4Linear(act, Numerics(accumulate, roundings, stores=stores * (2 if act in ("gelu", "silu") else 1)))
