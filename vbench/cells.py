"""What is kept of a run's checks: a count for each cell backend x op x format x dtypes, small enough to be committed.

A run's own records go with its folder. A file of cells says of one machine what passed there, what was refused and by
which rule, how close to the budget the worst came, and which sources all of it rests on. JSON lines: a header, then a
cell a line. ``vbench list --matrix --run`` makes and shows it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vbench.errors import DataError
from vbench.record import Outcome, Record
from vbench.spec import Op
from vbench.survey import matrix_parameters

SCHEMA = 1

#: Outcomes of a kernel that declined, typed, instead of answering.
DECLINED = (Outcome.UNSUPPORTED, Outcome.UNAVAILABLE)

#: Backend, variant, op, values of the op's format and dtypes.
Key = tuple[str, str, str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Cell:
    """Checks of one kernel on one combination of format and dtypes.

    Args:
        values: of ``survey.matrix_parameters``, in their order.
        passed: checks within budget. failed: outcome -> number, of those that ran and did not pass. declined: reason ->
            number.
        worst_over_budget: largest error of a passed check in units of its budget; ``None`` where none has an error.
    """

    backend: str
    variant: str
    op: str
    role: str
    values: tuple[str, ...]
    passed: int = 0
    failed: Mapping[str, int] = field(default_factory=dict)
    declined: Mapping[str, int] = field(default_factory=dict)
    worst_over_budget: float | None = None

    @property
    def key(self) -> Key:
        return self.backend, self.variant, self.op, self.values

    @property
    def kernel(self) -> str:
        return f"{self.backend}[{self.variant}]" if self.variant else self.backend

    def __str__(self) -> str:
        if self.failed:
            wrong = ", ".join(f"{n} {name}" for name, n in sorted(self.failed.items()))
            return f"{wrong} of {self.passed + sum(self.failed.values())}"
        if self.passed:
            return str(self.passed)
        return max(sorted(self.declined), key=lambda reason: self.declined[reason])


@dataclass(frozen=True, slots=True)
class Kept:
    """Cells of one run and the machine they are from.

    Args:
        sources: backend -> op -> digest of the sources of kernel, oracle and inputs; no entry where nothing ran.
    """

    run: str
    environment: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, str]]
    cells: tuple[Cell, ...]


def of_records(records: Iterable[Record], ops: Mapping[str, Op]) -> Kept:
    """The checks of one run, as cells; records of other kinds and of ops that are not installed are passed over.

    Raises:
        DataError: no checks, checks of several runs, or a backend's op with several sources.
    """
    found: dict[Key, list[Record]] = {}
    for record in records:
        op = ops.get(record.case.partition("[")[0])
        if record.kind != "check" or op is None:
            continue
        case = op.parse(record.case)
        values = tuple(case.text(p.name) for p in matrix_parameters(op))
        found.setdefault((record.backend, record.variant, op.name, values), []).append(record)
    runs = {r.run for some in found.values() for r in some}
    if len(runs) != 1:
        raise DataError(f"cells are of the checks of one run, and these records have checks of {len(runs)}")
    ran = [r for some in found.values() for r in some if r.outcome not in DECLINED]
    sources: dict[str, dict[str, str]] = {}
    for record in ran:
        # A worker that died, or whose memory was full, did not say what it ran.
        if not record.sources:
            continue
        op_name = record.case.partition("[")[0]
        if sources.setdefault(record.backend, {}).setdefault(op_name, record.sources) != record.sources:
            raise DataError(f"{record.backend} {op_name}: checks of different sources in one run")
    cells = tuple(_cell(key, some) for key, some in sorted(found.items()))
    return Kept(next(iter(runs)), dict(ran[0].environment) if ran else {}, sources, cells)


def _cell(key: Key, records: Sequence[Record]) -> Cell:
    backend, variant, op, values = key
    passed = [r for r in records if r.outcome is Outcome.PASSED]
    errors = [r.error.worst_over_budget for r in passed if r.error is not None]
    return Cell(
        backend,
        variant,
        op,
        records[0].role,
        values,
        len(passed),
        dict(Counter(r.outcome.value for r in records if r.outcome not in (Outcome.PASSED, *DECLINED))),
        dict(Counter(r.reason for r in records if r.outcome in DECLINED)),
        round(max(errors), 4) if errors else None,
    )


def to_text(kept: Kept) -> str:
    """JSON lines."""
    head = {"schema": SCHEMA, "run": kept.run, "environment": dict(kept.environment), "sources": kept.sources}
    return "".join(json.dumps(line, sort_keys=True) + "\n" for line in (head, *(asdict(c) for c in kept.cells)))


def read(path: Path) -> Kept:
    """A file that ``to_text`` made.

    Raises:
        DataError: it is missing, torn, or of another schema.
    """
    try:
        head, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if head["schema"] != SCHEMA:
            raise DataError(f"{path}: schema {head['schema']}, and this vbench reads {SCHEMA}")
        cells = tuple(Cell(**{**line, "values": tuple(line["values"])}) for line in lines)
        return Kept(head["run"], head["environment"], head["sources"], cells)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = f"{path}: no file of cells ({type(error).__name__}); vbench list --matrix --run RUN --json makes one"
        raise DataError(why) from None


def to_markdown(
    kept: Kept, ops: Mapping[str, Op], current: Callable[[str, str], str | None], ours: Iterable[tuple[str, str]] = ()
) -> str:
    """A table an op: checks passed, or what failed, or the rule by which all were declined.

    Args:
        ours: (backend, op) of our own backends; those without a cell are named at the end.
        current: (backend, op) -> digest of the sources of now, ``None`` where they are not installed.
    """
    by_op: dict[str, list[Cell]] = {}
    for cell in kept.cells:
        by_op.setdefault(cell.op, []).append(cell)
    parts = []
    for op, cells in sorted(by_op.items()):
        columns = sorted({cell.kernel for cell in cells})
        names = [p.name for p in matrix_parameters(ops[op])] or ["op"]
        at = {(cell.kernel, cell.values): cell for cell in cells}
        head = [*names, *columns]
        lines = [f"## {op}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for values in sorted({cell.values for cell in cells}):
            row = [_shown(kept, at.get((column, values)), current) for column in columns]
            lines.append("| " + " | ".join([*(values or (op,)), *row]) + " |")
        parts.append("\n".join(lines))
    absent = sorted(set(ours) - {(cell.backend, cell.op) for cell in kept.cells})
    if absent:
        parts.append("## Not in this run\n\n" + "\n".join(f"- {backend}: {op}" for backend, op in absent))
    return "\n\n".join(parts) + "\n"


def _shown(kept: Kept, cell: Cell | None, current: Callable[[str, str], str | None]) -> str:
    if cell is None:
        return "-"
    then = kept.sources.get(cell.backend, {}).get(cell.op)
    ran = cell.passed or cell.failed
    return f"{cell} STALE" if ran and then != current(cell.backend, cell.op) else str(cell)


def broken(kept: Kept) -> list[Cell]:
    """Cells of our own kernels with a check that ran and did not pass."""
    return [cell for cell in kept.cells if cell.role == "own" and cell.failed]
