"""Runs jobs in warm worker processes, one a backend; every job leaves exactly one record, whatever the kernel does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vbench import environment
from vbench.backend import Device, Place
from vbench.errors import DataError
from vbench.plan import ARITHMETIC, BATTERY, DEADLINE_S, Job, is_compile
from vbench.record import ErrorStats, Measurement, Outcome, Record
from vbench.registry import OWN_DISTRIBUTION, BackendInfo, ops
from vbench.store import Key, RunStore

#: Limit of a worker's start (interpreter, torch, loading the backend), which is no job's own time.
START_DEADLINE_S = 120.0

#: A job that was in flight when the harness was killed may be begun this often; it may be what killed it.
MOST_STARTS = 2

#: A kernel that met its deadline on this many cases of an op is not started on the others: each would cost a deadline.
MOST_HANGS = 2


#: A further worker starts for so many compilations: its own start costs as much as some of them.
COMPILATIONS_A_WORKER = 10
CHECKS_A_WORKER = 60
PROBE_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Failure:
    """The worker did not answer."""

    outcome: Outcome
    reason: str
    detail: str


class WorkerProcess:
    """A worker, started on first use and again after it died. ``threads``: torch's on the host; 0 leaves it its own."""

    def __init__(
        self,
        info: BackendInfo | None,
        place: Place,
        log: Path,
        threads: int,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._name = BATTERY if info is None else info.name
        self._distribution = OWN_DISTRIBUTION if info is None else info.distribution
        self._extra = {} if info is None else dict(info.environment.get(place, {}))
        self._extra |= variables or {}
        self._place = place
        self._log = log
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._ready = False
        self._ended = False
        self._starting = threading.Lock()

    def begin(self) -> None:
        """Start the process now and do not wait for it; the first request will, for what is left of its start."""
        with self._starting:
            if self._process is None and not self._ended:
                self._start()

    def _start(self) -> None:
        env = {**os.environ, **self._extra, "VBENCH_WORKER_THREADS": str(self._threads), "PYTHONUNBUFFERED": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vbench.worker", self._name, self._distribution, self._place],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env,
                start_new_session=True,
            )
        self._buffer = b""
        self._ready = False

    def ask(
        self, request: Mapping[str, Any], deadline_s: float, start_s: float = START_DEADLINE_S
    ) -> dict[str, Any] | Failure:
        """Send one job and wait for its answer; kill the whole process group at the deadline.

        Args:
            deadline_s: of the job.
            start_s: of the worker's start, where it is not running yet.
        """
        self.begin()
        if self._process is None:
            return Failure(Outcome.CRASHED, "ended", "the worker was ended for good and starts no more")
        if not self._ready:
            ready = self._read_line(start_s)
            if isinstance(ready, Failure):
                return Failure(ready.outcome, f"start_{ready.reason}", ready.detail)
            self._ready = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._gone()
        line = self._read_line(deadline_s)
        if isinstance(line, Failure):
            return line
        answer: dict[str, Any] = json.loads(line)
        if answer.pop("dead", False):
            self.kill()
        return answer

    def _read_line(self, deadline_s: float) -> bytes | Failure:
        process = self._process
        assert process is not None and process.stdout is not None
        limit = time.monotonic() + deadline_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, limit - time.monotonic()))
            if not ready:
                self.kill()
                return Failure(Outcome.TIMEOUT, "deadline", f"no answer within {deadline_s:g} s; killed")
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                return self._gone()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _gone(self) -> Failure:
        process = self._process
        assert process is not None
        code = process.wait()
        self.kill()
        tail = self._log.read_bytes()[-400:].decode(errors="replace").strip()
        if code < 0:
            name = signal.strsignal(-code) or "an unknown signal"
            return Failure(Outcome.CRASHED, f"signal_{-code}", f"the worker died by {name}; log ends: {tail}")
        return Failure(Outcome.CRASHED, f"exit_{code}", f"the worker ended with code {code}; log ends: {tail}")

    def kill(self) -> None:
        """End the worker and everything it started, at once. May be called from another thread."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def end(self) -> None:
        """As ``kill``, for good and without waiting: who holds tens of GB of pinned memory takes seconds to die.

        ``close`` or the thread that waits for an answer takes leave of the process.
        """
        with self._starting:
            self._ended = True
            process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let the worker end by itself; kill it if it does not."""
        process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        self.kill()


