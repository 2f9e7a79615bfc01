"""A baseline holds what the documents rest on, and no more than a person reviews."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vbench import baseline
from vbench.errors import DataError
from vbench.record import Measurement, Outcome, Record
from vbench.store import read_records, write_records

TABLE = (
    "<!-- vbench:table ratio quantity=time.graph backend=triton over=torch_native[cublas_bf16] op=fp4_linear "
    "fmt=nvfp4 rows=fmt cols=m hardware=sm_90 -->\n<!-- /vbench -->\n"
)


def timed(backend: str, variant: str, m: int, fmt: str = "nvfp4") -> Record:
    return Record(
        case=f"fp4_linear[fmt={fmt},x=bf16,act=none,bias=0,dist=normal,m={m},n=64,k=64]",
        backend=backend,
        variant=variant,
        kind="time",
        outcome=Outcome.PASSED,
        run="r",
        role="own" if backend == "triton" else "peer",
        suite="fp4",
        measurements=(Measurement("graph", (1e-6,)),),
        environment={"hardware": "sm_90"},
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    records = [timed(b, v, m) for m in (1, 16) for b, v in (("triton", ""), ("torch_native", "cublas_bf16"))]
    records += [timed("triton", "", 1, "absmax7_row"), timed("numba_cuda", "", 1)]
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    return path


def test_only_the_evidence_is_kept(run: Path, tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text(TABLE, encoding="utf-8")
    destination = tmp_path / "baselines" / "h200"
    assert baseline.make([document], [run], destination) == {"fp4": 4}
    kept = read_records(destination)
    assert {(r.backend, r.case.count("nvfp4")) for r in kept} == {("triton", 1), ("torch_native", 1)}
    assert kept == [r for r in read_records(run) if r.id in {k.id for k in kept}]


def test_too_much_to_review_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "doc.md"
    document.write_text(TABLE, encoding="utf-8")
    monkeypatch.setattr(baseline, "LIMIT", 3)
    with pytest.raises(DataError, match="rest on 4 records"):
        baseline.make([document], [run], tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_arithmetic_stays_with_the_cpu(tmp_path: Path) -> None:
    document = tmp_path / "doc.md"
    document.write_text("<!-- vbench:claim fp4.saving_fp32 -->x<!-- /vbench -->\n", encoding="utf-8")
    sum_record = Record(
        "fp4.saving_fp32", "arithmetic", "arithmetic", Outcome.PASSED, "r", suite="claims", metrics={"holds": 1.0}
    )
    cpu = tmp_path / "cpu.jsonl"
    write_records(cpu, [dataclasses.replace(sum_record, environment={"hardware": "cpu"})])
    assert baseline.make([document], [cpu], tmp_path / "a") == {"claims": 1}
    gpu = tmp_path / "gpu.jsonl"
    write_records(gpu, [sum_record, timed("triton", "", 1)])
    assert baseline.make([document], [gpu], tmp_path / "b") == {}
    assert baseline.main([str(tmp_path / "c"), "--run", str(tmp_path / "none"), "--document", str(document)]) == 2
