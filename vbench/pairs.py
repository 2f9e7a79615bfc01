"""Measures cells in fresh pairs of processes, one a side, that take their blocks of samples in turn.

A pair measures every cell. In it each cell is opened on both sides, then sampled in ABBA or BAAB order, who leads drawn
at random, then verified and closed. Inputs have a new seed in each pair. Every pair leaves one record a cell and side.
Where it is cheap, the next pair's processes start while a pair is measured; they touch the device only in their turn.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from vbench.comparison import Observation
from vbench.record import ErrorStats, Measurement, Outcome, Record
from vbench.runner import Failure
from vbench.sides import Side

#: Blocks of one cell in a pair, and samples in each.
ORDER = ("A", "B", "B", "A")
BLOCK_SAMPLES = 10
#: A block of long samples has fewer: as many as take this long, but at least so many. A process knows its own median
#: far better than two processes agree.
BLOCK_S, LEAST_BLOCK_SAMPLES = 0.4, 3
#: Rows of each output that are compared with the oracle before and after the blocks.
ROWS = 64
#: Slowdowns must be whole launches: with samples of a multiple of this many they are, down to 1 %.
INJECTION_LAUNCHES = 100
#: Limit of one request: opening compiles.
DEADLINE_S = 180.0


@dataclass(frozen=True, slots=True)
class Cell:
    """What is compared: one case on both sides.

    Args:
        op, case: the case's id has no seed: each pair draws inputs of its own.
        backend, variant: by side.
        slowdown: known part by which side B is slowed, to measure our own power.
    """

    op: str
    case: str
    backend: Mapping[str, str]
    variant: Mapping[str, str]
    role: str = "own"
    suite: str = ""
    source: str = ""
    slowdown: float = 0.0

    @property
    def who(self) -> str:
        """Side A as a record's ``who`` has it."""
        return self._who("A")

    def _who(self, side: str) -> str:
        backend, variant = self.backend[side], self.variant[side]
        return f"{backend}[{variant}]" if variant else backend

    @property
    def name(self) -> str:
        """Unique among the cells of a comparison."""
        return " ".join([self.case, *dict.fromkeys(map(self._who, "AB"))]) + (
            f" +{self.slowdown * 100:g}%" if self.slowdown else ""
        )

    @property
    def bound(self) -> tuple[str, ...]:
        """Cells that agree in this share what is bound."""
        return (self.case, *self.backend.values(), *self.variant.values())


class Asker(Protocol):
    """A worker process: see ``vbench.runner.WorkerProcess``."""

    def begin(self) -> None: ...

    def ask(self, request: Mapping[str, Any], deadline_s: float) -> dict[str, Any] | Failure: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


