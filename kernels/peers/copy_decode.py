"""Peer of ``tier_fetch``: what a user of plain torch writes, ``copy_(non_blocking=True)`` and then an eager decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.peers.dense_linear import TABLES, decoder
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

VARIANT = "copy_decode"
#: The op is judged bitwise; nothing is summed.
EXACT = Numerics()


def make(case: Case, variant: str, device: Device) -> CopyDecode:
    """Factory for op ``tier_fetch``, variant ``copy_decode``.

    Raises:
        Unsupported: ``unknown_variant``; ``unknown_format``.
    """
    if variant != VARIANT:
        raise Unsupported("unknown_variant", f"tier_fetch has the variant {VARIANT!r} here, not {variant!r}")
    if case.text("fmt") not in ("raw", *TABLES):
        raise Unsupported("unknown_format", f"fmt={case.text('fmt')} is not one of raw, {', '.join(TABLES)}")
    return CopyDecode(case.text("fmt"), getattr(torch, TORCH_DTYPE_NAMES[case.text("y")]))


@dataclass(frozen=True, slots=True)
class CopyDecode:
    """Exact; everything on the current stream."""

    fmt: str
    dtype: torch.dtype
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("weight",)
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; ``weight``, or ``codes``, ``scale``, ``global_scale``, on the host."""
        target = out["weight"]
        if self.fmt == "raw":

            def copy() -> None:
                target.copy_(inputs["weight"], non_blocking=True)

            return copy
        decode = decoder(self.fmt, target.device)

        def launch() -> None:
            codes, scale, global_scale = (
                inputs[name].to(target.device, non_blocking=True) for name in ("codes", "scale", "global_scale")
            )
            target.copy_(decode(codes, scale, global_scale, self.dtype))

        return launch
