"""What the commands that compare do: ``selftest``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vbench import documents, simulate
from vbench.record import Record
from vbench.sources import digest
from vbench.store import RECORDS, write_records


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
