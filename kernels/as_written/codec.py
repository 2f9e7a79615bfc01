"""The document's FP4 codec (section "FP4 quantisation" of its technical details).

Its lines: ``scale = W.abs().max() / 7``, ``W_quant = clamp(round(W / scale), -7, 7)``, ``packed = (high << 4) | low``,
``values = FP4_TABLE[unpack(packed)] * scale``.

Readings where it is silent
    Negative numbers have no place in ``(high << 4) | low``, so a code is W_quant + 8: a 16-entry table, zero at 8.
    Element 0 of a pair is ``low``.
    ``scale`` has W's dtype, as ``W.abs().max() / 7`` has in torch: a bfloat16 weight gets a bfloat16 scale.
    One scale a row or a group of 128 is the same line applied to each row or group.
    An all-zero weight divides zero by zero: the document does not look, and neither does this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

FP4_TABLE = tuple(float(code - 8) for code in range(16))

#: format -> elements of k that share a scale; 0 the whole tensor, -1 the row
GROUPS = {"absmax7_tensor": 0, "absmax7_row": -1, "absmax7_g128": 128}


def require_document_format(fmt: str) -> None:
    """Raises Unsupported for a format the document does not describe."""
    if fmt not in GROUPS:
        raise Unsupported("not_in_document", f"fmt={fmt}: the document has absmax/7 only; pick an absmax7 format")


def require_single_variant(variant: str) -> None:
    """Raises Unsupported for a variant name the codec and the linear layer do not have."""
    if variant:
        raise Unsupported("unknown_variant", f"this op of as_written has a single variant, not {variant!r}")


def encode(fmt: str, w: Tensor) -> tuple[Tensor, Tensor]:
    """w [n, k] -> packed codes u8 [n, k/2] and scale in w's dtype, [1], [n] or [n, k/128]."""
    n, k = w.shape
    group = GROUPS[fmt]
    groups = w.reshape(1, n * k) if group == 0 else w if group == -1 else w.reshape(n, k // group, group)
    scale = groups.abs().amax(dim=-1) / 7
    w_quant = torch.clamp(torch.round(groups / scale.unsqueeze(-1)), -7, 7).reshape(n, k)
    codes = (w_quant + 8).to(torch.uint8)
    low, high = codes[:, 0::2], codes[:, 1::2]
    return (high << 4) | low, scale


def decode(fmt: str, packed: Tensor, scale: Tensor, table: Tensor) -> Tensor:
    """packed u8 [n, k/2], scale float32 -> ``FP4_TABLE[indices] * scale`` [n, k] in float32.

    Args:
        table: FP4_TABLE as float32 [16] on the codes' device.
    """
    n, half = packed.shape
    group = GROUPS[fmt]
    indices = torch.stack((packed & 0xF, packed >> 4), dim=-1).reshape(n, 2 * half)
    values = table[indices.long()]
    if group > 0:
        return (values.reshape(n, -1, group) * scale.unsqueeze(-1)).reshape(n, 2 * half)
    return values * scale.reshape(-1, 1)


def table_on(device: Any) -> Tensor:
    """FP4_TABLE as float32 [16] on ``device``."""
    return torch.tensor(FP4_TABLE, dtype=torch.float32, device=device)


@dataclass(slots=True)
class Quantize:
    """``fp4_quantize`` as written."""

    fmt: str
    numerics: Numerics = field(default_factory=Numerics)
    produces: tuple[str, ...] = ("codes", "scale", "global_scale")
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``. The document has no global scale: it is 1."""
        w = inputs["w"]
        one = torch.ones(1, dtype=torch.float32, device=w.device)

        def launch() -> Mapping[str, Tensor]:
            codes, scale = encode(self.fmt, w)
            return {"codes": codes, "scale": scale.to(torch.float32), "global_scale": one}

        return launch


@dataclass(slots=True)
class Dequantize:
    """``fp4_dequantize`` as written."""

    fmt: str
    dtype: torch.dtype
    numerics: Numerics = field(default_factory=Numerics)
    produces: tuple[str, ...] = ("weight",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``."""
        packed, scale = inputs["codes"], inputs["scale"]
        table = table_on(packed.device)

        def launch() -> Mapping[str, Tensor]:
            return {"weight": decode(self.fmt, packed, scale, table).to(self.dtype)}

        return launch


def make_quantize(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported (``not_in_document``) for any format but absmax7."""
    require_single_variant(variant)
    require_document_format(case.text("fmt"))
    return Quantize(case.text("fmt"))


def make_dequantize(case: Case, variant: str, device: Device) -> Kernel:
    """Raises Unsupported (``not_in_document``) for any format but absmax7."""
    require_single_variant(variant)
    require_document_format(case.text("fmt"))
    return Dequantize(case.text("fmt"), getattr(torch, TORCH_DTYPE_NAMES[case.text("y")]))
