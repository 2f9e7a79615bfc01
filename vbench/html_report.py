"""One offline page of a run: claims, roofline, sweeps, errors, environment, records. Needs jinja2 (extra ``report``).

Everything is computed from records; the page has no script and fetches nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vbench.claims import Ledger
from vbench.documents import number, quantity_text
from vbench.errors import UsageError
from vbench.intervals import median_interval
from vbench.judge import ClaimVerdict, Finding, case_params
from vbench.plots import Limit, Plot, Point, Series, build
from vbench.record import Record
from vbench.report import si
from vbench.roofline import Ceilings, machine_of
from vbench.spec import Op, case_hash
from vbench.student import log_interval

#: One a backend, in the order they appear; the first six as Okabe & Ito (2008) chose them for the colour-blind, but for
#: sky blue on a light page. Each has a contrast of 3 or more on either page (WCAG 2.2, success criterion 1.4.11).
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "light-dark(#3795cf, #56b4e9)",
    "light-dark(#8c564b, #a0695e)", "#7f7f7f", "#9467bd", "light-dark(#129aa8, #17becf)", "#6b8e23", "#e7298a",
)  # fmt: skip
SECTIONS = (
    ("claims", "Claims"),
    ("roofline", "Roofline"),
    ("sweeps", "Sweeps"),
    ("errors", "Errors"),
    ("environment", "Environment"),
    ("records", "Records"),
)
#: Sweeps shown: those with the most points first.
MOST_SWEEPS = 24
#: Below this, an error over its budget is drawn at it: exact results would lie at minus infinity.
LEAST_ERROR = 1e-4
COLUMNS = ("record", "kind", "backend", "case", "outcome", "median", "interval (95 %)", "err/budget", "run", "sources")


def render(
    records: Sequence[Record],
    verdicts: Mapping[str, Sequence[ClaimVerdict]],
    ledgers: Mapping[str, Ledger],
    ops: Mapping[str, Op],
    known: Mapping[str, Ceilings],
    *,
    run: str,
    where: str,
) -> str:
    """The page.

    Args:
        verdicts, ledgers: by ledger's name.
        known: measured ceilings by machine.
        run: its title.
        where: path of the records, shown.

    Raises:
        UsageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise UsageError("report: jinja2 is missing; pip install 'vbench-kernels[report]'") from None
    template = resources.files("vbench").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = list(dict.fromkeys(r.who for r in records))

    def colour(name: str) -> int:
        return names.index(name) % len(COLOURS) if name in names else len(COLOURS) - 1

    figures = (
        ("roofline", "Roofline", _ROOFLINE_NOTE, rooflines(records, ops, known, colour)),
        ("sweeps", "Sweeps", _SWEEPS_NOTE, sweeps(records, colour)),
        ("errors", "Errors over their budgets", _ERRORS_NOTE, errors(records, colour)),
    )
    there = {r.id for r in records}
    claims = [
        _claim(claim.id, claim.says, verdict, there)
        for name, ledger in ledgers.items()
        for claim, verdict in zip(ledger.claims, verdicts[name], strict=True)
    ]
    decided = [c for c in claims if c["words"] & DECIDED]
    return made.from_string(template).render(
        run=run,
        where=where,
        counts=", ".join(f"{n} {outcome}" for outcome, n in Counter(r.outcome.value for r in records).most_common()),
        sections=SECTIONS,
        colours=COLOURS,
        decided=decided,
        undecided=[c for c in claims if not c["words"] & DECIDED],
        verdicts=_verdict_counts(claims),
        figures=figures,
        environment=environment_rows(records),
        columns=COLUMNS,
        rows=[{"id": r.id, "cells": _cells(r)} for r in records],
    )


#: Verdicts that decide a claim, in the order in which they are counted.
DECIDED_ORDER = ("REFUTED", "SUPPORTED")
DECIDED = frozenset(DECIDED_ORDER)

_ROOFLINE_NOTE = (
    "Attained rate against arithmetic intensity, one point a timed case; the dashed lines are this machine's measured "
    "ceilings (vbench roofline)."
)
_SWEEPS_NOTE = (
    "Median time by size, one line a backend. Bars: 95 % of the median over processes, or, where there was one, by "
    "order statistics within it."
)
_ERRORS_NOTE = "The worst element of each check: its error over its budget. Above 1 is wrong; exact is drawn at 0.0001."


