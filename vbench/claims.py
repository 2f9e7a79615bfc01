"""A document's claims, read from a TOML ledger. Standard library only.

Every claim is told in our own words. It may carry ``stated`` (what arithmetic on the document's own figures, or a cited
source fact, decides) and ``restated`` (a sentence we can measure). ``[[exclusion]]`` names figures that are not judged,
with the reason. Anything malformed is a DataError that names file, line, claim, key and rule.

The schema is described where the ledger of this repository starts (``suites/virtual_blackwell/claims.toml``).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vbench import arithmetic
from vbench.errors import DataError

VERDICT_WORDS = ("SUPPORTED", "REFUTED", "INCONCLUSIVE", "NOT_RUN")
METRICS = ("ratio", "value", "fraction_passed")
KINDS = ("check", "time")
PLAIN_QUANTITIES = (
    "time.graph",
    "time.wall",
    "time.cold",
    "peak_bytes",
    "error.worst_over_budget",
    "error.correctly_rounded",
)
#: Hardware classes of records (``Record.hardware``) a restated sentence may name; ``any``: each class by itself.
CLASS_PATTERN = re.compile(r"cpu|any|sm_[0-9]+[a-z]?")
#: Cards a document may have measured on -> text that stands in the environment's ``gpu`` of records made there.
NAMED_HARDWARE: Mapping[str, str] = {"none": "", "rtx3070": "RTX 3070", "rtx3090": "RTX 3090"}

#: What ``select`` says of a quiet parameter at its default, which the ids of cases leave out (``vbench.spec.Param``).
UNSAID = "unsaid"

REDUCERS = ("min", "max", "median", "mean")
Reducer = Literal["min", "max", "median", "mean"]


@dataclass(frozen=True, slots=True)
class Figures:
    """Numerals of the document: those after heading number ``at`` (0: before the first), occurrence ``nth`` of each."""

    at: int
    text: tuple[str, ...]
    nth: int = 1


@dataclass(frozen=True, slots=True)
class Fact:
    """A number that is not the document's, with where it comes from."""

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Stated:
    """What arithmetic decides of a claim.

    Args:
        check: expression of ``vbench.arithmetic`` that is true if the claim holds.
        reviewed: ``SUPPORTED`` or ``REFUTED``; ``NOT_RUN`` where the check can only refute and does not.
        value: expression whose value is shown, ``""`` for none.
        note: one sentence on what follows.
        facts: names bound in ``check`` and ``value``.
    """

    check: str
    reviewed: str
    value: str = ""
    note: str = ""
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reduction:
    """One step of ``reduce``: ``over`` names the parameter that goes, ``None`` all that are left."""

    how: Reducer
    over: str | None


@dataclass(frozen=True, slots=True)
class Holds:
    """``>= 2.57`` and the like, or ``within 2% of 2.57`` (``comparator`` "within", ``tolerance`` 0.02)."""

    comparator: Literal[">=", "<=", ">", "<", "==", "within"]
    threshold: float
    tolerance: float = 0.0

    def __str__(self) -> str:
        if self.comparator == "within":
            return f"within {self.tolerance * 100:g}% of {self.threshold:g}"
        return f"{self.comparator} {self.threshold:g}"


