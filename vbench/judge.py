"""Verdicts on claims, computed from records alone, and the exit code. Pure; standard library only.

Rules
    as stated   REFUTED where the claim's arithmetic, or a source fact in it, contradicts it. SUPPORTED by arithmetic
                only where the claim names no hardware: arithmetic cannot support a measurement. Else the restated
                measurement on the named card, else NOT_RUN(needs_CARD).
    restated    from records of its hardware class. Seconds of one process run decide only outside a margin of
                ``SINGLE_PROCESS_MARGIN``: samples of one process are no replicates of the process. Several process runs
                give a Student-t interval on the logarithms, at ``LEVEL`` shared among the cells (Bonferroni).
                Metrics of exact checks repeat bit for bit and carry no margin.
    missing     a cell the claim asks for and no valid record fills keeps the verdict at INCONCLUSIVE(missing_cells).
    STALE       the sources behind a record it rests on are not what they were.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vbench import student
from vbench.claims import NAMED_HARDWARE, UNSAID, Claim, Holds, Ledger, Reduction, Restated, arithmetic_metrics
from vbench.record import EXCUSED, Outcome, Record

__all__ = [
    "LEVEL",
    "SINGLE_PROCESS_MARGIN",
    "ClaimVerdict",
    "Finding",
    "arithmetic_metrics",
    "case_params",
    "exit_code",
    "is_stale",
    "judge",
    "quantity_of",
]

#: Half-width of the interval given to seconds of a single process run. Readings of one kernel in different processes
#: on one H200 lay up to 22 % apart.
SINGLE_PROCESS_MARGIN = 0.10
#: Two-sided confidence of a verdict on times, over all its cells together.
LEVEL = 0.99

DECIDED = ("SUPPORTED", "REFUTED")

CurrentSources = Callable[[Record], str | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One verdict.

    Args:
        word: SUPPORTED, REFUTED, INCONCLUSIVE, NOT_RUN or STALE.
        reason: short stable code for the last three (``needs_cuda``, ``single_process``, ``missing_cells``, ...).
        value: what was found; ``None`` where nothing was.
        low, high: its interval; equal to ``value`` for exact figures.
        unit: ``x`` for ratios, ``s``, ``B`` or ``""``.
        holds: the threshold in words, ``""`` for arithmetic.
        hardware: class or card the records come from.
        rests_on: ids of the records behind it, sorted.
        missing: cells asked for and not filled, with the reason.
        note: a sentence for a person.
        reviewed: the verdict word a person reviewed for this hardware, ``""`` if none.
        parts: one Finding a hardware class, where more than one counted.
    """

    word: str
    reason: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    holds: str = ""
    hardware: str = ""
    rests_on: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    note: str = ""
    reviewed: str = ""
    parts: tuple[Finding, ...] = ()

    @property
    def decided(self) -> bool:
        return self.word in DECIDED

    @property
    def digest(self) -> str:
        """sha256 over the sorted ids of the evidence, 64 hex digits; ``""`` without evidence."""
        if not self.rests_on:
            return ""
        return hashlib.sha256("\n".join(sorted(self.rests_on)).encode()).hexdigest()

    @property
    def label(self) -> str:
        return f"{self.word}({self.reason})" if self.reason else self.word

    def __str__(self) -> str:
        return self.label if self.value is None else f"{self.label} at {self.value:.4g}{self.unit}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "verdict": self.word,
            "reason": self.reason,
            "value": self.value,
            "interval": None if self.value is None else [self.low, self.high],
            "unit": self.unit,
            "holds": self.holds,
            "hardware": self.hardware,
            "reviewed": self.reviewed,
            "rests_on": list(self.rests_on),
            "evidence": self.digest,
            "missing": list(self.missing),
            "note": self.note,
        }


