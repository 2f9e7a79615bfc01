"""A against B: which cells, which processes, what it means for the exit code. ``vbench ab`` and ``gate --against``."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vbench.backend import Device
from vbench.comparison import Comparison, Judged, Rule, Word, judge_cells
from vbench.errors import UsageError
from vbench.pairs import Cell, PairRunner, Shares
from vbench.plan import EFFORTS, Effort
from vbench.record import EXCUSED, Record
from vbench.registry import BackendInfo, choose
from vbench.regression import workflow_commands
from vbench.runner import WorkerProcess
from vbench.sides import Side, import_path, parse_side
from vbench.spec import Op, Suite
from vbench.store import RunStore

#: A further round of pairs is begun if this part of the limit is left: a round starts processes before it measures.
LEAST_REST = 0.25


@dataclass(frozen=True, slots=True)
class Chosen:
    """A case to compare, with where it comes from."""

    op: str
    case: str
    suite: str = ""
    source: str = ""


def chosen_cases(
    suites: Iterable[Suite],
    ops: Mapping[str, Op],
    *,
    only_ops: Sequence[str],
    cases: Sequence[str],
    effort: Effort,
    device: Device,
) -> list[Chosen]:
    """The cases: those named, else the timed ones of the suites that mean something on ``device``, each once.

    Raises:
        UsageError: a case of no registered op.
        CaseError: a case that its op does not admit.
    """
    if cases:
        named = []
        for text in cases:
            op = ops.get(text.partition("[")[0])
            if op is None:
                raise UsageError(f"--case {text}: no operation of that name (known: {', '.join(ops)})")
            named.append(Chosen(op.name, op.parse(text).id))
        return named
    reach = EFFORTS.index(effort)
    found: dict[str, Chosen] = {}
    for suite in suites:
        for bench in suite.benches:
            if bench.case.op not in only_ops or EFFORTS.index(bench.effort) > reach:
                continue
            if device == "cuda" or bench.device == "any":
                found.setdefault(bench.case.id, Chosen(bench.case.op, bench.case.id, suite.name, bench.source))
    return list(found.values())


def cells_of(
    sides: Mapping[str, Side], backends: Sequence[str], infos: Mapping[str, BackendInfo], cases: Sequence[Chosen]
) -> list[Cell]:
    """The cells two sides have in common.

    Two backends are set against each other; of two trees each of ``backends`` against itself, in every variant.

    Raises:
        UsageError: a backend against a tree, a variant that is none, or nothing in common.
    """
    a, b = sides["A"], sides["B"]
    if bool(a.backend) != bool(b.backend):
        raise UsageError(f"{a.spec} against {b.spec}: compare a backend with a backend, or a revision with a revision")
    cells = []
    for case in cases:
        if a.backend:
            names, variants = {"A": a.backend, "B": b.backend}, [{"A": a.variant, "B": b.variant}]
        for name in ["both"] if a.backend else backends:
            if not a.backend:
                names = {"A": name, "B": name}
                variants = [{"A": v, "B": v} for v in infos[name].variants_of(case.op)]
            if not all(case.op in infos[names[s]].ops for s in "AB"):
                continue
            for variant in variants:
                for s in "AB":
                    if variant[s] not in infos[names[s]].variants_of(case.op):
                        known = ", ".join(v or '""' for v in infos[names[s]].variants_of(case.op))
                        raise UsageError(f"{names[s]}[{variant[s]}]: no variant of {case.op} (known: {known})")
                    _refuse_options(sides[s], case.op, infos[names[s]])
                role = infos[names["B"]].role
                cells.append(Cell(case.op, case.case, names, variant, role, case.suite, case.source))
    if not cells:
        raise UsageError(f"{a.spec} and {b.spec} have no timed case in common here; name one with --case")
    return cells


def _refuse_options(side: Side, op: str, info: BackendInfo) -> None:
    declared = info.options.get(op, ())
    for name in side.options:
        if name not in declared:
            raise UsageError(f"{side.spec}: {info.name} takes no {name} for {op} (declared: {', '.join(declared)})")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a comparison gave. ``failures``: records of side B's own backends that are wrong, not merely unsupported."""

    judged: Judged
    failures: tuple[Record, ...]


def compare_cells(
    runner: PairRunner,
    cells: Sequence[Cell],
    rule: Rule,
    records: Sequence[Record],
    floors: Mapping[str, float] | None = None,
) -> Outcome:
    """Measure and judge; cells that failed say on which side and why.

    Args:
        records: the list that ``runner.keep`` appends to.
        floors: see ``judge_cells``.
    """
    judged = judge_cells(runner.measure, [cell.name for cell in cells], rule, floors)
    named = {
        name: replace(one, word=Word.INCOMPARABLE, reason=runner.failed[name]) if name in runner.failed else one
        for name, one in judged.cells.items()
    }
    wrong = [r for r in records if r.side == "B" and r.role == "own" and r.outcome not in EXCUSED]
    return Outcome(replace(judged, cells=named), tuple(wrong))