def _claim(name: str, says: str, verdict: ClaimVerdict, there: set[str]) -> dict[str, Any]:
    return {
        "id": name,
        "says": says,
        "stated": _finding(verdict.stated, there),
        "restated": [_finding(f, there) for f in verdict.findings[1:]],
        "words": {str(f.word) for f in verdict.findings},
    }


def _verdict_counts(claims: Sequence[Mapping[str, Any]]) -> str:
    """How many claims there are and how many have such a verdict; one may have several, as stated and on machines."""
    counts = Counter(word for c in claims for word in c["words"] & DECIDED)
    open_ = sum(not c["words"] & DECIDED for c in claims)
    return ", ".join(
        [f"{len(claims)} claims", *(f"{counts[w]} {w}" for w in DECIDED_ORDER), f"{open_} not decided here"]
    )


def _finding(found: Finding, there: set[str]) -> dict[str, Any]:
    text = found.label + (f" on {found.hardware}" if found.hardware else "")
    if found.value is not None:
        text += f": {quantity_text(found.value, found.unit)}"
        if found.low is not None and found.high is not None and found.low != found.high:
            ends = (quantity_text(end, found.unit) for end in (found.low, found.high))
            text += f" [{', '.join(ends)}]"
    if found.holds:
        text += f" (holds {found.holds})"
    return {"word": found.word, "text": text, "ids": [i for i in found.rests_on if i in there]}


def environment_rows(records: Iterable[Record]) -> list[tuple[str, list[str]]]:
    """Each field of the environments with every value it has, in the order seen."""
    found: dict[str, dict[str, None]] = {}
    for r in records:
        for name, value in r.environment.items():
            found.setdefault(name, {})[str(value)] = None
    return [(name, list(values)) for name, values in found.items()]


def _cells(r: Record) -> list[str]:
    medians, ends = [], []
    for m in r.measurements:
        medians.append(f"{m.quantity} {si(m.median_s, 's')}")
        known = median_interval(m.samples_s)
        ends.append("-" if known is None else f"{si(known.low, 's')} to {si(known.high, 's')}")
    outcome = f"{r.outcome.value}({r.reason})" if r.reason else r.outcome.value
    error = "" if r.error is None else number(r.error.worst_over_budget)
    run = r.run if r.pair is None else f"{r.run} pair {r.pair}{r.side}"
    head = [r.id[:6], r.kind, r.who, f"{case_hash(r.case)} {r.case}", outcome]
    return [*head, "; ".join(medians), "; ".join(ends), error, run, r.sources.removeprefix("sha256:")]


Colour = Callable[[str], int]


def _timed(records: Iterable[Record]) -> dict[tuple[str, str, str], list[tuple[Record, float]]]:
    """(case, who, quantity) -> records with their medians, one a process; nothing tuned or of another tree."""
    found: dict[tuple[str, str, str], list[tuple[Record, float]]] = {}
    for r in records:
        for m in r.measurements if r.kind in ("time", "pair") and not r.tuning and not r.tree else ():
            found.setdefault((r.case, r.who, m.quantity), []).append((r, m.median_s))
    return found


def _point(x: float, cell: Sequence[tuple[Record, float]], quantity: str, what: str) -> Point:
    record = cell[-1][0]
    median = cell[0][1]
    low: float | None = None
    high: float | None = None
    if len(cell) > 1:
        median, low, high = log_interval([value for _, value in cell], 0.95)
    else:
        measured = record.measurement(quantity)
        known = None if measured is None else median_interval(measured.samples_s)
        if known is not None:
            low, high = known.low, known.high
    mark = "" if record.outcome.value == "PASSED" else f" ({record.outcome.value})"
    return Point(x, median, record.id, f"{what}: {si(median, 's')}{mark}", low, high)


