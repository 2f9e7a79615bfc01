"""Meaning of ``tier_fetch``: the decode of ``fp4_dequantize``, from tensors that lie in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vbench.reference.fp4 import degenerate, dequantize, packed_weight
from vbench.reference.ops.fetch import RAW
from vbench.reference.sampling import generator, torch_dtype
from vbench.spec import Case, Expected, Numerics


def _raw_weight(case: Case) -> Tensor:
    """[n, k] in dtype y: normal values, zeros, or (grid) random bit patterns, NaN and infinity among them."""
    shape, dtype, dist = (case.axis("n"), case.axis("k")), torch_dtype(case.text("y")), case.text("dist")
    gen = generator(case, "raw")
    if dist == "grid":
        size = shape[0] * shape[1] * dtype.itemsize
        return torch.randint(0, 256, (size,), generator=gen, dtype=torch.uint8).view(dtype).reshape(shape)
    return torch.zeros(shape, dtype=dtype) if dist == "zeros" else torch.randn(shape, generator=gen).to(dtype)


def fetch_inputs(case: Case, device: str) -> dict[str, Any]:
    """``weight`` [n, k] (raw) or ``codes``, ``scale``, ``global_scale``, on the host; page-locked for ``cuda``.

    A 4-bit weight is encoded on ``device`` and brought back, since encoding large ones on a host takes seconds.
    """
    raw = case.text("fmt") == RAW
    tensors: dict[str, Tensor] = {"weight": _raw_weight(case)} if raw else packed_weight(case, device)
    return {name: t.cpu().pin_memory() if device == "cuda" else t for name, t in tensors.items()}


def fetched(case: Case, inputs: dict[str, Any]) -> Tensor:
    """The weight [n, k] in dtype y, on the host."""
    if case.text("fmt") == RAW:
        weight: Tensor = inputs["weight"]
        return weight
    return dequantize(case.text("fmt"), inputs, torch_dtype(case.text("y")))


def fetch_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """Bitwise, all rows."""
    want = fetched(case, inputs)
    why = "a raw fetch copies its input" if case.text("fmt") == RAW else degenerate(case, want.numel())
    return {"weight": Expected(want, None, want.dtype, tuple(want.shape), degenerate=why)}