@dataclass(frozen=True, slots=True)
class Restated:
    """A sentence records can decide.

    Args:
        sentence: names the baseline with dtype, shapes and L2 state.
        metric: ``ratio`` (for times over/backend, "how many times faster"; else backend/over), ``value`` or
            ``fraction_passed`` (share of selected jobs that PASSED).
        quantity: ``time.graph``, ``time.wall``, ``time.cold`` (seconds), ``peak_bytes``, ``error.worst_over_budget``
            or ``metrics.NAME``; ``""`` for ``fraction_passed``.
        kind: kind of record to read, ``check`` or ``time``.
        backend, over: ``name`` or ``name[variant]``; ``over`` only with ``ratio``.
        select: ``op`` and parameter -> admitted values, as text (``UNSAID``: a quiet one left out). All must be met.
        over_select: parameters in which ``over`` runs another case than ``backend``, with the value it runs (a float32
            baseline against a bfloat16 kernel: ``{x = "fp32"}``); ``select`` gives the same parameter one value. With
            ``over_op`` also parameters that only that operation has.
        over_op: the operation ``over`` runs (``op`` in ``over_select``), the same as ``op`` unless given. Its cases are
            set against those of ``backend`` that agree in every parameter both operations have.
        reduce: steps in the order they are applied.
        holds: the threshold.
        hardware: class of the records (``cpu``, ``sm_90``, ...) or ``any``.
        reviewed: hardware class -> verdict word.
    """

    sentence: str
    metric: Literal["ratio", "value", "fraction_passed"]
    quantity: str
    kind: Literal["check", "time"]
    backend: str
    over: str
    op: str
    select: Mapping[str, tuple[str, ...]]
    over_select: Mapping[str, str]
    over_op: str
    reduce: tuple[Reduction, ...]
    holds: Holds
    hardware: str
    reviewed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Claim:
    """What a document says, where, on which hardware, and what decides it.

    ``open`` is a short code for why nothing decides it as stated (``forecast``, ``no_workload_named``).
    """

    id: str
    section: str
    says: str
    hardware: str
    figures: tuple[Figures, ...]
    stated: Stated | None = None
    restated: Restated | None = None
    open: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Figures that are not judged, and why."""

    section: str
    reason: str
    figures: tuple[Figures, ...]
    line: int = 0


@dataclass(frozen=True, slots=True)
class Ledger:
    """All claims and exclusions of one document."""

    path: str
    document: str
    document_sha256: str
    claims: tuple[Claim, ...]
    exclusions: tuple[Exclusion, ...]

    def claim(self, claim_id: str) -> Claim | None:
        return next((c for c in self.claims if c.id == claim_id), None)

    @property
    def arithmetic_ids(self) -> tuple[str, ...]:
        """Ids of the claims with a ``stated`` part: each is one job of kind ``arithmetic``."""
        return tuple(c.id for c in self.claims if c.stated is not None)


def arithmetic_metrics(claim: Claim) -> dict[str, float]:
    """Metrics of the record of kind ``arithmetic`` for this claim.

    ``holds`` is 1.0 or 0.0; ``value`` is the shown figure where the claim names one.

    Raises:
        DataError: the claim has no ``stated`` part, or its expression has no truth value.
    """
    if claim.stated is None:
        raise DataError(f"claim {claim.id} has no stated part to compute")
    bindings = {name: fact.value for name, fact in claim.stated.facts.items()}
    holds = arithmetic.evaluate(claim.stated.check, bindings)
    if not isinstance(holds, bool):
        raise DataError(f"claim {claim.id}: check {claim.stated.check!r} is a number, not a comparison")
    metrics = {"holds": float(holds)}
    if claim.stated.value:
        metrics["value"] = float(arithmetic.evaluate(claim.stated.value, bindings))
    return metrics


def stated_digest(claim: Claim) -> str:
    """``sha256:`` and 16 hex digits over check, value and facts: what an arithmetic record's ``sources`` may hold."""
    if claim.stated is None:
        raise DataError(f"claim {claim.id} has no stated part")
    facts = {name: [fact.value, fact.source] for name, fact in sorted(claim.stated.facts.items())}
    text = json.dumps([claim.stated.check, claim.stated.value, facts])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_reduce(text: str) -> tuple[Reduction, ...]:
    """``min over m of max over fmt`` -> steps in the order applied (fmt first). Raises DataError."""
    if not text.strip():
        return ()
    steps: list[Reduction] = []
    for part in re.split(r"\s+of\s+", text.strip()):
        match = re.fullmatch(r"(\w+)(?:\s+over\s+(\w+))?", part)
        if match is None or match.group(1) not in REDUCERS:
            raise DataError(f"{part!r} is not '{'|'.join(REDUCERS)} [over PARAMETER]'")
        steps.append(Reduction(match.group(1), match.group(2)))  # type: ignore[arg-type]  # one of REDUCERS
    if any(step.over is None for step in steps[1:]):
        raise DataError("only the leftmost step may leave out 'over PARAMETER'")
    named = [step.over for step in steps if step.over]
    if len(set(named)) != len(named):
        raise DataError("a parameter is reduced twice")
    return tuple(reversed(steps))


_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"


def parse_holds(text: str) -> Holds:
    """``>= 2.57`` or ``within 2% of 2.57``. Raises DataError."""
    match = re.fullmatch(rf"(>=|<=|==|>|<)\s*({_NUMBER})", text.strip())
    if match:
        return Holds(match.group(1), float(match.group(2)))  # type: ignore[arg-type]  # one of the comparators
    match = re.fullmatch(rf"within\s+({_NUMBER})\s*%\s+of\s+({_NUMBER})", text.strip())
    if match is None or float(match.group(1)) <= 0:
        raise DataError(f"{text!r} is neither '>=|<=|>|<|== NUMBER' nor 'within PERCENT% of NUMBER'")
    return Holds("within", float(match.group(2)), float(match.group(1)) / 100)


