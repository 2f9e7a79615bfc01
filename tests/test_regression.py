"""Doctored baselines and runs: each must give the verdict and exit code that it deserves, and say why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench import regression
from vbench.cli import main
from vbench.errors import DataError
from vbench.record import DeviceState, Measurement, Outcome, Record
from vbench.store import load_records, write_records

H200 = {
    "hardware": "sm_90",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6",
}
#: bf16 fp4_linear at these shapes: some 30 us on an H200, its datasheet's floor is 7 us.
CASE = "fp4_linear[fmt=nvfp4,x=bf16,act=none,bias=0,dist=normal,m={m},n=14336,k=4096]"
SPREAD = (0.0, 0.01, -0.01, 0.005, -0.005, 0.002)


def timed(
    run: str, m: int = 1, seconds: float = 30e-6, environment: Mapping[str, Any] = H200, **changes: Any
) -> Record:
    record = Record(
        case=CASE.format(m=m),
        backend="triton",
        kind="time",
        outcome=Outcome.PASSED,
        run=run,
        suite="fp4",
        measurements=(Measurement("graph", (seconds, seconds * 1.001, seconds * 0.999)),),
        environment=environment,
    )
    return replace(record, **changes)


def baseline_of(ms: tuple[int, ...] = (1, 4, 16), processes: int = 5) -> list[Record]:
    return [timed(f"b{i}", m, 30e-6 * (1 + SPREAD[i])) for i in range(processes) for m in ms]


def run_of(change: Callable[[Record], Record | None] = lambda r: r, ms: tuple[int, ...] = (1, 4, 16)) -> list[Record]:
    """A run as the baseline's, its first record changed or left out."""
    first, *rest = [timed("now", m) for m in ms]
    changed = change(first)
    return ([changed] if changed is not None else []) + rest


class Files:
    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.baseline, self.capsys = folder / "run.jsonl", folder / "baseline", capsys

    def gate(
        self, run: list[Record], baseline: list[Record] | None = None, *options: str
    ) -> tuple[int, dict[str, Any]]:
        write_records(self.run, run)
        write_records(self.baseline / "fp4.jsonl", baseline_of() if baseline is None else baseline)
        return self.again(*options)

    def again(self, *options: str) -> tuple[int, dict[str, Any]]:
        self.capsys.readouterr()
        code = main(["gate", str(self.run), "--baseline", str(self.baseline), "--format", "json", *options])
        out = self.capsys.readouterr().out
        return code, json.loads(out) if out else {}

    def doctor(self, old: str, new: str) -> None:
        text = self.run.read_text(encoding="utf-8")
        assert old in text
        self.run.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Files:
    return Files(tmp_path, capsys)


def words(body: dict[str, Any]) -> list[str]:
    return [row["word"] + (f"({row['reason']})" if row["reason"] else "") for row in body["rows"]]


def test_the_same_passes(files: Files) -> None:
    code, body = files.gate(run_of(), None, "--strict")
    assert (code, words(body)) == (0, ["SAME"] * 3)
    assert body["rows"][0]["baseline_processes"] == 5
    assert body["rows"][0]["margin"] == regression.LEAST_MARGIN


def test_ten_percent_slower_fails_and_faster_does_not(files: Files) -> None:
    code, body = files.gate(run_of(lambda r: timed("now", seconds=33.1e-6)))
    assert (code, words(body)) == (1, ["SLOWER", "SAME", "SAME"])
    assert body["rows"][0]["ratio"] == pytest.approx(33.1 / 30, rel=0.01)
    assert body["reasons"] == ["1 x SLOWER"]
    code, body = files.gate(run_of(lambda r: timed("now", seconds=27e-6)))
    assert (code, words(body)) == (0, ["FASTER", "SAME", "SAME"])


def test_another_choice_of_tile_is_named_beside_a_change_of_time(files: Files) -> None:
    chose = [replace(r, choice={"digest": "sha256:a", "bn": 64}) for r in baseline_of()]

    def slower(choice: dict[str, Any]) -> list[Record]:
        return run_of(lambda r: replace(r, measurements=(Measurement("graph", (33e-6,)),), choice=choice))

    other = {"digest": "sha256:b", "bn": 128}
    code, body = files.gate(slower(other), chose)
    assert (code, sorted(words(body))) == (1, ["SAME", "SAME", "SLOWER(other_choice)"])
    for choice, before in ((chose[0].choice, chose), ({}, chose), (other, None)):
        code, body = files.gate(slower(dict(choice)), before)
        assert (code, sorted(words(body))) == (1, ["SAME", "SAME", "SLOWER"]), "the same, or nothing said"


