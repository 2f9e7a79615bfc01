"""Process pairs on fake workers with a fake clock: order, records, failures, decisions. And what a side may be."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vbench import ab, registry, selftest, sides
from vbench.blocks import OutOfTurn, answer
from vbench.cli import main
from vbench.comparison import Rule, Word, looks_between
from vbench.errors import Unsupported, UsageError
from vbench.pairs import INJECTION_LAUNCHES, ORDER, Cell, PairRunner, floors, observation, observations
from vbench.record import Measurement, Outcome, Record
from vbench.registry import BackendInfo
from vbench.runner import Failure
from vbench.sides import Side, parse_side
from vbench.spec import resolve
from vbench.store import read_records
from vbench.timing import extra_launches, launches_of

CASE = "fp4_dequantize[fmt=nvfp4,y=bf16,dist=normal,n=64,k=64]"
ENVIRONMENT = {"hardware": "sm_90", "gpu": "NVIDIA H200", "driver": "1"}

#: (side, backend, case) -> seconds a launch
Times = Callable[[str, str, str], float]


class Machine:
    """Fake processes: each has an effect of its own; a clock is shared, and what a block reads depends on it."""

    def __init__(self, times: Times, *, process: float = 0.001, drift: float = 0.0, seed: int = 1) -> None:
        self.times, self.process, self.drift = times, process, drift
        self.draw = random.Random(seed)
        self.clock = 0
        self.log: list[tuple[str, str]] = []
        self.alive = 0
        self.opened: list[str] = []
        self.wrong: Mapping[tuple[str, str], Mapping[str, Any] | Failure] = {}
        self.clock_hz = {"A": 1.98e9, "B": 1.98e9}
        self.sample_s = 1e-3

    def start(self, side: str, backend: str) -> Process:
        self.alive += 1
        self.log.append((side, "start"))
        return Process(self, side, backend)


class Process:
    def __init__(self, machine: Machine, side: str, backend: str) -> None:
        self.machine, self.side, self.backend = machine, side, backend
        self.effect = math.exp(machine.draw.gauss(0, machine.process))
        self.case = ""

    def begin(self) -> None:
        self.machine.log.append((self.side, "begin"))

    def ask(self, request: Mapping[str, Any], deadline_s: float) -> dict[str, Any] | Failure:
        machine, kind = self.machine, str(request["kind"])
        machine.log.append((self.side, kind))
        body: dict[str, Any] = {"outcome": "PASSED", "reason": "native" if kind == "probe" else "", "detail": ""}
        given = machine.wrong.get((self.side, kind))
        if isinstance(given, Failure):
            return given
        if kind == "probe":
            body["environment"] = ENVIRONMENT
        elif kind == "open":
            self.case = request["case"]
            machine.opened.append(self.case.partition(",seed=")[0])
            body |= {"sources": "sha256:s", "prepare_s": 0.1, "numerics": {}, "elapsed_s": 0.2}
        elif kind == "arm":
            body["metrics"] = {
                "launches": request["launches"] or 3.0 * request["multiple"],
                "sample_s": machine.sample_s,
            }
            assert body["metrics"]["launches"] % request["multiple"] == 0
        elif kind == "block":
            machine.clock += 1
            drift = 1 + machine.drift * machine.clock
            seconds = (
                machine.times(self.side, self.backend, self.case) * self.effect * drift * (1 + request["slowdown"])
            )
            hz = machine.clock_hz[self.side]
            body["measurements"] = [
                {"quantity": "graph", "samples_s": [seconds] * request["samples"], "clock_hz": [hz, hz]}
            ]
        return {**body, **(given or {})}

    def kill(self) -> None:
        self.machine.alive -= 1

    close = kill


def cell(**changes: Any) -> Cell:
    both = {"A": "honest", "B": "honest"}
    return Cell(**{"op": "fp4_dequantize", "case": CASE, "backend": both, "variant": {"A": "", "B": ""}, **changes})


def runner(machine: Machine, *cells: Cell, sides: Mapping[str, Side] | None = None) -> tuple[PairRunner, list[Record]]:
    records: list[Record] = []
    made = PairRunner(
        run_id="r",
        cells={c.name: c for c in cells},
        sides=sides or {"A": Side("a"), "B": Side("b")},
        start=machine.start,
        keep=records.append,
        draw=random.Random(0),
    )
    return made, records


def steady(side: str, backend: str, case: str) -> float:
    return 10e-6


# -- pairs ----------------------------------------------------------------------------------------------------------


def test_blocks_alternate_and_the_leader_is_drawn() -> None:
    machine = Machine(steady)
    made, records = runner(machine, cell())
    made.measure(12, [cell().name])
    blocks = "".join(side for side, kind in machine.log if kind == "block")
    orders = {blocks[i : i + 4] for i in range(0, len(blocks), 4)}
    assert orders == {"ABBA", "BAAB"} and "".join(ORDER) == "ABBA"
    assert machine.log.count(("A", "start")) == machine.log.count(("B", "start")) == 12, "a fresh process a pair"
    assert machine.alive == 0
    assert len(records) == 24 and len({r.id for r in records}) == 24
    assert {(r.pair, r.side) for r in records} == {(p, s) for p in range(1, 13) for s in "AB"}
    assert all(r.measurements[0].blocks == (10, 10) and r.environment == ENVIRONMENT for r in records)


def test_each_pair_has_inputs_of_its_own_and_both_sides_the_same() -> None:
    seen: dict[str, list[str]] = {"A": [], "B": []}

    def times(side: str, backend: str, case: str) -> float:
        if case not in seen[side]:
            seen[side].append(case)
        return 1e-5

    made, records = runner(Machine(times), cell())
    made.measure(3, [cell().name])
    assert seen["A"] == seen["B"] and len(seen["A"]) == 3 and all("seed=" in case for case in seen["A"])
    assert {r.case for r in records} == {CASE}


def test_a_drift_that_is_linear_cancels_in_every_pair() -> None:
    """Control: the sides' own means, taken one after the other, would differ by the drift."""
    machine = Machine(steady, process=0.0, drift=0.01)
    made, _ = runner(machine, cell())
    (found,) = made.measure(5, [cell().name]).values()
    assert max(abs(o.log_time) for o in found) < 1e-3
    assert machine.drift * 2 > 1e-2