@dataclass(frozen=True, slots=True)
class ClaimVerdict:
    """Both verdicts on one claim. ``restated`` is ``None`` where the claim has no measurable sentence."""

    claim: str
    stated: Finding
    restated: Finding | None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every single verdict in it: hardware classes apart."""
        restated = () if self.restated is None else self.restated.parts or (self.restated,)
        return (self.stated, *restated)

    @property
    def decided(self) -> bool:
        return any(f.decided for f in self.findings)


def judge(ledger: Ledger, records: Iterable[Record], *, current_sources: CurrentSources) -> tuple[ClaimVerdict, ...]:
    """Judge every claim of the ledger, in its order.

    Args:
        records: of any kinds, backends and hardware.
        current_sources: digest of the sources as they are now for a record; ``None`` where that cannot be told.
    """
    pool = _Pool(records, current_sources)
    return tuple(ClaimVerdict(c.id, _judge_stated(c, pool), _judge_restated(c, pool)) for c in ledger.claims)


def exit_code(records: Sequence[Record], verdicts: Sequence[ClaimVerdict], *, strict: bool) -> tuple[int, list[str]]:
    """The code and the reasons for it in words.

    Returns:
        1: a job of an own backend, or of the harness, ended outside PASSED, UNSUPPORTED and UNAVAILABLE (OUT_OF_MEMORY
        is a result in suite ``model``), or a decided verdict contradicts the reviewed one for its hardware.
        3: nothing was judged, be it only that compilations were asked for and no compiler could be used; or, under
        ``strict``, anything is INCONCLUSIVE, NOT_RUN, STALE or UNAVAILABLE.
        0: else. Reasons that change nothing start with ``note:``.
    """
    bad: list[str] = []
    failed = Counter(
        f"{r.who} {r.outcome.value} in {r.kind}" + (f" ({r.reason})" if r.reason else "")
        for r in records
        if r.role in ("own", "harness") and not _excused(r)
    )
    bad += [f"{count} x {what}" for what, count in sorted(failed.items())]
    notes: list[str] = []
    for verdict in verdicts:
        for found in verdict.findings:
            if not found.decided or found.word == found.reviewed:
                continue
            here = f" on {found.hardware}" if found.hardware else " as stated"
            if found.reviewed in DECIDED:
                bad.append(f"claim {verdict.claim} is {found.word}{here}, reviewed as {found.reviewed}")
            else:
                notes.append(f"note: claim {verdict.claim} is {found.word}{here}, not reviewed yet")
    if bad:
        return 1, bad + notes
    judged = any(r.kind in ("check", "time", "battery", "compile") and r.outcome not in _NOT_JUDGED for r in records)
    if not judged and any(r.kind == "compile" for r in records):
        return 3, ["nothing was judged: no configuration could be compiled here", *notes]
    if not judged and not any(v.decided for v in verdicts):
        return 3, ["nothing was judged: no check passed or failed, no claim was decided", *notes]
    if strict:
        loose = Counter(f.label for v in verdicts for f in v.findings if not f.decided)
        loose += Counter(f"{r.outcome.value}({r.reason})" for r in records if r.outcome is Outcome.UNAVAILABLE)
        if loose:
            return 3, [f"strict: {count} x {what}" for what, count in sorted(loose.items())] + notes
    return 0, notes


_NOT_JUDGED = (Outcome.UNSUPPORTED, Outcome.UNAVAILABLE)


def _excused(record: Record) -> bool:
    return record.outcome in EXCUSED or (record.outcome is Outcome.OUT_OF_MEMORY and record.suite == "model")


def is_stale(record: Record, current_sources: CurrentSources) -> bool:
    """Whether the record's sources are known to have changed."""
    now = current_sources(record)
    return now is not None and now != record.sources


