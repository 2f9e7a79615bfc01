"""How many rows a run times, and how long that takes. Pure.

A row is one timed case on one kernel. An effort has a limit, so that a run on a GPU ends in minutes whatever suites are
installed: cases beyond it wait for ``--effort full``. Both sides of a ratio are kept or postponed together: of a case
those kernels that something rests on, those that it is there for (``spec.BenchCase.first``), and the others are one
group each.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from vbench.plan import Effort, Job
from vbench.record import Record

#: Most rows that an effort times; ``None``: all there are.
MOST_ROWS: Mapping[Effort, int | None] = {"quick": 300, "standard": 300, "full": None}

#: Op, case, whether something rests on its jobs, whether (of the others) the case is there for them.
Group = tuple[str, str, bool, bool]

#: Seconds from one worker's start to its first answer: interpreter, torch, a DSL.
WORKER_START_S = 5.0


@dataclass(frozen=True, slots=True)
class Limited:
    """A plan within its limit.

    Args:
        jobs: what to do, in the order given.
        rows: those of them that are timed in earnest; other timed jobs are known to be refused and cost nothing.
        postponed: timed jobs left out.
    """

    jobs: tuple[Job, ...]
    rows: tuple[Job, ...]
    postponed: tuple[Job, ...]

    @property
    def message(self) -> str:
        """One sentence for a person, ``""`` where nothing was postponed."""
        if not self.postponed:
            return ""
        cases = len({job.case for job in self.postponed})
        return (
            f"{len(self.rows)} rows are timed; {len(self.postponed)} more of {cases} cases wait for --effort full "
            "(or choose fewer suites, ops or backends)"
        )


def within_limit(
    jobs: Sequence[Job], most: int | None, takes_slot: Callable[[Job], bool], first: Callable[[Job], bool]
) -> Limited:
    """Keep as many timed cases as fit.

    Args:
        jobs: the ordered plan.
        most: rows that may be timed.
        takes_slot: whether a timed job is measured here; one that is refused or unavailable is planned and not counted.
        first: whether something rests on a job; such jobs come before those on which nothing does.

    Groups are taken in turn over the ops, each op's in the order of the plan but those that a case is there for before
    its others, and one that does not fit is passed over.
    """

    def group(job: Job) -> Group:
        rests = first(job)
        return job.op, job.case, rests, job.first and not rests

    groups: dict[Group, list[Job]] = {}
    for job in jobs:
        if job.kind == "time":
            groups.setdefault(group(job), []).append(job)
    weight = {key: sum(map(takes_slot, some)) for key, some in groups.items()}
    left = sum(weight.values()) if most is None else most
    kept: set[Group] = set()
    for wanted in (True, False):
        by_op: dict[str, list[Group]] = {}
        for key in sorted(groups, key=lambda key: not key[3]):
            if key[2] is wanted:
                by_op.setdefault(key[0], []).append(key)
        for turn in zip_longest(*by_op.values()):
            for key in turn:
                if key is not None and weight[key] <= left:
                    kept.add(key)
                    left -= weight[key]
    taken = tuple(job for job in jobs if job.kind != "time" or group(job) in kept)
    rows = tuple(job for job in taken if job.kind == "time" and takes_slot(job))
    if most is not None and len(rows) > most:
        raise AssertionError(f"{len(rows)} rows planned, {most} allowed")
    postponed = tuple(job for job in jobs if job.kind == "time" and group(job) not in kept)
    return Limited(taken, rows, postponed)


def estimate_s(rows: Sequence[Job], seen: Iterable[Record]) -> float | None:
    """Seconds that timed rows take, workers' starts included, by the mean of records seen; ``None`` without any.

    A backend's op is judged by its own records where there are some, else by the mean of all.
    """
    spent: dict[tuple[str, str], list[float]] = {}
    for record in seen:
        if record.kind == "time" and record.measurements:
            spent.setdefault((record.backend, record.case.partition("[")[0]), []).append(record.elapsed_s)
    if not spent:
        return None
    overall = statistics.fmean(s for some in spent.values() for s in some)
    means = {key: statistics.fmean(some) for key, some in spent.items()}
    total = sum(means.get((job.backend, job.op), overall) for job in rows)
    return total + WORKER_START_S * len({job.backend for job in rows})
