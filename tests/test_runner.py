"""Workers: every fault leaves exactly one record a job, and the rest of the run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import plugins
from vbench import registry
from vbench.backend import Device
from vbench.judge import exit_code
from vbench.plan import Job, plan
from vbench.record import Outcome, Record
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE, FP4_LINEAR
from vbench.runner import Failure, Run
from vbench.spec import Suite
from vbench.store import RunStore, read_records

LINEAR = FP4_LINEAR.case(fmt="nvfp4", x="fp32", m=3, n=6, k=32)
SMALL = Suite("small", "two cases", checks=(LINEAR, FP4_DEQUANTIZE.case(fmt="absmax7_row", n=4, k=16, y="fp32")))


def execute(tmp_path: Path, names: list[str], suite: Suite = SMALL, deadline_s: float | None = None) -> list[Record]:
    infos = {n: registry.backends()[n] for n in names}
    jobs = plan([suite], list(infos.values()), ops=registry.ops(), effort="quick", seed=0)
    if deadline_s is not None:
        jobs = tuple(dataclasses.replace(j, deadline_s=deadline_s) if "hang" in j.variant else j for j in jobs)
    store = RunStore(tmp_path / "run", {})
    seen: list[Record] = []
    run = Run("r1", jobs, infos, "cpu", store, lambda claim: ({}, ""), 2, seen.append)
    records = run.execute()
    store.close()
    assert Counter(_key(r) for r in records) == Counter(j.key for j in jobs)
    assert {r.id for r in read_records(store.path)} == {r.id for r in records} == {r.id for r in seen}
    return records


@dataclasses.dataclass(frozen=True)
class Faults:
    """A run of every fault, by two workers that share one queue. Made once, since each death costs a worker's start."""

    records: list[Record]
    asked: list[tuple[int, bool]]
    logs: list[Path]


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    folder = tmp_path_factory.mktemp("faults")
    asked: list[tuple[int, bool]] = []

    def two(self: Run, jobs: Sequence[Job], compiles: bool) -> int:
        asked.append((len(jobs), compiles))
        return 2

    with pytest.MonkeyPatch.context() as patch:
        plugins.install(folder, patch, "faulty", plugins.FAULTY)
        patch.setattr(Run, "_workers_for", two)
        records = execute(folder, ["faulty"], deadline_s=2.0)
    return Faults(records, asked, sorted((folder / "run").glob("faulty*.log")))


def test_two_workers_share_a_backends_checks(faults: Faults) -> None:
    assert (len([r for r in faults.records if r.backend == "faulty"]), False) in faults.asked
    assert len(faults.logs) == 2


@pytest.mark.parametrize(
    ("device", "compiles", "jobs", "workers"),
    [
        ("cpu", False, 9999, 1),
        ("cuda", False, 59, 1),
        ("cuda", False, 240, 4),
        ("cuda", False, 9999, 8),
        ("cpu", True, 25, 2),
        ("cpu", True, 9999, 8),
        ("cuda", True, 0, 1),
    ],
)
def test_more_workers_where_compilation_keeps_a_gpu_waiting(
    tmp_path: Path, device: Device, compiles: bool, jobs: int, workers: int
) -> None:
    with contextlib.closing(RunStore(tmp_path / "run", {})) as store:
        run = Run("r1", (), {}, device, store, lambda claim: ({}, ""), 8, print)
        job = Job("check", "s", "c", "o", "b", "", "own", 1.0)
        assert run._workers_for([job] * jobs, compiles) == workers


@pytest.mark.parametrize(("device", "timing"), [("cpu", 2), ("cuda", 0)])
def test_workers_side_by_side_share_the_cores_and_one_alone_beside_a_gpu_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device, timing: int
) -> None:
    threads: list[int] = []

    class Worker:
        def __init__(self, info: object, place: str, log: Path, given: int) -> None:
            threads.append(given)

        def ask(self, request: dict[str, Any], deadline_s: float) -> Failure:
            return Failure(Outcome.CRASHED, "exit_1", "")

        def close(self) -> None:
            pass

        kill = end = close

    monkeypatch.setattr("vbench.runner.WorkerProcess", Worker)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    jobs = [Job(kind, "s", f"c[n={kind}]", "c", "b", "", "own", 1.0) for kind in ("check", "time")]
    with contextlib.closing(RunStore(tmp_path / "run", {})) as store:
        Run("r1", jobs, {}, device, store, lambda claim: ({}, ""), 4, lambda record: None).execute()
    assert threads == [2, timing]


def _key(record: Record) -> tuple[str, str, str, str]:
    return record.kind, record.case, record.backend, record.variant


def test_every_fault_leaves_one_record_and_the_rest_goes_on(faults: Faults) -> None:
    records = faults.records
    found = {r.variant: r for r in records if r.kind == "check"}
    assert {v: r.outcome.value for v, r in found.items()} == plugins.FAULTS
    assert found["segfault"].reason == "signal_11"
    assert found["exit0"].reason == "exit_0"
    assert found["refuses"].reason == "because"
    assert found["raises"].reason == "RuntimeError"
    assert exit_code(records, (), strict=False)[0] == 1


def test_a_hang_costs_two_deadlines_an_op_not_one_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = plugins.FAULTY.replace(repr(tuple(plugins.FAULTS)), "('hang', 'zeros')")
    plugins.install(tmp_path, monkeypatch, "faulty", code)
    cases = [FP4_LINEAR.case(fmt="nvfp4", x="fp32", m=m, n=6, k=32) for m in (1, 2, 3, 4, 5, 0)]
    records = execute(tmp_path, ["faulty"], Suite("hangs", "six cases, the last refused", checks=tuple(cases)), 1.0)
    found = [(r.outcome.value, r.reason) for r in records if r.kind == "check" and r.variant == "hang"]
    assert found == [("TIMEOUT", "deadline")] * 2 + [("TIMEOUT", "hung_before")] * 3 + [("UNSUPPORTED", "zero_size")]
    others = [r.outcome.value for r in records if r.kind == "check" and r.variant == "zeros"]
    assert others == ["WRONG_VALUE"] * 5 + ["UNSUPPORTED"]  # another kernel's hangs are not held against it


