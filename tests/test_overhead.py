"""The harness's own cost per job, measured by pytest-benchmark. Shown, never decisive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vbench import registry
from vbench.plan import plan
from vbench.record import Outcome, Record
from vbench.runner import WorkerProcess
from vbench.store import RunStore

QUICK: dict[str, Any] = {"rounds": 20, "warmup_rounds": 2}


def test_overhead_of_storing_a_record(benchmark: Any, tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run", {})
    numbers = iter(range(10**6))

    def append() -> None:
        store.append(Record(f"c{next(numbers)}", "b", "check", Outcome.PASSED, "r"))

    benchmark.pedantic(append, **QUICK)
    store.close()


def test_overhead_of_a_job_in_a_warm_worker(benchmark: Any, tmp_path: Path) -> None:
    case = registry.suites()["fp4"].checks[0]
    worker = WorkerProcess(registry.backends()["torch"], "cpu", tmp_path / "log", 1)
    request = {"kind": "check", "op": case.op, "case": case.id, "variant": "", "role": "own"}
    answer = benchmark.pedantic(lambda: worker.ask(request, 60.0), **QUICK)
    worker.close()
    assert answer["outcome"] == "PASSED"


def test_overhead_of_planning(benchmark: Any) -> None:
    suites, infos = list(registry.suites().values()), list(registry.backends().values())
    jobs = benchmark.pedantic(
        lambda: plan(suites, infos, ops=registry.ops(), effort="quick", seed=0), rounds=3, warmup_rounds=1
    )
    assert jobs
