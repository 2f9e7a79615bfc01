"""The document's FP4 linear layer: decode by table, multiply, activate, one eager step after the other.

The document announces one fused kernel but writes none; its lines end at ``values = FP4_TABLE[indices] * scale``. The
rest is the plainest continuation: the decoded weight takes x's dtype (torch refuses to multiply two dtypes), then
``x @ values.T``, then the bias, then the activation, each rounded to x's dtype as eager torch does: in half types a
bias is added to a sum already rounded, which exact-grid cases with a bias show as WRONG_VALUE.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch
from vbench.kernels.as_written.codec import decode, require_document_format, require_single_variant, table_on
from vbench.spec import Case, Numerics

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


@dataclass(slots=True)
class Linear:
    """``fp4_linear`` as written; the weight is decoded again at every launch."""

    fmt: str
    act: str
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        x, packed, scale, bias = inputs["x"], inputs["codes"], inputs["scale"], inputs.get("bias")
        table = table_on(packed.device)

        def launch() -> Mapping[str, Tensor]:
            y = x @ decode(self.fmt, packed, scale, table).to(x.dtype).T
            if bias is not None:
                y = y + bias
            if self.act != "none":
                y = ACTIVATIONS[self.act](y)
            return {"y": y}

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported (``not_in_document``) for any format but absmax7.

    Numerics: decoding rounds to float32 and to x's dtype, and each eager step before the last stores a rounded y.
    """
    require_single_variant(variant)
    require_document_format(case.text("fmt"))
    x, act = case.text("x"), case.text("act")
    stores = (x,) * (case.axis("bias") + (act in ("gelu", "silu")))
    decoded = () if case.text("dist") == "grid" else ("fp32",) if x == "fp32" else ("fp32", x)
    accumulate = "tensor_core" if device == "cuda" and x != "fp32" else "fp32"
    return Linear(case.text("fmt"), act, Numerics(accumulate, operand_roundings=decoded + stores))