@pytest.mark.parametrize(
    ("factor", "word"), [(1.0, Word.SAME), (1.1, Word.SLOWER), (0.9, Word.FASTER), (1.02, Word.SLOWER)]
)
def test_the_word_follows_the_truth(factor: float, word: Word) -> None:
    machine = Machine(lambda side, backend, case: 1e-5 * (factor if side == "B" else 1.0))
    made, records = runner(machine, cell())
    found = ab.compare_cells(made, [cell()], Rule(looks=(6,), confirm=6), records)
    assert found.judged.cells[cell().name].word is word
    code, reasons = ab.exit_code(found, strict=True)
    assert code == (1 if word is Word.SLOWER else 0), reasons
    assert made.pairs == (6 if word is Word.SAME else 12), "what changed is confirmed in other processes"


def test_a_lower_clock_on_one_side_is_no_slowdown() -> None:
    machine = Machine(lambda side, backend, case: 1e-5 * (1.1 if side == "B" else 1.0))
    machine.clock_hz["B"] /= 1.1
    made, records = runner(machine, cell())
    found = ab.compare_cells(made, [cell()], Rule(looks=(6,)), records)
    assert found.judged.cells[cell().name].label == "INCONCLUSIVE(clock)"


def test_known_slowdowns_are_cells_of_the_same_processes() -> None:
    cells = [cell(slowdown=s) for s in (0.0, 0.01, 0.05)]
    machine = Machine(steady, process=1e-4)
    made, records = runner(machine, *cells)
    made.measure(4, [c.name for c in cells])
    assert machine.log.count(("B", "open")) == 4, "bound once for all of them"
    stored = observations([Record.from_json(r.to_json(), "x") for r in records])
    assert len(stored) == 3
    for (_, slowdown), found in stored.items():
        assert [o.log_time for o in found] == pytest.approx([math.log1p(slowdown)] * 4, abs=1e-3)
    assert len({r.id for r in records}) == len(records) == 24


