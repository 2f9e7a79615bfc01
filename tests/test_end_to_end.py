"""One whole `vbench run --suite all` on the CPU: conformance of every backend, claims decided, exit code 0."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vbench import registry
from vbench.record import EXCUSED, Record
from vbench.report import LAST_SCREEN_LINES, last_screen
from vbench.store import read_records

OWN = ("torch", "triton", "numba_cuda", "tiers")
#: Ops that illustrate a remark of the document and have a handful of fixed cases.
REMARKS = ("svd", "elementwise_chain")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Record]]:
    out = tmp_path_factory.mktemp("runs")
    # All but the ahead-of-time gate, which `make gate` runs.
    chosen = [part for name, suite in registry.suites().items() if not suite.compiles for part in ("--suite", name)]
    command = ["run", *chosen, "--device", "cpu", "--json", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "vbench", *command], capture_output=True, text=True, check=False, timeout=1200
    )
    body: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == body["exit"] == 0, (body["reasons"], done.stderr[-2000:])
    return body, read_records(Path(body["records"]))


def test_every_job_left_one_record(run: tuple[dict[str, Any], list[Record]]) -> None:
    body, records = run
    assert len(records) == body["jobs"]


@pytest.mark.parametrize("backend", OWN)
def test_own_backends_conform(run: tuple[dict[str, Any], list[Record]], backend: str) -> None:
    mine = [r for r in run[1] if r.backend == backend and r.kind == "check"]
    assert [(r.case, r.outcome.value, r.detail) for r in mine if r.outcome not in EXCUSED] == []
    per_op = Counter(r.case.partition("[")[0] for r in mine if r.outcome == "PASSED")
    few = {op: count for op, count in per_op.items() if count < (3 if op in REMARKS else 10)}
    assert per_op and not few, few


def test_the_trivial_kernels_fail_everywhere(run: tuple[dict[str, Any], list[Record]]) -> None:
    battery = [r for r in run[1] if r.kind == "battery"]
    assert len(battery) >= 200
    assert [r.case for r in battery if r.outcome not in EXCUSED] == []
    degenerate = [r for r in battery if r.reason == "degenerate"]
    assert degenerate and all(r.detail for r in degenerate)
    assert len(degenerate) < len(battery) / 5


def test_bad_kernel_input_is_unsupported_everywhere(run: tuple[dict[str, Any], list[Record]]) -> None:
    reasons = {r.reason for r in run[1] if r.kind == "check" and r.outcome == "UNSUPPORTED"}
    assert reasons >= {"k_odd", "k_not_multiple_of_block", "zero_size", "nonfinite_weight", "heads_not_multiple"}


def test_timing_rows_of_gpu_backends_are_counted_not_dropped(run: tuple[dict[str, Any], list[Record]]) -> None:
    timed = [r for r in run[1] if r.kind == "time" and r.backend in ("triton", "numba_cuda")]
    assert timed and {(r.outcome.value, r.reason) for r in timed} == {("UNAVAILABLE", "needs_cuda")}


def test_at_least_fifteen_claims_are_decided_from_this_run(run: tuple[dict[str, Any], list[Record]]) -> None:
    decided = [
        c["id"]
        for c in run[0]["claims"]
        if any(c[side] and c[side]["verdict"] in ("SUPPORTED", "REFUTED") for side in ("as_stated", "restated"))
    ]
    assert len(decided) >= 15
    waiting = [c for c in run[0]["claims"] if c["restated"] and c["restated"]["reason"] == "needs_cuda"]
    assert waiting, "claims that need a GPU must say so"


def test_the_last_screen_fits(run: tuple[dict[str, Any], list[Record]]) -> None:
    screen = last_screen(
        run_id="r",
        records=run[1],
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
