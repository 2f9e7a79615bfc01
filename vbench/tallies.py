"""What rounds of ``vbench fuzz`` add up to: counts and the distribution of error over budget, a kernel. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from vbench.record import Record

#: Width of a bin of error over budget; metric ``to_0.05`` counts (0, 0.05], ``exact`` counts 0.
BIN = 0.05
COUNTS = ("cases", "passed", "refused", "failed")


def bin_name(ratio: float) -> str:
    """Name of the metric that counts a case whose worst error over budget is ``ratio`` (at most 1: it passed)."""
    return "exact" if ratio == 0 else f"to_{math.ceil(round(ratio / BIN, 9)) * BIN:.2f}"


def _end(name: str) -> float:
    return 0.0 if name == "exact" else float(name.removeprefix("to_"))


def op_of(record: Record) -> str:
    """The operation that a round is of."""
    return record.case.partition("op=")[2].partition(",")[0].rstrip("]")


@dataclass(slots=True)
class Tally:
    """One kernel over its rounds.

    Args:
        counts: ``COUNTS``; ``degenerate``, cases on which a trivial kernel would have been right too (absent from older
            rounds); seconds ``compile_s`` and ``worker_s``.
        bins: ``bin_name`` -> cases that passed.
        worst: largest error over budget of what passed.
        records: ids of the rounds.
    """

    op: str
    who: str
    counts: dict[str, float] = field(default_factory=dict)
    bins: dict[str, float] = field(default_factory=dict)
    worst: float = 0.0
    records: list[str] = field(default_factory=list)

    def add(self, record: Record) -> None:
        for name, value in record.metrics.items():
            if name == "exact" or name.startswith("to_"):
                self.bins[name] = self.bins.get(name, 0.0) + value
            elif name in COUNTS or name in ("degenerate", "compile_s", "worker_s"):
                self.counts[name] = self.counts.get(name, 0.0) + value
        self.worst = max(self.worst, record.metrics.get("worst", 0.0))
        self.records.append(record.id)

    def at_most(self, part: float) -> float | None:
        """The end of the bin that the quantile ``part`` lies in; ``None`` where nothing was compared."""
        total = sum(self.bins.values())
        seen = 0.0
        for name in sorted(self.bins, key=_end):
            seen += self.bins[name]
            if seen >= part * total:
                return _end(name)
        return None


def tallies(records: Iterable[Record]) -> Mapping[tuple[str, str], Tally]:
    """By operation and kernel (``backend[variant]``), in the order they appear."""
    found: dict[tuple[str, str], Tally] = {}
    for r in records:
        if r.kind == "fuzz":
            key = op_of(r), r.who
            found.setdefault(key, Tally(*key)).add(r)
    return found


def rows(records: Iterable[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a table: a row a kernel that passed or failed anything."""
    head = ["op", "kernel", *COUNTS, "degenerate", "half within", "90 % within", "99 % within", "worst"]
    body = []
    for t in tallies(records).values():
        if t.counts.get("passed", 0) + t.counts.get("failed", 0) == 0:
            continue
        ends = [t.at_most(part) for part in (0.5, 0.9, 0.99)]
        cells = ["-" if end is None else f"{end:.2f}" for end in ends]
        counts = [f"{t.counts.get(n, 0):.0f}" for n in COUNTS]
        counts.append(f"{t.counts['degenerate']:.0f}" if "degenerate" in t.counts else "-")
        body.append([t.op, t.who, *counts, *cells, f"{t.worst:.3f}"])
    return head, body
