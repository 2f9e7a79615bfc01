"""Documents: which numerals a ledger accounts for, and the spans generated from records. Standard library only.

What is a numeral
    A run of decimal digits (full-width ones too), with thousands commas, a decimal part, an exponent and a leading
    minus where it stands for itself: ``2.57``, ``-1.3``, ``4,500``, ``1e-3``, ``2.11.0``. Both ends of a range are
    numerals (``3-4``), so are the parts of a date, the numbers of a list, and digits in code blocks and tables. A unit
    glued behind stays outside: ``163M`` is 163.
What is a name, and so no numeral
    Digits glued behind an ASCII letter or an underscore (``FP4``, ``test_x2.py``, ``float32``, ``V2``), and the
    product names in ``NAMES``. A lone ``x`` is a multiplication sign, not a letter: ``x2.57`` is 2.57. Nothing else is
    a name: in doubt a digit counts, and the ledger excludes it with a reason. Superscripts (N²) belong to a formula.

Spans
    ``<!-- vbench:claim ID -->...<!-- /vbench -->`` anywhere, in a table's cell too, holds one line.
    ``<!-- vbench:table SELECTOR -->...<!-- /vbench -->`` starts and ends on lines of its own.
    ``<!-- vbench:plot FILE STYLE SELECTOR [| NAME: WORDS ...] -->...<!-- /vbench -->``, too: an image of a table of
    kind ratio, or of several, each with further WORDS of its own; its words for who does not see it; and the SVG file,
    whose path starts at the document's folder. STYLE is ``lines`` (a line a row over the columns, which are numbers) or
    ``rows`` (a row a cell, under NAME).
    Marks in code (fenced or between backticks) are text. A selector is a kind and ``key=value`` words; several values
    are joined by commas, ``unsaid`` stands for a parameter that the case leaves out:
        ratio quantity=Q backend=WHO over=WHO rows=P cols=P [hardware=C] [kind=time|check] [PARAMETER=VALUES ...]
        value quantity=Q backend=WHO rows=P cols=P ...      (as ratio, one side)
        outcomes [hardware=C] [kind=time|check] [suite=S]   (backend x op, jobs counted by outcome)
        claims [only=SUPPORTED,...] [prefix=fp4.]           (claims whose verdict, stated or restated, is among these)
        rates backend=WHO [stage=cell|bh|suite]                (our own error rates, from ``vbench selftest``)
        search backend=WHO hardware=C                          (cases survived, from ``vbench fuzz``)
"""

from __future__ import annotations

import bisect
import difflib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vbench import tallies
from vbench.claims import CLASS_PATTERN, UNSAID, VERDICT_WORDS, Figures, Ledger
from vbench.errors import DataError
from vbench.judge import (
    SINGLE_PROCESS_MARGIN,
    ClaimVerdict,
    CurrentSources,
    Finding,
    case_params,
    is_stale,
    judge,
    quantity_of,
)
from vbench.pictures import Group, Mark, alternative, draw_lines, draw_rows
from vbench.record import Outcome, Record
from vbench.student import log_interval

#: Product names that end in digits not glued to a letter.
NAMES = (r"RTX [0-9]{4}", r"GPT-[0-9]", r"LLaMA-[0-9]+B", r"Llama-[0-9]+-[0-9]+B", r"Level [0-9](?:/[0-9])*")

_FULL_WIDTH = {0xFF10 + i: ord("0") + i for i in range(10)} | {0x2212: ord("-"), 0xFF0D: ord("-")}
_TOKEN = re.compile(
    rf"(?P<name>(?<![A-Za-z])(?:{'|'.join(NAMES)})(?![0-9])"
    r"|(?!(?<![A-Za-z_])[xX][0-9])[A-Za-z_]+[0-9]+(?:\.[0-9]+)*)"
    r"|(?P<number>(?:(?<![\w)\]\-])-)?"
    r"(?:0[xX][0-9a-fA-F]+|[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)*)"
    r"(?:[eE][-+]?[0-9]+)?)"
)
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True, slots=True)
class Numeral:
    """A numeral of a document.

    Args:
        text: normalised to ASCII digits and minus, thousands commas kept, unit left out.
        line, column: from 1.
        heading: number of headings above it or on its line (0: before the first).
        nth: how many times this text has occurred under this heading so far, from 1.
    """

    text: str
    line: int
    column: int
    heading: int
    nth: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.text} (heading {self.heading}, occurrence {self.nth})"


