"""A run against a baseline: did anything of ours get slower, or wrong? Pure; standard library only.

A cell is one case of one own backend and one timed quantity. A baseline holds at least BASELINE_PROCESSES processes of
it: their spread says how far apart two readings of unchanged code lie, so that the margin is the larger of
LEAST_MARGIN and SPREADS times that spread.

    SLOWER, FASTER   the run's median lies outside the margin; other_choice: the kernel says that it chose otherwise
    SAME             it lies inside
    INCONCLUSIVE     few_baseline_processes; noisy_baseline where it lies inside a margin above WIDEST_MARGIN
    INVALID          a time that cannot be (not a number, zero, below what the datasheet allows)
    MISSING          the baseline has it and the run does not, with what became of it
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from vbench.comparison import Word
from vbench.judge import case_params
from vbench.record import EXCUSED, Outcome, Record
from vbench.spec import case_hash
from vbench.student import log_interval

BASELINE_PROCESSES = 5
LEAST_MARGIN = 0.05
SPREADS = 3.0
WIDEST_MARGIN = 0.15

#: What two machines must share for their times to be compared: the environment's keys, and those asked of a CPU only.
LIKE = ("hardware", "gpu", "driver", "cuda", "torch", "triton", "ptxas", "numba", "numba-cuda")
LIKE_ON_CPU = ("cpu",)

#: case id, who, quantity
Cell = tuple[str, str, str]
#: Seconds that no kernel can undercut on the record's machine; 0 where nothing is known.
Floor = Callable[[Record], float]


@dataclass(frozen=True, slots=True)
class Row:
    """One cell's result. Times are seconds a launch; ``margin`` and ``ratio`` (run over baseline) are plain numbers."""

    case: str
    who: str
    quantity: str
    word: str
    reason: str = ""
    baseline_s: float | None = None
    baseline_low_s: float | None = None
    baseline_high_s: float | None = None
    baseline_processes: int = 0
    run_s: float | None = None
    ratio: float | None = None
    margin: float | None = None
    rests_on: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.word}({self.reason})" if self.reason else self.word


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which the machines differ; a value that a side has not is ``-``."""

    name: str
    baseline: tuple[str, ...]
    run: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {' and '.join(self.baseline)} in the baseline, {' and '.join(self.run)} in the run"


@dataclass(frozen=True, slots=True)
class Result:
    """What the gate found.

    Args:
        rows: cells of the baseline, changed ones first.
        failures: records of the run that are wrong or invalid, own backends' and the harness's.
        differences: why the machines cannot be compared; the rows are empty then.
        new: cells of the run that the baseline lacks.
        torn: half-written lines, as ``file:line: why``.
    """

    rows: tuple[Row, ...] = ()
    failures: tuple[Record, ...] = ()
    differences: tuple[Difference, ...] = ()
    new: tuple[Cell, ...] = ()
    torn: tuple[str, ...] = ()


def _timed(records: Sequence[Record]) -> list[Record]:
    """Own times of unchanged code: single runs, and sides of pairs without tuning or another tree's kernels."""
    return [
        r
        for r in records
        if r.kind in ("time", "pair") and r.role == "own" and r.measurements and not r.tuning and not r.tree
    ]


def _cells(records: Sequence[Record]) -> dict[Cell, list[tuple[Record, float]]]:
    """Cell -> its records with their medians in seconds, one a process."""
    found: dict[Cell, list[tuple[Record, float]]] = {}
    for r in _timed(records):
        for m in r.measurements:
            found.setdefault((r.case, r.who, m.quantity), []).append((r, m.median_s))
    return found


def differences(baseline: Sequence[Record], run: Sequence[Record]) -> tuple[Difference, ...]:
    """The fields in which the machines of two sets of times differ. Values are compared as sets, over all records."""
    found = []
    on_cpu = all(r.hardware == "cpu" for r in (*baseline, *run))
    for name in LIKE + (LIKE_ON_CPU if on_cpu else ()):
        old, new = ({str(r.environment.get(name, "-")) for r in side} for side in (baseline, run))
        if old != new:
            found.append(Difference(name, tuple(sorted(old)), tuple(sorted(new))))
    return tuple(found)


def _other_inputs(missing: Sequence[Cell], new: Sequence[Cell]) -> tuple[Difference, ...]:
    """Cells that would be the same but for the distribution of their inputs."""

    def without(cell: Cell) -> tuple[object, ...]:
        op, params = case_params(cell[0])
        return op, tuple(sorted((k, v) for k, v in params.items() if k != "dist")), *cell[1:]

    then = {without(c): case_params(c[0])[1].get("dist", "-") for c in missing}
    pairs = {(then[without(c)], case_params(c[0])[1].get("dist", "-")) for c in new if without(c) in then}
    if not pairs:
        return ()
    old, now = ({pair[i] for pair in pairs} for i in (0, 1))
    return (Difference("dist (input distribution)", tuple(sorted(old)), tuple(sorted(now))),)