class Shares:
    """Divides a time limit over pairs, so that a cell that the first pair reaches has time in all of them.

    The first pair has two shares, since it compiles; within a pair each backend has time by the number of its cells.

    Args:
        limit_s: seconds from now on.
        pairs: how many are to be measured.
    """

    def __init__(self, limit_s: float, pairs: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._began, self._share_s, self._clock = clock(), limit_s / (pairs + 1), clock

    def end(self, pair: int, part: float) -> float:
        """When, by the clock, pair ``pair`` (from 0) begins no further cell among the first ``part`` of its cells."""
        before = self._share_s * (pair + 1 if pair else 0)
        return self._began + before + part * self._share_s * (1 if pair else 2)

    def over(self, end: float) -> bool:
        return self._clock() >= end


@dataclass(slots=True)
class PairRunner:
    """A ``vbench.comparison.Measure`` that starts real processes.

    Args:
        run_id: goes into each record.
        cells: by name.
        sides: ``A`` and ``B``.
        start: makes a worker for a backend on a side; called anew for each pair.
        keep: takes each record as it is made.
        draw: decides who leads.
        environments: environment of the records by (side, backend), as probed.
        may_go_on: asked before each pair; once False no pair is begun any more.
        ahead: start the next pair's processes while a pair is measured. Not where their start would be measured too,
            which is wherever kernels and interpreters share the processor.
        failed: cell -> why it gave no observation, once it has failed on a side; it is not tried again.
    """

    run_id: str
    cells: Mapping[str, Cell]
    sides: Mapping[str, Side]
    start: Callable[[str, str], Asker]
    keep: Callable[[Record], None]
    draw: random.Random
    environments: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    may_go_on: Callable[[], bool] = lambda: True
    ahead: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    pairs: int = 0

    def measure(self, pairs: int, cells: Sequence[str]) -> dict[str, list[Observation]]:
        """Observations of ``pairs`` more pairs; a cell that fails has fewer or none."""
        return self._measure(pairs, cells, None)

    def measure_within(self, pairs: int, cells: Sequence[str], shares: Shares) -> dict[str, list[Observation]]:
        """As ``measure``, but a cell that a pair has no time for is left out of it and of all that follow.

        Returns:
            by cell; those without ``pairs`` observations were not reached, or failed.
        """
        return self._measure(pairs, cells, shares)

    def _measure(self, pairs: int, cells: Sequence[str], shares: Shares | None) -> dict[str, list[Observation]]:
        found: dict[str, list[Observation]] = {name: [] for name in cells}
        late: set[str] = set()
        waiting: list[tuple[tuple[str, ...], dict[str, Asker]]] = []
        try:
            for number in range(pairs):
                if not self.may_go_on():
                    break
                groups = self._by_backends([name for name in cells if name not in late])
                if not groups:
                    break
                self.pairs += 1
                total, before = sum(map(len, groups.values())), 0
                for i, (names, group) in enumerate(groups.items()):
                    before += len(group)
                    end = None if shares is None else (shares, shares.end(number, before / total))
                    workers = self._workers(names, waiting)
                    following = list(groups)[i + 1 :] or (list(groups) if number + 1 < pairs else [])
                    if self.ahead and following:
                        # Only one pair's worth waits, and it costs the device nothing before its probe.
                        waiting.append((following[0], self._workers(following[0], [])))
                        for worker in waiting[-1][1].values():
                            worker.begin()
                    for name, observation in self._pair(group, workers, end, late):
                        found[name].append(observation)
        finally:
            for _, workers in waiting:
                for worker in workers.values():
                    worker.kill()
        return found

    def _by_backends(self, cells: Iterable[str]) -> dict[tuple[str, ...], list[Cell]]:
        """The cells that have not failed, by the backends of their two sides."""
        groups: dict[tuple[str, ...], list[Cell]] = {}
        for name in cells:
            if name not in self.failed:
                cell = self.cells[name]
                groups.setdefault((cell.backend["A"], cell.backend["B"]), []).append(cell)
        return groups

    def _workers(
        self, names: tuple[str, ...], waiting: list[tuple[tuple[str, ...], dict[str, Asker]]]
    ) -> dict[str, Asker]:
        """Those of ``waiting`` for these backends, else new ones; others that wait are not needed any more."""
        while waiting:
            other, workers = waiting.pop()
            if other == names:
                return workers
            for worker in workers.values():
                worker.kill()
        return {side: self.start(side, name) for side, name in zip("AB", names, strict=True)}

    def _pair(
        self,
        cells: Sequence[Cell],
        workers: Mapping[str, Asker],
        end: tuple[Shares, float] | None,
        late: set[str],
    ) -> list[tuple[str, Observation]]:
        """One pair of processes measures all of ``cells``, which have the same backends.

        Args:
            end: once it is over, the cells not yet begun are added to ``late`` instead.
        """
        found: list[tuple[str, Observation]] = []
        bound: dict[tuple[str, ...], list[Cell]] = {}
        for cell in cells:
            bound.setdefault(cell.bound, []).append(cell)
        try:
            with ThreadPoolExecutor(max_workers=2) as pool:

                def both(requests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any] | Failure]:
                    futures = {s: pool.submit(workers[s].ask, requests[s], DEADLINE_S) for s in "AB"}
                    return {s: future.result() for s, future in futures.items()}

                probes = both({s: {"kind": "probe"} for s in "AB"})
                for side in "AB":
                    answer = probes[side]
                    if not isinstance(answer, Failure) and answer["outcome"] == Outcome.PASSED:
                        self.environments[side, cells[0].backend[side]] = answer["environment"]
                        if answer["reason"] != "native":
                            detail = f"{answer['reason']} here: run for its meaning, never for its speed"
                            probes[side] = Failure(Outcome.UNAVAILABLE, "needs_cuda", detail)
                if not self._fails(cells, probes, "probe"):
                    for group in bound.values():
                        if end is not None and end[0].over(end[1]):
                            late |= {cell.name for cell in group}
                        else:
                            found += self._group(group, workers, both)
                list(pool.map(lambda worker: worker.close(), workers.values()))
        except BaseException:
            for worker in workers.values():
                worker.kill()
            raise
        return found

    def _group(
        self,
        cells: Sequence[Cell],
        workers: Mapping[str, Asker],
        both: Callable[[Mapping[str, Mapping[str, Any]]], dict[str, dict[str, Any] | Failure]],
    ) -> list[tuple[str, Observation]]:
        """Cells that share what is bound: opened once, sampled one after the other."""
        first = cells[0]
        opened = both({s: self._open(first, s) for s in "AB"})
        if self._fails(cells, opened, "open"):
            return []
        multiple = INJECTION_LAUNCHES if any(c.slowdown for c in cells) else 1
        arm: dict[str, Any] = {"kind": "arm", "launches": 0, "multiple": multiple, "slowdowns": []}
        # Both sides average over as many launches; A says how many, undisturbed by B.
        counted = workers["A"].ask(arm, DEADLINE_S)
        if self._fails(cells, {"A": counted}, "arm"):
            return []
        assert not isinstance(counted, Failure)
        arm["launches"] = round(counted["metrics"]["launches"])
        samples = block_samples(counted["metrics"]["sample_s"])
        slowdowns = {"A": [0.0], "B": sorted({c.slowdown for c in cells})}
        if self._fails(cells, both({s: {**arm, "slowdowns": slowdowns[s]} for s in "AB"}), "arm"):
            return []
        taken: list[tuple[Cell, dict[str, list[Measurement]]]] = []
        for cell in cells:
            blocks: dict[str, list[Measurement]] = {"A": [], "B": []}
            leads = self.draw.random() < 0.5
            for letter in ORDER:
                side = letter if leads else "B" if letter == "A" else "A"
                slowdown = cell.slowdown if side == "B" else 0.0
                request = {"kind": "block", "slowdown": slowdown, "samples": samples}
                answer = workers[side].ask(request, DEADLINE_S)
                if self._fails([cell], {side: answer}, "block"):
                    return []
                assert not isinstance(answer, Failure)
                blocks[side].append(Measurement.from_dict(answer["measurements"][0]))
            taken.append((cell, blocks))
        closed = both({s: {"kind": "close"} for s in "AB"})
        if self._fails(cells, closed, "close"):
            return []
        found = []
        for cell, blocks in taken:
            for side in "AB":
                self._keep(cell, side, opened[side], joined(blocks[side]))
            found.append((cell.name, observation(self.pairs, joined(blocks["A"]), joined(blocks["B"]))))
        return found

    def _open(self, cell: Cell, side: str) -> dict[str, Any]:
        # A new seed each pair: new values, the same on both sides.
        case = f"{cell.case[:-1]},seed={self.pairs}]"
        return {
            "kind": "open",
            "op": cell.op,
            "case": case,
            "variant": cell.variant[side],
            "options": dict(self.sides[side].options),
            "role": cell.role,
            "rows": ROWS,
        }

    def _fails(self, cells: Sequence[Cell], answers: Mapping[str, dict[str, Any] | Failure], when: str) -> bool:
        """Whether a side did not pass; if so every cell has its record and is not tried again."""
        bad = {s: a for s, a in answers.items() if isinstance(a, Failure) or a["outcome"] != Outcome.PASSED}
        for side, answer in bad.items():
            for cell in cells:
                record = self._keep(cell, side, answer, None, when)
                self.failed.setdefault(cell.name, f"side {side} {record.label}")
        return bool(bad)

    def _keep(
        self,
        cell: Cell,
        side: str,
        answer: dict[str, Any] | Failure,
        measured: Measurement | None,
        when: str = "",
    ) -> Record:
        options = dict(self.sides[side].options)
        if cell.slowdown:
            options["injected"] = f"{cell.slowdown:g}"
        known: dict[str, Any] = {}
        if isinstance(answer, Failure):
            outcome, reason, detail = answer.outcome, answer.reason, answer.detail
        else:
            outcome, reason, detail = Outcome(answer["outcome"]), answer["reason"], answer["detail"]
            error = answer.get("error")
            known = {
                "error": ErrorStats(**{**error, "at": tuple(error["at"])}) if error else None,
                "prepare_s": answer.get("prepare_s"),
                "numerics": answer.get("numerics") or {},
                "choice": answer.get("choice") or {},
                "sources": answer.get("sources") or "",
                "elapsed_s": answer.get("elapsed_s") or 0.0,
            }
        record = Record(
            case=cell.case,
            backend=cell.backend[side],
            variant=cell.variant[side],
            kind="pair",
            outcome=outcome,
            run=self.run_id,
            role=cell.role,
            suite=cell.suite,
            reason=reason or (f"at_{when}" if outcome is not Outcome.PASSED else ""),
            detail=detail,
            source=cell.source,
            measurements=() if measured is None else (measured,),
            environment=self.environments.get((side, cell.backend[side]), {}),
            pair=self.pairs,
            side=side,
            tuning=options,
            tree=self.sides[side].label,
            **known,
        )
        self.keep(record)
        return record


