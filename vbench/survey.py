"""What each backend takes, asked of its own capability checks: kernels are built for cases, and none is launched.

``python -m vbench.survey NAME DISTRIBUTION DEVICE`` answers questions from standard input; ``ask`` runs it. A child
process because factories import torch and DSLs, and may crash.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from vbench.backend import Device
from vbench.errors import Unsupported
from vbench.registry import BackendInfo, find_entry, load_backend, ops
from vbench.spec import TORCH_DTYPE_NAMES, Case, Op, Param, Suite, resolve

#: One backend's questions may import a DSL first, and build some hundred kernels.
ASK_DEADLINE_S = 180.0

#: The rule of a backend without an implementation of an op.
NOT_OFFERED = "op_not_offered"

#: Op, case id, variant.
Question = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """``ok``; ``unsupported`` by a typed refusal, whose rule is ``code`` and whose message is ``detail``;
    ``unavailable``, the backend cannot be used here; ``hole``: anything else a factory raises, or no case to ask with.
    An ``ok`` with code ``no_fixed_case`` was asked with a case that no suite has.
    """

    kind: Literal["ok", "unsupported", "unavailable", "hole"]
    code: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return {"ok": "ok*" if self.code else "ok", "hole": f"HOLE {self.code}", "unavailable": f"({self.code})"}.get(
            self.kind, self.code
        )


def answer(backend: Any, device: Device, questions: Iterable[Question]) -> list[Answer]:
    """In this process. The backend has been probed as usable."""
    known = ops()
    found = []
    for op_name, case_id, variant in questions:
        op = known[op_name]
        case = op.parse(case_id)
        rejected = op.reject(case)
        if rejected is not None:
            found.append(Answer("unsupported", *rejected))
            continue
        try:
            resolve(backend.ops[op_name])(case, variant, device)
            found.append(Answer("ok"))
        except Unsupported as refusal:
            found.append(Answer("unsupported", refusal.rule, refusal.message))
        except Exception as error:
            found.append(Answer("hole", type(error).__name__))
    return found


def ask(info: BackendInfo, device: Device, questions: Sequence[Question]) -> list[Answer]:
    """In a child process; where that dies or hangs, every answer is a hole."""
    if info.problem:
        return [Answer("unavailable", info.problem)] * len(questions)
    environment = {**os.environ, **info.environment.get(device, {})}
    command = [sys.executable, "-m", "vbench.survey", info.name, info.distribution, device]
    text = json.dumps(questions)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=environment, timeout=ASK_DEADLINE_S, check=False
        )
        found = [Answer(**item) for item in json.loads(done.stdout)]
    except subprocess.TimeoutExpired:
        return [Answer("hole", "hung")] * len(questions)
    except (json.JSONDecodeError, TypeError):
        return [Answer("hole", f"exit_{done.returncode}")] * len(questions)
    return found


def ask_all(
    infos: Iterable[BackendInfo], device: Device, questions: Callable[[BackendInfo], Sequence[Question]]
) -> dict[tuple[str, str, str, str], Answer]:
    """Every backend's answers side by side: (backend, op, case id, variant) -> answer."""
    asked = [(info, some) for info in infos if (some := list(questions(info)))]
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        answers = pool.map(lambda pair: ask(pair[0], device, pair[1]), asked)
        return {
            (info.name, *question): found
            for (info, some), given in zip(asked, answers, strict=True)
            for question, found in zip(some, given, strict=True)
        }


def matrix_parameters(op: Op) -> list[Param]:
    """The parameters whose every combination is a row: the weight format, and each that is a dtype."""
    return [
        p for p in op.params if p.kind == "choice" and (p.name == "fmt" or set(p.choices) <= set(TORCH_DTYPE_NAMES))
    ]


def representatives(op: Op, suites: Iterable[Suite]) -> dict[tuple[str, ...], tuple[Case | None, bool]]:
    """Values of the matrix parameters -> a case with them, and whether it is one of the suites' own.

    The first fixed case that has a meaning; where there is none, another fixed case with these values put in, if
    possible one that the op does not reject; ``None`` only where no suite has a case of the op.
    """
    names = [p.name for p in matrix_parameters(op)]
    fixed = [
        case
        for suite in suites
        for case in (*suite.checks, *(bench.case for bench in suite.benches))
        if case.op == op.name and op.reject(case) is None
    ]
    own: dict[tuple[str, ...], Case] = {}
    for case in fixed:
        own.setdefault(tuple(case.text(name) for name in names), case)
    found: dict[tuple[str, ...], tuple[Case | None, bool]] = {}
    for values in product(*(p.choices for p in matrix_parameters(op))):
        if values in own:
            found[values] = own[values], True
            continue
        put_in = dict(zip(names, values, strict=True))
        changed = [op.case(seed=case.seed, **{**dict(case.params), **put_in}) for case in fixed]
        found[values] = next((c for c in changed if op.reject(c) is None), next(iter(changed), None)), False
    return found