@functools.lru_cache(maxsize=65536)
def _parse_case(case_id: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    match = re.fullmatch(r"(\w+)\[(.*)\]", case_id)
    if match is None:
        return case_id, ()
    pairs = [part.partition("=") for part in match.group(2).split(",") if part]
    params = {name: value for name, _, value in pairs}
    return match.group(1), tuple({"seed": "0", **params}.items())


def case_params(case_id: str) -> tuple[str, dict[str, str]]:
    """``op[a=1,b=x]`` -> (op, {"seed": "0", "a": "1", "b": "x"}). No id: (the text, {})."""
    op, params = _parse_case(case_id)
    return op, dict(params)


def quantity_of(record: Record, quantity: str) -> float | None:
    """The figure in the record's own unit (seconds, bytes, plain), or ``None`` where it has no valid one.

    A record of an own backend counts only if it PASSED. Peers and subjects count as they are: their metrics say how
    wrong they are.
    """
    if record.role == "own" and record.outcome is not Outcome.PASSED:
        return None
    if quantity.startswith("time."):
        measurement = record.measurement(quantity.removeprefix("time."))
        return None if measurement is None else measurement.median_s
    if quantity == "peak_bytes":
        return None if record.peak_bytes is None else float(record.peak_bytes)
    if quantity == "error.worst_over_budget":
        return None if record.error is None else record.error.worst_over_budget
    if quantity == "error.correctly_rounded":
        return None if record.error is None else record.error.correctly_rounded
    return record.metrics.get(quantity.removeprefix("metrics."))


@dataclass(frozen=True, slots=True)
class _Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class _Cell:
    """One case with its value, one number a process run."""

    params: Mapping[str, str]
    values: tuple[float, ...]


def may_rest_on(restated: Restated, backend: str, variant: str, case_id: str) -> bool:
    """Whether a record of this case on this kernel would be read for the claim, on whichever side."""
    op = case_params(case_id)[0]
    name = f"{backend}[{variant}]" if variant else backend
    return any(
        who == name and op == _op_of(restated, who) and _asked(restated, who, case_id) for who in _sides(restated)
    )


def _op_of(restated: Restated, who: str) -> str:
    return restated.over_op if who == restated.over else restated.op


def _asked(restated: Restated, who: str, case_id: str) -> bool:
    """Whether the claim reads this case on this side. Without a ``seed`` in ``select`` it is seed 0."""
    params = case_params(case_id)[1]
    wanted: dict[str, tuple[str, ...]] = {"seed": ("0",), **restated.select}
    if who == restated.over:
        wanted |= {name: (value,) for name, value in restated.over_select.items()}
    # Another operation lacks some of the parameters that select names.
    other = _op_of(restated, who) != restated.op
    lacking = set(wanted) - set(params) - set(restated.over_select) if other else set()
    return all(params.get(name, UNSAID) in values for name, values in wanted.items() if name not in lacking)


class _Pool:
    """The records, indexed by what claims ask for."""

    def __init__(self, records: Iterable[Record], current_sources: CurrentSources) -> None:
        self.current_sources = current_sources
        self.arithmetic: dict[str, list[Record]] = {}
        self._by: dict[tuple[str, str, str], list[Record]] = {}
        for record in records:
            if record.kind == "arithmetic":
                self.arithmetic.setdefault(record.case, []).append(record)
            else:
                op = _parse_case(record.case)[0]
                self._by.setdefault((record.kind, record.who, op), []).append(record)

    def select(self, restated: Restated, who: str) -> list[Record]:
        """Records of one side of the claim, on any hardware."""
        records = self._by.get((restated.kind, who, _op_of(restated, who)), [])
        return [record for record in records if _asked(restated, who, record.case)]

    def stale(self, evidence: Iterable[Record]) -> bool:
        return any(is_stale(r, self.current_sources) for r in evidence)


def _judge_stated(claim: Claim, pool: _Pool) -> Finding:
    needs = f"needs_{claim.hardware}"
    note, value = "", None
    if claim.stated is not None:
        note, reviewed = claim.stated.note, claim.stated.reviewed
        evidence = pool.arithmetic.get(claim.id, [])
        valid = [r for r in evidence if r.outcome is Outcome.PASSED and "holds" in r.metrics]
        if not valid:
            reason = next((r.reason or r.outcome.value.lower() for r in evidence), "no_records")
            return Finding("NOT_RUN", reason, reviewed=reviewed, note=note)
        holds = all(r.metrics["holds"] == 1.0 for r in valid)
        value = valid[-1].metrics.get("value")
        ids = tuple(sorted(r.id for r in valid))
        if not holds or claim.hardware == "none":
            word = "SUPPORTED" if holds else "REFUTED"
            found = Finding(word, "", value, value, value, rests_on=ids, note=note, reviewed=reviewed)
            return _staled(found, valid, pool)
        note = note or "its figures agree with each other; arithmetic cannot support the measurement"
        needs_finding = Finding("NOT_RUN", needs, value, value, value, rests_on=ids, note=note, reviewed=reviewed)
    elif claim.hardware == "none":
        return Finding("NOT_RUN", claim.open or "restated_only", note=note)
    else:
        needs_finding = Finding("NOT_RUN", claim.open or needs, note=note)
    if claim.restated is not None:
        card = NAMED_HARDWARE[claim.hardware]
        found = _measure(claim.restated, pool, lambda r: card in str(r.environment.get("gpu", "")), claim.hardware)
        if found.rests_on:
            return replace(found, reviewed="")
    return needs_finding


def _judge_restated(claim: Claim, pool: _Pool) -> Finding | None:
    restated = claim.restated
    if restated is None:
        return None
    if restated.hardware != "any":
        return _on_class(restated, pool, restated.hardware)
    sides = [r for who in _sides(restated) for r in pool.select(restated, who)]
    classes = sorted({r.hardware for r in sides if r.hardware and r.outcome is not Outcome.UNAVAILABLE})
    if not classes:
        return replace(_on_class(restated, pool, "any"), hardware="any")
    parts = tuple(_on_class(restated, pool, name) for name in classes)
    if len(parts) == 1:
        return parts[0]
    ids = tuple(sorted({i for p in parts for i in p.rests_on}))
    hardware = "+".join(classes)
    if len({p.word for p in parts}) == 1:
        return replace(parts[0], hardware=hardware, rests_on=ids, parts=parts, reviewed="")
    return Finding("INCONCLUSIVE", "classes_disagree", hardware=hardware, rests_on=ids, parts=parts)


def _on_class(restated: Restated, pool: _Pool, name: str) -> Finding:
    # Jobs that died before the environment was known carry no class: they count as this machine's.
    found = _measure(restated, pool, lambda r: r.hardware in (name, ""), name)
    return replace(found, reviewed=restated.reviewed.get(name, ""))


def _sides(restated: Restated) -> tuple[str, ...]:
    return (restated.backend, restated.over) if restated.over else (restated.backend,)


def _measure(restated: Restated, pool: _Pool, here: Callable[[Record], bool], hardware: str) -> Finding:
    """The verdict from the records for which ``here`` is true."""
    holds = str(restated.holds)
    sides: list[dict[str, dict[str, float]]] = []  # case id -> run -> value, one a side
    evidence: dict[tuple[str, str, str], Record] = {}  # who, case id, run
    missing: dict[str, None] = {}
    for who in _sides(restated):
        everywhere = pool.select(restated, who)
        records = [r for r in everywhere if here(r) and r.outcome is not Outcome.UNAVAILABLE]
        if not records:
            gone = Counter(r.reason or "unavailable" for r in everywhere if r.outcome is Outcome.UNAVAILABLE)
            reason = gone.most_common(1)[0][0] if gone else "no_records" if not everywhere else f"needs_{hardware}"
            return Finding("NOT_RUN", reason, holds=holds, hardware=hardware)
        values: dict[str, dict[str, float]] = {}
        aligned = [(_aligned(restated, who, r.case), r) for r in records]
        for case, r in aligned:
            number = _number(restated, r)
            if number is None:
                missing[f"{who} {r.case}: {_why(r, restated)}"] = None
                continue
            values.setdefault(case, {})[r.run] = number
            evidence[who, case, r.run] = r
        for combination in _combinations(restated):
            filled = [c for c in values if _matches(c, combination)]
            if not filled and not any(_matches(case, combination) for case, _ in aligned):
                missing[f"{who} {','.join(f'{k}={v}' for k, v in combination.items())}: no record"] = None
        if not values:
            unsupported = Counter(r.reason for r in records if r.outcome is Outcome.UNSUPPORTED)
            if sum(unsupported.values()) == len(records):
                return Finding("NOT_RUN", unsupported.most_common(1)[0][0], holds=holds, hardware=hardware)
            gaps = tuple(missing)
            return Finding("INCONCLUSIVE", "no_valid_records", holds=holds, hardware=hardware, missing=gaps)
        sides.append(values)

    cells, rests_on = _cells(restated, sides, evidence, missing)
    if restated.metric == "fraction_passed":
        everything = [v for cell in cells for v in cell.values]
        cells = [_Cell({}, (statistics.fmean(everything),))] if everything else []
    if not cells:
        gaps = tuple(missing)
        return Finding("INCONCLUSIVE", "no_common_cell", holds=holds, hardware=hardware, missing=gaps)
    seconds = restated.quantity.startswith("time.")
    intervals = [(cell.params, _interval(cell.values, seconds, LEVEL, len(cells))) for cell in cells]
    left: _Cells = intervals
    for step in restated.reduce:
        left = _reduce(left, step)
    ids = tuple(sorted(r.id for r in rests_on))
    if len(left) != 1:
        note = f"reduce leaves {len(left)} values; select or reduce {', '.join(_varying(left))}"
        gaps = tuple(missing)
        return Finding(
            "INCONCLUSIVE", "ambiguous_reduce", holds=holds, hardware=hardware, rests_on=ids, missing=gaps, note=note
        )
    got = left[0][1]
    word = _decide(restated.holds, got)
    reason = ""
    if missing:
        word, reason = "INCONCLUSIVE", "missing_cells"
    elif word == "INCONCLUSIVE":
        reason = "single_process" if any(len(c.values) == 1 for c in cells) else "interval"
    unit = _unit(restated)
    found = Finding(
        word, reason, got.value, got.low, got.high, unit, holds, hardware, rests_on=ids, missing=tuple(missing)
    )
    return _staled(found, rests_on, pool)


def _cells(
    restated: Restated,
    sides: Sequence[Mapping[str, Mapping[str, float]]],
    evidence: Mapping[tuple[str, str, str], Record],
    missing: dict[str, None],
) -> tuple[list[_Cell], list[Record]]:
    """The cells both sides fill, and the records in them. A run counts for a ratio only where it has both sides."""
    cells: list[_Cell] = []
    rests_on: list[Record] = []
    own = sides[0]
    cases = sorted({case for side in sides for case in side})
    for case in cases:
        absent = [who for who, side in zip(_sides(restated), sides, strict=True) if case not in side]
        if absent:
            missing.setdefault(f"{absent[0]} {case}: no valid record", None)
            continue
        runs = sorted(set(own[case]).intersection(*(side[case] for side in sides[1:])))
        if not runs:
            missing.setdefault(f"{restated.over} {case}: never in one process run with {restated.backend}", None)
            continue
        values: list[float] = []
        for run in runs:
            first = own[case][run]
            if len(sides) == 2:
                second = sides[1][case][run]
                top, bottom = (second, first) if restated.quantity.startswith("time.") else (first, second)
                first = math.nan if bottom == 0 else top / bottom
            values.append(first)
            rests_on += [evidence[who, case, run] for who in _sides(restated)]
        cells.append(_Cell(case_params(case)[1], tuple(values)))
    return cells, rests_on


def _aligned(restated: Restated, who: str, case_id: str) -> str:
    """The case of ``backend`` that a case of ``over`` is set against: the same but for ``over_select``.

    Where ``over`` runs another operation, or leaves out a quiet parameter, both sides are named by the parameters of
    ``backend``'s, in one order: what only the other has goes, and what it lacks is as selected.
    """
    if restated.over_op != restated.op or UNSAID in restated.over_select.values():
        params = dict(case_params(case_id)[1])
        if who == restated.over:
            chosen = {k: v[0] for k, v in restated.select.items() if k not in params or k in restated.over_select}
            params = {k: v for k, v in params.items() if k not in restated.over_select} | chosen
        named = ",".join(f"{k}={v}" for k, v in sorted(params.items()) if (k, v) != ("seed", "0"))
        return f"{restated.op}[{named}]"
    if who != restated.over or not restated.over_select:
        return case_id
    op, params = case_params(case_id)
    pairs = [(k, restated.select[k][0] if k in restated.over_select else v) for k, v in params.items()]
    return f"{op}[{','.join(f'{k}={v}' for k, v in pairs if (k, v) != ('seed', '0'))}]"


def _number(restated: Restated, record: Record) -> float | None:
    if restated.metric == "fraction_passed":
        return None if record.outcome is Outcome.UNSUPPORTED else float(record.outcome is Outcome.PASSED)
    return quantity_of(record, restated.quantity)


def _why(record: Record, restated: Restated) -> str:
    if record.outcome is Outcome.PASSED:
        return f"has no {restated.quantity}"
    return f"{record.outcome.value}({record.reason})" if record.reason else record.outcome.value


def _combinations(restated: Restated) -> Iterable[dict[str, str]]:
    names = list(restated.select)
    for values in itertools.product(*restated.select.values()):
        yield dict(zip(names, values, strict=True))


def _matches(case_id: str, wanted: Mapping[str, str]) -> bool:
    params = case_params(case_id)[1]
    return all(params.get(name, UNSAID) == value for name, value in wanted.items())


def _interval(values: Sequence[float], seconds: bool, level: float, cells: int) -> _Interval:
    """Of one cell: its runs' values -> value and interval. ``cells`` share the error probability."""
    if any(math.isnan(v) for v in values):
        return _Interval(math.nan, math.nan, math.nan)
    if not seconds:
        return _Interval(statistics.median(values), min(values), max(values))
    if len(values) == 1:
        only = values[0]
        return _Interval(only, only * (1 - SINGLE_PROCESS_MARGIN), only * (1 + SINGLE_PROCESS_MARGIN))
    return _Interval(*student.log_interval(values, 1 - (1 - level) / cells))


_Cells = Sequence[tuple[Mapping[str, str], _Interval]]

_REDUCERS: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "max": max,
    "median": statistics.median,
    "mean": statistics.fmean,
}


