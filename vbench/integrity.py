"""What the harness measures and compares with must be what it was before a plug-in was loaded.

Code in one process can always deceive another part of it; what is meant is an author, or a program that writes
kernels, who patched a clock or a comparison (gpu-mode/reference-kernels issue 162 patched ``Event.elapsed_time``).
``capture`` is called before a backend is loaded, ``Captured.altered`` after its kernels ran.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from vbench import timing

#: Dotted names under a module that are looked at once the module is loaded.
_TORCH_NAMES = (
    "equal",
    "isnan",
    "isfinite",
    "allclose",
    "cuda.synchronize",
    "cuda.Event.record",
    "cuda.Event.synchronize",
    "cuda.Event.elapsed_time",
    "cuda.CUDAGraph.replay",
)


@dataclass(frozen=True, slots=True)
class Captured:
    """Attributes and their values: (owner, attribute, name to report, value)."""

    kept: tuple[tuple[Any, str, str, Any], ...]

    def altered(self) -> list[str]:
        """Names whose value is another now; each is put back, so that the next job is measured honestly."""
        found = []
        for owner, attribute, name, value in self.kept:
            if getattr(owner, attribute) is not value:
                setattr(owner, attribute, value)
                found.append(name)
        return found


def capture() -> Captured:
    """Clocks, and of torch, where it is loaded, what waits, times and compares."""
    kept: list[tuple[Any, str, str, Any]] = [
        (time, name, f"time.{name}", getattr(time, name)) for name in ("perf_counter", "perf_counter_ns", "monotonic")
    ]
    kept.append((timing, "perf_counter", "vbench.timing.perf_counter", vars(timing)["perf_counter"]))
    torch = sys.modules.get("torch")
    for dotted in _TORCH_NAMES if torch is not None else ():
        *path, attribute = dotted.split(".")
        owner: Any = torch
        for part in path:
            owner = getattr(owner, part)
        kept.append((owner, attribute, f"torch.{dotted}", getattr(owner, attribute)))
    return Captured(tuple(kept))