def block_samples(sample_s: float) -> int:
    """How many samples of about ``sample_s`` seconds a block has."""
    return max(LEAST_BLOCK_SAMPLES, min(BLOCK_SAMPLES, int(BLOCK_S / sample_s))) if sample_s > 0 else BLOCK_SAMPLES


def joined(blocks: Sequence[Measurement]) -> Measurement:
    """The blocks of one side as one measurement, samples in time order."""
    states = []
    before = 0
    for block in blocks:
        states += [replace(state, at_sample=state.at_sample + before) for state in block.states]
        before += len(block.samples_s)
    first = blocks[0]
    return Measurement(
        quantity=first.quantity,
        samples_s=tuple(s for block in blocks for s in block.samples_s),
        launches_per_sample=first.launches_per_sample,
        rotated_bytes=first.rotated_bytes,
        clock_hz=tuple(c for block in blocks for c in block.clock_hz),
        stopped=first.stopped,
        states=tuple(states),
        states_absent=first.states_absent,
        blocks=tuple(len(block.samples_s) for block in blocks),
    )


def observation(pair: int, a: Measurement, b: Measurement) -> Observation:
    """The difference of the means of the logarithms of the block medians, B minus A; the same for cycles."""
    medians = [_block_medians(side) for side in (a, b)]
    log_time = _mean_log(medians[1]) - _mean_log(medians[0])
    clocks = [_block_clocks(side) for side in (a, b)]
    if not all(clocks):
        return Observation(pair, log_time)
    cycles = [[m * c for m, c in zip(*side, strict=True)] for side in zip(medians, clocks, strict=True)]
    return Observation(pair, log_time, _mean_log(cycles[1]) - _mean_log(cycles[0]))