def test_launches_make_whole_slowdowns() -> None:
    for estimate_s in (1e-7, 1e-5, 1e-3, 1.0):
        n = launches_of(estimate_s, 1e-3, INJECTION_LAUNCHES, 2000)
        assert n % INJECTION_LAUNCHES == 0 and 100 <= n <= 2000
        assert [extra_launches(n, s) for s in (0.01, 0.02, 0.05)] == [n // 100, n // 50, n // 20]
    with pytest.raises(ValueError, match="cannot be slowed"):
        extra_launches(10, 0.01)


@pytest.mark.parametrize("kind", ["probe", "open", "arm", "block", "close"])
@pytest.mark.parametrize("how", ["dies", "wrong"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_side_that_fails_leaves_its_record_and_is_not_tried_again(kind: str, how: str, side: str) -> None:
    machine = Machine(steady)
    wrong = {"outcome": "WRONG_VALUE", "reason": "", "detail": "off"}
    given: Any = Failure(Outcome.CRASHED, "signal_11", "gone") if how == "dies" else wrong
    machine.wrong = {(side, kind): given}
    made, records = runner(machine, cell())
    found = ab.compare_cells(made, [cell()], Rule(looks=(3, 4)), records)
    one = found.judged.cells[cell().name]
    assert one.word is Word.INCOMPARABLE and one.reason.startswith(
        f"side {side} " + ("CRASHED" if how == "dies" else "WRONG")
    )
    failed = [r for r in records if r.outcome is not Outcome.PASSED]
    assert failed and all(r.side == side and not r.measurements for r in failed) and machine.alive == 0
    assert made.pairs <= 4 and machine.log.count((side, "start")) == 1, "one pair, no more"
    code, _ = ab.exit_code(found, strict=False)
    assert code == (1 if side == "B" else 3), "our own B wrong is a failure; A's fault leaves nothing decided"


def test_a_cell_that_an_aa_run_found_too_noisy_is_not_gated() -> None:
    noisy, _ = runner(Machine(steady, process=0.05), cell())
    kept: list[Record] = []
    noisy.keep = kept.append
    noisy.measure(10, [cell().name])
    known = floors(kept, 10)
    assert list(known) == [cell().name] and known[cell().name] > 0.005
    slower = Machine(lambda side, backend, case: 1e-5 * (1.1 if side == "B" else 1.0))
    for given, label in ((known, "INCONCLUSIVE(noisy_cell)"), ({cell().name: 0.004}, "SLOWER"), ({}, "SLOWER")):
        made, records = runner(slower, cell())
        found = ab.compare_cells(made, [cell()], Rule(looks=(6,)), records, given)
        assert found.judged.cells[cell().name].label == label
    assert floors(kept[:4], 10) == {}, "two pairs say nothing of noise"


def test_interpreted_kernels_are_never_timed() -> None:
    machine = Machine(steady)
    machine.wrong = {("A", "probe"): {"reason": "interpreted"}}
    made, records = runner(machine, cell())
    found = ab.compare_cells(made, [cell()], Rule(looks=(3,)), records)
    assert found.judged.cells[cell().name].reason == "side A UNAVAILABLE(needs_cuda)"
    assert not any(kind == "block" for _, kind in machine.log)


def test_a_limit_ends_between_pairs() -> None:
    now = iter([0.0, 0.0, 10.0, 20.0, 30.0, 40.0])
    may = ab.time_limit(25.0, clock=lambda: next(now))
    assert [may(), may(), may()] == [True, True, False], "a third would end at 30 s"
    assert ab.time_limit(None, clock=lambda: 1e9)()


class Paid:
    """A clock that fake processes move: a start and each cell have a price, the first pair's cells a higher one."""

    def __init__(self, machine: Machine, start_s: float, cell_s: float, compile_s: float) -> None:
        self.machine, self.start_s, self.cell_s, self.compile_s = machine, start_s, cell_s, compile_s

    def __call__(self) -> float:
        kinds = [kind for side, kind in self.machine.log if side == "A"]
        opened = kinds.count("open")
        seen = {case for case in self.machine.opened if case}
        return self.start_s * kinds.count("probe") + self.cell_s * opened + self.compile_s * len(seen)


@pytest.mark.parametrize("limit_s", [30.0, 60.0, 100.0, 150.0])
def test_what_a_limit_leaves_is_whole_cells_and_the_first_ones(limit_s: float) -> None:
    cells = [cell(case=CASE.replace("n=64", f"n={32 * i}")) for i in range(1, 21)]
    machine = Machine(steady)
    clock = Paid(machine, start_s=2.0, cell_s=0.5, compile_s=0.5)
    made, records = runner(machine, *cells)
    left = ab.measure_all(made, [c.name for c in cells], 5, limit_s, clock)
    have = [sum(r.case == c.case and r.side == "A" for r in records) for c in cells]
    finished = [n for n in have if n == 5]
    assert have[: len(finished)] == finished, "in the order given"
    assert len(left) == len(cells) - len(finished)
    assert clock() <= limit_s + 2.0 + 1.0, "one start and one cell may be under way when it ends"
    needed_s = 5 * (2.0 + 0.5 * 20) + 0.5 * 20
    assert len(finished) >= min(20, 0.4 * limit_s / needed_s * 20), "most of the time is used"
    assert (len(finished) == 20) == (limit_s >= 100.0), f"all take {needed_s:g} s"


def test_a_simple_limit_on_pairs_would_leave_no_cell_whole() -> None:
    """Control: what shares are for."""
    cells = [cell(case=CASE.replace("n=64", f"n={32 * i}")) for i in range(1, 21)]
    machine = Machine(steady)
    clock = Paid(machine, start_s=2.0, cell_s=0.5, compile_s=0.5)
    made, records = runner(machine, *cells)
    made.may_go_on = ab.time_limit(60.0, clock)
    made.measure(5, [c.name for c in cells])
    assert {sum(r.case == c.case and r.side == "A" for r in records) for c in cells} == {4}, "of five"


@pytest.mark.parametrize("names", [["honest"], ["honest", "other"]])
def test_the_next_processes_start_while_a_pair_is_measured(names: list[str]) -> None:
    cells = [cell(backend={"A": n, "B": n}) for n in names]
    machine = Machine(steady)
    made, records = runner(machine, *cells)
    made.ahead = True
    made.measure(3, [c.name for c in cells])
    mine = [kind for side, kind in machine.log if side == "A"]
    number = 3 * len(names)
    assert mine.count("start") == mine.count("probe") == number, "none is started in vain, each pair has its own"
    assert mine.count("begin") == number - 1 and mine[:4] == ["start", "start", "begin", "probe"]
    assert machine.alive == 0 and len(records) == 6 * len(names)
    # Control: without it each starts in its turn.
    other = Machine(steady)
    made, _ = runner(other, *cells)
    made.measure(3, [c.name for c in cells])
    assert ("A", "begin") not in other.log


def test_processes_that_wait_die_with_the_run() -> None:
    machine = Machine(steady)
    made, _ = runner(machine, cell())
    made.ahead = True

    def stop(record: Record) -> None:
        raise KeyboardInterrupt

    made.keep = stop
    with pytest.raises(KeyboardInterrupt):
        made.measure(3, [cell().name])
    assert machine.log.count(("A", "start")) == 2 and machine.alive == 0
    failing = Machine(steady)
    failing.wrong = {("A", "open"): {"outcome": "WRONG_VALUE"}}
    made, _ = runner(failing, cell())
    made.ahead = True
    made.measure(3, [cell().name])
    assert failing.alive == 0, "nothing is left to measure: what waited is ended"


def test_cycles_need_every_blocks_clock() -> None:
    def side(seconds: float, hz: tuple[float, ...]) -> Measurement:
        return Measurement("graph", (seconds,) * 4, clock_hz=hz, blocks=(2, 2))

    known = observation(1, side(1e-5, (2e9,) * 4), side(2e-5, (1e9,) * 4))
    assert known.log_time == pytest.approx(math.log(2)) and known.log_cycles == pytest.approx(0)
    assert observation(1, side(1e-5, (2e9,) * 4), side(2e-5, (1e9,) * 3)).log_cycles is None


def test_a_block_of_no_open_cell_is_refused() -> None:
    with pytest.raises(OutOfTurn):
        answer(None, {"kind": "block"})


def test_looks() -> None:
    assert looks_between(10, 20) == (10, 15, 20) and looks_between(10, 10) == (10,) and looks_between(3, 4) == (3, 4)


# -- sides ----------------------------------------------------------------------------------------------------------

INFOS = {
    "honest": BackendInfo("honest", "d", ops={"fp4_linear": "m:f"}, options={"fp4_linear": ("num_warps",)}),
    "other": BackendInfo("other", "d", role="peer", ops={"fp4_linear": "m:f"}, variants={"fp4_linear": ("", "fast")}),
}
LINEAR = "fp4_linear[fmt=nvfp4,x=bf16,act=none,bias=0,dist=normal,m=1,n=64,k=64]"


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    top = tmp_path / "repository"
    (top / "kernels").mkdir(parents=True)
    (top / "kernels" / "__init__.py").write_text("WHICH = 'old'\n", encoding="utf-8")
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "old")
    (top / "kernels" / "__init__.py").write_text("WHICH = 'new'\n", encoding="utf-8")
    git(top, "commit", "-qam", "new")
    return top


def test_a_side_is_a_backend_a_folder_or_a_revision(repository: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    assert parse_side("honest@num_warps=8", INFOS, scratch) == Side(
        "honest@num_warps=8", "honest", "", {"num_warps": "8"}
    )
    assert parse_side("other[fast]", INFOS, scratch).variant == "fast"
    assert parse_side(str(repository), INFOS, scratch).tree == repository
    old = parse_side("HEAD~1", INFOS, scratch, repository)
    assert old.tree is not None and (old.tree / "kernels" / "__init__.py").read_text() == "WHICH = 'old'\n"
    assert old.label.startswith("HEAD~1 (") and not old.backend
    same = [parse_side(spec, INFOS, scratch, repository).tree for spec in ("HEAD", "HEAD~0")]
    assert same[0] == same[1] != old.tree


def test_other_kernels_run_under_this_harness(repository: Path, tmp_path: Path) -> None:
    path = sides.import_path(repository, tmp_path)
    code = "import vbench.kernels, vbench.worker; print(vbench.kernels.WHICH, vbench.worker.TIMED_ROWS)"
    done = subprocess.run(
        [str(Path(__import__("sys").executable)), "-c", code],
        env={"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PATH": "/usr/bin:/bin"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["new", "256"], done.stderr
    plain = tmp_path / "plain"
    plain.mkdir()
    assert sides.import_path(plain, tmp_path).startswith(f"{plain}:")


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("honest", "nobody", "no backend"),
        ("honest@warps=8", "honest", "declares no option 'warps' (declared: num_warps)"),
        ("honest@num_warps", "honest", "is not option=value"),
        ("honest", "other[slow]", "no variant of fp4_linear"),
        ("honest", ".", "compare a backend with a backend"),
    ],
)
def test_sides_that_mean_nothing_are_named(a: str, b: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as info:
        both = {"A": parse_side(a, INFOS, tmp_path), "B": parse_side(b, INFOS, tmp_path)}
        ab.cells_of(both, [], INFOS, [ab.Chosen("fp4_linear", LINEAR)])
    assert said in str(info.value)


def test_cells_of_backends_and_of_trees() -> None:
    cases = [ab.Chosen("fp4_linear", LINEAR, "fp4"), ab.Chosen("attention", "attention[]")]
    (one,) = ab.cells_of({"A": Side("a", "honest"), "B": Side("b", "other", "fast")}, [], INFOS, cases)
    assert one.name == f"{LINEAR} honest other[fast]" and one.role == "peer"
    trees = {"A": Side("x", tree=Path("x")), "B": Side("installed")}
    found = ab.cells_of(trees, ["honest", "other"], INFOS, cases)
    assert [c.name for c in found] == [f"{LINEAR} honest", f"{LINEAR} other", f"{LINEAR} other[fast]"]
    with pytest.raises(UsageError, match="no timed case in common"):
        ab.cells_of(trees, ["honest"], INFOS, cases[1:])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gate"], "give RUN and --baseline"),
        (["gate", "latest", "--against", "HEAD"], "leave out RUN"),
        (["gate", "--against", "triton"], "name a git revision or a folder"),
        (["ab", "tiers", "no-such-revision"], "no git revision"),
        (["ab", "triton@num_stages=x,foo=1", "triton"], "declares no option 'foo'"),
        (["ab", "tiers", "tiers", "--pairs", "1"], "at least 2 pairs"),
        (["ab", "tiers", "tiers", "--case", "fp5[x=1]"], "no operation of that name"),
        (["ab", "tiers", "tiers", "--case", "tier_stack[x=1]"], "tier_stack has no parameter 'x'"),
    ],
)
def test_bad_input_exits_2(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--device", "cpu", "--out", str(tmp_path)]
    assert main([*arguments, *more]) == 2
    assert said in capsys.readouterr().err


# -- self-test ------------------------------------------------------------------------------------------------------


def fake_pairs(machine: Machine, cells: list[Cell], pairs: int, run: str) -> list[Record]:
    made, records = runner(machine, *cells)
    made.run_id = run
    made.measure(pairs, [c.name for c in cells])
    return records


def selftest_cells(number: int) -> list[Cell]:
    cases = [ab.Chosen("fp4_linear", LINEAR.replace("m=1", f"m={m}")) for m in range(1, number + 1)]
    return selftest.cells_of(cases, INFOS, ["honest"])


def test_rates_of_a_quiet_machine() -> None:
    cells = selftest_cells(9)
    assert [c.slowdown for c in cells[:8]] == [0.0, 0.01, 0.0, 0.02, 0.0, 0.05, 0.0, 0.01]
    records = fake_pairs(Machine(steady, process=0.002), cells, 10, "one")
    result = selftest.rates(records, run="r", rule=Rule())
    found = {(r.case.split("stage=")[1].split(",")[0], r.metrics["injected"]): r.metrics for r in result.records}
    assert {stage for stage, _ in found} == {"cell", "bh"}
    assert found["cell", 0.0]["cells"] == 9 and found["cell", 0.0]["rate"] == 0
    assert found["cell", 0.05]["cells"] == 3 and found["cell", 0.05]["rate"] == 1
    assert result.gated == 9 and not result.noisy
    assert "false alarms 0.0 %" in selftest.summary(result.records)


def test_runs_are_joined_and_the_second_ten_confirm() -> None:
    cells = selftest_cells(3)
    machine = Machine(steady, process=0.002)
    records = fake_pairs(machine, cells, 10, "one") + fake_pairs(machine, cells, 10, "two")
    result = selftest.rates(records, run="r", rule=Rule())
    found = {(r.case.split("stage=")[1].split(",")[0], r.metrics["injected"]): r.metrics for r in result.records}
    assert {stage for stage, _ in found} == {"cell", "suite"}
    assert found["cell", 0.0]["cells"] == 6, "two trials a cell"
    assert found["suite", 0.05] == {**found["suite", 0.05], "cells": 1, "rate": 1}


def test_a_noisy_cell_is_marked() -> None:
    records = fake_pairs(Machine(steady, process=0.05), selftest_cells(2), 10, "one")
    result = selftest.rates(records, run="r", rule=Rule())
    assert result.gated == 0 and len(result.noisy) == 2


def test_an_unfair_machine_is_seen() -> None:
    """Control: a machine on which side B is always slower raises false alarms in the table."""
    machine = Machine(lambda side, backend, case: 1e-5 * (1.03 if side == "B" else 1.0), process=0.002)
    result = selftest.rates(fake_pairs(machine, selftest_cells(6), 10, "one"), run="r", rule=Rule())
    assert all(r.metrics["rate"] == 1 for r in result.records if r.metrics["injected"] == 0)


def test_cheapest() -> None:
    cases = [ab.Chosen("o", name) for name in "abcd"]
    found = selftest.cheapest(cases, {"a": 3.0, "b": 1.0, "c": 2.0, "d": 4.0}, 2, 1)
    assert [c.case for c in found] == ["c", "a"]
    found = selftest.cheapest(cases, {"a": 3.0, "b": 0.0, "d": 4.0}, 4, 0)
    assert [c.case for c in found] == ["a", "d", "b", "c"], "of b and c nothing is known"


@pytest.mark.parametrize(("sample_s", "samples"), [(1e-3, 10), (0.04, 10), (0.1, 4), (0.3, 3), (9.0, 3), (0.0, 10)])
def test_long_samples_are_fewer(sample_s: float, samples: int) -> None:
    machine = Machine(steady)
    machine.sample_s = sample_s
    made, records = runner(machine, cell())
    made.measure(1, [cell().name])
    assert [r.measurements[0].blocks for r in records] == [(samples, samples)] * 2


def test_what_is_unfinished_is_counted_cell_by_cell() -> None:
    cells = selftest_cells(3)
    records = fake_pairs(Machine(steady), cells[:3], 4, "one") + fake_pairs(Machine(steady), cells[2:3], 1, "two")
    stored = [Record.from_json(r.to_json(), "x") for r in records]
    assert selftest.unfinished(cells, stored, 4) == cells[3:]
    assert selftest.unfinished(cells, stored, 5) == cells[:2] + cells[3:]
    assert selftest.unfinished(cells, [], 1) == cells
    assert [
        c.slowdown for c in selftest.cells_of([ab.Chosen("fp4_linear", LINEAR)], INFOS, ["honest"], injected=False)
    ] == [0.0]


RESIDENT = "tier_stack[trace=resident,keys=8,item_bytes=64,steps=8,gpu_bytes=1024,host_bytes=1024,file_bytes=4096]"


def test_a_baseline_is_measured_updated_and_gated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = itertools.count()

    def start(self: object, side: str, backend: str) -> Process:
        return Machine(steady, seed=next(seeds)).start(side, backend)

    monkeypatch.setattr(ab.Workers, "start", start)
    out = tmp_path / "runs"
    common = ["--backend", "tiers", "--device", "cpu", "--out", str(out)]
    measure = ["baseline", "measure", *common, "--case", RESIDENT, "--case", RESIDENT.replace("keys=8", "keys=4")]
    assert main([*measure[:-2], "--pairs", "3"]) == 0
    (first,) = [p.parent.name for p in out.glob("*/records.jsonl")]
    assert main([*measure, "--resume", first]) == 0
    second = next(p.parent for p in out.glob("*/records.jsonl") if p.parent.name != first)
    assert {r.case for r in read_records(second)} == {RESIDENT.replace("keys=8", "keys=4")}, "the other has its own"
    assert "1 of 1 have 6 processes" in capsys.readouterr().out
    assert main([*measure, "--resume", first, second.name]) == 0
    assert "nothing left to measure: 2 cells" in capsys.readouterr().out
    kept = tmp_path / "kept"
    update = ["baseline", "update", first, second.name, "--baseline", str(kept), "--out", str(out), "--write"]
    assert main(update) == 0
    assert len(read_records(kept)) == 12
    assert main(["gate", second.name, "--out", str(out), "--baseline", str(kept)]) == 0
    assert main(["gate", second.name, "--out", str(out), "--baseline", str(kept), "--strict"]) == 3, "one is missing"
    again = [*measure[:-2], "--baseline", str(kept), "--op", "tier_stack", "--pairs", "1"]
    assert main([*again, "--resume", first]) == 0
    assert "nothing left to measure" in capsys.readouterr().out
    with monkeypatch.context() as changed:
        changed.setitem(ENVIRONMENT, "driver", "999.1")
        assert main(again) == 0
    assert "machine   driver: 1 in the baseline, 999.1 in the run; a gate refuses" in capsys.readouterr().out
    assert main(again) == 0 and "machine" not in capsys.readouterr().out, "control: the same machine"
    slower = Machine(lambda side, backend, case: 1.2e-5)
    monkeypatch.setattr(ab.Workers, "start", lambda self, side, backend: slower.start(side, backend))
    assert main(["baseline", "measure", *common, "--case", RESIDENT, "--pairs", "1"]) == 0
    third = max(out.glob("*/records.jsonl"), key=lambda p: p.stat().st_mtime_ns)
    assert main(["gate", str(third), "--baseline", str(kept)]) == 1
    slower.wrong = {("B", "close"): {"outcome": "WRONG_VALUE"}}
    assert main(["baseline", "measure", *common, "--case", RESIDENT, "--pairs", "1"]) == 1, "wrong is never a baseline"
    assert "1 x WRONG_VALUE" in capsys.readouterr().out
    assert main([*measure, "--pairs", "0"]) == 2
    assert main([*measure, "--claims", "--pairs", "1"]) == 0, "no claim rests on these: nothing to do, and it says so"
    assert "none that is asked for" in capsys.readouterr().out


def test_selftest_joins_stored_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: object, side: str, backend: str) -> Process:
        return Machine(steady, seed=side.encode()[0]).start(side, backend)

    monkeypatch.setattr(ab.Workers, "start", start)
    case = "tier_stack[trace=resident,keys=8,item_bytes=64,steps=8,gpu_bytes=1024,host_bytes=1024,file_bytes=4096]"
    common = ["selftest", "--aa", "--device", "cpu", "--backend", "tiers", "--case", case, "--out", str(tmp_path)]
    assert main([*common, "--pairs", "6"]) == 3, "six pairs are too few for a rate"
    assert "nothing judged" in capsys.readouterr().out
    (first,) = tmp_path.glob("*/records.jsonl")
    assert main([*common, "--pairs", "6", "--join", first.parent.name, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kind"] for row in rows} == {"selftest"} and len(rows) == 4
    (rates,) = tmp_path.glob("*/selftest.jsonl")
    assert len(read_records(rates)) == 4
    assert main([*common, "--pairs", "0", "--join", first.parent.name, first.parent.name]) == 2


def test_options_reach_the_kernel_or_are_refused() -> None:
    case = registry.ops()["fp4_linear"].parse(LINEAR)
    factory = resolve(registry.backends()["triton"].ops["fp4_linear"])
    plain, tuned = factory(case, "", "cpu"), factory(case, "", "cpu", num_warps="2", num_stages="1")
    assert (tuned.plan.warps, tuned.plan.stages) == (2, 1) and tuned.plan != plain.plan
    for name, value in (("num_warps", "3"), ("num_stages", "many")):
        with pytest.raises(Unsupported, match="option_value"):
            factory(case, "", "cpu", **{name: value})


def test_every_declared_option_names_an_op_of_the_backend() -> None:
    for info in registry.backends().values():
        assert set(info.options) <= set(info.ops), info.name