class _Table:
    """One TOML table being read: hands out checked values and refuses what is left over."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise DataError(f"{where}: must be a table")
        self._left = dict(data)
        self.where = where

    def fail(self, key: str, rule: str) -> DataError:
        return DataError(f"{self.where}: key {key!r}: {rule}")

    def raw(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def text(self, key: str, *, default: str | None = None) -> str:
        value = self._left.pop(key, default)
        if value is None:
            raise self.fail(key, "is missing")
        if not isinstance(value, str) or (not value.strip() and default is None):
            raise self.fail(key, "must be a text that is not empty")
        return value.strip()

    def word(self, key: str, admitted: Collection[str], *, default: str | None = None) -> str:
        value = self.text(key, default=default)
        if value not in admitted:
            raise self.fail(key, f"{value!r} is not one of {', '.join(admitted)}")
        return value

    def parsed(self, key: str, parser: Callable[[str], Any], *, default: str | None = None) -> Any:
        value = self.text(key, default=default)
        try:
            return parser(value)
        except DataError as error:
            raise self.fail(key, str(error)) from None

    def rest(self) -> dict[str, Any]:
        """All that has not been taken yet."""
        left, self._left = self._left, {}
        return left

    def done(self, known: str) -> None:
        if self._left:
            key = next(iter(self._left))
            raise self.fail(key, f"is unknown here; known: {known}")


def _figures(table: _Table) -> tuple[Figures, ...]:
    given = table.raw("figures", [])
    if not isinstance(given, list):
        raise table.fail("figures", "must be a list of {at, text}")
    found: list[Figures] = []
    for entry in given:
        part = _Table(entry, f"{table.where}: figures")
        at, text, nth = part.raw("at"), part.raw("text"), part.raw("nth", 1)
        for key, value, least in (("at", at, 0), ("nth", nth, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise part.fail(key, f"must be a whole number from {least}")
        if not isinstance(text, list) or not text or not all(isinstance(t, str) and t for t in text):
            raise part.fail("text", "must be a list of numerals as texts")
        if len(set(text)) != len(text):
            raise part.fail("text", "names a numeral twice; use a further entry with nth")
        part.done("at, text, nth")
        found.append(Figures(at, tuple(text), nth))
    return tuple(found)


def _stated(data: Any, hardware: str, where: str) -> Stated:
    table = _Table(data, f"{where}: stated")
    facts: dict[str, Fact] = {}
    given = table.raw("facts", {})
    if not isinstance(given, dict):
        raise table.fail("facts", "must be a table of {value, source}")
    for name, body in given.items():
        part = _Table(body, f"{table.where}: facts.{name}")
        value = part.raw("value")
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise part.fail("value", "must be a finite number")
        facts[name] = Fact(value, part.text("source"))
        part.done("value, source")
    stated = Stated(
        check=table.text("check"),
        reviewed=table.word("reviewed", ("SUPPORTED", "REFUTED", "NOT_RUN")),
        value=table.text("value", default=""),
        note=table.text("note", default=""),
        facts=facts,
    )
    table.done("check, value, note, facts, reviewed")
    bindings = {name: fact.value for name, fact in facts.items()}
    used: set[str] = set()
    for key, expression in (("check", stated.check), ("value", stated.value)):
        if not expression:
            continue
        try:
            used |= arithmetic.names(expression)
            result = arithmetic.evaluate(expression, bindings)
        except DataError as error:
            raise table.fail(key, str(error)) from None
        if isinstance(result, bool) is not (key == "check"):
            raise table.fail(key, "must be a comparison" if key == "check" else "must be a number")
    if set(facts) - used:
        raise table.fail("facts", f"{', '.join(sorted(set(facts) - used))} is used in no expression")
    if stated.reviewed == "SUPPORTED" and hardware != "none":
        raise table.fail("reviewed", f"arithmetic cannot support a measurement on {hardware}, only refute it")
    if stated.reviewed == "NOT_RUN" and hardware == "none":
        raise table.fail("reviewed", "arithmetic decides a claim that names no hardware")
    return stated


def _quantity(text: str) -> str:
    if text in PLAIN_QUANTITIES or re.fullmatch(r"metrics\.\w+", text):
        return text
    raise DataError(f"{text!r} is not one of {', '.join(PLAIN_QUANTITIES)} or metrics.NAME")


def _who(text: str) -> str:
    if re.fullmatch(r"\w+(\[\w+\])?", text):
        return text
    raise DataError(f"{text!r} is not 'backend' or 'backend[variant]'")


def _hardware_class(text: str) -> str:
    if CLASS_PATTERN.fullmatch(text):
        return text
    raise DataError(f"{text!r} is not cpu, sm_NUMBER or any")


def _select(table: _Table, ops: Mapping[str, Collection[str]] | None) -> tuple[str, dict[str, tuple[str, ...]]]:
    part = _Table(table.raw("select"), f"{table.where}: select")
    op = part.text("op")
    if ops is not None and op not in ops:
        raise part.fail("op", f"{op!r} is no known operation; known: {', '.join(sorted(ops))}")
    select: dict[str, tuple[str, ...]] = {}
    for name, value in part.rest().items():
        if ops is not None and name not in (*ops[op], "seed"):
            raise part.fail(name, f"{op} has no such parameter; it has {', '.join(sorted(ops[op]))}")
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, str | int) and not isinstance(v, bool) for v in values):
            raise part.fail(name, "must be a text, a whole number, or a list of them that is not empty")
        if len({str(v) for v in values}) != len(values):
            raise part.fail(name, "names a value twice")
        select[name] = tuple(str(v) for v in values)
    return op, select


def _over_select(
    table: _Table, op: str, select: Mapping[str, tuple[str, ...]], ops: Mapping[str, Collection[str]] | None
) -> tuple[str, dict[str, str]]:
    """The operation ``over`` runs, and the parameters in which its cases differ."""
    given = table.raw("over_select", default={})
    if not isinstance(given, dict):
        raise table.fail("over_select", "must be a table of parameters")
    for name, value in given.items():
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise table.fail("over_select", f"{name!r} must be one text or whole number")
    over_select = {name: str(value) for name, value in given.items()}
    over_op = over_select.pop("op", op)
    if ops is not None and over_op not in ops:
        raise table.fail("over_select", f"{over_op!r} is no known operation; known: {', '.join(sorted(ops))}")
    for name in over_select:
        if over_op == op or name in select:
            if len(select.get(name, ())) != 1:
                raise table.fail("over_select", f"{name!r} must have exactly one value in select")
        elif ops is not None and name not in ops[over_op]:
            known = ", ".join(sorted(ops[over_op]))
            raise table.fail("over_select", f"{over_op} has no parameter {name!r}; it has {known}")
    if ops is not None and over_op != op:
        for name, values in select.items():
            if name not in (*ops[over_op], "seed") and len(values) != 1:
                rule = f"{over_op} has no parameter {name!r}, so that select must give it exactly one value"
                raise table.fail("over_select", rule)
    return over_op, over_select


def _restated(data: Any, where: str, ops: Mapping[str, Collection[str]] | None) -> Restated:
    table = _Table(data, f"{where}: restated")
    metric = table.word("metric", METRICS)
    plain = metric == "fraction_passed"
    op, select = _select(table, ops)
    reviewed_given = table.raw("reviewed")
    hardware = table.parsed("hardware", _hardware_class)
    if not isinstance(reviewed_given, dict) or not reviewed_given:
        raise table.fail("reviewed", 'is missing: give {hardware_class = "VERDICT"}')
    reviewed: dict[str, str] = {}
    for name, word in reviewed_given.items():
        if word not in VERDICT_WORDS:
            raise table.fail("reviewed", f"{word!r} is not one of {', '.join(VERDICT_WORDS)}")
        if not CLASS_PATTERN.fullmatch(name) or name == "any":
            raise table.fail("reviewed", f"{name!r} is no hardware class")
        if hardware not in ("any", name) and word != "NOT_RUN":
            raise table.fail("reviewed", f"{name} cannot be {word}: only records of {hardware} count")
        reviewed[name] = word
    if hardware != "any" and hardware not in reviewed:
        raise table.fail("reviewed", f"has no verdict for {hardware}")
    over_op, over_select = _over_select(table, op, select, ops) if metric == "ratio" else (op, {})
    restated = Restated(
        sentence=table.text("sentence"),
        metric=metric,  # type: ignore[arg-type]  # one of METRICS
        quantity="" if plain else table.parsed("quantity", _quantity),
        kind=table.word("kind", KINDS),  # type: ignore[arg-type]  # one of KINDS
        backend=table.parsed("backend", _who),
        over=table.parsed("over", _who) if metric == "ratio" else "",
        op=op,
        select=select,
        over_select=over_select,
        over_op=over_op,
        reduce=table.parsed("reduce", parse_reduce, default=""),
        holds=table.parsed("holds", parse_holds),
        hardware=hardware,
        reviewed=reviewed,
    )
    for step in restated.reduce:
        if ops is not None and step.over is not None and step.over not in ops[op]:
            raise table.fail("reduce", f"{op} has no parameter {step.over!r}")
    if restated.over == restated.backend:
        raise table.fail("over", "is the backend itself; name another to compare with")
    if plain and restated.reduce:
        raise table.fail("reduce", "a fraction is taken over everything selected")
    if restated.quantity.startswith("time.") and restated.kind != "time":
        raise table.fail("kind", f"{restated.quantity} stands in records of kind time only")
    table.done(
        "sentence, metric, quantity, kind, backend, over, select, over_select, reduce, holds, hardware, reviewed"
    )
    return restated


def _header_lines(text: str, name: str) -> list[int]:
    """Lines (from 1) of the ``[[name]]`` headers, in order."""
    pattern = re.compile(rf"\s*\[\[\s*{name}\s*\]\]\s*(#.*)?")
    return [number for number, line in enumerate(text.splitlines(), start=1) if pattern.fullmatch(line)]


def parse_ledger(text: str, path: str, *, ops: Mapping[str, Collection[str]] | None = None) -> Ledger:
    """Read a ledger's text.

    Args:
        path: stands in messages.
        ops: operation -> its parameters; where given, ``select`` is held against it.

    Raises:
        DataError: not TOML, an unknown or missing key, a value that breaks its rule, or an id used twice.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"at line (\d+)", str(error))
        line = at.group(1) if at else str(text.count("\n") + 1)
        raise DataError(f"{path}:{line}: not TOML ({error})") from None
    top = _Table(data, path)
    document, sha256 = top.text("document"), top.text("document_sha256")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise top.fail("document_sha256", "must be 64 hex digits, lower case")
    bodies: dict[str, list[tuple[int, Any]]] = {}
    for name in ("claim", "exclusion"):
        given = top.raw(name, [])
        if not isinstance(given, list):
            raise top.fail(name, f"must be an array of tables: [[{name}]]")
        lines = _header_lines(text, name)
        numbered = lines if len(lines) == len(given) else [0] * len(given)
        bodies[name] = list(zip(numbered, given, strict=True))
    top.done("document, document_sha256, claim, exclusion")

    claims: dict[str, Claim] = {}
    for line, body in bodies["claim"]:
        table = _Table(body, f"{path}:{line}: claim")
        claim_id = table.text("id")
        if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)+", claim_id):
            raise table.fail("id", f"{claim_id!r} must be dotted lower-case words, such as fp4.speedup")
        table.where = f"{path}:{line}: claim {claim_id}"
        if claim_id in claims:
            raise table.fail("id", f"is used twice, first at line {claims[claim_id].line}")
        hardware = table.word("hardware", NAMED_HARDWARE)
        stated, restated = table.raw("stated"), table.raw("restated")
        claims[claim_id] = Claim(
            id=claim_id,
            section=table.text("section"),
            says=table.text("says"),
            hardware=hardware,
            figures=_figures(table),
            stated=None if stated is None else _stated(stated, hardware, table.where),
            restated=None if restated is None else _restated(restated, table.where, ops),
            open=table.text("open", default=""),
            line=line,
        )
        table.done("id, section, says, hardware, figures, stated, restated, open")
        claim = claims[claim_id]
        if not re.fullmatch(r"[a-z0-9_]*", claim.open) or (claim.open and stated is not None):
            raise table.fail("open", "is a short lower-case code, for a claim without a stated part")
        if hardware == "none" and stated is None and restated is None and not claim.open:
            raise table.fail("open", "is missing: nothing decides this claim, so say why in a short code")
    exclusions: list[Exclusion] = []
    for line, body in bodies["exclusion"]:
        table = _Table(body, f"{path}:{line}: exclusion")
        exclusion = Exclusion(table.text("section"), table.text("reason"), _figures(table), line)
        if not exclusion.figures:
            raise table.fail("figures", "is missing")
        table.done("section, reason, figures")
        exclusions.append(exclusion)
    return Ledger(path, document, sha256, tuple(claims.values()), tuple(exclusions))


def load_ledger(path: Path, *, ops: Mapping[str, Collection[str]] | None = None) -> Ledger:
    """Read a ledger file; see ``parse_ledger``.

    Raises:
        DataError: also where the file cannot be read as UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    return parse_ledger(text, str(path), ops=ops)