def judge_run(baseline: Sequence[Record], run: Sequence[Record], *, floor: Floor, torn: Sequence[str] = ()) -> Result:
    """Compare a run with a baseline; see the module's rules.

    Args:
        floor: seconds below which a time is impossible.
        torn: lines of the run that could not be read.
    """
    failures = tuple(r for r in run if r.role in ("own", "harness") and not _excused(r))
    then, now = _cells(baseline), _cells(run)
    new = tuple(sorted(set(now) - set(then)))
    missing = sorted(set(then) - set(now))
    unlike = differences(_timed(baseline), _timed(run)) if then and now else ()
    unlike += _other_inputs(missing, new)
    if unlike:
        return Result((), failures, unlike, new, tuple(torn))
    became = {(r.case, r.who): r for r in run if r.kind in ("time", "pair")}
    rows = [_row(cell, then[cell], now[cell], floor) for cell in then if cell in now]
    rows += [_missing(cell, then[cell], became.get(cell[:2])) for cell in missing]
    order = {word: i for i, word in enumerate(_ORDER)}
    rows.sort(key=lambda row: (order[row.word], -abs(math.log(row.ratio or 1.0)), row.case, row.who, row.quantity))
    return Result(tuple(rows), failures, (), new, tuple(torn))


_ORDER = ("SLOWER", "INVALID", "MISSING", "INCONCLUSIVE", "FASTER", "SAME")


def _excused(record: Record) -> bool:
    return record.outcome in EXCUSED or (record.outcome is Outcome.OUT_OF_MEMORY and record.suite == "model")


def _row(cell: Cell, then: Sequence[tuple[Record, float]], now: Sequence[tuple[Record, float]], floor: Floor) -> Row:
    old = [value for _, value in then]
    old_s, low_s, high_s, margin = spread(old)
    run_s = statistics.median(value for _, value in now)
    ratio = run_s / old_s
    ids = tuple(sorted(r.id for r, _ in (*then, *now)))
    least_s = max(floor(r) for r, _ in now)
    if min(value for _, value in now) < least_s:
        word, reason = Word.INVALID.value, "below_floor"
    elif len(old) < BASELINE_PROCESSES:
        word, reason = Word.INCONCLUSIVE.value, "few_baseline_processes"
    elif ratio > 1 + margin:
        word, reason = Word.SLOWER.value, _choice(then, now)
    elif ratio < 1 / (1 + margin):
        word, reason = Word.FASTER.value, _choice(then, now)
    elif margin > WIDEST_MARGIN:
        word, reason = Word.INCONCLUSIVE.value, "noisy_baseline"
    else:
        word, reason = Word.SAME.value, ""
    return Row(*cell, word, reason, old_s, low_s, high_s, len(old), run_s, ratio, margin, ids)


def _choice(then: Sequence[tuple[Record, float]], now: Sequence[tuple[Record, float]]) -> str:
    """``other_choice`` where the kernel says that it chose another tile, path or the like than it ever did before."""
    old, new = ({str(r.choice["digest"]) for r, _ in side if r.choice} for side in (then, now))
    return "other_choice" if old and new and not old & new else ""


def spread(values_s: Sequence[float]) -> tuple[float, float, float, float]:
    """Median, its interval (95 %, equal to the median for one process) and the margin for what is set against it."""
    if len(values_s) < 2:
        only = values_s[0]
        return only, only, only, LEAST_MARGIN
    median, low, high = log_interval(values_s, 0.95)
    return median, low, high, max(LEAST_MARGIN, SPREADS * statistics.stdev(math.log(v) for v in values_s))


def _missing(cell: Cell, then: Sequence[tuple[Record, float]], became: Record | None) -> Row:
    old_s, low_s, high_s, margin = spread([value for _, value in then])
    invalid = became is not None and became.outcome is Outcome.INVALID
    reason = "not_run" if became is None else became.reason or became.outcome.value.lower()
    ids = tuple(sorted((*(r.id for r, _ in then), *(() if became is None else (became.id,)))))
    word = Word.INVALID.value if invalid else "MISSING"
    return Row(*cell, word, reason, old_s, low_s, high_s, len(then), margin=margin, rests_on=ids)


