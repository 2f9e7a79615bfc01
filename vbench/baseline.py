"""Keep the records a document rests on: ``python -m vbench.baseline DOC RUN DEST`` (``make baseline``).

Writes ``DEST/<suite>.jsonl`` with just those records of a run that the document's generated numbers need, so that what
is committed stays small enough to be reviewed. Records of other hardware in DEST are not touched: one folder a machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from vbench import documents
from vbench.errors import DataError, UsageError
from vbench.record import Record
from vbench.session import current_sources, ledgers
from vbench.store import read_records, write_records

#: More rows than a person reviews.
LIMIT = 120


def make(document: Path, run: Path, destination: Path, ledger: str = "virtual_blackwell") -> dict[str, int]:
    """Rows written by suite.

    Raises:
        DataError: bad records or spans, or more than LIMIT rows.
    """
    records = read_records(run)
    kept = documents.evidence(
        document.read_text(encoding="utf-8"),
        ledgers()[ledger],
        records,
        current_sources=current_sources(),
        where=str(document),
    )
    if len(kept) > LIMIT:
        raise DataError(f"{document} rests on {len(kept)} records of {run}; {LIMIT} is the most a person reviews")
    by_suite: dict[str, list[Record]] = {}
    for record in kept:
        by_suite.setdefault(record.suite, []).append(record)
    for old in destination.glob("*.jsonl"):
        old.unlink()
    for suite, rows in by_suite.items():
        write_records(destination / f"{suite}.jsonl", rows)
    return {suite: len(rows) for suite, rows in sorted(by_suite.items())}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vbench.baseline", description=__doc__.partition("\n")[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args(argv)
    try:
        print(make(arguments.document, arguments.run, arguments.destination))
    except (DataError, UsageError) as error:
        print(f"vbench.baseline: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