@dataclass(frozen=True, slots=True)
class Gap:
    """Why coverage is not whole: a numeral nobody accounts for, or a figure of the ledger that is not in the text.

    Args:
        line: of the document for a numeral, of the ledger for a figure.
        message: one line.
    """

    line: int
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True, slots=True)
class Drift:
    """A generated span that differs from what the records say now."""

    where: str
    line: int
    what: str
    found: str
    expected: str

    @property
    def unregistered(self) -> tuple[str, ...]:
        """Numbers that stand in the span and in no record behind it, each once."""
        left = Counter(n.text for n in numerals(self.found)) - Counter(n.text for n in numerals(self.expected))
        return tuple(left)

    @property
    def reason(self) -> str:
        """``stale`` (it rests on other sources and does not say so), ``unregistered`` (a number that no record has) or
        ``drift``."""
        if "STALE" in self.expected and self.expected.count("STALE") > self.found.count("STALE"):
            return "stale"
        return "unregistered" if self.unregistered else "drift"

    def __str__(self) -> str:
        said = {"stale": "stale evidence is not marked STALE: ", "drift": ""}.get(
            self.reason, f"numbers of no record ({', '.join(self.unregistered[:4])}): "
        )
        shown = f"found {self.found.strip()!r}, expected {self.expected.strip()!r}"
        return f"{self.where}:{self.line}: {self.what}: {said}{shown}"


def _fenced_lines(lines: Sequence[str]) -> list[bool]:
    """Whether each line is a code fence or lies inside one."""
    inside = ""
    flags: list[bool] = []
    for line in lines:
        fence = _FENCE.match(line)
        if inside:
            flags.append(True)
            if fence and fence.group(1).startswith(inside) and not line.strip().strip(inside[0]):
                inside = ""
        else:
            flags.append(fence is not None)
            inside = fence.group(1) if fence else ""
    return flags


def numerals(text: str, where: str = "document") -> list[Numeral]:
    """Every numeral of a Markdown document in order; see the module's rule of what is a name.

    Spans of ours are left out: records account for them.
    """
    spans = list(_spans(text, where))
    blank = list(text)
    for span in spans:
        for i in range(span.start, span.end):
            if blank[i] != "\n":
                blank[i] = " "
    lines = "".join(blank).translate(_FULL_WIDTH).split("\n")
    found: list[Numeral] = []
    seen: Counter[tuple[int, str]] = Counter()
    heading = 0
    for number, (line, fenced) in enumerate(zip(lines, _fenced_lines(lines), strict=True), start=1):
        if not fenced and _HEADING.match(line):
            heading += 1
        for match in _TOKEN.finditer(line):
            token = match.group("number")
            if token is None:
                continue
            seen[heading, token] += 1
            found.append(Numeral(token, number, match.start() + 1, heading, seen[heading, token]))
    return found


def coverage(text: str, ledger: Ledger, *, where: str = "document") -> list[Gap]:
    """What keeps the ledger from accounting for every numeral of ``text``, in order; empty if nothing does.

    A figure is matched by heading number, numeral and occurrence, so the text may be another version than the one
    whose sha256 the ledger names.
    """
    owned: dict[tuple[int, str, int], list[str]] = {}
    owners: list[tuple[str, int, tuple[Figures, ...]]] = [(f"claim {c.id}", c.line, c.figures) for c in ledger.claims]
    owners += [(f"exclusion {e.section!r}", e.line, e.figures) for e in ledger.exclusions]
    there = numerals(text, where)
    keys = {(n.heading, n.text, n.nth) for n in there}
    gaps: list[Gap] = []
    lost: list[Gap] = []
    for owner, line, figures in owners:
        for group in figures:
            for numeral in group.text:
                key = (group.at, numeral, group.nth)
                owned.setdefault(key, []).append(owner)
                if key not in keys:
                    what = f"occurrence {group.nth} of {numeral} after heading {group.at} is not in the document"
                    lost.append(Gap(line, f"{ledger.path}:{line}: {owner}: {what}"))
    for n in there:
        if (n.heading, n.text, n.nth) not in owned:
            gaps.append(Gap(n.line, f"{n}: no claim and no exclusion accounts for it"))
    return gaps + lost


# -- spans ----------------------------------------------------------------------------------------------------------

