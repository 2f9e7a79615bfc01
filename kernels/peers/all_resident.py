"""The baseline of every tier claim: all tensors stay on the device, no capacity, no levels.

Same trace, same consumer (a copy of each accessed value into the output), so that what a tier stack adds is the
difference of the two times. It moves each put value to the device as the stack must. It has no levels, so it produces
only ``values``; evict, spill and promote have nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.spec import Case, Numerics

VARIANT = "all_resident"


def make(case: Case, variant: str, device: Device) -> AllResident:
    """Factory for op ``tier_stack``, variant ``all_resident``.

    Raises:
        Unsupported: ``unknown_variant``.
    """
    if variant != VARIANT:
        raise Unsupported("unknown_variant", f"tier_stack has the variant {VARIANT!r} here, not {variant!r}")
    return AllResident()


class AllResident:
    """Device memory is the only limit: a trace whose live tensors exceed it ends in the allocator's own error."""

    numerics = Numerics()
    produces = ("values",)
    deterministic = True
    graph_safe = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Nothing to prepare.

        Args:
            inputs: ``steps`` ((operation, key, value index) each) and ``values`` (uint8 vectors on the CPU).
            out: ``values``, uint8 vector of all accessed bytes, is written.
        """
        steps: list[tuple[str, str, int]] = inputs["steps"]
        values: list[Tensor] = inputs["values"]
        out_u8: Tensor = out["values"]

        def launch() -> None:
            resident: dict[str, Tensor] = {}
            done_bytes = 0
            for kind, key, index in steps:
                if kind == "put":
                    # ``copy`` even on a CPU: a resident tensor is the stack's own, as the tiers' is
                    resident[key] = values[index].to(out_u8.device, copy=True)
                elif kind == "access":
                    value = resident[key]
                    out_u8[done_bytes : done_bytes + value.numel()].copy_(value)
                    done_bytes += value.numel()

        return launch
