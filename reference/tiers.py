"""Meaning of ``tier_stack``: a dict model of three levels with byte capacities and LRU eviction.

Rules
    put(key)      drop any old value of the key; store the new one as most recent in level 0.
    access(key)   give the value; then, if it lies below level 0, move it to level 0; it becomes most recent.
    promote(key)  as access, without reading the value.
    evict(key)    move it one level down, as most recent there; in level 2 nothing happens.
    spill(key)    move it to level 2, as most recent there; in level 2 nothing happens.
    Whenever a level must make room, its least recent item moves down, as most recent there, and so on.
    A value larger than a level's capacity passes it by, to the first level below that can hold it.
    Level 2 has nothing below it: when it must make room the stack is full, which the traces here never reach.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from vbench.errors import Unsupported
from vbench.reference.sampling import generator
from vbench.spec import Case, Expected, Numerics

LEVELS = 3
Step = tuple[str, str, int]  # operation, key, index of the value (put only, else -1)


def tier_inputs(case: Case, device: str) -> dict[str, Any]:
    """``capacities_bytes`` (three ints), ``steps`` (list of Step) and ``values`` (list of uint8 tensors on the CPU).

    mixed: random operations on random keys, sizes from 1 byte up; cyclic: 0..n-1 again and again; palindrome: 0..n-1
    then n-1..0 (a forward and a backward pass); resident: random accesses. All begin by putting every key.
    """
    gen = generator(case, "trace")
    keys, steps, item = case.axis("keys"), case.axis("steps"), case.axis("item_bytes")
    trace = case.text("trace")
    values: list[Tensor] = []
    out: list[Step] = []

    def draw(limit: int) -> int:
        return int(torch.randint(0, limit, (1,), generator=gen))

    def put(key: int) -> None:
        size = 1 + draw(item) if trace == "mixed" else item
        out.append(("put", f"layer.{key}", len(values)))
        values.append(torch.randint(0, 256, (size,), generator=gen, dtype=torch.uint8))

    for key in range(min(keys, steps)):
        put(key)
    order = {"cyclic": list(range(keys)), "palindrome": list(range(keys)) + list(reversed(range(keys)))}.get(trace)
    for i in range(steps - len(out)):
        if trace == "mixed":
            kind = ("access", "access", "access", "put", "promote", "evict", "spill")[draw(7)]
            key = draw(keys)
            if kind == "put":
                put(key)
            else:
                out.append((kind, f"layer.{key}", -1))
        else:
            key = order[i % len(order)] if order is not None else draw(keys)
            out.append(("access", f"layer.{key}", -1))
    capacities = (case.axis("gpu_bytes"), case.axis("host_bytes"), case.axis("file_bytes"))
    return {"capacities_bytes": capacities, "steps": out, "values": values}


class DictStack:
    """The rules above, in dictionaries. One OrderedDict a level, least recent first."""

    def __init__(self, capacities_bytes: tuple[int, int, int]) -> None:
        self.capacities = capacities_bytes
        self.levels: list[OrderedDict[str, Tensor]] = [OrderedDict() for _ in range(LEVELS)]

    def used(self, level: int) -> int:
        return sum(t.numel() for t in self.levels[level].values())

    def find(self, key: str) -> int:
        return next((i for i, level in enumerate(self.levels) if key in level), -1)

    def insert(self, key: str, value: Tensor, level: int) -> None:
        while value.numel() > self.capacities[level]:
            level += 1
            if level == LEVELS:
                raise Unsupported("stack_full", f"{key}: {value.numel()} bytes fit no level")
        while self.used(level) + value.numel() > self.capacities[level]:
            if level + 1 == LEVELS:
                raise Unsupported("stack_full", f"{key}: the last level is full")
            oldest, moved = self.levels[level].popitem(last=False)
            self.insert(oldest, moved, level + 1)
        self.levels[level][key] = value

    def move(self, key: str, to: int) -> Tensor:
        value = self.levels[self.find(key)].pop(key)
        self.insert(key, value, to)
        return value

    def put(self, key: str, value: Tensor) -> None:
        found = self.find(key)
        if found >= 0:
            del self.levels[found][key]
        self.insert(key, value, 0)

    def access(self, key: str) -> Tensor:
        return self.move(key, 0)

    def evict(self, key: str) -> None:
        found = self.find(key)
        if found + 1 < LEVELS:
            self.move(key, found + 1)

    def spill(self, key: str) -> None:
        if self.find(key) < LEVELS - 1:
            self.move(key, LEVELS - 1)


def replay(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Run the trace on a DictStack; outputs as the op declares them, on the CPU."""
    stack = DictStack(inputs["capacities_bytes"])
    read: list[Tensor] = []
    found_level: list[int] = []
    level_bytes: list[list[int]] = []
    hits = [0] * LEVELS
    for kind, key, index in inputs["steps"]:
        found = stack.find(key)
        found_level.append(found)
        if kind == "put":
            stack.put(key, inputs["values"][index])
        elif kind == "access":
            hits[found] += 1
            read.append(stack.access(key))
        elif kind == "promote":
            stack.move(key, 0)
        elif kind == "evict":
            stack.evict(key)
        else:
            stack.spill(key)
        level_bytes.append([stack.used(i) for i in range(LEVELS)])
    return {
        "values": torch.cat(read) if read else torch.empty(0, dtype=torch.uint8),
        "found_level": torch.tensor(found_level, dtype=torch.int64),
        "level_bytes": torch.tensor(level_bytes, dtype=torch.int64).reshape(len(level_bytes), LEVELS),
        "hits": torch.tensor(hits, dtype=torch.int64),
    }


def tier_oracle(case: Case, inputs: dict[str, Any], numerics: Numerics, max_rows: int | None) -> dict[str, Expected]:
    """Bitwise."""
    want = replay(inputs)
    why = "" if want["values"].numel() else "no access, so nothing depends on the values"
    return {name: Expected(t, None, t.dtype, tuple(t.shape), degenerate=why) for name, t in want.items()}


def tier_metrics(
    case: Case, inputs: dict[str, Any], outputs: dict[str, Any], expected: dict[str, Expected]
) -> dict[str, float]:
    """Hit rate of level 0 over accesses, capacity multiplier (bytes of all live keys / gpu_bytes), bytes by level."""
    live: dict[str, int] = {}
    for kind, key, index in inputs["steps"]:
        if kind == "put":
            live[key] = inputs["values"][index].numel()
    metrics = {"capacity_multiplier": sum(live.values()) / inputs["capacities_bytes"][0]}
    if "hits" in outputs and int(outputs["hits"].sum()):
        hits = outputs["hits"].tolist()
        metrics["level0_hit_rate"] = hits[0] / sum(hits)
    if "level_bytes" in outputs and len(outputs["level_bytes"]):
        peak = outputs["level_bytes"].amax(dim=0).tolist()
        metrics |= {f"level{i}_peak_bytes": float(v) for i, v in enumerate(peak)}
        metrics["level0_utilisation"] = peak[0] / inputs["capacities_bytes"][0]
    return metrics
