"""From a failing case to a small one: works on the parameters of cases, so that whatever fails can be shrunk.

Hypothesis draws cases but does not shrink them here (docs/adr/0024): a case that a worker died of is shrunk like any
other, several candidates at a time, and so is one that no strategy drew. Standard library only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from vbench.spec import Case, Op, Param, ParamValue

#: Sizes keep a factor of up to this where a step allows it: blocks of formats, tiles.
MOST_KEPT = 128


def _rank(p: Param, value: ParamValue) -> int:
    """How far a choice is from the plainest: its default, else the first admitted."""
    return 0 if value == p.default else 1 + p.choices.index(str(value))


def measure(op: Op, case: Case) -> tuple[int, int, int, int]:
    """What gets smaller: sum of sizes, set flags, distance of choices from the plainest, seed."""
    sizes = sum(case.axis(p.name) for p in op.params if p.kind == "axis")
    flags = sum(case.axis(p.name) for p in op.params if p.kind == "flag")
    choices = sum(_rank(p, case[p.name]) for p in op.params if p.kind == "choice")
    return sizes, flags, choices, case.seed


def _sizes_below(p: Param, value: int) -> list[int]:
    """Smaller values of an axis, the smallest first: its least; less by a half, a quarter, ... and by one; less by
    tiles, which keeps the tail; and the same in whole blocks, where the value is made of them."""
    least = 0 if p.default == 0 else 1
    found = {least, value - 1, value % MOST_KEPT, value % 16}
    step = value // 2
    while step:
        found.add(value - step)
        step //= 2
    block = 2
    while block <= MOST_KEPT:
        found.add(value - block)
        if value % block == 0:
            found |= {block, value // 2 // block * block}
        block *= 2
    return sorted(v for v in found if least <= v < value)


def candidates(op: Op, case: Case) -> list[Case]:
    """Cases one step smaller than ``case`` that have a meaning, boldest steps first, each once."""
    axes = [p for p in op.params if p.kind == "axis"]

    def steps() -> Iterator[dict[str, ParamValue]]:
        for a, b in combinations(axes, 2):
            va, vb = case.axis(a.name), case.axis(b.name)
            if va > 1 and vb > 1:
                # Sizes that a rule ties together (heads, blocks) can only shrink together.
                yield {a.name: 1, b.name: 1}
                yield {a.name: va // 2, b.name: vb // 2}
        for p in axes:
            for value in _sizes_below(p, case.axis(p.name)):
                yield {p.name: value}
        for p in op.params:
            if p.kind == "flag" and case.axis(p.name):
                yield {p.name: 0}
            elif p.kind == "choice":
                for choice in sorted(p.choices, key=lambda c, p=p: _rank(p, c)):  # type: ignore[misc]  # binds p
                    if _rank(p, choice) < _rank(p, case[p.name]):
                        yield {p.name: choice}

    found: dict[str, Case] = {}
    changed = [op.case(seed=case.seed, **{**dict(case.params), **step}) for step in steps()]
    if case.seed:
        changed.append(op.case(seed=0, **dict(case.params)))
    for smaller in changed:
        if measure(op, smaller) < measure(op, case) and op.reject(smaller) is None:
            found.setdefault(smaller.id, smaller)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Shrunk:
    """``case`` fails like the one that was found. ``whole``: no step smaller fails; else a limit ended the search."""

    case: Case
    attempts: int
    whole: bool


def shrink(
    op: Op,
    case: Case,
    fails: Callable[[Sequence[Case]], Sequence[bool]],
    *,
    width: int,
    most: int,
    limit_s: float,
    clock: Callable[[], float] = time.monotonic,
) -> Shrunk:
    """Greedily, while a candidate fails in the same way.

    Args:
        fails: for a few cases whether each fails like ``case``; may run them side by side.
        width: how many to ask about at a time.
        most, limit_s: attempts and seconds after which the smallest found so far is taken.
    """
    began, attempts = clock(), 0
    known: set[str] = {case.id}
    while True:
        untried = [c for c in candidates(op, case) if c.id not in known]
        found: Case | None = None
        for at in range(0, len(untried), width):
            if attempts >= most or clock() - began >= limit_s:
                return Shrunk(case, attempts, whole=False)
            asked = untried[at : at + min(width, most - attempts)]
            attempts += len(asked)
            known |= {c.id for c in asked}
            failing = [c for c, failed in zip(asked, fails(asked), strict=True) if failed]
            if failing:
                found = min(failing, key=lambda c: measure(op, c))
                break
        if found is None:
            return Shrunk(case, attempts, whole=True)
        case = found