def test_a_stranger_is_planned_checked_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.install(tmp_path, monkeypatch, "honest", plugins.HONEST)
    assert registry.backends()["honest"].distribution == "plugin_honest"
    command = [
        "run",
        "--suite",
        "fp4",
        "--backend",
        "honest",
        "--op",
        "fp4_dequantize",
        "--device",
        "cpu",
        "--json",
        "--out",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "vbench", *command, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert set(body["outcomes"]) <= {"PASSED", "UNSUPPORTED", "UNAVAILABLE"}
    checks = [r for r in read_records(Path(body["records"])) if r.kind == "check" and r.backend == "honest"]
    assert sum(r.outcome is Outcome.PASSED for r in checks) >= 5


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise ValueError('no')", "import_error"),
        ("raise SystemExit(0)", "import_error"),
        ("import os; os._exit(0)", "crashed_on_load"),
        ("import ctypes; ctypes.string_at(0)", "crashed_on_load"),
        ("print('hello'); BACKEND = None", "prints_to_stdout"),
        ("import os; os.write(1, b'hello\\n'); BACKEND = None", "prints_to_stdout"),
        ("BACKEND = object()", "not_a_backend"),
        ("x = 1", "import_error"),
    ],
)
def test_a_broken_plugin_is_unavailable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, problem: str
) -> None:
    plugins.install(tmp_path, monkeypatch, "broken", code)
    assert registry.backends()["broken"].problem == problem
    records = execute(tmp_path, ["broken"], Suite("none", "no case"))
    (record,) = [r for r in records if r.backend == "broken"]
    assert (record.outcome, record.reason) == (Outcome.UNAVAILABLE, problem)
    judged = Record(LINEAR.id, "another", "check", Outcome.PASSED, "r1")
    assert exit_code([*records, judged], (), strict=False)[0] == 0


@pytest.mark.parametrize("mode", ["native", "interpreted", "simulated"])
def test_cases_too_large_for_an_interpreter_are_counted_and_left_to_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The control is a backend that computes natively: it is asked for such a case too."""
    asked: list[str] = []

    class Worker:
        def __init__(self, *_: object) -> None:
            pass

        def ask(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
            asked.append(request.get("case", ""))
            body = dict.fromkeys(("error", "metrics", "prepare_s", "peak_bytes", "numerics", "environment"))
            return {
                **body, "outcome": "PASSED", "reason": mode if request["kind"] == "probe" else "", "detail": "",
                "measurements": [], "sources": "", "elapsed_s": 0.1,
            }  # fmt: skip

        def close(self) -> None:
            pass

        kill = end = close

    monkeypatch.setattr("vbench.runner.WorkerProcess", Worker)
    plugins.install(tmp_path, monkeypatch, "honest", plugins.HONEST)
    large, small = (FP4_DEQUANTIZE.case(fmt="nvfp4", n=n, k=32) for n in (64, 1))
    suite = Suite("native", "one large, one small", checks=(large, small), native=frozenset({large}))
    records = execute(tmp_path, ["honest"], suite)
    found = {r.case: r.label for r in records if r.kind == "check"}
    left = "PASSED" if mode == "native" else "UNAVAILABLE(needs_cuda)"
    assert found == {large.id: left, small.id: "PASSED"}
    # Once by the trivial kernels, whatever the mode; once by the backend.
    assert (asked.count(large.id), asked.count(small.id)) == (2 if mode == "native" else 1, 2)


def test_a_second_claimant_of_a_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.install(tmp_path, monkeypatch, "honest", plugins.HONEST, entry="triton", dist="impostor")
    found = registry.backends()
    assert found["triton"].distribution == registry.OWN_DISTRIBUTION
    assert found["triton@impostor"].problem == "duplicate_name"


def test_a_failed_probe_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = plugins.FAULTY.replace("return Availability(usable=True)", "os._exit(7)")
    plugins.install(tmp_path, monkeypatch, "faulty", code)
    began = time.monotonic()
    records = [r for r in execute(tmp_path, ["faulty"]) if r.backend == "faulty"]
    assert {(r.outcome, r.reason) for r in records} == {(Outcome.CRASHED, "exit_7")}
    assert len(records) == 1 + len(plugins.FAULTS)
    assert time.monotonic() - began < 60


def test_interrupt_keeps_every_finished_record(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vbench", "run", "--suite", "fp4", "--backend", "torch", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        files = list(tmp_path.glob("*/records.jsonl"))
        if files and files[0].read_text().count('"kind": "check"') >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    kept = read_records(files[0])
    assert sum(r.kind == "check" for r in kept) >= 3


def test_jobs_are_unique_and_pure() -> None:
    infos = [registry.backends()["torch"]]
    suites = list(registry.suites().values())
    jobs = plan(suites, infos, ops=registry.ops(), effort="quick", seed=3)
    assert len({j.key for j in jobs}) == len(jobs)
    assert jobs == plan(suites, infos, ops=registry.ops(), effort="quick", seed=3)
    assert jobs != plan(suites, infos, ops=registry.ops(), effort="quick", seed=4)
    assert all(isinstance(j, Job) and j.deadline_s > 0 for j in jobs)


def test_unwritable_results_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "vbench", "run", "--suite", "tier", "--backend", "torch", "--out", str(blocked)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert "results folder" in done.stderr and "--out" in done.stderr