@pytest.mark.parametrize(("field", "value"), [("gpu", "NVIDIA H100 80GB HBM3"), ("driver", "570.9"), ("cuda", "12.8")])
def test_unlike_machines_are_refused_with_the_field(files: Files, field: str, value: str) -> None:
    other = {**H200, field: value}
    code, body = files.gate([timed("now", m, 60e-6, other) for m in (1, 4, 16)])
    assert code == 3 and body["rows"] == [], "no verdict from another machine, however slow"
    (difference,) = body["differences"]
    assert (difference["name"], difference["baseline"], difference["run"]) == (field, [H200[field]], [value])
    assert field in body["reasons"][0] and value in body["reasons"][0]


def test_other_input_distributions_are_refused(files: Files) -> None:
    code, body = files.gate([replace(r, case=r.case.replace("dist=normal", "dist=grid")) for r in run_of()])
    assert code == 3 and "dist (input distribution): normal in the baseline, grid in the run" in body["reasons"][0]


def test_a_wrong_value_fails_whatever_the_times_say(files: Files) -> None:
    check = timed("now", kind="check", measurements=(), outcome=Outcome.WRONG_VALUE)
    code, body = files.gate([*run_of(), check])
    assert code == 1 and body["failures"][0]["outcome"] == "WRONG_VALUE"
    peer = replace(check, backend="torch_native", role="peer")
    assert files.gate([*run_of(), peer])[0] == 0, "a peer's fault is no failure of ours"
    assert files.gate([timed("now", m, 60e-6, {**H200, "gpu": "x"}) for m in (1, 4)] + [check])[0] == 1


def test_a_missing_cell_is_shown_and_strict_asks_for_it(files: Files) -> None:
    code, body = files.gate(run_of(lambda r: None))
    assert (code, words(body)) == (0, ["MISSING(not_run)", "SAME", "SAME"])
    assert files.again("--strict")[0] == 3
    gone = run_of(lambda r: replace(r, measurements=(), outcome=Outcome.UNSUPPORTED, reason="k_not_multiple"))
    code, body = files.gate(gone, None, "--strict")
    assert (code, words(body)[0]) == (3, "MISSING(k_not_multiple)")


@pytest.mark.parametrize("time", ["NaN", "-Infinity", "0.0", "-3e-05"])
def test_a_time_that_cannot_be_is_invalid(files: Files, time: str) -> None:
    files.gate(run_of())
    files.doctor("3e-05", time)
    code, body = files.again()
    assert (code, words(body)[0]) == (1, "INVALID(impossible_time)")
    assert words(body)[1:] == ["SAME", "SAME"]


def test_a_time_below_the_datasheets_floor_is_invalid(files: Files) -> None:
    code, body = files.gate(run_of(lambda r: timed("now", seconds=1e-6)))
    assert (code, words(body)[0]) == (1, "INVALID(below_floor)")
    # control: on a GPU without a datasheet the same time is only faster
    unknown = {**H200, "gpu": "unknown"}
    old = [replace(r, environment=unknown) for r in baseline_of()]
    code, body = files.gate([timed("now", m, 1e-6, unknown) for m in (1, 4, 16)], old)
    assert (code, words(body)) == (0, ["FASTER"] * 3)


def test_nothing_is_judged_from_nothing(files: Files) -> None:
    code, body = files.gate([])
    assert code == 3 and "nothing judged" in body["reasons"][0]
    code, body = files.gate(run_of(), baseline_of(processes=4))
    assert code == 3 and words(body) == ["INCONCLUSIVE(few_baseline_processes)"] * 3
    check = timed("now", kind="check", measurements=())
    assert files.gate([check])[0] == 3


def test_a_noisy_baseline_has_a_wide_margin_and_says_so(files: Files) -> None:
    noisy = [timed(f"b{i}", 1, 30e-6 * math.exp(0.08 * (-1) ** i)) for i in range(6)]
    code, body = files.gate([timed("now", 1, 33e-6), timed("now", 4)], [*noisy, *baseline_of((4,))])
    assert (code, words(body)) == (0, ["INCONCLUSIVE(noisy_baseline)", "SAME"])
    assert body["rows"][0]["margin"] > regression.WIDEST_MARGIN
    assert files.gate([timed("now", 1, 60e-6), timed("now", 4)], [*noisy, *baseline_of((4,))])[0] == 1


def test_sides_of_pairs_are_processes_too(files: Files) -> None:
    sides = [
        replace(timed("aa", 1, 30e-6 * (1 + SPREAD[i])), kind="pair", pair=i, side=side)
        for i in range(3)
        for side in ("A", "B")
    ]
    code, body = files.gate([timed("now", 1)], sides)
    assert (code, body["rows"][0]["baseline_processes"]) == (0, 6)
    slowed = [replace(r, tuning={"injected": "0.05"}) for r in sides]
    assert files.gate([timed("now", 1)], slowed)[0] == 3, "control: slowed sides are no baseline"


