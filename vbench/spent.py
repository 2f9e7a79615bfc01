"""Where the time of a run went, from its records and its journal of phases. Pure.

Seconds of workers add up whatever process of a run measured them, so that a resumed run's are those of an unbroken one.
Several workers check side by side, so that the wall's are fewer; those are in the journal of each process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vbench.record import Record


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds that jobs took in their workers.

    Args:
        jobs: how many of them took any time.
        total_s: all of it, a worker's start apart.
        prepare_s: set-up outside the clock: binding, packing, compiling ahead.
        compile_s: first launches beyond a second one (the whole first one where there was no second); for kind
            ``compile`` the compilation.
        samples_s: launches that were timed.
    """

    jobs: int = 0
    total_s: float = 0.0
    prepare_s: float = 0.0
    compile_s: float = 0.0
    samples_s: float = 0.0

    @property
    def rest_s(self) -> float:
        """Drawing inputs, oracles, comparisons, reruns, buffers and their flushing."""
        return self.total_s - self.prepare_s - self.compile_s - self.samples_s

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.jobs + other.jobs,
            self.total_s + other.total_s,
            self.prepare_s + other.prepare_s,
            self.compile_s + other.compile_s,
            self.samples_s + other.samples_s,
        )


def of(record: Record) -> Spent:
    """What one job took; a job without a worker (arithmetic, a refusal by its probe) took nothing."""
    if not record.elapsed_s:
        return Spent()
    prepare_s, first_s = record.prepare_s or 0.0, record.first_launch_s or 0.0
    compile_s = first_s if record.compile_s is None else max(0.0, record.compile_s)
    if record.kind == "compile":
        prepare_s, compile_s = 0.0, prepare_s
    samples_s = sum(m.launches_per_sample * sum(m.samples_s) for m in record.measurements)
    return Spent(1, record.elapsed_s, prepare_s, compile_s, samples_s)


def total(records: Iterable[Record]) -> Spent:
    """What all of them took."""
    return sum(map(of, records), Spent())


def by_backend(records: Iterable[Record]) -> dict[tuple[str, str], Spent]:
    """(kind, backend) -> what its jobs took, the longest first. Jobs that took nothing are left out."""
    found: dict[tuple[str, str], Spent] = {}
    for record in records:
        spent = of(record)
        if spent.jobs:
            key = record.kind, record.backend
            found[key] = found.get(key, Spent()) + spent
    return dict(sorted(found.items(), key=lambda item: -item[1].total_s))


def by_phase(records: Iterable[Record]) -> dict[str, Spent]:
    """``checks`` (all that is not timed: probes, compilations and the trivial kernels too) and ``timing``."""
    parts = {"checks": Spent(), "timing": Spent()}
    for record in records:
        parts["timing" if record.kind == "time" else "checks"] += of(record)
    return parts


def line(records: Iterable[Record], walls: Mapping[str, float], unfinished: bool = False) -> str:
    """One line for the last screen: checks and timing apart.

    Args:
        walls: phase -> seconds by the clock on the wall, over all processes of the run.
        unfinished: a process of the run was killed and left no such seconds, so that there are more.
    """
    texts = []
    for name, spent in by_phase(records).items():
        if not spent.jobs:
            continue
        wall = f"{walls[name]:.0f} s, {'more where killed, ' if unfinished else ''}" if name in walls else ""
        kinds = {"prepare": spent.prepare_s, "compile": spent.compile_s, "samples": spent.samples_s}
        said = ", ".join(f"{kind} {s:.0f}" for kind, s in kinds.items() if s or kind != "samples")
        texts.append(f"{name} {wall}{spent.total_s:.0f} s of workers ({said}, rest {spent.rest_s:.0f})")
    return "; ".join(texts) or "nothing ran in a worker"


def to_dict(records: Iterable[Record], walls: Mapping[str, float], unfinished: bool) -> dict[str, Any]:
    """JSON-ready: phase -> seconds, ``wall_s`` ``null`` where no process noted it."""
    body: dict[str, Any] = {
        name: {"wall_s": walls.get(name), **asdict(spent), "rest_s": spent.rest_s}
        for name, spent in by_phase(records).items()
        if spent.jobs
    }
    return {**body, "more_where_killed": unfinished}
