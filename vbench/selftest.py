"""Our own error rates on a machine: identical code on both sides, beside known slowdowns. ``vbench selftest --aa``.

Each case gives two cells in the same processes: one with nothing injected, and one whose side B is slowed by 1, 2 or
5 % (in turn over the cases) by launches that are run and not counted. Rates are computed from stored pairs, so that
runs can be joined.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vbench.ab import Chosen
from vbench.comparison import Comparison, Observation, Rule, compare, floor_exceeds, judge_cells
from vbench.pairs import Cell, observations
from vbench.record import Outcome, Record
from vbench.registry import BackendInfo
from vbench.simulate import SLOWDOWNS, Rates, count, rate_metrics
from vbench.sources import digest

BACKEND = "pairs"
#: What the rates rest on: how a decision is made, and how a block is timed.
SOURCES = ("vbench.comparison", "vbench.timing")
#: Pairs of one trial: the number at which ``vbench ab`` looks first.
PAIRS = 10

#: Cell and slowdown -> observations.
Observed = Mapping[tuple[str, float], Sequence[Observation]]


def cells_of(
    cases: Sequence[Chosen], infos: Mapping[str, BackendInfo], backends: Sequence[str], *, injected: bool = True
) -> list[Cell]:
    """Two cells for each case of each backend and variant: identical code, and a slowdown, in turn over the cases.

    Args:
        injected: whether the slowdowns are wanted; a baseline has no use for them.
    """
    found: list[Cell] = []
    for case in cases:
        for name in backends:
            info = infos[name]
            for variant in info.variants_of(case.op) if case.op in info.ops else ():
                slowdown = SLOWDOWNS[len(found) // 2 % len(SLOWDOWNS)]
                names, variants = {"A": name, "B": name}, {"A": variant, "B": variant}
                for part in (0.0, slowdown) if injected else (0.0,):
                    cell = Cell(case.op, case.case, names, variants, info.role, case.suite, case.source, part)
                    found.append(cell)
    return found


def unfinished(cells: Iterable[Cell], pairs: Iterable[Record], wanted: int) -> list[Cell]:
    """The cells of which ``pairs`` hold fewer than ``wanted`` pairs of processes."""
    have: Counter[tuple[str, str, float]] = Counter()
    for r in pairs:
        if r.kind == "pair" and r.measurements and r.side == "A" and not r.tree:
            have[r.case, r.who, float(r.tuning.get("injected", "0"))] += 1
    return [c for c in cells if have[c.case, c.who, c.slowdown] < wanted]


@dataclass(frozen=True, slots=True)
class Result:
    """Rates of one machine.

    Args:
        records: of kind ``selftest``, one a stage and slowdown.
        noisy: cells of identical code whose noise floor is above half the margin; not to be gated.
        gated: how many cells of identical code are quiet enough.
    """

    records: tuple[Record, ...]
    noisy: tuple[tuple[str, Comparison], ...]
    gated: int


def rates(pairs: Iterable[Record], *, run: str, rule: Rule) -> Result:
    """Rates from stored records of kind ``pair``, of one or more runs on one machine.

    Stage ``cell``: each disjoint group of PAIRS pairs of a cell is one trial at ``rule.alpha``. Stage ``suite``: all
    cells of identical code together, or with all cells of one slowdown, the whole way of ``judge_cells``: the first
    PAIRS pairs decide, the next PAIRS confirm; where there are no second PAIRS, stage ``bh``: without confirmation.
    """
    kept = [r for r in pairs if r.kind == "pair" and r.measurements and not r.tree]
    observed = {key: found for key, found in observations(kept).items() if len(found) >= PAIRS}
    environment = kept[0].environment if kept else {}
    machine = str(environment.get("gpu") or environment.get("cpu") or "unknown").replace(" ", "_").replace(",", "")
    slowdowns = sorted({slowdown for _, slowdown in observed})
    records = []
    for stage in ("cell", "bh", "suite"):
        for slowdown in slowdowns:
            found = _cell(observed, slowdown, rule) if stage == "cell" else _suite(observed, slowdown, rule, stage)
            if found is None or not found.cells:
                continue
            case = f"selftest[machine={machine},stage={stage},pairs={PAIRS},injected={slowdown * 100:g}%]"
            metrics = rate_metrics(found, slowdown)
            records.append(
                Record(
                    case,
                    BACKEND,
                    "selftest",
                    Outcome.PASSED,
                    run,
                    role="harness",
                    metrics=metrics,
                    environment=environment,
                    sources=digest(SOURCES),
                )
            )
    same = {
        name: compare([o.log_time for o in found[:PAIRS]], alpha=rule.alpha, delta=rule.delta)
        for (name, slowdown), found in observed.items()
        if slowdown == 0
    }
    noisy = tuple((name, one) for name, one in same.items() if floor_exceeds(one, rule.delta))
    return Result(tuple(records), noisy, len(same) - len(noisy))


def _cell(observed: Observed, slowdown: float, rule: Rule) -> Rates:
    words = []
    for (_, injected), found in observed.items():
        if injected == slowdown:
            for start in range(0, len(found) - PAIRS + 1, PAIRS):
                logs = [o.log_time for o in found[start : start + PAIRS]]
                words.append(compare(logs, alpha=rule.alpha, delta=rule.delta, method=rule.method).word)
    return count(words)


def _suite(observed: Observed, slowdown: float, rule: Rule, stage: str) -> Rates | None:
    """All cells of identical code, beside those of ``slowdown``; ``None`` where there are too few or too many pairs."""
    confirm = PAIRS if stage == "suite" else 0
    chosen = {key: found for key, found in observed.items() if key[1] in (0.0, slowdown)}
    enough = {f"{name}\n{s}": (s, found) for (name, s), found in chosen.items() if len(found) >= PAIRS + confirm}
    if not enough or (stage == "bh" and all(len(f) >= 2 * PAIRS for f in chosen.values())):
        return None
    taken = dict.fromkeys(enough, 0)

    def replay(pairs: int, cells: Sequence[str]) -> dict[str, Sequence[Observation]]:
        found = {}
        for cell in cells:
            found[cell] = enough[cell][1][taken[cell] : taken[cell] + pairs]
            taken[cell] += pairs
        return found

    once = Rule(rule.delta, rule.alpha, (PAIRS,), rule.q, confirm, rule.method)
    judged = judge_cells(replay, list(enough), once)
    return count([judged.cells[cell].word for cell, (s, _) in enough.items() if s == slowdown])


def summary(records: Sequence[Record]) -> str:
    """One line on what the rates say: the false-alarm rate, and the power at each slowdown, of the strictest stage."""
    stages = ("suite", "bh", "cell")
    stage = next((s for s in stages if any(f"stage={s}," in r.case for r in records)), "")
    parts = []
    for r in records:
        if f"stage={stage}," not in r.case:
            continue
        m = r.metrics
        what = f"slowdown of {m['injected'] * 100:g} % found" if m["injected"] else "false alarms"
        parts.append(f"{what} {m['rate'] * 100:.1f} % [{m['low'] * 100:.1f}, {m['high'] * 100:.1f}]")
    return f"stage {stage}: " + "; ".join(parts) if parts else "no cell has enough pairs"


def cheapest(cases: Iterable[Chosen], cost_s: Mapping[str, float], number: int, skip: int) -> list[Chosen]:
    """``number`` of the cases with the smallest lower bound on their time, after the first ``skip`` of them.

    Args:
        cost_s: by case id; cases whose bound is not known, or is 0, come last: a sample is at least 100 launches.
    """
    ordered = sorted(cases, key=lambda c: (cost_s.get(c.case) or math.inf, c.case))
    return ordered[skip : skip + number]