def _reduce(cells: _Cells, step: Reduction) -> _Cells:
    """One step. All reducers grow with each argument, so an interval's ends reduce by themselves."""
    groups: dict[tuple[tuple[str, str], ...], list[_Interval]] = {}
    for params, interval in cells:
        key = () if step.over is None else tuple((k, v) for k, v in params.items() if k != step.over)
        groups.setdefault(key, []).append(interval)
    how = _REDUCERS[step.how]

    def of(values: Sequence[float]) -> float:
        return math.nan if any(math.isnan(v) for v in values) else how(values)

    return [
        (dict(key), _Interval(of([i.value for i in group]), of([i.low for i in group]), of([i.high for i in group])))
        for key, group in groups.items()
    ]


def _varying(cells: _Cells) -> list[str]:
    names = {name for params, _ in cells for name in params}
    return sorted(n for n in names if len({params.get(n) for params, _ in cells}) > 1)


def _decide(holds: Holds, got: _Interval) -> str:
    """SUPPORTED where the whole interval satisfies ``holds``, REFUTED where none of it does, else INCONCLUSIVE.

    A figure that is not a number satisfies nothing.
    """
    low, high, t = got.low, got.high, holds.threshold
    if math.isnan(got.value):
        return "REFUTED"
    match holds.comparator:
        case ">=":
            inside, outside = low >= t, high < t
        case ">":
            inside, outside = low > t, high <= t
        case "<=":
            inside, outside = high <= t, low > t
        case "<":
            inside, outside = high < t, low >= t
        case "==":
            inside, outside = low == high == t, high < t or low > t
        case "within":
            reach = abs(t) * holds.tolerance
            inside, outside = t - reach <= low and high <= t + reach, high < t - reach or low > t + reach
    return "SUPPORTED" if inside else "REFUTED" if outside else "INCONCLUSIVE"


def _unit(restated: Restated) -> str:
    if restated.metric == "ratio":
        return "x"
    if restated.quantity.startswith("time."):
        return "s"
    return "B" if restated.quantity == "peak_bytes" else ""


def _staled(found: Finding, evidence: Iterable[Record], pool: _Pool) -> Finding:
    if not pool.stale(evidence):
        return found
    return replace(found, word="STALE", reason="sources_changed", note=f"was {found.label} with the old sources")
