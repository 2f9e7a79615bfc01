"""Ceilings measured on a CPU, and what a time attains of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench import ceilings, registry
from vbench.cli import main
from vbench.errors import Unsupported
from vbench.monitor import NoMonitor
from vbench.record import Measurement, Outcome, Record
from vbench.roofline import DATASHEETS, Attained, attained, floor_s
from vbench.roofline import ceilings as known_ceilings
from vbench.store import write_records

NONE = NoMonitor("no_gpu")
H200 = {"hardware": "sm_90", "gpu": "NVIDIA H200"}
LINEAR = "fp4_linear[fmt=nvfp4,x=bf16,act=none,bias=0,dist=normal,m=4096,n=14336,k=4096]"


def ceiling(what: str, per_s: float, environment: dict[str, str] = H200) -> Record:
    return Record(
        case=f"roofline[{what}]",
        backend="roofline",
        kind="roofline",
        outcome=Outcome.PASSED,
        run="r",
        role="harness",
        metrics={"per_s": per_s},
        environment=environment,
    )


MEASURED = [
    ceiling("what=read,bytes=1048576", 1e12),
    ceiling("what=read,bytes=1073741824", 4.1e12),
    ceiling("what=copy,bytes=1073741824", 3.9e12),
    ceiling("what=matmul,dtype=bf16,n=8192", 700e12),
    ceiling("what=matmul,dtype=fp32,n=8192", 50e12),
    ceiling("what=h2d,memory=pinned,bytes=1", 50e9),
]


def test_the_best_of_each_is_the_ceiling() -> None:
    found = known_ceilings([*MEASURED, ceiling("what=read,bytes=1", 9e12, {"gpu": "other"})])
    assert set(found) == {"NVIDIA H200", "other"}
    here = found["NVIDIA H200"]
    assert here.bytes_per_s == 4.1e12 and here.flops_per_s == {"bf16": 700e12, "fp32": 50e12}
    assert here.floor_s(0, int(50e12), "fp32") == pytest.approx(1.0)
    assert here.floor_s(0, int(700e12), "fp8") == pytest.approx(1.0), "unknown dtype: the fastest there is"
    broken = replace(MEASURED[1], outcome=Outcome.UNSUPPORTED, metrics={})
    assert known_ceilings([broken]) == {}


def test_what_a_time_attains() -> None:
    op = registry.ops()["fp4_linear"]
    case = op.parse(LINEAR)
    assert op.flops is not None
    work_s = op.flops(case) / 700e12
    record = Record(LINEAR, "triton", "time", Outcome.PASSED, "r", environment=H200)
    found = attained(record, 2 * work_s, op, known_ceilings(MEASURED))
    assert found is not None and found.of_measured == pytest.approx(0.5)
    assert found.of_datasheet == pytest.approx(0.5 * 700 / 989.4), "of the datasheet it is less"
    assert found.floor_s == pytest.approx(work_s)
    only_sheet = attained(record, 2 * work_s, op, {})
    assert only_sheet == Attained(pytest.approx(op.flops(case) / 989.4e12), None, found.of_datasheet)  # type: ignore[arg-type]
    assert attained(replace(record, environment={"gpu": "unknown"}), 1.0, op, {}) is None


@given(st.integers(1, 1 << 40), st.integers(1, 1 << 50))
def test_no_time_above_the_floor_attains_more_than_all(moved: int, work: int) -> None:
    here = known_ceilings(MEASURED)["NVIDIA H200"]
    floor = here.floor_s(moved, work, "bf16")
    assert floor >= moved / 4.1e12 and floor >= work / 700e12
    assert floor > floor_s("NVIDIA H200", moved, work), "what was measured is below the datasheet"
    assert DATASHEETS["NVIDIA H200"].memory_bytes_per_s > here.bytes_per_s


def test_the_cpu_has_ceilings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "CPU_SIZES", (1 << 16, 1 << 20))
    monkeypatch.setattr(ceilings, "LIMIT_S", 0.05)
    arguments = ["roofline", "--device", "cpu", "--only", "read", "--only", "copy", "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 4 and all(row["outcome"] == "PASSED" for row in rows)
    records = [Record.from_json(json.dumps(row), "x:1") for row in rows]
    for r in records:
        assert r.metrics["per_s"] == pytest.approx(r.metrics["work"] / r.measurements[0].median_s)
        assert 1e6 < r.metrics["per_s"] < 1e13
    (machine,) = known_ceilings(records)
    assert machine == records[0].environment["cpu"]
    assert main(["roofline", "--device", "cpu", "--only", "reed", "--out", str(tmp_path)]) == 2
    assert main(["roofline", "--device", "cpu", "--folder", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2


def test_files_are_read_back_through_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "FILE_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "FILE_BLOCK", 1 << 18)
    monkeypatch.setattr(ceilings, "LIMIT_S", 0.02)
    chosen = [p for p in ceilings.probes("cpu", tmp_path) if p.what.startswith("file")]
    assert len(chosen) == 2 * len(ceilings.DEPTHS)
    found = ceilings.records(chosen, "cpu", "r", NONE, lambda r: None)
    # Where the file system refuses O_DIRECT it says so; nothing is measured through the page cache instead.
    assert all(r.outcome is Outcome.PASSED or r.reason == "o_direct_refused" for r in found)
    assert all(bool(r.measurements) == (r.outcome is Outcome.PASSED) for r in found)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_what_cannot_be_had_is_a_record_with_its_reason() -> None:
    def fails(error: Exception) -> Callable[[], Any]:
        def make() -> Any:
            raise error

        return make

    chosen = [
        ceilings.Probe("a", (), 1, "B", fails(Unsupported("no_such_unit", "not on this machine"))),
        ceilings.Probe("b", (), 1, "B", fails(RuntimeError("broken"))),
        ceilings.Probe("c", (), 8, "B", lambda: (lambda: sum(range(1000)), lambda: None)),
    ]
    kept: list[Record] = []
    found = ceilings.records(chosen, "cpu", "r", NONE, kept.append)
    assert [r.label for r in found] == ["UNSUPPORTED(no_such_unit)", "RUNTIME_ERROR(RuntimeError)", "PASSED"]
    assert found == kept and found[2].measurements == (found[2].measurements[0],)
    assert isinstance(found[2].measurements[0], Measurement)


def test_every_probe_of_a_gpu_is_listed_without_one(tmp_path: Path) -> None:
    listed = list(ceilings.probes("cuda", tmp_path))
    assert len({p.case for p in listed}) == len(listed)
    assert {p.what for p in listed} == {
        "read", "copy", "matmul", "exp", "launch", "h2d", "d2h", "duplex", "file_read", "file_write"
    }  # fmt: skip
    assert {dict(p.parameters)["dtype"] for p in listed if p.what == "matmul"} == {
        "bf16",
        "fp16",
        "fp8",
        "tf32",
        "fp32",
    }


def test_rows_say_what_they_attain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed = Record(
        LINEAR, "triton", "time", Outcome.PASSED, "r", measurements=(Measurement("graph", (1e-3,)),), environment=H200
    )
    path = tmp_path / "records.jsonl"
    write_records(path, [timed])
    assert main(["show", str(path)]) == 0
    assert "% of datasheet" in capsys.readouterr().out
    write_records(path, [timed, *MEASURED])
    assert main(["show", str(path)]) == 0
    assert "69 % of measured" in capsys.readouterr().out
    assert main(["show", str(path), "--format", "csv"]) == 0
    head, row, *_ = capsys.readouterr().out.splitlines()
    assert head.endswith("floor_s,of measured,of datasheet") and row.split(",")[-2].startswith("0.68")
