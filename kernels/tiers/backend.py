"""The tier backend: device memory, pinned host memory and files behind one LRU stack. No torch here."""

from __future__ import annotations

from vbench.backend import DeclaredBackend

BACKEND = DeclaredBackend(
    name="tiers",
    role="own",
    summary="tier engine: exact byte budgets, pinned slab, side-stream copies, checksummed crash-safe files",
    ops={"tier_stack": "vbench.kernels.tiers.op:make"},
    probe_function="vbench.kernels.tiers.op:probe",
)