@dataclass(frozen=True, slots=True)
class Table:
    """One op: a row for each combination of format and dtypes, a column for each kernel that backends offer."""

    op: str
    parameters: tuple[str, ...]
    columns: tuple[str, ...]
    rows: Mapping[tuple[str, ...], tuple[Answer, ...]]
    not_offered: tuple[str, ...] = ()


def matrix(
    known: Mapping[str, Op], suites: Sequence[Suite], infos: Sequence[BackendInfo], device: Device
) -> list[Table]:
    """Backend x op x format x dtype, answered by the backends themselves on ``device``."""
    cases = {op.name: representatives(op, suites) for op in known.values()}

    def questions(info: BackendInfo) -> list[Question]:
        return [
            (op, case.id, variant)
            for op in info.ops
            if op in cases
            for case, _ in cases[op].values()
            if case is not None
            for variant in info.variants_of(op)
        ]

    answers = ask_all(infos, device, questions)
    tables = []
    for op, rows in cases.items():
        offered = [(i, v) for i in infos if op in i.ops for v in i.variants_of(op)]
        tables.append(
            Table(
                op,
                tuple(p.name for p in matrix_parameters(known[op])),
                tuple(f"{i.name}[{v}]" if v else i.name for i, v in offered),
                {
                    values: tuple(
                        _marked(answers[i.name, op, case.id, v], fixed)
                        if case is not None
                        else Answer("hole", "no_case")
                        for i, v in offered
                    )
                    for values, (case, fixed) in rows.items()
                },
                tuple(i.name for i in infos if op not in i.ops),
            )
        )
    return tables


def _marked(found: Answer, fixed: bool) -> Answer:
    return found if fixed or found.kind != "ok" else Answer("ok", "no_fixed_case")


def to_markdown(tables: Iterable[Table]) -> str:
    """A heading and a table an op."""
    parts = []
    for table in tables:
        head = [*(table.parameters or ("op",)), *table.columns]
        lines = [f"## {table.op}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for values, cells in table.rows.items():
            lines.append("| " + " | ".join([*(values or (table.op,)), *map(str, cells)]) + " |")
        if table.not_offered:
            lines += ["", f"Not offered (`{NOT_OFFERED}`) by {', '.join(table.not_offered)}."]
        reasons: dict[str, str] = {}
        for cell in (cell for cells in table.rows.values() for cell in cells):
            if cell.kind == "unsupported":
                reasons.setdefault(cell.code, cell.detail)
        lines += ["", *(f"- `{code}`, for example: {detail}" for code, detail in reasons.items())] if reasons else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def to_dict(tables: Iterable[Table]) -> list[dict[str, Any]]:
    """JSON-ready: one object a cell; an op that a backend does not offer at all is one cell of it."""
    tables = list(tables)
    absent = [
        {"op": table.op, "kernel": name, "answer": "unsupported", "code": NOT_OFFERED, "detail": ""}
        for table in tables
        for name in table.not_offered
    ]
    return absent + [
        {
            "op": table.op,
            "kernel": column,
            **dict(zip(table.parameters, values, strict=True)),
            "answer": cell.kind,
            "code": cell.code,
            "detail": cell.detail,
        }
        for table in tables
        for values, cells in table.rows.items()
        for column, cell in zip(table.columns, cells, strict=True)
    ]


def main(argv: list[str]) -> int:
    from dataclasses import asdict

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    name, distribution, place = argv
    device: Device = "cuda" if place == "cuda" else "cpu"
    questions = [tuple(question) for question in json.load(sys.stdin)]
    info, backend = load_backend(find_entry(name, distribution))
    if info.problem:
        found = [Answer("unavailable", info.problem)] * len(questions)
    elif not backend.probe(device).usable:
        found = [Answer("unavailable", "not_usable")] * len(questions)
    else:
        found = answer(backend, device, questions)
    json.dump([asdict(a) for a in found], answers)
    answers.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
