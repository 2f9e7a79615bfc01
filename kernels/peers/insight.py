"""Peers of ``svd`` and ``elementwise_chain``: the same work on the device and by way of the host.

Variants
    svd: ``device`` runs ``torch.linalg.svdvals`` where the matrix lies (cuSOLVER on ``cuda``); ``host`` copies the
        matrix to the host, runs LAPACK, copies the values back.
    elementwise_chain: ``device`` runs each step in torch; ``numpy`` takes the tensor to a NumPy array and back in each
        step, as code does that mixes the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

SVD_VARIANTS = ("device", "host")
CHAIN_VARIANTS = ("device", "numpy")
#: Nothing but float32.
SINGLE = Numerics()


@dataclass(frozen=True, slots=True)
class Work:
    """``compute(inputs, out)`` writes the outputs. Timed by wall clock: host and device take turns."""

    compute: Callable[[Mapping[str, Any], Mapping[str, Any]], None]
    produces: tuple[str, ...]
    numerics: Numerics = SINGLE
    deterministic: bool = False
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """See ``vbench.backend.Kernel.bind``; nothing is prepared."""
        return lambda: self.compute(inputs, out)


def _require(variant: str, variants: tuple[str, ...]) -> None:
    if variant not in variants:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {', '.join(variants)}")


def make_svd(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``svd``. Raises Unsupported: ``unknown_variant``."""
    _require(variant, SVD_VARIANTS)

    def compute(inputs: Mapping[str, Any], out: Mapping[str, Any]) -> None:
        a = inputs["a"] if variant == "device" else inputs["a"].cpu()
        out["values"].copy_(torch.linalg.svdvals(a))

    return Work(compute, ("values",))


def make_chain(case: Case, variant: str, device: Device) -> Kernel:
    """Factory for op ``elementwise_chain``. Raises Unsupported: ``unknown_variant``."""
    _require(variant, CHAIN_VARIANTS)
    steps = case.axis("steps")

    def on_device(inputs: Mapping[str, Any], out: Mapping[str, Any]) -> None:
        x = inputs["x"]
        y = x
        for _ in range(steps):
            y = torch.add(x, y, alpha=0.5)
        out["y"].copy_(y)

    def by_numpy(inputs: Mapping[str, Any], out: Mapping[str, Any]) -> None:
        x = inputs["x"]
        host_x = x.cpu().numpy()
        y = x
        for _ in range(steps):
            y = torch.from_numpy(y.cpu().numpy() * 0.5 + host_x).to(x.device)
        out["y"].copy_(y)

    return Work(on_device if variant == "device" else by_numpy, ("y",))