def exit_code(result: Result, *, strict: bool) -> tuple[int, list[str]]:
    """The code and the reasons for it in words.

    Returns:
        1: something is SLOWER or INVALID, or a record of the run is wrong.
        3: the machines differ, nothing was judged, or, under ``strict``, a cell is MISSING or INCONCLUSIVE, or a line
        of the run is torn.
        0: else.
    """
    words = Counter(row.label for row in result.rows)
    failed = Counter(f"{r.who} {r.label}" for r in result.failures)
    bad = [f"{n} x {what}" for what, n in sorted(failed.items())]
    bad += [f"{n} x {what}" for what, n in sorted(words.items()) if what.startswith(("SLOWER", "INVALID"))]
    if bad:
        return 1, bad + [str(d) for d in result.differences]
    if result.differences:
        return 3, [f"machines differ in {d}" for d in result.differences]
    if not any(row.word in ("FASTER", "SAME") for row in result.rows):
        loose = ", ".join(f"{n} x {what}" for what, n in sorted(words.items())) or "no timed cell of ours"
        return 3, [f"nothing judged: {loose}"]
    if strict:
        open_ends = [f"strict: {n} x {what}" for what, n in sorted(words.items()) if what.startswith(_OPEN)]
        open_ends += [f"strict: {line}" for line in result.torn]
        if open_ends:
            return 3, open_ends
    return 0, []


_OPEN = ("MISSING", "INCONCLUSIVE")

Format = Literal["table", "json", "github"]


def render(result: Result, code: int, reasons: Sequence[str], fmt: Format, names: Mapping[str, str]) -> str:
    """The result as text.

    Args:
        fmt: ``table`` for people; ``json``; ``github``: workflow commands, then the table in Markdown.
        names: what was compared, shown at the end (``run``, ``baseline``).
    """
    if fmt == "json":
        body = {
            **names,
            "exit": code,
            "reasons": list(reasons),
            "rows": [asdict(row) for row in result.rows],
            "failures": [{"id": r.id, "case": r.case, "who": r.who, "outcome": r.label} for r in result.failures],
            "differences": [asdict(d) for d in result.differences],
            "new": [list(cell) for cell in result.new],
            "torn": list(result.torn),
        }
        return json.dumps(body, indent=1, ensure_ascii=False)
    lines = list(_annotations(result, code, reasons)) if fmt == "github" else []
    counts = Counter(row.word for row in result.rows)
    head = ["cell", "backend", "quantity", "verdict", "baseline", "run", "ratio", "margin"]
    shown = [_cells_of(row) for row in result.rows if fmt == "github" or row.word != "SAME"]
    lines += _markdown(head, shown) if fmt == "github" else _columns(head, shown)
    lines += [f"FAILED    {r.who} {r.label} {case_hash(r.case)} {r.case}" for r in result.failures]
    lines += [f"torn      {line}" for line in result.torn]
    if result.new:
        lines.append(f"new       {len(result.new)} cells are not in the baseline")
    lines.append(f"cells     {', '.join(f'{counts[w]} {w}' for w in _ORDER if counts[w]) or 'none'}")
    lines += [f"{name:<9} {value}" for name, value in names.items()]
    lines.append(f"exit {code}" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return "\n".join(lines)


def _cells_of(row: Row) -> list[str]:
    def us(value: float | None) -> str:
        return "-" if value is None else f"{value * 1e6:.4g}"

    old = f"{us(row.baseline_s)} [{us(row.baseline_low_s)}, {us(row.baseline_high_s)}] us of {row.baseline_processes}"
    ratio = "-" if row.ratio is None else f"{row.ratio:.3f}x"
    margin = "-" if row.margin is None else f"{100 * row.margin:.1f} %"
    return [row.case, row.who, row.quantity, row.label, old, f"{us(row.run_s)} us", ratio, margin]


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *rows)]


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rows)] + [""]


#: GitHub shows at most this many annotations of a kind for one step.
ANNOTATIONS = 10


def _annotations(result: Result, code: int, reasons: Sequence[str]) -> list[str]:
    """Workflow commands ``::error title=...::...`` (GitHub, "Workflow commands for GitHub Actions")."""
    errors = [f"{r.who} {r.label}: {r.case}" for r in result.failures]
    errors += [_sentence(row) for row in result.rows if row.word in ("SLOWER", "INVALID")]
    warnings = [_sentence(row) for row in result.rows if row.word in _OPEN] + list(result.torn)
    if code and not errors:
        (errors if code == 1 else warnings)[:0] = list(reasons)
    return [*workflow_commands("error", errors), *workflow_commands("warning", warnings)]


def workflow_commands(level: str, messages: Sequence[str]) -> list[str]:
    """GitHub workflow commands of a level (``error``, ``warning``), no more than GitHub shows."""
    shown = list(messages[:ANNOTATIONS])
    if len(messages) > ANNOTATIONS:
        shown[-1] = f"and {len(messages) - ANNOTATIONS + 1} more, in the table"
    return [f"::{level} title=vbench gate::{_escaped(message)}" for message in shown]


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _sentence(row: Row) -> str:
    _, _, quantity, label, old, new, ratio, margin = _cells_of(row)
    return f"{row.who} {label}: {row.case} {quantity} {new}, baseline {old}, ratio {ratio}, margin {margin}"