def sweeps(records: Sequence[Record], colour: Colour) -> list[Plot]:
    """One plot for each set of cases that differ in one numeric parameter, the one with the most values."""
    timed = _timed(records)
    found: dict[tuple[str, str, str, str], dict[str, dict[int, Point]]] = {}
    for (case, who, quantity), cell in timed.items():
        op, params = case_params(case)
        for axis, value in params.items():
            if axis != "seed" and value.isdecimal() and int(value) > 0:
                rest = ",".join(f"{k}={v}" for k, v in params.items() if k not in (axis, "seed"))
                sides = found.setdefault((op, axis, rest, quantity), {})
                sides.setdefault(who, {})[int(value)] = _point(int(value), cell, quantity, f"{who}, {axis}={value}")
    plots = []
    for (op, axis, rest, quantity), sides in found.items():
        sizes = {x for points in sides.values() for x in points}
        if len(sizes) >= 3:
            series = [Series(who, list(points.values()), joined=True) for who, points in sides.items()]
            plot = build(f"{op}, {quantity}: {rest}", axis, "seconds", series, colour=colour)
            plots.append((len(sizes) * len(sides), plot))
    return [plot for _, plot in sorted(plots, key=lambda item: -item[0])[:MOST_SWEEPS]]


def errors(records: Sequence[Record], colour: Colour) -> list[Plot]:
    """One plot an op: each check's worst error over its budget, by backend."""
    by_op: dict[str, dict[str, list[Record]]] = {}
    for r in records:
        if r.kind in ("check", "time") and r.error is not None and r.error.worst_over_budget < float("inf"):
            by_op.setdefault(case_params(r.case)[0], {}).setdefault(r.who, []).append(r)
    plots = []
    for op, sides in by_op.items():
        series = []
        for place, (who, found) in enumerate(sides.items()):
            # Side by side, so that many checks do not hide each other.
            points = []
            for i, r in enumerate(found):
                value = r.error.worst_over_budget if r.error is not None else 0.0
                x = place + 0.6 * ((i + 1) / (len(found) + 1) - 0.5)
                points.append(Point(x, max(value, LEAST_ERROR), r.id, f"{who} {r.case}: {number(value)}"))
            series.append(Series(who, points))
        limit = Limit("budget", [(-0.5, 1.0), (len(sides) - 0.5, 1.0)])
        words = "backends, in the legend's order"
        plots.append(
            build(
                op,
                words,
                "error / budget",
                series,
                limits=[limit],
                places=len(sides),
                y_words=lambda v: f"{v:g}",
                colour=colour,
            )
        )
    return plots


def rooflines(
    records: Sequence[Record], ops: Mapping[str, Op], known: Mapping[str, Ceilings], colour: Colour
) -> list[Plot]:
    """One plot a machine with measured ceilings: operations a second against operations a byte."""
    by_machine: dict[str, dict[str, list[Point]]] = {}
    for (case, who, quantity), cell in _timed(records).items():
        op = ops.get(case_params(case)[0])
        record = cell[-1][0]
        if op is None or op.bytes is None or op.flops is None or quantity != "graph" or machine_of(record) not in known:
            continue
        parsed = op.parse(case)
        moved, work = op.bytes(parsed), op.flops(parsed)
        if moved and work:
            point = _point(1.0, cell, quantity, f"{who} {case}")
            placed = Point(work / moved, work / point.y, point.record, point.text)
            by_machine.setdefault(machine_of(record), {}).setdefault(who, []).append(placed)
    plots = []
    for machine, sides in by_machine.items():
        here = known[machine]
        xs = [p.x for points in sides.values() for p in points]
        limits = []
        for dtype, peak in sorted(here.flops_per_s.items(), key=lambda item: item[1]):
            ridge = peak / here.bytes_per_s
            ends = sorted({min(xs), ridge, max(*xs, ridge * 4)})
            limits.append(Limit(dtype, [(x, min(peak, x * here.bytes_per_s)) for x in ends]))
        series = [Series(who, points) for who, points in sides.items()]
        plots.append(build(machine, "operations / byte", "operations / s", series, limits=limits, colour=colour))
    return plots


def write(path: Path, page: str) -> None:
    """Write the page. Raises UsageError where that cannot be."""
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"-o {path}: {error.strerror}; choose another file") from None
