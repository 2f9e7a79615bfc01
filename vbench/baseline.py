"""Keep the records documents rest on: ``python -m vbench.baseline DEST --run RUN... --document DOC...``.

Writes ``DEST/<suite>.jsonl`` with just those records of some runs that the generated numbers need, so that what
is committed stays small enough to be reviewed. Suites that the runs did not have are left as they are; one folder a
machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vbench import documents
from vbench.commands import current_sources, ledgers
from vbench.errors import DataError, UsageError
from vbench.record import Record
from vbench.store import read_records, write_records

#: More rows than a person reviews.
LIMIT = 120


def make(
    texts: Sequence[Path], runs: Sequence[Path], destination: Path, ledger: str = "virtual_blackwell"
) -> dict[str, int]:
    """Rows written by suite.

    Arithmetic needs no machine: its records are kept where the run was on a CPU, and left out elsewhere.

    Raises:
        DataError: bad records or spans, or more than LIMIT rows.
    """
    records = [record for run in runs for record in read_records(run)]
    on_gpu = any(r.hardware.startswith("sm_") for r in records)
    sources = current_sources()
    ids = {
        r.id
        for path in texts
        for r in documents.evidence(
            path.read_text(encoding="utf-8"), ledgers()[ledger], records, current_sources=sources, where=str(path)
        )
    }
    kept = [r for r in records if r.id in ids and not (on_gpu and r.kind == "arithmetic")]
    if len(kept) > LIMIT:
        raise DataError(f"the documents rest on {len(kept)} records; {LIMIT} is the most a person reviews")
    by_suite: dict[str, list[Record]] = {record.suite: [] for record in records if record.suite}
    for record in kept:
        by_suite.setdefault(record.suite, []).append(record)
    for suite, rows in by_suite.items():
        path = destination / f"{suite}.jsonl"
        if rows:
            write_records(path, rows)
        else:
            path.unlink(missing_ok=True)
    return {suite: len(rows) for suite, rows in sorted(by_suite.items()) if rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vbench.baseline", description=__doc__.partition("\n")[0])
    parser.add_argument("destination", type=Path, help="results/baselines/MACHINE")
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders or JSONL files of runs")
    parser.add_argument("--document", type=Path, nargs="+", required=True, help="Markdown with generated numbers")
    arguments = parser.parse_args(argv)
    try:
        print(make(arguments.document, arguments.run, arguments.destination))
    except (DataError, UsageError) as error:
        print(f"vbench.baseline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