def test_half_written_lines_are_named_and_the_rest_is_kept(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.gate(run_of(ms=(1, 4, 16)))
    text = files.run.read_text(encoding="utf-8")
    files.run.write_text(text[: len(text) - 200], encoding="utf-8")
    code, body = files.again()
    assert (code, sorted(words(body))) == (0, ["MISSING(not_run)", "SAME", "SAME"])
    assert body["torn"][0].startswith(f"{files.run}:3: not whole JSON")
    assert files.again("--strict")[0] == 3
    main(["gate", str(files.run), "--baseline", str(files.baseline)])
    assert f"{files.run}:3" in capsys.readouterr().err


def test_bad_files_are_refused_by_name(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.gate(run_of())
    text = files.run.read_text(encoding="utf-8")
    files.run.write_text(text + text.splitlines()[0] + "\n", encoding="utf-8")
    for arguments, said in (
        ([str(files.run), "--baseline", str(files.baseline)], f"{files.run}:4: id "),
        (["no-such-run", "--baseline", str(files.baseline)], "no run 'no-such-run'"),
        ([str(files.baseline), "--baseline", "no/such/folder"], "no/such/folder"),
    ):
        assert main(["gate", *arguments]) == 2
        assert said in capsys.readouterr().err
    files.run.write_text('{"schema": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"run.jsonl:1"):
        load_records(files.run)


def test_github_annotations_are_escaped_and_counted(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    many = tuple(range(1, 15))
    files.gate([timed("now", m, 40e-6) for m in many], baseline_of(many))
    code = main(["gate", str(files.run), "--baseline", str(files.baseline), "--format", "github"])
    lines = capsys.readouterr().out.splitlines()
    errors = [line for line in lines if line.startswith("::error title=vbench gate::")]
    assert code == 1 and len(errors) == regression.ANNOTATIONS and errors[-1].endswith("and 5 more, in the table")
    assert "margin 5.0 %25" in errors[0]
    assert sum(line.startswith("| fp4_linear[") for line in lines) == 14


def test_the_table_shows_what_is_not_the_same(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    files.gate(run_of(lambda r: timed("now", seconds=40e-6)))
    assert main(["gate", str(files.run), "--baseline", str(files.baseline)]) == 1
    out = capsys.readouterr().out
    assert "SLOWER" in out and "1.333x" in out and "1 SLOWER, 2 SAME" in out and out.count("fp4_linear[") == 1


@given(st.floats(0.5, 2.0), st.lists(st.floats(-0.05, 0.05), min_size=5, max_size=8))
def test_the_margin_decides_and_nothing_else(factor: float, noise: list[float]) -> None:
    old = [timed(f"b{i}", 1, 30e-6 * math.exp(n)) for i, n in enumerate(noise)]
    result = regression.judge_run(old, [timed("now", 1, 30e-6 * factor)], floor=lambda r: 0.0)
    (row,) = result.rows
    assert row.margin is not None and row.ratio is not None and row.margin >= regression.LEAST_MARGIN
    assert (row.word == "SLOWER") == (row.ratio > 1 + row.margin)
    assert (row.word == "FASTER") == (row.ratio < 1 / (1 + row.margin))
    assert regression.exit_code(result, strict=False)[0] == (
        1 if row.word == "SLOWER" else 3 if row.word == "INCONCLUSIVE" else 0
    )


def test_a_pair_record_survives_the_round_trip_and_a_half_one_is_refused() -> None:
    record = replace(
        timed("aa"),
        kind="pair",
        pair=3,
        side="B",
        tuning={"num_warps": "8"},
        tree="HEAD~1",
        measurements=(
            Measurement("graph", (1e-6,) * 4, blocks=(2, 2), states=(DeviceState(0, 1.0, 1.0, 1.0, 1.0, (), 0, 1),)),
        ),
    )
    assert Record.from_json(record.to_json(), "x:1") == record
    assert (
        len({record.id, replace(record, side="A").id, replace(record, pair=4).id, replace(record, tuning={}).id}) == 4
    )
    with pytest.raises(DataError, match="pair number and a side"):
        replace(record, side="")
    with pytest.raises(DataError, match="pair number and a side"):
        replace(timed("aa"), pair=1, side="A")
    with pytest.raises(DataError, match="do not divide"):
        Measurement("graph", (1e-6,) * 4, blocks=(2, 1))
