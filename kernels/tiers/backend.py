"""The tier backend: device memory, pinned host memory and files behind one LRU stack. No torch here.

On a CPU level 0 is plain memory, real in every other respect, so it may be timed there too.
"""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="tiers",
    role="own",
    summary="tier engine: exact byte budgets, pinned slab, side-stream copies, checksummed crash-safe files",
    ops={
        "tier_stack": "vbench.kernels.tiers.op:make",
        "tier_fetch": "vbench.kernels.tiers.fetch:make",
        "offload_pass": "vbench.kernels.tiers.offload:make",
    },
)
