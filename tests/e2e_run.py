"""What a whole `make run` on a CPU left behind: conformance of every backend, claims decided, every job one record.

Not collected by default: it reads the newest run in results/runs, which takes minutes to make. ``.ci/run`` makes it and
then runs this by name.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from vbench import registry
from vbench.commands import current_sources, find_run, ledgers
from vbench.judge import ClaimVerdict, exit_code, judge
from vbench.record import EXCUSED, Record
from vbench.report import LAST_SCREEN_LINES, last_screen
from vbench.store import phase_walls, read_records, read_summary

OWN = ("torch", "triton", "numba_cuda", "tiers")
#: Ops that illustrate a remark of the document and have a handful of fixed cases.
REMARKS = ("svd", "elementwise_chain")


@pytest.fixture(scope="module")
def folder() -> Path:
    found = find_run("latest", Path("results/runs"))
    summary = read_summary(found)
    whole = {name for name, suite in registry.suites().items() if not suite.compiles}
    assert whole <= {*summary["suites"]} and summary["device"] == "cpu", f"{found} is no whole CPU run; first: make run"
    return found


@pytest.fixture(scope="module")
def records(folder: Path) -> list[Record]:
    return read_records(folder)


@pytest.fixture(scope="module")
def verdicts(records: list[Record]) -> list[ClaimVerdict]:
    now = current_sources()
    return [v for book in ledgers().values() for v in judge(book, records, current_sources=now)]


def test_nothing_contradicts_what_was_reviewed(records: list[Record], verdicts: list[ClaimVerdict]) -> None:
    assert exit_code(records, verdicts, strict=False)[0] == 0


def test_every_job_left_one_record(folder: Path, records: list[Record]) -> None:
    assert len(records) == read_summary(folder)["jobs"]
    walls, unfinished = phase_walls(folder)
    assert set(walls) == {"checks", "timing"} and not unfinished


@pytest.mark.parametrize("backend", OWN)
def test_own_backends_conform(records: list[Record], backend: str) -> None:
    mine = [r for r in records if r.backend == backend and r.kind == "check"]
    assert [(r.case, r.outcome.value, r.detail) for r in mine if r.outcome not in EXCUSED] == []
    per_op = Counter(r.case.partition("[")[0] for r in mine if r.outcome == "PASSED")
    few = {op: count for op, count in per_op.items() if count < (3 if op in REMARKS else 10)}
    assert per_op and not few, few


def test_the_trivial_kernels_fail_everywhere(records: list[Record]) -> None:
    battery = [r for r in records if r.kind == "battery"]
    assert len(battery) >= 200
    assert [r.case for r in battery if r.outcome not in EXCUSED] == []
    degenerate = [r for r in battery if r.reason == "degenerate"]
    assert degenerate and all(r.detail for r in degenerate)
    assert len(degenerate) < len(battery) / 5


def test_bad_kernel_input_is_unsupported_everywhere(records: list[Record]) -> None:
    reasons = {r.reason for r in records if r.kind == "check" and r.outcome == "UNSUPPORTED"}
    assert reasons >= {"k_odd", "k_not_multiple_of_block", "zero_size", "nonfinite_weight", "heads_not_multiple"}


def test_timing_rows_of_gpu_backends_are_counted_not_dropped(records: list[Record]) -> None:
    timed = [r for r in records if r.kind == "time" and r.backend in ("triton", "numba_cuda")]
    assert timed and {(r.outcome.value, r.reason) for r in timed} == {("UNAVAILABLE", "needs_cuda")}


def test_at_least_fifteen_claims_are_decided_from_this_run(verdicts: list[ClaimVerdict]) -> None:
    sides = [[side.to_dict() for side in (v.stated, v.restated) if side is not None] for v in verdicts]
    decided = [both for both in sides if any(side["verdict"] in ("SUPPORTED", "REFUTED") for side in both)]
    assert len(decided) >= 15
    waiting = [v for v in verdicts if v.restated is not None and v.restated.to_dict()["reason"] == "needs_cuda"]
    assert waiting, "claims that need a GPU must say so"


def test_the_last_screen_fits(records: list[Record]) -> None:
    screen = last_screen(
        run_id="r",
        records=records,
        verdicts=(),
        code=0,
        reasons=(),
        where="here",
        elapsed_s=1.0,
        device="cpu",
    )
    assert len(screen.splitlines()) <= LAST_SCREEN_LINES
    for word in ("outcomes", "claims", "battery", "worst", "slowest", "not run", "records", "next"):
        assert word in screen
