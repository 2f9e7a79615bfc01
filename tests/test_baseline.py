"""A baseline holds what the documents rest on, no more than a person reviews, and changes only when told to."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tests.test_roofline import MEASURED
from vbench import baseline
from vbench.cli import main
from vbench.record import Measurement, Outcome, Record
from vbench.store import read_records, write_records

TABLE = (
    "<!-- vbench:table ratio quantity=time.graph backend=triton over=torch_native[cublas_bf16] op=fp4_linear "
    "fmt=nvfp4 rows=fmt cols=m hardware=sm_90 -->\n<!-- /vbench -->\n"
)


def timed(backend: str, variant: str, m: int, fmt: str = "nvfp4", run: str = "r", seconds: float = 1e-6) -> Record:
    return Record(
        case=f"fp4_linear[fmt={fmt},x=bf16,act=none,bias=0,dist=normal,m={m},n=64,k=64]",
        backend=backend,
        variant=variant,
        kind="time",
        outcome=Outcome.PASSED,
        run=run,
        role="own" if backend == "triton" else "peer",
        suite="fp4",
        measurements=(Measurement("graph", (seconds,)),),
        environment={"hardware": "sm_90"},
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records = [timed(b, v, m) for m in (1, 16) for b, v in (("triton", ""), ("torch_native", "cublas_bf16"))]
    records += [timed("triton", "", 1, "absmax7_row"), timed("numba_cuda", "", 1)]
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    return path


def update(destination: Path, runs: list[Path], documents: list[Path], *more: str) -> int:
    named = ["--document", *map(str, documents)] if documents else []
    return main(["baseline", "update", *map(str, runs), "--baseline", str(destination), *named, *more])


def test_only_the_evidence_is_kept(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "doc.md"
    document.write_text(TABLE, encoding="utf-8")
    destination = tmp_path / "baselines" / "h200"
    assert update(destination, [run], [document]) == 0
    assert not destination.exists(), "nothing is written before it is reviewed"
    assert "add --write" in capsys.readouterr().out
    assert update(destination, [run], [document], "--write") == 0
    kept = read_records(destination)
    assert {(r.backend, r.case.count("nvfp4")) for r in kept} == {("triton", 1), ("torch_native", 1)}
    assert kept == [r for r in read_records(run) if r.id in {k.id for k in kept}] and len(kept) == 4


def test_without_a_document_every_time_is_kept(run: Path, tmp_path: Path) -> None:
    assert update(tmp_path / "all", [run], [], "--write") == 0
    assert read_records(tmp_path / "all") == read_records(run)


def test_pairs_make_a_baseline_of_six_processes(tmp_path: Path) -> None:
    pairs = [
        dataclasses.replace(
            timed("triton", "", m, run="aa"), kind="pair", pair=p, side=side, suite="fp4", tuning=tuning
        )
        for m in (1, 16)
        for p in range(1, 11)
        for side in "AB"
        for tuning in ({}, {"injected": "0.02"})
    ]
    path = tmp_path / "aa.jsonl"
    write_records(path, pairs)
    other = tmp_path / "to" / "fp4.jsonl"
    write_records(other, [timed("torch_native", "", 1)])
    assert update(tmp_path / "to", [path], [], "--write") == 0
    assert len(read_records(other)) == 1, "a suite's other records are left alone"
    kept = read_records(tmp_path / "to" / "pairs.jsonl")
    assert len(kept) == 12 and not any(r.tuning for r in kept)
    assert {r.pair for r in kept} == {1, 2, 3}
    assert main(["gate", str(path), "--baseline", str(tmp_path / "to")]) == 0


def test_processes_of_what_documents_rest_on_are_kept(run: Path, tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(TABLE, encoding="utf-8")
    evidence = tmp_path / "alone"
    assert update(evidence, [run], [document], "--write") == 0
    shown = {r.case for r in read_records(evidence)}
    pairs = [
        dataclasses.replace(r, kind="pair", pair=p, side=side, run="aa")
        for r in read_records(run)
        if r.backend == "triton" and r.measurements
        for p in range(1, 6)
        for side in "AB"
    ]
    assert {r.case for r in pairs} > {r.case for r in pairs} & shown
    path = tmp_path / "aa.jsonl"
    write_records(path, pairs)
    assert update(tmp_path / "to", [run, path], [document], "--write") == 0
    kept = read_records(tmp_path / "to" / "pairs.jsonl")
    assert {r.case for r in kept} == {r.case for r in pairs} & shown, "of what a number rests on, and of nothing else"
    assert len(kept) == 6 * len({r.case for r in kept})
    others = [r for r in read_records(tmp_path / "to") if r.kind != "pair"]
    assert others == read_records(evidence)
    # Later, and without the run that the numbers are of: what is there stays, and says whose processes are kept.
    ceilings = [dataclasses.replace(MEASURED[0], run=r, environment={"hardware": "sm_90"}) for r in ("old", "new")]
    write_records(path, [*pairs, *ceilings])
    assert update(evidence, [path], [document], "--write") == 0
    assert read_records(evidence / "pairs.jsonl") == kept
    assert [r for r in read_records(evidence) if r.kind == "time"] == others
    assert [r.run for r in read_records(evidence / "roofline.jsonl")] == ["new"], "the machine's ceilings, once each"


def test_old_and_new_stand_side_by_side(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination, document = tmp_path / "to", tmp_path / "doc.md"
    document.write_text(TABLE, encoding="utf-8")
    update(destination, [run], [document], "--write")
    runs = []
    for i in range(5):
        path = tmp_path / f"new{i}.jsonl"
        records = [
            timed(b, v, m, run=f"n{i}", seconds=(2e-6 if b == "triton" and m == 1 else 1e-6) * (1 + 0.001 * i))
            for m in (1, 4)
            for b, v in (("triton", ""), ("torch_native", "cublas_bf16"))
        ]
        write_records(path, records)
        runs.append(path)
    capsys.readouterr()
    assert update(destination, runs, [document], "--json", "--write") == 0
    body = json.loads(capsys.readouterr().out)
    rows = {(c["who"], c["case"].split("m=")[1].split(",")[0]): c for c in body["changes"]}
    slower = rows["triton", "1"]
    assert slower["disjoint"] and slower["new"]["processes"] == 5 and slower["old"]["processes"] == 1
    assert slower["new"]["low_s"] < slower["new"]["median_s"] < slower["new"]["high_s"]
    assert rows["triton", "4"]["old"] is None and rows["triton", "16"]["new"] is None
    assert body["changes"][0] == slower, "what moved comes first"
    assert len(read_records(destination)) == 20
    assert update(destination, [runs[0], runs[0]], [document]) == 2, "one run given twice is no second process"


def test_too_much_to_review_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "doc.md"
    document.write_text(TABLE, encoding="utf-8")
    monkeypatch.setattr(baseline, "LIMIT", 3)
    assert update(tmp_path / "to", [run], [document], "--write") == 2
    assert "rest on 4 cells" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_arithmetic_stays_with_the_cpu(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text("<!-- vbench:claim fp4.saving_fp32 -->x<!-- /vbench -->\n", encoding="utf-8")
    sum_record = Record(
        "fp4.saving_fp32", "arithmetic", "arithmetic", Outcome.PASSED, "r", suite="claims", metrics={"holds": 1.0}
    )
    cpu = tmp_path / "cpu.jsonl"
    write_records(cpu, [dataclasses.replace(sum_record, environment={"hardware": "cpu"})])
    assert update(tmp_path / "a", [cpu], [document], "--write") == 0
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["claims.jsonl"]
    gpu = tmp_path / "gpu.jsonl"
    write_records(gpu, [sum_record, timed("triton", "", 1)])
    assert update(tmp_path / "b", [gpu], [document], "--write") == 2, "nothing is left to keep"
    assert update(tmp_path / "c", [tmp_path / "none"], [document]) == 2


def test_readings_are_over_processes() -> None:
    records = [timed("triton", "", 1, run=f"r{i}", seconds=1e-6 * math.exp(0.01 * i)) for i in range(-2, 3)]
    (reading,) = baseline.readings(records).values()
    assert reading.median_s == pytest.approx(1e-6) and reading.processes == 5
    assert reading.low_s < 0.99e-6 and reading.high_s > 1.01e-6


def test_a_cell_costs_what_its_longest_job_took() -> None:
    one, two = (
        dataclasses.replace(timed("triton", "", 1), run=run, elapsed_s=s) for run, s in (("a", 2.0), ("b", 3.0))
    )
    injected = dataclasses.replace(one, tuning={"injected": "0.01"}, elapsed_s=9.0)
    assert baseline.costs_s([one, two, injected]) == {(one.case, one.who): 3.0}
