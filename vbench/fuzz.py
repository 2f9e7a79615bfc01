"""``vbench fuzz``: rounds of generated cases on one backend, several workers at a time; what fails is shrunk.

A case that kills or hangs its worker has failed like any other; the worker is started again. Each round leaves a record
a kernel, and each failure (of a kind at most ``KEPT``) a record of its own, which ``vbench repro`` takes.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

from vbench.backend import Device
from vbench.plan import DEADLINE_S, FUZZ, draw
from vbench.record import BROKEN_LAW, EXCUSED, Outcome, Record
from vbench.registry import BackendInfo
from vbench.runner import MOST_HANGS, START_DEADLINE_S, Failure, WorkerProcess, answered
from vbench.shrink import shrink
from vbench.spec import Case, Frame, Generated, Op, Suite
from vbench.store import RunStore
from vbench.tallies import bin_name

#: Cases of an op in a round. A round is what a limit or an interruption costs, and what Hypothesis searches at once.
ROUND: dict[Device, int] = {"cpu": 40, "cuda": 300}
#: The first round is smaller and each next one twice as large: while kernels are still being compiled, cases are slow,
#: and a search that is cut off then has rounds on disk all the same.
FIRST_ROUND = 20
#: Records of failures of one kind (kernel, outcome, reason); the round counts the others.
KEPT = 10
#: Shrinking one kind of failure may take so many attempts.
SHRINK_ATTEMPTS = 200
#: A hang is told from the slowest case that passed by this factor, and this much, so that shrinking one ends.
HANG_FACTOR, HANG_LEAST_S = 10.0, 2.0


def cases_of_round(device: Device, number: int) -> int:
    """Cases of an op in round ``number``: a function of it alone, so that a resumed search draws the same."""
    return min(ROUND[device], FIRST_ROUND << min(number, 16))


@dataclass(frozen=True, slots=True)
class Target:
    """One strategy of a suite, and where its cases may lie."""

    suite: str
    op: Op
    generated: Generated
    number: int
    frames: tuple[Frame, ...] = ()

    def cases(self, seed: int, number: int, count: int) -> list[Case]:
        """The cases of round ``number``: the same for the same arguments."""
        return draw(self.generated, count, (seed * 1000 + self.number) * 100_000 + number, self.frames)


def frames_of(op: Op, generated: Generated, most: int, seed: int) -> tuple[Frame, ...]:
    """``most`` frames around cases the strategy draws; none where it has no compile-time parameters."""
    if not generated.frame or most <= 0:
        return ()
    drawn = (c for c in draw(generated, 4 * most, seed) if op.reject(c) is None)
    return tuple(dict.fromkeys(Frame.of(op, c, generated.frame) for c in drawn))[:most]


def targets_of(
    suites: Iterable[Suite], known: Mapping[str, Op], names: Sequence[str], device: Device, frames: int, seed: int
) -> list[Target]:
    """Every strategy of the suites whose cases are of one of the operations ``names`` and may run on ``device``."""
    found: dict[str, Target] = {}
    for suite in suites:
        for generated in (*suite.generated, *suite.searched):
            if generated.device == "cuda" and device != "cuda":
                continue
            op = known[draw(generated, 1, 0)[0].op]
            if op.name in names and generated.strategy not in found:
                most = frames_of(op, generated, frames, seed)
                found[generated.strategy] = Target(suite.name, op, generated, len(found), most)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Task:
    """One case for one kernel. ``home``: tasks of one home go to one worker, which then compiles for the others too."""

    case: Case
    variant: str
    home: int
    deadline_s: float


class Pool:
    """Workers of one backend that share tasks; a worker whose own are done takes another's.

    ``until``: on the monotonic clock, when no further task is begun and those under way are cut off, compiling or not;
    both are UNAVAILABLE(``time_limit``), which says nothing of a kernel.
    """

    def __init__(self, info: BackendInfo, device: Device, folder: Path, workers: int) -> None:
        log = info.name.replace("/", "_")
        self._role = info.role
        self._workers = [
            WorkerProcess(info, device, folder / f"{log}.{number}.log", threads=1) for number in range(workers)
        ]
        self._threads = ThreadPoolExecutor(max_workers=workers)
        self._lock = Lock()
        self._stop = Event()
        self.until: float | None = None
        self._hangs: Counter[tuple[str, str]] = Counter()
        self.width = workers

    def probe(self) -> dict[str, Any] | Failure:
        """Starts every worker, and what the first says of its backend."""
        asked = [self._threads.submit(w.ask, {"kind": "probe"}, DEADLINE_S["probe"]) for w in self._workers]
        answers = [one.result() for one in asked]
        return answers[0]

    def start(self, tasks: Sequence[Task], *, forgive: bool = False) -> Callable[[], list[dict[str, Any] | Failure]]:
        """Begin; the returned function waits for the answers, in the order of ``tasks``.

        Args:
            forgive: ask although the kernel hung before.
        """
        queues: list[deque[int]] = [deque() for _ in self._workers]
        for index, task in enumerate(tasks):
            queues[task.home % len(queues)].append(index)
        answers: dict[int, dict[str, Any] | Failure] = {}

        def serve(number: int) -> None:
            while (index := self._take(queues, number)) is not None:
                answers[index] = self._ask(self._workers[number], tasks[index], forgive)

        serving: list[Future[None]] = [self._threads.submit(serve, number) for number in range(len(queues))]

        def wait() -> list[dict[str, Any] | Failure]:
            for one in serving:
                one.result()
            late = Failure(Outcome.UNAVAILABLE, "time_limit", "not begun within --limit-s")
            return [answers.get(index, late) for index in range(len(tasks))]

        return wait

    def _take(self, queues: Sequence[deque[int]], number: int) -> int | None:
        with self._lock:
            if self._stop.is_set() or (self.until is not None and time.monotonic() > self.until):
                return None
            if queues[number]:
                return queues[number].popleft()
            longest = max(queues, key=len)
            return longest.pop() if longest else None

    def _ask(self, worker: WorkerProcess, task: Task, forgive: bool) -> dict[str, Any] | Failure:
        kernel = (task.case.op, task.variant)
        if self._hangs[kernel] >= MOST_HANGS and not forgive:
            return Failure(Outcome.TIMEOUT, "hung_before", f"not started: {MOST_HANGS} other cases met their deadline")
        request: dict[str, Any] = {"kind": "check", "op": task.case.op, "case": task.case.id, "variant": task.variant}
        left_s = math.inf if self.until is None else max(0.0, self.until - time.monotonic())
        request |= {"role": self._role, "thorough": True, "off": []}
        answer = worker.ask(request, min(task.deadline_s, left_s), min(START_DEADLINE_S, left_s))
        late = self.until is not None and time.monotonic() >= self.until
        if late and isinstance(answer, Failure) and answer.outcome is Outcome.TIMEOUT:
            return Failure(Outcome.UNAVAILABLE, "time_limit", "under way when --limit-s ended")
        if isinstance(answer, Failure) and answer.outcome is Outcome.TIMEOUT:
            with self._lock:
                self._hangs[kernel] += 1
        return answer

    def kill(self) -> None:
        """End at once; what is under way is lost."""
        self._stop.set()
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        for one in [self._threads.submit(worker.close) for worker in self._workers]:
            one.result()
        self._threads.shutdown()


def _reason(reason: str, metrics: Mapping[str, float] | None) -> str:
    """A reason code, and which law was broken where one was."""
    return " ".join((reason, *(name for name in metrics or {} if name.startswith(BROKEN_LAW))))


@dataclass(frozen=True, slots=True)
class Found:
    """What came of one task."""

    task: Task
    outcome: Outcome
    reason: str
    detail: str
    fields: Mapping[str, Any]

    @staticmethod
    def of(task: Task, answer: dict[str, Any] | Failure) -> Found:
        if isinstance(answer, Failure):
            return Found(task, answer.outcome, answer.reason, answer.detail, {})
        fields = {k: v for k, v in answered(answer).items() if k not in ("environment", "measurements")}
        return Found(task, Outcome(answer["outcome"]), answer["reason"], answer["detail"], fields)

    @property
    def failed(self) -> bool:
        return self.outcome not in EXCUSED

    @property
    def ratio(self) -> float | None:
        """Worst error over budget of what was compared; ``None`` where nothing was."""
        error = self.fields.get("error")
        return None if error is None else float(error.worst_over_budget)

    @property
    def excused(self) -> bool:
        """Whether a trivial kernel would have been right too, for a reason (``vbench.check.trivial_survivors``)."""
        return bool(self.fields.get("metrics", {}).get("degenerate"))

    @property
    def compile_s(self) -> float:
        """What the first launch took beyond a steady one."""
        first, steady = self.fields.get("first_launch_s"), self.fields.get("steady_launch_s")
        return max(0.0, first - steady) if first is not None and steady is not None else 0.0

    @property
    def elapsed_s(self) -> float:
        return float(self.fields.get("elapsed_s", 0.0))

    @property
    def what(self) -> tuple[str, str, str, str]:
        """Its kind of failure: op, variant, outcome and reason, of laws each its own."""
        return self.task.case.op, self.task.variant, str(self.outcome), _reason(self.reason, self.fields.get("metrics"))


def distribution(ratios: Sequence[float]) -> dict[str, float]:
    """Error over budget of what passed: a count a bin (``vbench.tallies.bin_name``; none without a case), the worst."""
    counts = Counter(bin_name(r) for r in ratios)
    found = {name: float(n) for name, n in sorted(counts.items())}
    return found | ({"worst": max(ratios)} if ratios else {})


def round_metrics(found: Sequence[Found], wall_s: float) -> dict[str, float]:
    """Counts and the distribution, of one kernel in one round. ``wall_s`` is of the round, all kernels together."""
    found = [f for f in found if f.outcome is not Outcome.UNAVAILABLE]
    passed = [f for f in found if f.outcome is Outcome.PASSED]
    refused = sum(f.outcome is Outcome.UNSUPPORTED for f in found)
    failed = sum(f.failed for f in found)
    counts = {"cases": len(found), "passed": len(passed), "refused": refused, "failed": failed}
    return {
        **{name: float(n) for name, n in counts.items()},
        "round_wall_s": wall_s,
        "degenerate": float(sum(f.excused for f in found)),
        "compile_s": sum(f.compile_s for f in found),
        "worker_s": sum(f.elapsed_s for f in found),
        **distribution([f.ratio for f in passed if f.ratio is not None]),
    }


@dataclass(slots=True)
class Fuzz:
    """A search on one backend.

    Args:
        run_id, info, device, store: as in ``vbench.runner.Run``.
        pool: its workers.
        environment: of the machine, for records.
        shrink_s: seconds that shrinking one kind of failure may take.
        deadline_s: of a case.
        on_round: called after each round with its number and seconds.
        stored: ids of records that the store has.
    """

    run_id: str
    info: BackendInfo
    device: Device
    store: RunStore
    pool: Pool
    environment: Mapping[str, Any]
    shrink_s: float
    deadline_s: float = DEADLINE_S["check"]
    on_round: Callable[[int, float], None] = lambda number, seconds: None
    stored: set[str] = field(default_factory=set)
    records: list[Record] = field(default_factory=list)
    shrunk: list[Record] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)
    _kinds: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    _slowest_s: float = 0.0

    def take_up(self, kept: Iterable[Record]) -> None:
        """Go on from what an earlier process of the same run stored."""
        for r in kept:
            self.stored.add(r.id)
            self.records.append(r)
            if r.kind == "check":
                self._kinds[r.case.partition("[")[0], r.variant, str(r.outcome), _reason(r.reason, r.metrics)] += 1
                self._seen.add(r.case)

    def tasks(self, target: Target, cases: Iterable[Case]) -> list[Task]:
        """A task a variant for each case not tried before."""
        homes = {frame: number for number, frame in enumerate(target.frames)}
        made: list[Task] = []
        for case in cases:
            if case.id in self._seen:
                continue
            self._seen.add(case.id)
            frame = Frame.of(target.op, case, target.generated.frame) if target.frames else None
            # A draw that breaks a rule on purpose lies in no frame; it is refused wherever it goes.
            home = homes.get(frame, len(made)) if frame is not None else len(made)
            made += [Task(case, variant, home, self.deadline_s) for variant in self.info.variants_of(case.op)]
        return made

    def rounds(self, targets: Sequence[Target], numbers: Iterator[int], seed: int, more: Callable[[], bool]) -> None:
        """Rounds of every target, while ``more()`` says so. Draws one ahead of the workers."""

        def drawn(number: int) -> tuple[int, list[tuple[Target, list[Task]]]]:
            count = cases_of_round(self.device, number)
            return number, [(t, self.tasks(t, t.cases(seed, number, count))) for t in targets]

        following = next(numbers, None)
        ahead = drawn(following) if following is not None else None
        while ahead is not None and more():
            number, asked = ahead
            began = time.monotonic()
            wait = self.pool.start([task for _, tasks in asked for task in tasks])
            following = next(numbers, None)
            ahead = drawn(following) if following is not None else None
            found = [Found.of(f, a) for f, a in zip((t for _, ts in asked for t in ts), wait(), strict=True)]
            wall_s = time.monotonic() - began
            self._account(f"seed={seed},round={number}", {t.op.name: (t.op, t.suite) for t in targets}, found, wall_s)
            self.on_round(number, wall_s)

    def replay(self, target: Target, cases: Sequence[Case], what: str = "regressions") -> None:
        """Cases that nobody draws: what once failed, before all others, or what was asked for."""
        tasks = self.tasks(replace(target, frames=()), cases)
        if tasks:
            began = time.monotonic()
            found = [Found.of(t, a) for t, a in zip(tasks, self.pool.start(tasks)(), strict=True)]
            of = {target.op.name: (target.op, target.suite)}
            self._account(what, of, found, time.monotonic() - began)

    def _account(self, what: str, of: Mapping[str, tuple[Op, str]], found: Sequence[Found], wall_s: float) -> None:
        """Store the failures, shrunk where their kind is new, and then the round: if it is there, it is whole."""
        passed_s = [f.elapsed_s for f in found if f.outcome is Outcome.PASSED]
        self._slowest_s = max([self._slowest_s, *passed_s])
        for f in found:
            # What was not started says nothing of its own case.
            if f.failed and f.reason != "hung_before":
                self._kinds[f.what] += 1
                if self._kinds[f.what] == 1:
                    self._shrunk(of[f.task.case.op][0], f)
                if self._kinds[f.what] <= KEPT:
                    self._keep(f)
        kernels: dict[tuple[str, str], list[Found]] = {}
        for f in found:
            kernels.setdefault((f.task.case.op, f.task.variant), []).append(f)
        for (op, variant), some in kernels.items():
            sources = next((f.fields["sources"] for f in some if f.fields.get("sources")), "")
            failed = any(f.failed for f in some)
            self._store(
                Record(
                    case=f"fuzz[op={op},{what}]",
                    backend=self.info.name,
                    kind="fuzz",
                    outcome=Outcome.WRONG_VALUE if failed else Outcome.PASSED,
                    reason="failures" if failed else "",
                    run=self.run_id,
                    role=self.info.role,
                    variant=variant,
                    suite=FUZZ,
                    metrics=round_metrics(some, wall_s),
                    environment=self.environment,
                    sources=sources,
                    elapsed_s=wall_s,
                )
            )

    def _shrunk(self, op: Op, first: Found) -> None:
        hang = first.outcome is Outcome.TIMEOUT
        deadline_s = min(first.task.deadline_s, HANG_FACTOR * self._slowest_s + HANG_LEAST_S) if hang else None
        last: dict[str, Found] = {first.task.case.id: first}

        def fails(cases: Sequence[Case]) -> list[bool]:
            tasks = [
                Task(c, first.task.variant, number, deadline_s or first.task.deadline_s)
                for number, c in enumerate(cases)
            ]
            found = [Found.of(t, a) for t, a in zip(tasks, self.pool.start(tasks, forgive=True)(), strict=True)]
            last.update({f.task.case.id: f for f in found})
            return [f.what == first.what for f in found]

        left_s = self.shrink_s if self.pool.until is None else self.pool.until - time.monotonic()
        limit_s = min(self.shrink_s, max(0.0, left_s))
        small = shrink(op, first.task.case, fails, width=self.pool.width, most=SHRINK_ATTEMPTS, limit_s=limit_s)
        end = "no step smaller fails" if small.whole else "a limit ended the search"
        f = last[small.case.id]
        note = f"shrunk from {first.task.case.id} in {small.attempts} attempts; {end}"
        self.shrunk.append(self._keep(replace(f, detail=f"{f.detail.rstrip()}\n{note}")))

    def _keep(self, f: Found) -> Record:
        return self._store(
            Record(
                case=f.task.case.id,
                backend=self.info.name,
                kind="check",
                outcome=f.outcome,
                reason=f.reason,
                detail=f.detail,
                run=self.run_id,
                role=self.info.role,
                variant=f.task.variant,
                suite=FUZZ,
                environment=self.environment,
                **f.fields,
            )
        )

    def _store(self, record: Record) -> Record:
        if record.id not in self.stored:
            self.stored.add(record.id)
            self.store.append(record)
            self.records.append(record)
        return record
