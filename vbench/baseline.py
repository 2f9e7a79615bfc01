"""The records a baseline keeps, and what changes when it is taken anew. Writes only when told to.

Kept is what the documents' generated numbers rest on, with further processes of those cells, or, where no document is
given, the times of a few processes of every cell; so that what is committed stays small enough to be reviewed. Suites
that the runs did not have are left as they are; one folder a machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vbench import documents, regression
from vbench.claims import Ledger
from vbench.errors import DataError
from vbench.judge import SINGLE_PROCESS_MARGIN, CurrentSources
from vbench.record import Record
from vbench.store import read_records, write_records

#: More cells than a person reviews.
LIMIT = 300
#: More processes of a cell say little more of their spread, and are many bytes.
KEPT_PROCESSES = 6


@dataclass(frozen=True, slots=True)
class Reading:
    """A cell's median over processes with its 95 % interval, seconds a launch; one process has the judge's margin."""

    median_s: float
    low_s: float
    high_s: float
    processes: int


@dataclass(frozen=True, slots=True)
class Change:
    """A timed cell of any backend before and after; ``None`` where it is not there."""

    case: str
    who: str
    quantity: str
    old: Reading | None
    new: Reading | None

    @property
    def disjoint(self) -> bool:
        """Whether the two intervals do not meet: the cell moved by more than its noise."""
        if self.old is None or self.new is None:
            return False
        return self.new.low_s > self.old.high_s or self.new.high_s < self.old.low_s


def select(
    records: Sequence[Record],
    texts: Mapping[Path, str],
    ledger: Ledger,
    current_sources: CurrentSources,
    beside: Sequence[Record] = (),
) -> list[Record]:
    """The records to keep.

    Args:
        texts: documents by path; none: every timed cell is kept.
        beside: records that stay in the baseline: further processes of their cells are kept too.

    Arithmetic needs no machine: its records are kept where the run was on a CPU, and left out elsewhere.

    Raises:
        DataError: a span of a document that means nothing, or more than LIMIT cells.
    """
    every = [*records, *beside]
    on_gpu = any(r.hardware.startswith("sm_") for r in records)
    if texts:
        ids = {
            r.id
            for path, text in texts.items()
            for r in documents.evidence(text, ledger, every, current_sources=current_sources, where=str(path))
        }
        # A gate needs several processes of what is gated: sides of pairs, which no document's number rests on.
        held = {(r.case, r.who) for r in every if r.id in ids and r.kind == "time"}
        ids |= _times([r for r in records if r.kind == "pair" and (r.case, r.who) in held])
    else:
        ids = _times(records)
    # The machine's ceilings, whatever the documents say: reports draw rooflines from them. The last of each.
    ids |= set({r.case: r.id for r in records if r.kind == "roofline"}.values())
    kept = [r for r in records if r.id in ids and not (on_gpu and r.kind == "arithmetic")]
    cells = {(r.case, r.who, *sorted(r.tuning.items())) for r in kept}
    if len(cells) > LIMIT:
        raise DataError(f"the documents rest on {len(cells)} cells; {LIMIT} is the most a person reviews")
    return kept


def _times(records: Sequence[Record]) -> set[str]:
    """Ids of the times of unchanged code, of the first KEPT_PROCESSES processes of each cell."""
    seen: Counter[tuple[str, str]] = Counter()
    ids = set()
    for r in records:
        if r.measurements and not r.tuning and not r.tree:
            seen[r.case, r.who] += 1
            if seen[r.case, r.who] <= KEPT_PROCESSES:
                ids.add(r.id)
    return ids


def readings(records: Sequence[Record]) -> dict[regression.Cell, Reading]:
    """Every timed cell, of peers and subjects too."""
    values: dict[regression.Cell, list[float]] = {}
    for r in records:
        for m in r.measurements if not r.tuning and not r.tree else ():
            values.setdefault((r.case, r.who, m.quantity), []).append(m.median_s)
    return {cell: _reading(v) for cell, v in values.items()}


def costs_s(records: Sequence[Record]) -> dict[tuple[str, str], float]:
    """Each timed cell's (case, who) and how long a job of it took in all, seconds: the longest of its records."""
    found: dict[tuple[str, str], float] = {}
    for r in records:
        if r.measurements and not r.tuning and not r.tree:
            found[r.case, r.who] = max(r.elapsed_s, found.get((r.case, r.who), 0.0))
    return found


def _reading(values_s: Sequence[float]) -> Reading:
    median_s, low_s, high_s, _ = regression.spread(values_s)
    if len(values_s) == 1:
        low_s, high_s = median_s * (1 - SINGLE_PROCESS_MARGIN), median_s * (1 + SINGLE_PROCESS_MARGIN)
    return Reading(median_s, low_s, high_s, len(values_s))


def changes(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """Old against new, cell by cell, those that moved beyond their intervals first."""
    then, now = readings(old), readings(new)
    found = [Change(*cell, then.get(cell), now.get(cell)) for cell in sorted({*then, *now})]
    return sorted(found, key=lambda c: (not c.disjoint, c.old is not None and c.new is not None))


def files(kept: Sequence[Record], records: Sequence[Record]) -> dict[str, list[Record]]:
    """File's name -> its rows; no rows where the runs had such records and none of them is kept.

    A file a suite; pairs apart, so that taking them anew leaves a suite's other records alone.
    """
    by_file: dict[str, list[Record]] = {name: [] for name in map(_file_of, records) if name}
    for record in kept:
        by_file.setdefault(_file_of(record) or record.kind, []).append(record)
    return dict(sorted(by_file.items()))


def _file_of(record: Record) -> str:
    return "pairs" if record.kind == "pair" else record.suite


def staying(destination: Path, records: Sequence[Record]) -> list[Record]:
    """The records of the baseline's files that runs with these records would not replace."""
    names = {_file_of(r) or r.kind for r in records}
    paths = sorted(destination.glob("*.jsonl"))
    return [record for path in paths if path.stem not in names for record in read_records(path)]


def replaced(destination: Path, by_suite: dict[str, list[Record]]) -> list[Record]:
    """The records that writing would replace."""
    paths = [destination / f"{suite}.jsonl" for suite in by_suite]
    return [record for path in paths if path.is_file() for record in read_records(path)]


def write(destination: Path, by_suite: dict[str, list[Record]]) -> None:
    """Write ``destination/<suite>.jsonl``, each whole or not at all."""
    for suite, rows in by_suite.items():
        path = destination / f"{suite}.jsonl"
        if rows:
            write_records(path, rows)
        else:
            path.unlink(missing_ok=True)


def to_text(found: Sequence[Change]) -> str:
    """The diff that a person reviews, one line a timed cell."""

    def side(reading: Reading | None) -> str:
        if reading is None:
            return "-"
        low, high = reading.low_s * 1e6, reading.high_s * 1e6
        return f"{reading.median_s * 1e6:.4g} [{low:.4g}, {high:.4g}] us of {reading.processes}"

    lines = []
    for c in found:
        mark = "*" if c.disjoint else "+" if c.old is None else "-" if c.new is None else " "
        ratio = f"  {c.new.median_s / c.old.median_s:.3f}x" if c.old is not None and c.new is not None else ""
        lines.append(f"{mark} {c.case} {c.who} {c.quantity}: {side(c.old)} -> {side(c.new)}{ratio}")
    return "\n".join(lines)


def to_json(found: Sequence[Change]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [{**asdict(c), "disjoint": c.disjoint} for c in found]
