"""Kept checks: counts by cell, what fails, what is stale; and the committed ones are shown as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vbench import cells, registry
from vbench.cli import main
from vbench.errors import DataError
from vbench.record import ErrorStats, Outcome, Record
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "results" / "conformance" / "h200.jsonl"
OPS = {FP4_DEQUANTIZE.name: FP4_DEQUANTIZE}


def record(outcome: Outcome, n: int, over: float = 0.5, **changes: str) -> Record:
    case = FP4_DEQUANTIZE.case(fmt=changes.pop("fmt", "nvfp4"), y="bf16", n=n, k=16)
    ran = outcome not in cells.DECLINED
    error = ErrorStats("weight", 1, 0, over, None, 1.0) if ran else None
    body = {"backend": "triton", "run": "r1", "sources": "sha256:now" if ran else "", **changes}
    return Record(case=case.id, kind="check", outcome=outcome, error=error, environment={"gpu": "G"}, **body)  # type: ignore[arg-type]


def test_a_cell_counts_what_passed_failed_and_was_declined() -> None:
    records = [
        record(Outcome.PASSED, 1, 0.25),
        record(Outcome.PASSED, 2, 0.75),
        record(Outcome.WRONG_VALUE, 3, 9.0),
        record(Outcome.UNSUPPORTED, 4, reason="rule"),
        record(Outcome.UNSUPPORTED, 1, reason="rule", fmt="nf4"),
    ]
    kept = cells.of_records(records, OPS)
    assert (kept.run, kept.environment, kept.sources) == (
        "r1",
        {"gpu": "G"},
        {"triton": {"fp4_dequantize": "sha256:now"}},
    )
    declined, ran = kept.cells
    assert (ran.passed, ran.failed, ran.declined, ran.worst_over_budget) == (2, {"WRONG_VALUE": 1}, {"rule": 1}, 0.75)
    assert (str(ran), str(declined)) == ("1 WRONG_VALUE of 3", "rule")
    assert cells.broken(kept) == [ran]
    strangers = cells.of_records([record(Outcome.WRONG_VALUE, 1, 9.0, role="peer")], OPS)
    assert cells.broken(strangers) == []


def test_what_ran_on_other_sources_says_so() -> None:
    kept = cells.of_records([record(Outcome.PASSED, 1), record(Outcome.UNSUPPORTED, 1, reason="rule", fmt="nf4")], OPS)
    for digest, stale in (("sha256:now", False), ("sha256:then", True), (None, True)):
        text = cells.to_markdown(kept, OPS, lambda backend, op, digest=digest: digest)  # type: ignore[misc]
        assert ("| 1 STALE |" in text) is stale and "| rule |" in text


def test_the_file_is_read_back_and_a_bad_one_is_named(tmp_path: Path) -> None:
    kept = cells.of_records([record(Outcome.PASSED, 1), record(Outcome.UNSUPPORTED, 1, reason="rule", fmt="nf4")], OPS)
    path = tmp_path / "kept.jsonl"
    path.write_text(cells.to_text(kept), encoding="utf-8")
    assert cells.read(path) == kept
    head, first, *_ = path.read_text(encoding="utf-8").splitlines()
    for bad in ("", "{}", head + "\n" + first[:-5], head.replace('"schema": 1', '"schema": 2'), head + '\n{"op": "x"}'):
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(DataError, match="kept"):
            cells.read(path)
    with pytest.raises(DataError, match="absent"):
        cells.read(tmp_path / "absent")


def test_runs_and_sources_are_not_mixed() -> None:
    with pytest.raises(DataError, match="2"):
        cells.of_records([record(Outcome.PASSED, 1), record(Outcome.PASSED, 1, run="r2")], OPS)
    with pytest.raises(DataError, match="0"):
        cells.of_records([], OPS)
    with pytest.raises(DataError, match="different sources"):
        cells.of_records([record(Outcome.PASSED, 1), record(Outcome.PASSED, 2, sources="sha256:then")], OPS)
    told = record(Outcome.PASSED, 1)
    kept = cells.of_records([told, record(Outcome.OUT_OF_MEMORY, 2, sources="")], OPS)
    assert [sources for ops in kept.sources.values() for sources in ops.values()] == [told.sources]


def test_the_command_shows_keeps_and_judges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--suite", "fp4", "--op", "fp4_dequantize", "--backend", "torch", "--no-time", "--device", "cpu"]
    assert main(["run", *arguments, "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    (run,) = tmp_path.iterdir()
    assert main(["list", "--matrix", "--run", str(run), "--json"]) == 0
    text = capsys.readouterr().out
    path = tmp_path / "kept.jsonl"
    path.write_text(text, encoding="utf-8")
    assert main(["list", "--matrix", "--kept", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "## fp4_dequantize" in shown and "STALE" not in shown
    head, *lines = map(json.loads, text.splitlines())
    lines[0]["failed"] = {"WRONG_VALUE": 1}
    path.write_text("\n".join(map(json.dumps, [head, *lines])), encoding="utf-8")
    assert main(["list", "--matrix", "--kept", str(path)]) == 1
    assert "WRONG_VALUE of" in capsys.readouterr().err
    assert main(["list", "--matrix", "--kept", str(path), "--run", str(run)]) == 2
    assert main(["list", "--kept", str(path)]) == 2


def test_the_committed_cells_are_right_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--matrix", "--kept", str(KEPT)]) == 0
    written = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    assert written[written.index("## ") :] == capsys.readouterr().out, "run: make matrix"
    kept = cells.read(KEPT)
    ours = {(info.name, op) for info in registry.backends().values() if info.role == "own" for op in info.ops}
    passed = {(cell.backend, cell.op) for cell in kept.cells if cell.role == "own" and cell.passed}
    absent = {f"- {backend}: {op}" for backend, op in ours - passed}
    assert absent == {line for line in written.splitlines() if line.startswith("- ")}