_MARK = re.compile(r"<!--\s*(/?)\s*vbench\b(.*?)-->", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Span:
    """``text[start:end]`` lies between the marks; ``opened`` is where the first mark begins."""

    kind: str
    selector: str
    opened: int
    start: int
    end: int
    line: int


def _code_mask(text: str) -> list[tuple[int, int]]:
    """Half-open ranges of code: fenced lines and inline code, in order."""
    lines = text.split("\n")
    ranges: list[tuple[int, int]] = []
    at = 0
    for line, fenced in zip(lines, _fenced_lines(lines), strict=True):
        if fenced:
            ranges.append((at, at + len(line)))
        else:
            for match in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", line):
                ranges.append((at + match.start(), at + match.end()))
        at += len(line) + 1
    return ranges


def _spans(text: str, where: str) -> Iterator[_Span]:
    """The spans in order. Raises DataError for marks that make none."""
    masked = _code_mask(text)
    starts = [begin for begin, _ in masked]
    open_mark: tuple[str, str, re.Match[str], int] | None = None
    for mark in _MARK.finditer(text):
        slot = bisect.bisect_right(starts, mark.start()) - 1
        if slot >= 0 and mark.start() < masked[slot][1]:
            continue
        line = text.count("\n", 0, mark.start()) + 1
        here = f"{where}:{line}"
        if mark.group(1):
            if mark.group(2).strip():
                raise DataError(f"{here}: a span closes with <!-- /vbench -->")
            if open_mark is None:
                raise DataError(f"{here}: <!-- /vbench --> closes no span")
            kind, selector, opened, opened_line = open_mark
            yield _Span(kind, selector, opened.start(), opened.end(), mark.start(), opened_line)
            open_mark = None
            continue
        if open_mark is not None:
            raise DataError(f"{here}: a span inside the span opened at line {open_mark[3]}; spans do not nest")
        head = re.fullmatch(r":(claim|table|plot)\s+(\S.*?)\s*", mark.group(2), re.DOTALL)
        if head is None or "\n" in mark.group(2):
            raise DataError(f"{here}: expected <!-- vbench:claim ID -->, vbench:table SELECTOR or vbench:plot FILE ...")
        open_mark = (head.group(1), head.group(2), mark, line)
    if open_mark is not None:
        raise DataError(
            f"{where}:{open_mark[3]}: span vbench:{open_mark[0]} {open_mark[1]} is never closed; "
            "end what is generated with <!-- /vbench -->"
        )


def check(
    text: str,
    ledger: Ledger,
    records: Sequence[Record],
    *,
    current_sources: CurrentSources,
    where: str = "document",
    files: Callable[[str], str | None] | None = None,
) -> list[Drift]:
    """The spans whose content is not what ``update`` would write.

    Args:
        files: the text of a file by its path from the document's folder, ``None`` where there is none; without it, the
            files of plots are not looked at.

    Raises:
        DataError: a mark, claim id or selector that means nothing (file and line named).
    """
    verdicts = judge(ledger, records, current_sources=current_sources)
    drifts: list[Drift] = []
    for span in _spans(text, where):
        what = f"vbench:{span.kind} {span.selector}"
        expected = _render(span, text, ledger, verdicts, records, current_sources, where)
        found = text[span.start : span.end]
        if found != expected:
            drifts.append(Drift(where, span.line, what, found, expected))
        if span.kind == "plot" and files is not None:
            path, picture = _picture(span, records, current_sources, where)
            there = files(path)
            if there != picture:
                state = "no file" if there is None else "another picture"
                drifts.append(Drift(where, span.line, what, state, f"{path} as generated"))
    return drifts


def update(
    text: str,
    ledger: Ledger,
    records: Sequence[Record],
    *,
    current_sources: CurrentSources,
    where: str = "document",
) -> str:
    """The text with every span's content generated anew; nothing outside the spans changes.

    Raises:
        DataError: as ``check``.
    """
    verdicts = judge(ledger, records, current_sources=current_sources)
    out: list[str] = []
    at = 0
    for span in _spans(text, where):
        out += [text[at : span.start], _render(span, text, ledger, verdicts, records, current_sources, where)]
        at = span.end
    return "".join((*out, text[at:]))


def pictures(
    text: str, records: Sequence[Record], *, current_sources: CurrentSources, where: str = "document"
) -> dict[str, str]:
    """The SVG files of the document's plots: path from the document's folder -> text.

    Raises:
        DataError: as ``check``.
    """
    spans = [span for span in _spans(text, where) if span.kind == "plot"]
    return dict(_picture(span, records, current_sources, where) for span in spans)


def evidence(
    text: str, ledger: Ledger, records: Sequence[Record], *, current_sources: CurrentSources, where: str = "document"
) -> list[Record]:
    """The records that the document's generated spans rest on, in the order given.

    Raises:
        DataError: as ``check``.
    """
    verdicts = judge(ledger, records, current_sources=current_sources)
    ids: set[str] = set()
    for span in _spans(text, where):
        here = f"{where}:{span.line}"
        if span.kind == "plot":
            for part in _plot(span.selector, here).parts:
                ids |= _in_grid(_grid(_Selector(part.selector, here), records))
            continue
        selector = _Selector(span.selector, here) if span.kind == "table" else None
        if selector is not None and selector.kind == "rates":
            backend = selector.given.get("backend")
            ids |= {r.id for r in records if r.kind == "selftest" and r.backend == backend}
        if selector is not None and selector.kind == "search":
            ids |= {r.id for r in _rounds(selector, records)}
        if selector is not None and selector.kind in ("ratio", "value"):
            ids |= _in_grid(_grid(selector, records))
        elif selector is None or selector.kind == "claims":
            chosen = verdicts if selector is not None else [_verdict(span.selector, verdicts, ledger, here)]
            ids |= {i for v in chosen for f in v.findings for i in f.rests_on}
    return [r for r in records if r.id in ids]


def _verdict(claim: str, verdicts: Sequence[ClaimVerdict], ledger: Ledger, here: str) -> ClaimVerdict:
    """The verdict on a claim. Raises DataError for an id that the ledger has not, with the nearest one."""
    for verdict in verdicts:
        if verdict.claim == claim:
            return verdict
    near = difflib.get_close_matches(claim, [v.claim for v in verdicts], 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise DataError(f"{here}: no claim {claim!r} in {ledger.path}; {hint}vbench claims list names all of them")


def _render(
    span: _Span,
    text: str,
    ledger: Ledger,
    verdicts: Sequence[ClaimVerdict],
    records: Sequence[Record],
    current_sources: CurrentSources,
    where: str,
) -> str:
    here = f"{where}:{span.line}"
    if span.kind == "claim":
        return claim_line(_verdict(span.selector, verdicts, ledger, here))
    before = text[text.rfind("\n", 0, span.opened) + 1 : span.opened]
    closing = text.find("\n", text.index("-->", span.end))
    after = text[text.index("-->", span.end) + 3 : closing if closing >= 0 else len(text)]
    if before.strip() or after.strip():
        raise DataError(f"{here}: a {span.kind}'s marks stand on lines of their own")
    if span.kind == "plot":
        plot = _plot(span.selector, here)
        alt, _ = plot.draw(records, current_sources, here)
        return f"\n\n![{alt}]({plot.path})\n\n"
    rows = _table(_Selector(span.selector, here), verdicts, records, current_sources)
    # Blank lines: Markdown takes what follows an HTML comment without one for part of it.
    return "\n\n" + "\n".join(rows) + "\n\n"


def number(value: float) -> str:
    """``value`` to three significant digits, without an exponent from 0.0001 to a million: 2.90, 0.0123, 12300."""
    rounded = f"{value:.2e}"
    if value == 0 or not -1e308 < value < 1e308:
        return "0" if value == 0 else str(value)
    mantissa, _, exponent_text = rounded.partition("e")
    exponent = int(exponent_text)
    if not -5 < exponent < 6:
        return f"{mantissa}e{exponent}"
    return f"{float(rounded):.{max(2 - exponent, 0)}f}"


_SCALES = {"s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns")), "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))}


def quantity_text(value: float, unit: str) -> str:
    """``value`` in ``unit`` (``x``, ``s``, ``B`` or none) to three digits: ``2.90x``, ``31.4 us``, ``20.1 GB``."""
    for scale, name in _SCALES.get(unit, ()):
        if abs(value) >= scale:
            return f"{number(value / scale)} {name}"
    return f"{number(value)}{unit}" if unit == "x" else f"{number(value)} {unit}".rstrip()


def claim_line(verdict: ClaimVerdict) -> str:
    """One line without a vertical bar: restated verdict by hardware, then as stated.

    Example: ``**SUPPORTED** on sm_90: 2.90x (holds ">= 2.57"; 24 records, evidence 3f2a91); as stated **NOT_RUN**
    (needs_rtx3070)``
    """
    parts = [_finding_text(f) for f in verdict.findings[1:]]
    parts.append("as stated " + _finding_text(verdict.stated))
    return "; ".join(parts)


def _finding_text(found: Finding) -> str:
    text = f"**{found.word}**"
    if found.reason:
        text += f" ({found.reason})"
    if found.hardware:
        text += f" on {found.hardware}"
    if found.value is not None:
        text += f": {quantity_text(found.value, found.unit)}"
    inside = []
    if found.holds:
        inside.append(f'holds "{found.holds}"')
    if found.missing:
        inside.append(f"{len(found.missing)} cells missing")
    if found.rests_on:
        count = len(found.rests_on)
        inside.append(f"{count} record{'s' if count > 1 else ''}, evidence {found.digest[:6]}")
    return text + (f" ({'; '.join(inside)})" if inside else "")


class _Selector:
    """A table's selector, word by word."""

    def __init__(self, text: str, here: str) -> None:
        self.here = here
        self.kind, *words = text.split()
        self.given: dict[str, str] = {}
        for word in words:
            key, sep, value = word.partition("=")
            if not sep or not key or not value:
                raise DataError(f"{here}: {word!r} is not key=value")
            if key in self.given:
                raise DataError(f"{here}: {key} is given twice")
            self.given[key] = value

    def take(self, key: str, pattern: str, default: str | None = None) -> str:
        value = self.given.pop(key, default)
        if value is None:
            raise DataError(f"{self.here}: table {self.kind} needs {key}=")
        if value and not re.fullmatch(pattern, value):
            raise DataError(f"{self.here}: {key}={value} is not of the form {pattern}")
        return value

    def done(self) -> None:
        if self.given:
            raise DataError(f"{self.here}: table {self.kind} knows no {next(iter(self.given))}=")


def _table(
    selector: _Selector, verdicts: Sequence[ClaimVerdict], records: Sequence[Record], current_sources: CurrentSources
) -> list[str]:
    if selector.kind in ("ratio", "value"):
        return _cells_table(selector, records, current_sources)
    if selector.kind == "outcomes":
        return _outcomes_table(selector, records)
    if selector.kind == "claims":
        return _claims_table(selector, verdicts)
    if selector.kind == "rates":
        return _rates_table(selector, records, current_sources)
    if selector.kind == "search":
        return _search_table(selector, records, current_sources)
    raise DataError(
        f"{selector.here}: table kind {selector.kind!r} is not one of claims, outcomes, rates, ratio, search, value"
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]


def _order(value: str) -> tuple[int, int, str]:
    """Whole numbers by size, then texts."""
    return (0, int(value), "") if value.isdecimal() else (1, 0, value)


@dataclass(frozen=True, slots=True)
class _Grid:
    """What a table of kind ``ratio`` or ``value`` shows: (row, column) -> backend -> records."""

    quantity: str
    sides: tuple[str, ...]
    rows: str
    cols: str
    found: Mapping[tuple[str, str], Mapping[str, list[Record]]]


def _grid(selector: _Selector, records: Sequence[Record]) -> _Grid:
    """The records a selector names. Raises DataError for an unknown parameter or a cell with several cases."""
    here, who = selector.here, r"\w+(\[\w+\])?"
    quantity = selector.take(
        "quantity", r"time\.(graph|wall|cold)|peak_bytes|error\.(worst_over_budget|correctly_rounded)|metrics\.\w+"
    )
    sides = [selector.take("backend", who)]
    if selector.kind == "ratio":
        sides.append(selector.take("over", who))
    op, rows, cols = (selector.take(key, r"\w+") for key in ("op", "rows", "cols"))
    hardware = selector.take("hardware", CLASS_PATTERN.pattern, "any")
    kind = selector.take("kind", "check|time", "time" if quantity.startswith("time.") else "check")
    wanted = {"seed": ["0"], **{name: value.split(",") for name, value in selector.given.items()}}
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    cases: dict[tuple[str, str], set[str]] = {}
    for record in records:
        got_op, params = case_params(record.case)
        if record.kind != kind or record.who not in sides or got_op != op:
            continue
        shown = (rows, cols, *(name for name, values in wanted.items() if UNSAID not in values))
        unknown = [name for name in shown if name not in params]
        if unknown:
            raise DataError(f"{here}: {op} has no parameter {unknown[0]!r}; it has {', '.join(sorted(params))}")
        elsewhere = record.hardware not in (hardware, "") and hardware != "any"
        if elsewhere or any(params.get(name, UNSAID) not in v for name, v in wanted.items()):
            continue
        key = (params[rows], params[cols])
        cases.setdefault(key, set()).add(record.case)
        found.setdefault(key, {}).setdefault(record.who, []).append(record)
    for key, ids in cases.items():
        if len(ids) > 1:
            raise DataError(f"{here}: cell {rows}={key[0]}, {cols}={key[1]} has {len(ids)} cases; fix more parameters")
    return _Grid(quantity, tuple(sides), rows, cols, found)


def _cells_table(selector: _Selector, records: Sequence[Record], current_sources: CurrentSources) -> list[str]:
    grid = _grid(selector, records)
    if not grid.found:
        return ["NOT_RUN (no_records)"]
    seconds = grid.quantity.startswith("time.")
    unit = "x" if len(grid.sides) == 2 else "s" if seconds else "B" if grid.quantity == "peak_bytes" else ""
    columns = sorted({c for _, c in grid.found}, key=_order)
    body = []
    for row in sorted({r for r, _ in grid.found}, key=_order):
        here = [grid.found.get((row, c), {}) for c in columns]
        body.append([row, *(_cell(cell, grid.sides, grid.quantity, unit, current_sources) for cell in here)])
    return _markdown([grid.rows, *(f"{grid.cols}={c}" for c in columns)], body)


def _in_grid(grid: _Grid) -> set[str]:
    """Ids of the records behind a grid's cells: those of runs that have every side."""
    ids: set[str] = set()
    for cell in grid.found.values():
        together = set.intersection(*({r.run for r in cell.get(who, ())} for who in grid.sides))
        ids |= {r.id for side in cell.values() for r in side if r.run in together}
    return ids


@dataclass(frozen=True, slots=True)
class _Figures:
    """A cell's values, one a process run; or ``gap``, why there is none. ``wrong``: the outcome of a wrong peer."""

    values: tuple[float, ...] = ()
    gap: str = ""
    wrong: str = ""


def _cell(
    found: Mapping[str, list[Record]], sides: Sequence[str], quantity: str, unit: str, current_sources: CurrentSources
) -> str:
    """One cell: the median over process runs; or why there is none. A wrong peer's figure is marked as wrong."""
    got = _figures(found, sides, quantity, current_sources)
    if got.gap:
        return got.gap
    return quantity_text(statistics.median(got.values), unit) + (f" ({got.wrong})" if got.wrong else "")


def _figures(
    found: Mapping[str, list[Record]], sides: Sequence[str], quantity: str, current_sources: CurrentSources
) -> _Figures:
    by_run: list[dict[str, float]] = []
    wrong = ""
    for who in sides:
        side = found.get(who, [])
        if not side:
            return _Figures(gap="no record")
        if any(is_stale(r, current_sources) for r in side):
            return _Figures(gap="STALE")
        values = {r.run: v for r in side if (v := quantity_of(r, quantity)) is not None}
        if not values:
            return _Figures(gap=side[0].label)
        wrong = wrong or next((r.outcome.value for r in side if r.outcome is not Outcome.PASSED), "")
        by_run.append(values)
    runs = sorted(set.intersection(*(set(values) for values in by_run)))
    if not runs:
        return _Figures(gap="no common run")
    if len(by_run) == 1:
        figures = [by_run[0][run] for run in runs]
    else:
        first, second = (by_run[1], by_run[0]) if quantity.startswith("time.") else (by_run[0], by_run[1])
        if any(second[run] == 0 for run in runs):
            return _Figures(gap="over zero")
        figures = [first[run] / second[run] for run in runs]
    return _Figures(tuple(figures), wrong=wrong)


@dataclass(frozen=True, slots=True)
class _Part:
    """A table of a plot, with the name that the picture gives it (may be empty)."""

    name: str
    selector: str


@dataclass(frozen=True, slots=True)
class _Plot:
    """What a plot's mark asks for."""

    path: str
    style: str
    parts: tuple[_Part, ...]

    def draw(self, records: Sequence[Record], current_sources: CurrentSources, here: str) -> tuple[str, str]:
        """(words for who does not see it, SVG)."""
        groups: list[Group] = []
        heads: dict[str, None] = {}
        overs: dict[str, None] = {}
        columns: dict[str, None] = {}
        for part in self.parts:
            selector = _Selector(part.selector, here)
            if selector.kind != "ratio":
                raise DataError(f"{here}: a plot shows tables of kind ratio, not {selector.kind!r}")
            op = selector.given.get("op", "")
            grid = _grid(selector, records)
            heads[f"{op} by {grid.sides[0]}"] = None
            overs[f"{grid.quantity}: times as fast as {grid.sides[1]}"] = None
            columns[grid.cols] = None
            groups += self._groups(grid, part.name, current_sources, here)
        label = ", ".join(overs)
        alt = alternative(groups, f"{', '.join(heads)}, {label}")
        if self.style == "rows":
            return alt, draw_rows(groups, label, alt)
        return alt, draw_lines(groups, ", ".join(columns), label, alt)

    def _groups(self, grid: _Grid, name: str, current_sources: CurrentSources, here: str) -> list[Group]:
        names = sorted({r for r, _ in grid.found}, key=_order)
        columns = sorted({c for _, c in grid.found}, key=_order)
        if not names:
            return [Group(name, [Mark("", 1.0, word="NOT_RUN")])]
        by_row: dict[str, list[Mark]] = {}
        for row in names:
            for column in columns:
                if self.style == "lines" and not (column.isdecimal() and int(column) > 0):
                    raise DataError(f"{here}: lines need numbers above zero in {grid.cols}=, not {column!r}; use rows")
                label = f"{grid.cols}={column}" if self.style == "lines" else _both(grid, row, column)
                x = float(column) if self.style == "lines" else 0.0
                got = _figures(grid.found.get((row, column), {}), grid.sides, grid.quantity, current_sources)
                by_row.setdefault(row, []).append(_mark(label, x, got))
        if self.style == "rows":
            return [Group(name, [mark for marks in by_row.values() for mark in marks])]
        first = f"{name}, " if name else ""
        return [Group(f"{first}{_named(grid.rows, row)}", marks) for row, marks in by_row.items()]


def _named(key: str, value: str) -> str:
    """``d=64``, but ``nvfp4`` alone: a word says what it is."""
    return f"{key}={value}" if value.isdecimal() else value


def _both(grid: _Grid, row: str, column: str) -> str:
    return f"{_named(grid.rows, row)}, {_named(grid.cols, column)}"


def _mark(label: str, x: float, got: _Figures) -> Mark:
    """A value with 95 % over process runs, or the judge's margin of one; a wrong peer's is none."""
    if got.gap or got.wrong:
        return Mark(label, x, word=got.gap or got.wrong)
    value = statistics.median(got.values)
    if len(got.values) > 1:
        _, low, high = log_interval(got.values, 0.95)
    else:
        low, high = value * (1 - SINGLE_PROCESS_MARGIN), value * (1 + SINGLE_PROCESS_MARGIN)
    return Mark(label, x, value, low, high, text=quantity_text(value, "x"))


_FILE = re.compile(r"(?!.*\.\.)\w[\w./-]*\.svg")


def _plot(text: str, here: str) -> _Plot:
    """Read ``FILE STYLE SELECTOR [| NAME: WORDS ...]``. Raises DataError where it is none."""
    head, *parts = (part.strip() for part in text.split("|"))
    path, style, common = (*head.split(maxsplit=2), "", "", "")[:3]
    if not _FILE.fullmatch(path):
        raise DataError(f"{here}: {path!r} is no path of an .svg file below the document's folder")
    if style not in ("lines", "rows"):
        raise DataError(f"{here}: a plot is of style lines or rows, not {style!r}")
    if not common:
        raise DataError(f"{here}: a plot needs what it shows after its style: ratio quantity=...")
    found = []
    for part in parts:
        name, sep, words = part.partition(": ")
        if not sep:
            raise DataError(f"{here}: a part of a plot is NAME: key=value ..., not {part!r}")
        found.append(_Part(name, f"{common} {words.strip()}"))
    return _Plot(path, style, tuple(found) or (_Part("", common),))


def _picture(span: _Span, records: Sequence[Record], current_sources: CurrentSources, where: str) -> tuple[str, str]:
    here = f"{where}:{span.line}"
    plot = _plot(span.selector, here)
    return plot.path, plot.draw(records, current_sources, here)[1]


def _outcomes_table(selector: _Selector, records: Sequence[Record]) -> list[str]:
    hardware = selector.take("hardware", CLASS_PATTERN.pattern, "any")
    kinds = selector.take("kind", "check|time", "")
    suite = selector.take("suite", r"\w+", "")
    selector.done()
    counts: dict[tuple[str, str], Counter[str]] = {}
    for r in records:
        if r.kind not in ("check", "time") or (kinds and r.kind != kinds) or (suite and r.suite != suite):
            continue
        if hardware not in ("any", r.hardware) and r.outcome is not Outcome.UNAVAILABLE:
            continue
        counts.setdefault((r.who, case_params(r.case)[0]), Counter())[r.outcome.value] += 1
    if not counts:
        return ["NOT_RUN (no_records)"]
    ops = sorted({op for _, op in counts})
    order = {outcome.value: i for i, outcome in enumerate(Outcome)}

    def cell(who: str, op: str) -> str:
        inside = counts.get((who, op), Counter())
        return ", ".join(f"{inside[o]} {o}" for o in sorted(inside, key=order.__getitem__)) or "-"

    return _markdown(
        ["backend", *ops], ([who, *(cell(who, op) for op in ops)] for who in sorted({w for w, _ in counts}))
    )


def _claims_table(selector: _Selector, verdicts: Sequence[ClaimVerdict]) -> list[str]:
    words = (*VERDICT_WORDS, "STALE")
    only = selector.take("only", rf"({'|'.join(words)})(,({'|'.join(words)}))*", "").split(",")
    prefix = selector.take("prefix", r"[\w.]+", "")
    selector.done()
    rows = []
    for v in verdicts:
        if not v.claim.startswith(prefix) or (only != [""] and not any(f.word in only for f in v.findings)):
            continue
        restated = "; ".join(_short(f) for f in v.findings[1:]) or "-"
        rows.append([v.claim, _short(v.stated), restated])
    return _markdown(["claim", "as stated", "restated"], rows) if rows else ["no claim"]


def _rates_table(selector: _Selector, records: Sequence[Record], current_sources: CurrentSources) -> list[str]:
    backend = selector.take("backend", r"\w+")
    stage = selector.take("stage", "cell|bh|suite", "")
    selector.done()
    return rates_table(records, backend, stage, current_sources)


def rates_table(
    records: Iterable[Record], backend: str, stage: str = "", current_sources: CurrentSources = lambda record: None
) -> list[str]:
    """Lines of a Markdown table from records of kind ``selftest``: machine by injected slowdown.

    A cell shows the share of compared cells called SLOWER (either way where nothing was injected), its 95 % interval
    and their number; or STALE.
    """
    rows: dict[tuple[str, str, str], dict[float, str]] = {}
    for r in records:
        params = case_params(r.case)[1]
        if r.kind != "selftest" or r.backend != backend or stage not in ("", params["stage"]):
            continue
        m = r.metrics
        text = f"{100 * m['rate']:.1f} % [{100 * m['low']:.1f}, {100 * m['high']:.1f}] of {m['cells']:.0f}"
        key = params["machine"], params["stage"], params["pairs"]
        rows.setdefault(key, {})[m["injected"]] = "STALE" if is_stale(r, current_sources) else text
    if not rows:
        return ["NOT_RUN (no_records)"]
    injected = sorted({i for cells in rows.values() for i in cells})
    head = ["machine", "stage", "pairs", *(f"+{100 * i:g} %" if i else "identical code" for i in injected)]
    return _markdown(head, ([*key, *(cells.get(i, "no record") for i in injected)] for key, cells in rows.items()))


def _rounds(selector: _Selector, records: Sequence[Record]) -> list[Record]:
    backend = selector.take("backend", r"\w+")
    hardware = selector.take("hardware", CLASS_PATTERN.pattern)
    selector.done()
    return [r for r in records if r.kind == "fuzz" and r.backend == backend and r.hardware == hardware]


def _search_table(selector: _Selector, records: Sequence[Record], current_sources: CurrentSources) -> list[str]:
    """A row a kernel: cases, how they ended, error over budget. Rounds of other sources are left out and counted.

    A round that was refused as a whole rests on no sources.
    """
    rounds = _rounds(selector, records)
    if not rounds:
        return ["NOT_RUN (no_records)"]
    judged = (r for r in rounds if r.metrics.get("passed", 0) + r.metrics.get("failed", 0))
    stale = [r for r in judged if is_stale(r, current_sources)]
    head, rows = tallies.rows(r for r in rounds if r not in stale)
    lines = _markdown(head, rows) if rows else []
    return [*lines, *([f"STALE: {len(stale)} rounds are of other sources"] if stale else [])]


def _short(found: Finding) -> str:
    text = found.label + (f" on {found.hardware}" if found.hardware and found.word != "NOT_RUN" else "")
    if found.value is None:
        return text
    held = f" (holds {found.holds})" if found.holds else ""
    return f"{text}: {quantity_text(found.value, found.unit)}{held}"
