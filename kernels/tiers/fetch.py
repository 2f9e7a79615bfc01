"""The ``tier_fetch`` kernel: packed bytes cross the link on the copy stream, then the compute stream decodes them.

What the tier stack does when it promotes: one copy a tensor into a staging slot, ordered by the rules of ``links.py``;
the slot is overwritten only after the decode that reads it is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.tiers.decode import TABLES, Decoder
from vbench.kernels.tiers.links import CudaLinks, HostLinks, Links
from vbench.spec import Case, Numerics

#: The op is judged bitwise; nothing is summed.
EXACT = Numerics()


def make(case: Case, variant: str, device: Device) -> FetchKernel:
    """Factory of the ``tier_fetch`` kernel.

    Raises:
        Unsupported: ``unknown_variant``; ``format``.
    """
    if variant:
        raise Unsupported("unknown_variant", f"tier_fetch has no variant {variant!r}; leave it out")
    fmt = case.text("fmt")
    if fmt != "raw" and fmt not in TABLES:
        raise Unsupported("format", f"fmt={fmt}: this engine decodes {', '.join(TABLES)}")
    return FetchKernel(fmt)


def as_bytes(t: Tensor) -> Tensor:
    """A contiguous tensor's memory as a uint8 vector."""
    return t.reshape(-1).view(torch.uint8)


@dataclass(frozen=True)
class FetchKernel:
    """Exact. ``links``: how bytes travel; ``None`` takes those of the output's device."""

    fmt: str
    links: Links | None = None
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("weight",)
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Makes the staging slot (as large as the packed weight) and the copy stream.

        Args:
            inputs: ``weight`` (raw) or ``codes``, ``scale``, ``global_scale``, in host memory.
            out: ``weight`` [n, k] is written.

        Raises:
            Unsupported: ``not_on_host``; ``not_pinned``: a copy from pageable memory would block the host.
        """
        target: Tensor = out["weight"]
        names = ("weight",) if self.fmt == "raw" else ("codes", "scale", "global_scale")
        for name in names:
            if inputs[name].device.type != "cpu":
                raise Unsupported("not_on_host", f"{name} is on {inputs[name].device}; this op fetches from the host")
            if target.is_cuda and not inputs[name].is_pinned():
                raise Unsupported("not_pinned", f"{name} is pageable memory; call .pin_memory()")
        links = self.links or (CudaLinks(target.device) if target.is_cuda else HostLinks())
        if self.fmt == "raw":
            slots: dict[str, Tensor] = {"weight": target}
            decoder = None
        else:
            slots = {name: torch.empty_like(inputs[name], device=target.device) for name in names}
            decoder = Decoder(self.fmt, target.device)

        def launch() -> None:
            # What the compute stream has read from the slots so far, or left in the target, comes first.
            free = links.compute_mark(links.compute_stream())
            for name in names:
                arrived = links.copy(as_bytes(slots[name]), as_bytes(inputs[name]), free)
            links.compute_wait(arrived)  # the last copy's mark stands for all: the copy stream keeps their order
            if decoder is not None:
                decoder.into(target, slots)

        return launch
