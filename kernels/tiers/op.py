"""The ``tier_stack`` kernel: a trace replayed on the engine."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbench.backend import Device, Launch
from vbench.errors import Unsupported
from vbench.kernels.tiers.errors import TierFullError
from vbench.kernels.tiers.ledger import Ledger
from vbench.kernels.tiers.stack import TierStack
from vbench.spec import Case, Numerics

LEVELS = 3
#: (operation, key, index of the value; -1 for all but put)
Step = tuple[str, str, int]


def make(case: Case, variant: str, device: Device) -> TierKernel:
    """Factory of the ``tier_stack`` kernel.

    Raises:
        Unsupported: ``unknown_variant``.
    """
    if variant:
        raise Unsupported("unknown_variant", f"tier_stack has no variant {variant!r}; leave it out")
    return TierKernel()


class TierKernel:
    """Gives all four outputs; bitwise, whatever the timing of copies."""

    numerics = Numerics()
    produces = ("values", "found_level", "level_bytes", "hits")
    deterministic = True
    graph_safe = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Rehearse the trace without bytes, then make slabs and a temporary folder, removed with the launch.

        Args:
            inputs: ``capacities_bytes`` (3 ints), ``steps`` (list of Step), ``values`` (uint8 vectors on the CPU).
            out: only the device of ``values`` is taken from it; the launch returns tensors of its own.

        Raises:
            Unsupported: ``stack_full``: the trace needs more room than the levels have.
        """
        steps: list[Step] = inputs["steps"]
        values: list[Tensor] = inputs["values"]
        capacities: tuple[int, int, int] = inputs["capacities_bytes"]
        accessed_bytes = rehearse(capacities, steps, [v.numel() for v in values])
        folder = Path(tempfile.mkdtemp(prefix="vbench-tier-"))
        try:
            stack = TierStack(
                capacities,
                folder,
                largest_bytes=max((v.numel() for v in values), default=0),
                device=out["values"].device,
            )
        except BaseException:
            shutil.rmtree(folder)
            raise
        return Replay(stack, folder, steps, values, accessed_bytes)


def rehearse(capacities_bytes: tuple[int, int, int], steps: list[Step], sizes_bytes: list[int]) -> int:
    """Run the trace on a ledger alone.

    Returns:
        bytes of all accessed values together.

    Raises:
        Unsupported: ``stack_full``.
    """
    ledger = Ledger(capacities_bytes)
    live: dict[str, int] = {}
    accessed = 0
    try:
        for kind, key, index in steps:
            if kind == "put":
                live[key] = sizes_bytes[index]
                ledger.put(key, sizes_bytes[index])
            elif kind in ("access", "promote"):
                accessed += live[key] if kind == "access" else 0
                ledger.move(key, 0)
            else:
                level = ledger.level_of(key)
                if level < LEVELS - 1:
                    ledger.move(key, level + 1 if kind == "evict" else LEVELS - 1)
    except TierFullError as error:
        raise Unsupported("stack_full", str(error)) from error
    return accessed


class Replay:
    """The launch: from an empty stack through the whole trace. Owns the stack and its folder."""

    def __init__(
        self, stack: TierStack, folder: Path, steps: list[Step], values: list[Tensor], accessed_bytes: int
    ) -> None:
        self.stack = stack
        self._steps = steps
        self._values = values
        self._accessed_bytes = accessed_bytes
        self._cleanup = weakref.finalize(self, _close, stack, folder)

    def close(self) -> None:
        """Close the stack and remove its folder; also done when the launch is collected or the process exits."""
        self._cleanup()

    def __call__(self) -> Mapping[str, Tensor]:
        stack = self.stack
        stack.clear()
        values_u8 = torch.empty(self._accessed_bytes, dtype=torch.uint8, device=stack.device)
        found_level: list[int] = []
        level_bytes: list[tuple[int, ...]] = []
        hits = [0] * LEVELS
        done_bytes = 0
        for kind, key, index in self._steps:
            found = stack.level_of(key)
            found_level.append(found)
            if kind == "put":
                stack.put(key, self._values[index])
            elif kind == "access":
                hits[found] += 1
                size = stack.size_of(key)
                stack.access_into(key, values_u8[done_bytes : done_bytes + size])
                done_bytes += size
            elif kind == "promote":
                stack.promote(key)
            elif kind == "evict":
                stack.evict(key)
            elif kind == "spill":
                stack.spill(key)
            else:
                raise ValueError(f"unknown operation {kind!r} in the trace")
            level_bytes.append(stack.used_bytes)

        def integers(rows: Any) -> Tensor:
            return torch.tensor(rows, dtype=torch.int64, device=stack.device)

        return {
            "values": values_u8,
            "found_level": integers(found_level),
            "level_bytes": integers(level_bytes).reshape(len(level_bytes), LEVELS),
            "hits": integers(hits),
        }


def _close(stack: TierStack, folder: Path) -> None:
    stack.close()
    shutil.rmtree(folder)
