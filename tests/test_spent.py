"""Where the time went: sums that do not care which process measured them, and a screen that still fits."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench import report, runner, spent
from vbench.commands import show_run
from vbench.errors import DataError
from vbench.plan import Job
from vbench.record import ErrorStats, Measurement, Outcome, Record
from vbench.report import LAST_SCREEN_LINES, last_screen
from vbench.store import PHASES, RunStore, phase_walls, read_records

CHECK = Record("op[n=1]", "b", "check", Outcome.PASSED, "r", prepare_s=1.0, first_launch_s=5.0, steady_launch_s=2.0)
CHECK = replace(CHECK, elapsed_s=10.0)
TIMED = replace(CHECK, kind="time", measurements=(Measurement("graph", (0.1, 0.2), launches_per_sample=4),))


def test_what_a_job_took_is_divided_without_rest() -> None:
    assert spent.of(CHECK) == spent.Spent(1, 10.0, 1.0, 3.0, 0.0)
    assert spent.of(TIMED).samples_s == pytest.approx(1.2)
    assert spent.of(TIMED).rest_s == pytest.approx(10 - 1 - 3 - 1.2)
    # Without a second launch the whole first one counts; a second that took longer does not count backwards.
    assert spent.of(replace(CHECK, steady_launch_s=None)).compile_s == 5.0
    assert spent.of(replace(CHECK, steady_launch_s=6.0)).compile_s == 0.0
    # Of kind compile the set-up is the compilation; a job that no worker had took nothing.
    assert spent.of(replace(CHECK, kind="compile", first_launch_s=None, steady_launch_s=None)).compile_s == 1.0
    assert spent.of(replace(CHECK, elapsed_s=0.0)) == spent.Spent()


@given(st.lists(st.sampled_from(["check", "time", "battery"]), max_size=20), st.integers(0, 20))
def test_a_resumed_run_adds_up_to_an_unbroken_one(kinds: list[Any], cut: int) -> None:
    records = [replace(CHECK, kind=kind, case=f"op[n={n}]", backend="ab"[n % 2]) for n, kind in enumerate(kinds)]
    whole = spent.total(records)
    assert spent.total(records[:cut]) + spent.total(records[cut:]) == whole
    assert sum(spent.by_backend(records).values(), spent.Spent()) == whole
    assert whole.jobs == len(records)
    assert sum(spent.by_phase(records).values(), spent.Spent()) == whole
    body = json.loads(json.dumps(spent.to_dict(records, {"checks": 2.0}, True)))
    assert set(body) == {"more_where_killed"} | {"timing" if kind == "time" else "checks" for kind in kinds}
    assert "checks" not in body or body["checks"]["wall_s"] == 2.0
    if "timing" in body:
        assert (body["timing"]["wall_s"], body["timing"]["rest_s"]) == (None, 6.0 * kinds.count("time"))


def test_walls_of_all_processes_add_up_and_a_killed_one_is_said(tmp_path: Path) -> None:
    with contextlib.closing(RunStore(tmp_path / "run", {})) as store:
        assert phase_walls(store.folder) == ({}, False)
        for wall_s in (1.5, 2.0):
            store.phase("checks")
            store.phase("checks", wall_s)
        assert phase_walls(store.folder) == ({"checks": 3.5}, False)
        store.phase("timing")
    walls, unfinished = phase_walls(tmp_path / "run")
    assert (walls, unfinished) == ({"checks": 3.5}, True)
    line = spent.line([CHECK, TIMED], walls, unfinished)
    assert line.startswith(
        "checks 4 s, more where killed, 10 s of workers (prepare 1, compile 3, rest 6); timing 10 s of"
    )
    # A torn line is no harm, and is cut off by the next process; a whole one of another kind is.
    path = tmp_path / "run" / PHASES
    path.write_bytes(path.read_bytes() + b'{"ended": "tim')
    assert phase_walls(tmp_path / "run")[0] == walls
    with contextlib.closing(RunStore(tmp_path / "run", {}, resume=True)) as store:
        store.phase("timing", 4.0)
    assert phase_walls(tmp_path / "run") == ({"checks": 3.5, "timing": 4.0}, False)
    path.write_text('{"over": "timing"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"phases\.jsonl:1"):
        phase_walls(tmp_path / "run")


class Worker:
    """Answers at once, or is interrupted."""

    interrupted = False

    def __init__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        if self.interrupted:
            raise KeyboardInterrupt
        body: dict[str, Any] = dict.fromkeys(("error", "metrics", "peak_bytes", "numerics", "environment"))
        body |= {"outcome": "PASSED", "reason": "", "detail": "", "measurements": [], "sources": ""}
        return {**body, "prepare_s": 0.25, "first_launch_s": 0.5, "steady_launch_s": 0.125, "elapsed_s": 1.0}

    def kill(self) -> None:
        pass

    close = end = kill


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_notes_its_phases_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interrupted: bool
) -> None:
    monkeypatch.setattr(runner, "WorkerProcess", Worker)
    jobs = [Job(kind, "s", f"c[n={n}]", "c", "b", "", "own", 1.0) for kind in ("check", "time") for n in range(3)]
    folder = tmp_path / "run"

    def run(some: list[Job]) -> None:
        with contextlib.closing(RunStore(folder, {}, resume=folder.exists())) as store:
            kept = read_records(folder) if store.path.stat().st_size else []
            take = runner.Run("r", some, {}, "cuda", store, runner.no_arithmetic, 2, lambda record: None, kept=kept)
            take.execute()

    run(jobs[:3])
    monkeypatch.setattr(Worker, "interrupted", interrupted)
    with pytest.raises(KeyboardInterrupt) if interrupted else contextlib.nullcontext():
        run(jobs)
    # The second process had nothing to check, and said nothing of that phase.
    walls, unfinished = phase_walls(folder)
    assert set(walls) == {"checks", "timing"} and not unfinished
    lines = (folder / PHASES).read_text(encoding="utf-8").splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["began", "ended"] * 2
    assert show_run(str(folder), tmp_path, False, None, "table") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].startswith("time: checks 0 s, 3 s of workers (prepare 1, compile 1, rest 1)")
    assert ("timing" in shown[-1]) is not interrupted


def test_the_table_of_seconds_ends_with_the_sum() -> None:
    table = report.seconds([CHECK, TIMED, replace(CHECK, backend="c", elapsed_s=2.0)])
    assert list(table["backend"]) == ["b", "b", "c", ""]
    assert list(table["jobs"]) == [1, 1, 1, 3]
    assert table["seconds"].iloc[-1] == 22.0 == sum(table["seconds"].iloc[:-1])


@pytest.mark.parametrize("wrong_peer", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("subject", [False, True])
def test_the_fullest_screen_keeps_its_last_lines(wrong_peer: bool, compiled: bool, subject: bool) -> None:
    """Whatever there is to say, the next command is the last line, and failures are counted that are not shown."""
    error = ErrorStats("y", 4, 1, 2.0, None, 0.5)
    failed = [replace(CHECK, case=f"op[n={n}]", outcome=Outcome.WRONG_VALUE, error=error) for n in range(9)]
    records = [TIMED, *failed]
    records += [replace(failed[0], role="peer", backend="p")] if wrong_peer else []
    records += [replace(failed[0], role="subject", backend="s")] if subject else []
    records += [replace(CHECK, kind="compile", case="op,arch=sm_90")] if compiled else []
    walls = {"checks": 12.0, "timing": 3.0}
    given: dict[str, Any] = {"verdicts": (), "code": 1, "reasons": ("x",), "where": "here", "elapsed_s": 1.0}
    lines = last_screen(run_id="r", records=records, device="cpu", walls=(walls, False), **given).splitlines()
    assert len(lines) <= LAST_SCREEN_LINES
    assert [line.split()[0] for line in lines[-4:]] == ["not", "time", "records", "next"]
    shown = sum(line.startswith("FAILED") for line in lines)
    assert shown >= 1 and any(line.startswith(f"          and {9 - shown} more") for line in lines)
    assert "checks 12 s" in lines[-3] and "timing 3 s" in lines[-3]
