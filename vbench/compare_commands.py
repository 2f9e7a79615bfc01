"""What the commands of ``vbench.cli_compare`` do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from vbench import baseline, commands, documents, registry, regression, simulate
from vbench.errors import DataError
from vbench.record import Record
from vbench.roofline import floor_s
from vbench.sources import digest
from vbench.store import RECORDS, load_records, read_records, write_records


def gate_command(run: str, out: Path, folder: Path, *, strict: bool, fmt: regression.Format) -> int:
    """``vbench gate RUN --baseline DIR``. Pure: reads records, needs no GPU.

    Raises:
        UsageError, DataError: no such run or baseline, or a file that is none.
    """
    path = commands.find_run(run, out)
    loaded = load_records(path)
    reviewed = read_records(folder)
    result = regression.judge_run(reviewed, loaded.records, floor=_floor(), torn=loaded.torn)
    code, reasons = regression.exit_code(result, strict=strict)
    if not loaded.records:
        code, reasons = 3, ["nothing judged: the run has no record"]
    for line in loaded.torn:
        print(f"vbench: {line}; left out, the rest is kept", file=sys.stderr)
    print(regression.render(result, code, reasons, fmt, {"run": str(path), "baseline": str(folder)}))
    return code


def _floor() -> regression.Floor:
    """Seconds below which the datasheet of a record's GPU calls its time impossible."""
    ops = registry.ops()

    def floor(record: Record) -> float:
        op = ops.get(record.case.partition("[")[0])
        if op is None:
            return 0.0
        case = op.parse(record.case)
        moved = op.bytes(case) if op.bytes is not None else 0
        work = op.flops(case) if op.flops is not None else 0
        return floor_s(str(record.environment.get("gpu", "")), moved, work)

    return floor


def baseline_update(
    runs: Sequence[str], out: Path, destination: Path, texts: Sequence[Path], ledger: str, *, write: bool, as_json: bool
) -> int:
    """``vbench baseline update``: print old and new side by side; write only with ``write``.

    Raises:
        UsageError, DataError: bad runs, documents or ledger, too much to review, or machines that differ.
    """
    books = commands.ledgers()
    registry.choose("ledger", [ledger], books)
    records = [record for run in runs for record in read_records(commands.find_run(run, out))]
    _refuse_twins(records)
    kept = baseline.select(records, texts, books[ledger], commands.current_sources())
    if not kept:
        raise DataError("nothing to keep: no record of these runs is behind a number of the documents")
    by_suite = baseline.files(kept, records)
    old = baseline.replaced(destination, by_suite)
    found = baseline.changes(old, kept)
    timed = [[r for r in side if r.measurements] for side in (old, kept)]
    unlike = regression.differences(*timed) if all(timed) else ()
    if as_json:
        body = {
            "changes": baseline.to_json(found),
            "machine": [str(d) for d in unlike],
            "rows": {suite: len(rows) for suite, rows in by_suite.items()},
            "written": write,
        }
        print(json.dumps(body, indent=1, ensure_ascii=False))
    else:
        print(baseline.to_text(found))
        for difference in unlike:
            print(f"machine   {difference}")
        moved = sum(c.disjoint for c in found)
        print(f"cells     {len(found)}, of which {moved} moved beyond their intervals (*)")
        print(f"rows      {', '.join(f'{len(rows)} {suite}' for suite, rows in by_suite.items())}")
        print(f"written   {destination}" if write else "written   nothing; review, then add --write")
    if write:
        baseline.write(destination, by_suite)
    return 0


def _refuse_twins(records: Sequence[Record]) -> None:
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise DataError(f"id {record.id} occurs in two of the runs: one of them is given twice")
        seen.add(record.id)


def simulated_selftest(seed: int, out: Path, as_json: bool) -> int:
    """``vbench selftest --aa --simulated``: the rates of the rule on machines whose noise is known.

    The run's id is made of the seed and the sources, so that the same command gives the same file.
    """
    run = f"selftest-{digest(simulate.SOURCES).removeprefix('sha256:')[:8]}-{seed}"
    records = simulate.records(run=run, seed=seed)
    path = out / run / RECORDS
    write_records(path, records)
    _print_rates(records, simulate.BACKEND, as_json)
    if not as_json:
        print(f"\nrecords   {path}")
    return 0


def _print_rates(records: Sequence[Record], backend: str, as_json: bool) -> None:
    if as_json:
        print("[" + ",\n".join(r.to_json() for r in records) + "]")
        return
    print("\n".join(documents.rates_table(records, backend)))