def exit_code(found: Outcome, *, strict: bool) -> tuple[int, list[str]]:
    """1: a cell or the geometric mean is SLOWER, or side B is wrong; 3: nothing decided, or loose ends under
    ``strict``; else 0. With the reasons in words."""
    words = Counter(one.word for one in found.judged.cells.values())
    bad = [f"{n} x {what}" for what, n in sorted(Counter(f"B {r.who} {r.label}" for r in found.failures).items())]
    if words[Word.SLOWER]:
        bad.append(f"{words[Word.SLOWER]} x SLOWER")
    if found.judged.geomean.word is Word.SLOWER:
        bad.append("geometric mean SLOWER")
    if bad:
        return 1, bad
    loose = Counter(
        one.label for one in found.judged.cells.values() if one.word not in (Word.SAME, Word.FASTER, Word.SLOWER)
    )
    texts = [f"{n} x {what}" for what, n in sorted(loose.items())]
    if not words[Word.SAME] and not words[Word.FASTER]:
        return 3, ["nothing decided: " + ("; ".join(texts) or "no cell")]
    return (3, [f"strict: {text}" for text in texts]) if strict and texts else (0, [])


def to_text(found: Outcome, code: int, reasons: Sequence[str], names: Mapping[str, str]) -> str:
    """One line a cell, the geometric mean, and what follows."""
    lines = [_line(one, name) for name, one in sorted(found.judged.cells.items(), key=lambda item: _order(item[1]))]
    lines.append(_line(found.judged.geomean, "geometric mean over all cells"))
    counts = Counter(one.word.value for one in found.judged.cells.values())
    lines.append(f"cells     {', '.join(f'{n} {word}' for word, n in sorted(counts.items()))}")
    lines += [f"{name:<9} {value}" for name, value in names.items()]
    lines.append(f"exit {code}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return "\n".join(lines)


def github_lines(found: Outcome, code: int, reasons: Sequence[str]) -> list[str]:
    """Workflow commands for GitHub: errors for what makes the exit code 1, warnings for what stayed open."""
    slower = [_line(one, name) for name, one in found.judged.cells.items() if one.word is Word.SLOWER]
    errors = slower or (list(reasons) if code == 1 else [])
    open_ends = (Word.INCONCLUSIVE, Word.INCOMPARABLE, Word.INVALID)
    warnings = [_line(one, name) for name, one in found.judged.cells.items() if one.word in open_ends]
    return [*workflow_commands("error", errors), *workflow_commands("warning", warnings)]


def _order(one: Comparison) -> tuple[int, float]:
    order = [Word.SLOWER, Word.INVALID, Word.INCOMPARABLE, Word.INCONCLUSIVE, Word.FASTER, Word.SAME]
    return order.index(one.word), -(one.ratio or 0.0)


def _line(one: Comparison, name: str) -> str:
    if one.ratio is None or one.low is None or one.high is None:
        return f"{one.label:<28} {'-':<30} {name}"
    interval = f"{one.ratio:.4f}x [{one.low:.4f}, {one.high:.4f}] of {one.pairs}"
    again = "" if one.confirmed is None else f"  (confirmed {one.confirmed:.4f}x)"
    return f"{one.label:<28} {interval:<30} {name}{again}"


def to_json(found: Outcome, code: int, reasons: Sequence[str], names: Mapping[str, str]) -> str:
    """The same for programs."""
    body: dict[str, Any] = {
        **names,
        "exit": code,
        "reasons": list(reasons),
        "cells": {name: asdict(one) for name, one in found.judged.cells.items()},
        "geomean": asdict(found.judged.geomean),
        "failures": [{"id": r.id, "case": r.case, "who": r.who, "outcome": r.label} for r in found.failures],
    }
    return json.dumps(body, indent=1, ensure_ascii=False)


class Workers:
    """Starts the processes of both sides.

    Args:
        scratch: folder for links and revisions; must outlive the workers.
        folder: where their logs go.
    """

    def __init__(
        self, sides: Mapping[str, Side], infos: Mapping[str, BackendInfo], device: Device, scratch: Path, folder: Path
    ) -> None:
        self._sides, self._infos, self._device = sides, infos, device
        self._scratch, self._folder = scratch, folder

    def start(self, side: str, backend: str) -> WorkerProcess:
        tree = self._sides[side].tree
        variables = {}
        if tree is not None:
            # Without the safe path, -m would put the current folder, and so this tree's kernels, first.
            variables = {"PYTHONPATH": import_path(tree, self._scratch), "PYTHONSAFEPATH": "1"}
        log = self._folder / f"{side}-{backend}.log"
        threads = 0 if self._device == "cuda" else 1
        return WorkerProcess(self._infos[backend], self._device, log, threads, variables)


def time_limit(limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> Callable[[], bool]:
    """Whether another pair may begin: as long as one that takes as long as the last still fits ``limit_s``.

    The last, not the longest: the first pair compiles.
    """
    began = before = clock()

    def may_go_on() -> bool:
        nonlocal before
        now = clock()
        took, before = now - before, now
        return limit_s is None or now - began + took <= limit_s

    return may_go_on


def run_ab(
    specs: tuple[str, str] | tuple[str],
    *,
    run_id: str,
    infos: Mapping[str, BackendInfo],
    suites: Sequence[Suite],
    ops: Mapping[str, Op],
    backends: Sequence[str],
    only_ops: Sequence[str],
    cases: Sequence[str],
    effort: Effort,
    device: Device,
    rule: Rule,
    out: Path,
    seed: int,
    limit_s: float | None,
    floors: Mapping[str, float] | None = None,
) -> tuple[Outcome, Path]:
    """Compare two sides in fresh processes. One spec alone: that tree as A, what is installed as B.

    Returns:
        the outcome, and where the records are.

    Raises:
        UsageError, CaseError: specs, backends or cases that mean nothing.
        DataError: the results folder cannot be written.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vbench-ab-")))
        first = parse_side(specs[0], infos, scratch)
        second = parse_side(specs[1], infos, scratch) if len(specs) == 2 else Side("installed")
        if len(specs) == 1 and first.backend:
            raise UsageError(f"--against {specs[0]}: a backend; name a git revision or a folder")
        sides = {"A": first, "B": second}
        own = [n for n, info in infos.items() if info.role == "own" and info.timed and not info.problem]
        chosen = choose("backend", backends, list(infos)) if backends else own
        wanted = chosen_cases(suites, ops, only_ops=only_ops, cases=cases, effort=effort, device=device)
        cells = cells_of(sides, chosen, infos, wanted)
        summary = {"a": first.spec, "b": second.spec, "rule": asdict(rule)}
        runner, records, path = _runner(
            stack, cells, sides, summary, scratch, run_id, infos, device, out, seed, time_limit(limit_s)
        )
        return compare_cells(runner, cells, rule, records, floors), path


def measure_cells(
    cells: Sequence[Cell],
    sides: Mapping[str, Side],
    *,
    run_id: str,
    infos: Mapping[str, BackendInfo],
    device: Device,
    out: Path,
    seed: int,
    pairs: int,
    limit_s: float | None,
) -> tuple[list[Record], Path]:
    """``pairs`` pairs of every cell, judged by nobody. Returns the records and where they are.

    With a limit, of the cells in the order given as many as it has time for; what is left of it, if it is not too
    little, is given to the others.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vbench-ab-")))
        runner, records, path = _runner(
            stack, cells, sides, {"pairs": pairs}, scratch, run_id, infos, device, out, seed
        )
        measure_all(runner, [cell.name for cell in cells], pairs, limit_s)
        return records, path


def measure_all(
    runner: PairRunner,
    names: Sequence[str],
    pairs: int,
    limit_s: float | None,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """See ``measure_cells``. Returns the names of the cells that the limit left without all their pairs."""
    if limit_s is None:
        runner.measure(pairs, names)
        return []
    end = clock() + limit_s
    left: list[str] = list(names)
    while left and end - clock() > LEAST_REST * limit_s:
        found = runner.measure_within(pairs, left, Shares(end - clock(), pairs, clock))
        left = [name for name in left if name not in runner.failed and len(found[name]) < pairs]
    return left


def _runner(
    stack: ExitStack,
    cells: Sequence[Cell],
    sides: Mapping[str, Side],
    summary: Mapping[str, Any],
    scratch: Path,
    run_id: str,
    infos: Mapping[str, BackendInfo],
    device: Device,
    out: Path,
    seed: int,
    may_go_on: Callable[[], bool] = lambda: True,
) -> tuple[PairRunner, list[Record], Path]:
    """A runner that stores its records and keeps them in the list returned. The store is closed with ``stack``."""
    store = RunStore(out / run_id, {"run": run_id, "device": device, "seed": seed, "cells": len(cells), **summary})
    stack.callback(store.close)
    records: list[Record] = []

    def keep(record: Record) -> None:
        store.append(record)
        records.append(record)

    runner = PairRunner(
        run_id=run_id,
        cells={cell.name: cell for cell in cells},
        sides=sides,
        start=Workers(sides, infos, device, scratch, store.folder).start,
        keep=keep,
        draw=random.Random(seed),
        may_go_on=may_go_on,
        ahead=device == "cuda",
    )
    return runner, records, store.path