@dataclass(slots=True)
class Run:
    """One execution of a plan.

    Args:
        run_id: goes into each record.
        jobs: what to do, in order.
        infos: backends by name.
        device: where.
        store: where records go.
        arithmetic: claim id -> (metrics, digest of what was computed), for kind ``arithmetic``.
        parallel: workers at a time while nothing is being timed.
        on_record: called after each record is stored (progress).
        kept: records that an earlier, unfinished process of the same run stored; their jobs are not run again.
        starts: how often a job was begun by such a process; see ``MOST_STARTS``.
    """

    run_id: str
    jobs: Sequence[Job]
    infos: Mapping[str, BackendInfo]
    device: Device
    store: RunStore
    arithmetic: Callable[[str], tuple[Mapping[str, float], str]]
    parallel: int
    on_record: Callable[[Record], None]
    kept: Sequence[Record] = ()
    starts: Mapping[Key, int] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    _in_flight: set[Key] = field(default_factory=set)
    _verified: set[tuple[str, bool]] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _workers: set[WorkerProcess] = field(default_factory=set)
    _probes: dict[tuple[str, bool], Record] = field(default_factory=dict)
    _hangs: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def execute(self) -> list[Record]:
        """Run everything. Checks first, several backends side by side; then timing, alone on the machine.

        Raises:
            KeyboardInterrupt: after killing the workers; every finished record is stored.
            DataError: the store refused a record, or this is not the machine that the kept records are from.
        """
        self.records = list(self.kept)
        self._probes = {(r.backend, is_compile(r.kind, r.case)): r for r in self.kept if r.kind == "probe"}
        self._hangs = Counter(_kernel(r) for r in self.kept if _hung(r))
        done = {(r.kind, r.case, r.backend, r.variant) for r in self.kept}
        checks: dict[tuple[str, bool], list[Job]] = {}
        times: dict[str, list[Job]] = {}
        for job in self.jobs:
            if job.key in done:
                continue
            if job.kind == "time":
                times.setdefault(job.backend, []).append(job)
            else:
                checks.setdefault((job.backend, job.compiles), []).append(job)
        try:
            with self._phase("checks", bool(checks)), ThreadPoolExecutor(max_workers=self.parallel) as pool:
                # Long lists first, so that no backend is left alone at the end.
                ordered = sorted(checks.items(), key=lambda item: -len(item[1]))
                futures = [
                    pool.submit(self._backend, name, queue, compiles, number)
                    for (name, compiles), jobs in ordered
                    for queue in [iter(jobs)]
                    for number in range(self._workers_for(jobs, compiles))
                ]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    self._abort()
                    raise
            with self._phase("timing", bool(times)):
                # Ours first: of a run that is cut off they are worth most.
                for name, jobs in sorted(times.items(), key=lambda item: item[1][0].role != "own"):
                    self._backend(name, iter(jobs), alone=True)
        except BaseException:
            self._abort()
            raise
        if len(self.records) != len(self.jobs):
            raise AssertionError(f"{len(self.jobs)} jobs left {len(self.records)} records")
        return self.records

    @contextlib.contextmanager
    def _phase(self, name: str, anything: bool) -> Iterator[None]:
        """Note how long a phase takes, however it ends; one without jobs is none."""
        if not anything:
            yield
            return
        self.store.phase(name)
        began = time.monotonic()
        try:
            yield
        finally:
            # A failing disk may be why it ends, and must not hide the first error.
            with contextlib.suppress(DataError):
                self.store.phase(name, time.monotonic() - began)

    def _abort(self) -> None:
        """End every worker. First, and before anything that may take long, their jobs are withdrawn: whoever waits for
        us may lose patience and kill us too, and the jobs would count as begun.
        """
        with self._lock:
            self._stop.set()
            workers = list(self._workers)
            in_flight, self._in_flight = self._in_flight, set()
        # The workers end with us and for our reasons, so that no job of theirs is to blame. A failing disk may be why
        # we end, and must not hide the first error; the job then counts as begun, which costs it one try.
        with contextlib.suppress(DataError):
            for key in sorted(in_flight):
                self.store.withdrawn(key)
        for worker in workers:
            worker.end()

    def _workers_for(self, jobs: Sequence[Job], compiles: bool) -> int:
        """How many workers take these jobs from one queue: what keeps a GPU's checks waiting is compilation on the
        host, one core a worker. On a CPU the other backends fill the cores.
        """
        if not compiles and self.device == "cpu":
            return 1
        return max(1, min(self.parallel, len(jobs) // (COMPILATIONS_A_WORKER if compiles else CHECKS_A_WORKER)))

    def _backend(
        self, name: str, jobs: Iterator[Job], compiles: bool = False, number: int = 0, alone: bool = False
    ) -> None:
        """Jobs of one backend in a warm worker, until ``jobs`` is empty; several workers may take from it.

        Workers side by side share the cores. One that is ``alone`` beside a GPU has them all: what it times on the host
        (a peer's NumPy, a decomposition) is meant to use them.

        The first job of a shared queue is the probe, and the others wait for its record.
        """
        threads = 0 if alone and self.device == "cuda" else max(1, (os.cpu_count() or 1) // self.parallel)
        probed = any(job.kind == "probe" and (job.backend, job.compiles) == (name, compiles) for job in self.jobs)
        log = self.store.folder / f"{name.replace('/', '_')}{'.compile' if compiles else ''}{number or ''}.log"
        worker = WorkerProcess(self.infos.get(name), "compile" if compiles else self.device, log, threads)
        with self._lock:
            self._workers.add(worker)
        try:
            for job in jobs:
                while probed and job.kind != "probe" and (name, compiles) not in self._probes:
                    if self._stop.wait(PROBE_POLL_S):
                        return
                if self._stop.is_set():
                    return
                self._finish(self._one(worker, job))
        except BaseException:
            # Before ``close``, which waits for a worker that is busy; and whoever waits for a probe that will not come
            # must not wait for ever.
            self._abort()
            raise
        finally:
            worker.close()
            with self._lock:
                self._workers.discard(worker)

    def _same_machine(self, worker: WorkerProcess, name: str, compiles: bool) -> None:
        """A resumed backend must be usable as its kept probe says: records of one run share one environment."""
        probes = (r for r in self.kept if r.kind == "probe" and r.backend == name)
        kept = next((r for r in probes if is_compile(r.kind, r.case) == compiles), None)
        if kept is None or kept.outcome is not Outcome.PASSED or (name, compiles) in self._verified:
            return
        self._verified.add((name, compiles))
        answer = worker.ask({"kind": "probe"}, DEADLINE_S["probe"])
        if isinstance(answer, Failure):
            raise DataError(f"resume: backend {name} was usable and now its probe ends in {answer.reason}")
        # Through JSON and back, as the kept one went.
        now = json.loads(json.dumps([answer["outcome"], answer["reason"], answer.get("environment") or {}]))
        then = json.loads(json.dumps([kept.outcome, kept.reason, dict(kept.environment)]))
        if now != then:
            old, new = then[2], now[2]
            keys = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
            words = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in keys) or f"{then[:2]} now {now[:2]}"
            raise DataError(f"resume: backend {name} stands on another environment ({words}); start a new run")

    def _finish(self, record: Record) -> None:
        if self._stop.is_set():
            return
        self.store.append(record)
        with self._lock:
            self._in_flight.discard((record.kind, record.case, record.backend, record.variant))
            self.records.append(record)
            if record.kind == "probe":
                self._probes[record.backend, is_compile(record.kind, record.case)] = record
            if _hung(record):
                self._hangs[_kernel(record)] += 1
        self.on_record(record)

    def _one(self, worker: WorkerProcess, job: Job) -> Record:
        if job.backend == ARITHMETIC:
            metrics, digest = self.arithmetic(job.case)
            return self._record(job, Outcome.PASSED, metrics=metrics, sources=digest)
        info = self.infos.get(job.backend)
        if info is not None and info.problem:
            return self._record(job, Outcome.UNAVAILABLE, info.problem, info.detail)
        probe = self._probes.get((job.backend, job.compiles))
        if probe is not None and probe.outcome is not Outcome.PASSED:
            return self._record(job, probe.outcome, probe.reason, probe.detail)
        if job.kind == "time" and self.device != "cuda" and job.device == "cuda":
            detail = "timed on a GPU only; run it on a machine with CUDA"
            return self._record(job, Outcome.UNAVAILABLE, "needs_cuda", detail)
        if job.kind == "time" and probe is not None and probe.reason != "native":
            detail = f"{probe.reason} here: run for its meaning, never for its speed"
            return self._record(job, Outcome.UNAVAILABLE, "needs_cuda", detail)
        if job.native and probe is not None and probe.reason != "native":
            detail = f"{probe.reason} here, and the case is too large for that; checked on a GPU"
            return self._record(job, Outcome.UNAVAILABLE, "needs_cuda", detail)
        request: dict[str, Any] = {
            "kind": job.kind,
            "op": job.op,
            "case": job.case,
            "variant": job.variant,
            "role": job.role,
        }
        if job.thorough:
            request |= {"thorough": True, "off": list(job.off)}
        if self.starts.get(job.key, 0) >= MOST_STARTS:
            detail = (
                f"begun {self.starts[job.key]} times, and each time the run was killed before it ended; not tried again"
            )
            return self._record(job, Outcome.CRASHED, "in_flight_when_killed", detail)
        if self._hangs[_kernel(job)] >= MOST_HANGS and not _rejected(job):
            detail = f"not started: {MOST_HANGS} other cases of {job.op} met their deadline in this run"
            return self._record(job, Outcome.TIMEOUT, "hung_before", detail)
        self._same_machine(worker, job.backend, job.compiles)
        with self._lock:
            if self._stop.is_set():
                return self._record(job, Outcome.CRASHED, "ended", "never stored: the run was ended before this began")
            self._in_flight.add(job.key)
        self.store.started(job.key)
        answer = worker.ask(request, job.deadline_s)
        if isinstance(answer, Failure):
            return self._record(job, answer.outcome, answer.reason, answer.detail)
        return self._record(job, Outcome(answer["outcome"]), answer["reason"], answer["detail"], **answered(answer))

    def _record(self, job: Job, outcome: Outcome, reason: str = "", detail: str = "", **rest: Any) -> Record:
        env = rest.pop("environment", None)
        if env is None:
            probe = self._probes.get((job.backend, job.compiles))
            env = probe.environment if probe is not None and probe.environment else environment.describe("cpu")
        return Record(
            case=job.case,
            backend=job.backend,
            kind=job.kind,
            outcome=outcome,
            run=self.run_id,
            role=job.role,
            variant=job.variant,
            suite=job.suite,
            reason=reason,
            detail=detail,
            source=job.source,
            environment=env,
            **rest,
        )


def no_arithmetic(claim: str) -> tuple[Mapping[str, float], str]:
    """For runs whose jobs all launch something. Raises AssertionError: such a run was planned wrongly."""
    raise AssertionError(f"{claim}: this run has no arithmetic")


def answered(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker found, as the fields of a Record besides outcome, reason and detail."""
    error = answer["error"]
    return {
        "error": ErrorStats(**{**error, "at": tuple(error["at"])}) if error else None,
        "measurements": tuple(Measurement.from_dict(m) for m in answer["measurements"]),
        "metrics": answer["metrics"] or {},
        "prepare_s": answer["prepare_s"],
        "first_launch_s": answer.get("first_launch_s"),
        "steady_launch_s": answer.get("steady_launch_s"),
        "peak_bytes": answer["peak_bytes"],
        "peak_device_bytes": answer.get("peak_device_bytes"),
        "absent": answer.get("absent") or {},
        "numerics": answer["numerics"] or {},
        "choice": answer.get("choice") or {},
        "sources": answer["sources"],
        "elapsed_s": answer["elapsed_s"],
        "environment": answer.get("environment") or None,
    }


def detect_device() -> Device:
    """``cuda`` if torch can use a GPU, asked in a child process so that the harness itself needs no torch."""
    if not any(Path("/dev").glob("nvidia*")) and not Path("/dev/dxg").exists():
        return "cpu"
    code = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=300)
    return "cuda" if done.returncode == 0 else "cpu"


def _hung(record: Record) -> bool:
    return record.outcome is Outcome.TIMEOUT and record.reason == "deadline"


def _kernel(job: Job | Record) -> tuple[str, str, str]:
    """Backend, variant and op (for a compilation, the op it serves): what hangs together."""
    return job.backend, job.variant, job.case.partition("," if job.kind == "compile" else "[")[0]


def _rejected(job: Job) -> bool:
    """Whether the op refuses the case, so that nothing would be launched."""
    op = ops().get(job.op)
    return op is not None and op.reject(op.parse(job.case)) is not None