def _mean_log(values: Sequence[float]) -> float:
    return statistics.fmean(math.log(v) for v in values)


def _block_medians(side: Measurement) -> list[float]:
    ends = list(itertools.accumulate(side.blocks))
    return [statistics.median(side.samples_s[end - n : end]) for n, end in zip(side.blocks, ends, strict=True)]


def _block_clocks(side: Measurement) -> list[float]:
    """Mean SM clock of each block, hertz, from the readings before and after it; empty where one is missing."""
    if len(side.clock_hz) != 2 * len(side.blocks):
        return []
    return [statistics.fmean(side.clock_hz[2 * i : 2 * i + 2]) for i in range(len(side.blocks))]


def observations(records: Iterable[Record]) -> dict[tuple[str, float], list[Observation]]:
    """Observations from stored records of kind ``pair``, of one or more runs, by cell and slowdown.

    Returns:
        (case and both sides in words, slowdown of B) -> observations. Pairs of different runs are numbered apart.
    """
    numbers: dict[tuple[str, int | None], int] = {}
    sides: dict[tuple[str, str, int], dict[str, list[Record]]] = {}
    for r in records:
        if r.kind == "pair" and r.measurements:
            pair = numbers.setdefault((r.run, r.pair), len(numbers))
            cell = sides.setdefault((r.case, r.tuning.get("injected", "0"), pair), {"A": [], "B": []})
            cell[r.side].append(r)
    found: dict[tuple[str, float], list[Observation]] = {}
    for (case, injected, pair), both in sides.items():
        # Several cells of one case are told apart by their order, which is the same on both sides.
        for a, b in zip(both["A"], both["B"], strict=False):
            who = " ".join(dict.fromkeys((_words(a), _words(b))))
            one = observation(pair, a.measurements[0], b.measurements[0])
            found.setdefault((f"{case} {who}", float(injected)), []).append(one)
    return found


def floors(records: Iterable[Record], pairs: int) -> dict[str, float]:
    """Noise floors from stored pairs of identical code: what the standard error of the log ratio is at ``pairs`` pairs.

    Returns:
        by case and backend as ``Cell.name`` has them; cells of fewer than three pairs are left out.
    """
    clean = [r for r in records if not r.tuning and not r.tree]
    return {
        name: statistics.stdev(o.log_time for o in found) / math.sqrt(pairs)
        for (name, _), found in observations(clean).items()
        if len(found) >= 3
    }


def _words(r: Record) -> str:
    options = ",".join(f"{k}={v}" for k, v in sorted(r.tuning.items()) if k != "injected")
    return r.who + (f"@{options}" if options else "") + (f" of {r.tree}" if r.tree else "")
