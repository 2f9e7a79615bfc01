"""Definition of the stack of memory levels. Imports no torch."""

from __future__ import annotations

from vbench.spec import Case, Op, Output, Param


def _reject_tiers(case: Case) -> tuple[str, str] | None:
    for name in ("keys", "item_bytes", "steps", "gpu_bytes"):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: a trace needs keys, bytes, steps and a level 0"
    return None


TIER_STACK = Op(
    name="tier_stack",
    summary=(
        "replay a trace of put, access, promote, evict and spill on a stack of levels with byte capacities and LRU "
        "eviction; every accessed value bitwise, the level of every key and the bytes of every level after each step"
    ),
    params=(
        Param("trace", "choice", "access pattern", ("mixed", "cyclic", "palindrome", "resident"), "mixed"),
        Param("keys", "axis", "distinct tensors"),
        Param("item_bytes", "axis", "bytes of a tensor; in trace mixed the largest, sizes vary below it"),
        Param("steps", "axis", "operations in the trace"),
        Param("gpu_bytes", "axis", "capacity of level 0"),
        Param("host_bytes", "axis", "capacity of level 1"),
        Param("file_bytes", "axis", "capacity of level 2"),
    ),
    outputs=(
        Output("values", "u8", "total bytes accessed"),
        Output("found_level", "i64", "steps"),
        Output("level_bytes", "i64", "steps, 3"),
        Output("hits", "i64", "3"),
    ),
    inputs="vbench.reference.tiers:tier_inputs",
    oracle="vbench.reference.tiers:tier_oracle",
    reject=_reject_tiers,
    metrics="vbench.reference.tiers:tier_metrics",
)

OPS: tuple[Op, ...] = (TIER_STACK,)
