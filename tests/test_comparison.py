"""Intervals and the rule for A against B, held to distributions whose answer is known, and to simulated machines."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench import intervals, simulate, student
from vbench.cli import main
from vbench.comparison import (
    Comparison,
    Observation,
    Rule,
    Word,
    benjamini_hochberg,
    compare,
    floor_exceeds,
    in_cycles,
    judge_cells,
    over_looks,
    spend,
)
from vbench.documents import rates_table
from vbench.errors import DataError
from vbench.store import read_records

LOGS = st.lists(st.floats(-0.2, 0.2), min_size=3, max_size=20).filter(lambda v: statistics.pstdev(v) > 1e-6)


def ar1(n: int, rho: float, draw: random.Random) -> list[float]:
    state, found = draw.gauss(0, 1), []
    for _ in range(n):
        found.append(state)
        state = rho * state + math.sqrt(1 - rho * rho) * draw.gauss(0, 1)
    return found


# -- intervals ------------------------------------------------------------------------------------------------------


def test_the_median_interval_covers_also_where_samples_depend_and_the_naive_one_does_not() -> None:
    draw = random.Random(1)
    for rho, least in ((0.0, 0.93), (0.6, 0.9), (0.9, 0.85)):
        covered = naive = unknown = 0
        for _ in range(300):
            samples = ar1(200, rho, draw)
            found = intervals.median_interval(samples)
            unknown += found is None
            covered += found is not None and found.low <= 0 <= found.high
            ordered = sorted(samples)
            naive += ordered[85] <= 0 <= ordered[114]  # the interval of 200 independent samples
        assert covered >= least * (300 - unknown) and unknown <= 15, rho
        # control: taking dependent samples for independent ones is caught by the same count
        assert (naive < 0.8 * 300) == (rho > 0.5)


def test_effective_size() -> None:
    draw = random.Random(2)
    for rho in (0.0, 0.5, 0.9):
        sizes = [intervals.effective_size(ar1(400, rho, draw)) for _ in range(40)]
        # The indicator's correlation at lag k is 2/pi * asin(rho^k).
        inflation = 1 + 2 * sum(2 / math.pi * math.asin(rho**k) for k in range(1, 200))
        assert statistics.median(sizes) == pytest.approx(400 / inflation, rel=0.35)
    assert intervals.effective_size([1.0] * 50) == 50
    assert intervals.effective_size([-1.0, 1.0] * 25) == 50, "negative dependence is not credited"


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_median_interval_holds_the_median_or_says_none(samples: list[float], level: float) -> None:
    found = intervals.median_interval(samples, level)
    if found is None:
        assert 2 * 0.5 ** math.floor(intervals.effective_size(samples)) > 1 - level - 1e-12 or len(samples) < 2
    else:
        assert found.low <= found.value <= found.high and found.low in samples and found.high in samples


def test_six_samples_are_the_fewest_at_95_percent() -> None:
    assert intervals.median_interval([1.0, 2, 3, 4, 5]) is None
    found = intervals.median_interval([3.0, 1, 6, 2, 5, 4])
    assert found is not None and (found.low, found.high) == (1.0, 6.0)


@pytest.mark.parametrize(("q", "needed"), [(0.5, 20), (0.9, 100), (0.99, 1000), (0.01, 1000)])
def test_a_quantile_of_too_few_samples_is_refused(q: float, needed: int) -> None:
    with pytest.raises(DataError, match=f"needs at least {needed} samples"):
        intervals.quantile([1.0] * (needed - 1), q)
    ordered = [float(i) for i in range(needed)]
    assert intervals.quantile(ordered[::-1], q) == pytest.approx(np.quantile(ordered, q))


@given(LOGS, st.floats(-1, 1))
def test_both_intervals_move_with_the_values_and_turn_with_them(logs: list[float], by: float) -> None:
    for method in (intervals.student, intervals.sign_flip):
        found, moved = method(logs, 0.9), method([x + by for x in logs], 0.9)
        turned = method([-x for x in logs], 0.9)
        assert moved.low == pytest.approx(found.low + by, abs=1e-9)
        assert [turned.low, turned.high] == pytest.approx([-found.high, -found.low])


def test_sign_flip_is_the_test_inverted() -> None:
    logs = [0.3, -0.1, 0.2, 0.25, 0.05, 0.4, 0.1, -0.02]
    bounds = intervals.sign_flip(logs, 0.95)

    def p(centre: float) -> float:
        deviations = [x - centre for x in logs]
        seen = sum(deviations)
        flips = [sum(s * d for s, d in zip(signs, deviations, strict=True)) for signs in SIGNS]
        return sum(f >= seen - 1e-12 for f in flips) / len(flips)

    assert p(bounds.low - 1e-6) <= 0.05 < p(bounds.low + 1e-6)
    assert math.isinf(intervals.sign_flip(logs[:6], 0.99).low), "2^-6 is more than 0.01: nothing can be rejected"
    assert math.isfinite(intervals.sign_flip(logs[:7], 0.99).low)


SIGNS = tuple(itertools.product((1, -1), repeat=8))


def test_sign_flip_covers_beyond_enumeration() -> None:
    draw = random.Random(3)
    misses = sum(intervals.sign_flip([draw.gauss(0, 1) for _ in range(16)], 0.9).low > 0 for _ in range(25))
    assert misses <= 8  # 2.5 expected; above 8 has probability 0.0002


@pytest.mark.parametrize(
    ("k", "n", "low", "high"), [(0, 200, 0.0, 0.01828), (5, 100, 0.01643, 0.11284), (4, 4, 0.39764, 1)]
)
def test_rate_interval_against_published_values(k: int, n: int, low: float, high: float) -> None:
    found = intervals.rate(k, n)
    assert [found.low, found.high] == pytest.approx([low, high], abs=1e-4)


@given(st.floats(0.5, 30), st.floats(0.5, 30), st.floats(0.001, 0.999))
def test_incomplete_beta_has_its_symmetry(a: float, b: float, x: float) -> None:
    assert student.incomplete_beta(a, b, x) == pytest.approx(1 - student.incomplete_beta(b, a, 1 - x), abs=1e-9)


# -- the rule -------------------------------------------------------------------------------------------------------


@given(LOGS, st.floats(0.001, 0.2), st.floats(0.002, 0.05), st.sampled_from(["student", "sign_flip"]))
def test_the_words_are_what_the_rule_says(logs: list[float], alpha: float, delta: float, method: str) -> None:
    one = compare(logs, alpha=alpha, delta=delta, method=method)  # type: ignore[arg-type]
    turned = compare([-x for x in logs], alpha=alpha, delta=delta, method=method)  # type: ignore[arg-type]
    mirror = {Word.SLOWER: Word.FASTER, Word.FASTER: Word.SLOWER}
    assert turned.word is mirror.get(one.word, one.word)
    assert one.ratio is not None and one.low is not None and one.high is not None
    if one.word is Word.SLOWER:
        assert one.low > 1 and one.ratio >= (1 + delta) * (1 - 1e-9)
    elif one.word is Word.SAME:
        assert 1 / (1 + 2 * delta) < one.low <= one.high < 1 + 2 * delta
        assert not (one.low > 1 and one.ratio > 1 + delta)
    elif one.word is Word.INCONCLUSIVE:
        assert one.high >= 1 + 2 * delta or one.low <= 1 / (1 + 2 * delta)
    if method == "student":
        assert (one.low > 1) == (one.p_slower < alpha) or one.low == pytest.approx(1)


def test_bad_observations_decide_nothing() -> None:
    assert compare([0.1], alpha=0.01, delta=0.01).label == "INCONCLUSIVE(too_few_pairs)"
    assert compare([0.1, math.nan, 0.1], alpha=0.01, delta=0.01).label == "INVALID(not_finite)"
    assert compare([0.0] * 5, alpha=0.01, delta=0.01).word is Word.SAME
    assert compare([0.05] * 5, alpha=0.01, delta=0.01).word is Word.SLOWER


@pytest.mark.parametrize(
    "broken",
    [{"delta": 0.0}, {"alpha": 0.5}, {"q": 1.0}, {"looks": ()}, {"looks": (10, 5)}, {"looks": (1,)}, {"confirm": 1}],
)
def test_a_rule_that_is_none_is_refused(broken: dict[str, object]) -> None:
    with pytest.raises(DataError, match="rule"):
        Rule(**broken)  # type: ignore[arg-type]


@given(st.floats(1e-4, 0.4), st.lists(st.integers(2, 50), min_size=1, max_size=4, unique=True).map(sorted))
def test_spending_adds_up(alpha: float, looks: list[int]) -> None:
    shares = spend(alpha, looks)
    assert sum(shares) == pytest.approx(alpha) and all(s > 0 for s in shares)
    assert over_looks([shares[0]], shares, alpha) == pytest.approx(alpha)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 0.3))
def test_benjamini_hochberg_against_its_definition(p: list[float], q: float) -> None:
    found = benjamini_hochberg(p, q)
    ordered = sorted(p)
    cut = max((x for i, x in enumerate(ordered, 1) if x <= q * i / len(p)), default=-1.0)
    assert found == tuple(x <= cut for x in p)


def test_equal_cycles_make_a_change_of_time_a_change_of_the_clock() -> None:
    noise = [0.0, 0.001, -0.001, 0.0005, -0.0005] * 2
    slower = compare([0.05 + n for n in noise], alpha=0.01, delta=0.01)
    assert slower.word is Word.SLOWER

    def seen(cycles: Sequence[float | None]) -> list[Observation]:
        return [Observation(i, 0.05 + n, c) for i, (n, c) in enumerate(zip(noise, cycles, strict=True))]

    assert in_cycles(slower, seen(noise), alpha=0.01, delta=0.01).label == "INCONCLUSIVE(clock)"
    assert in_cycles(slower, seen([0.05 + n for n in noise]), alpha=0.01, delta=0.01).word is Word.SLOWER
    assert in_cycles(slower, seen([None, *noise[1:]]), alpha=0.01, delta=0.01).word is Word.SLOWER, "clock unknown"


class Script:
    """A ``Measure`` that reads its ratios from a script: cell -> log ratio by pair number."""

    def __init__(self, script: Mapping[str, Sequence[float]], noise: float = 1e-4) -> None:
        self.script, self.next = script, 0
        self.calls: list[tuple[int, list[str]]] = []
        self.noise = noise

    def __call__(self, pairs: int, cells: Sequence[str]) -> dict[str, list[Observation]]:
        self.calls.append((pairs, list(cells)))
        first, self.next = self.next, self.next + pairs
        numbers = range(first, self.next)
        wobble = [self.noise * (-1) ** i for i in range(self.next)]
        return {
            c: [Observation(i, self.script[c][min(i, len(self.script[c]) - 1)] + wobble[i]) for i in numbers]
            for c in cells
            if self.script[c]
        }


def test_only_open_cells_get_more_pairs_and_only_changed_ones_are_confirmed() -> None:
    wild = [0.2, -0.2] * 20
    script = Script({"same": [0.0], "slow": [0.05], "wild": wild, "gone": []})
    judged = judge_cells(script, list(script.script), Rule(looks=(4, 6), confirm=3))
    assert {c: one.label for c, one in judged.cells.items()} == {
        "same": "SAME", "slow": "SLOWER", "wild": "INCONCLUSIVE(interval)", "gone": "INCOMPARABLE(no_pair)",
    }  # fmt: skip
    assert script.calls == [(4, ["same", "slow", "wild", "gone"]), (2, ["wild"]), (3, ["slow"])]
    assert judged.cells["slow"].pairs == 4 and judged.cells["wild"].pairs == 6
    assert judged.geomean.pairs == 4


def test_what_other_processes_do_not_confirm_is_taken_back() -> None:
    script = Script({"slow": [0.05] * 5 + [0.0]})
    judged = judge_cells(script, ["slow"], Rule(looks=(5,), confirm=5))
    assert judged.cells["slow"].label == "INCONCLUSIVE(not_confirmed)"
    assert judged.cells["slow"].confirmed == pytest.approx(1.0, abs=1e-3)


def test_one_of_many_needs_more_evidence_than_one_alone() -> None:
    marginal = [0.02 + 0.02 * (-1) ** i for i in range(12)]
    alone = judge_cells(Script({"a": marginal}), ["a"], Rule(looks=(12,), confirm=0))
    assert alone.cells["a"].word is Word.SLOWER
    many = {"a": marginal, **{f"c{i}": [0.0] for i in range(200)}}
    judged = judge_cells(Script(many), list(many), Rule(looks=(12,), confirm=0))
    assert judged.cells["a"].label == "INCONCLUSIVE(multiplicity)"


def test_the_floor_marks_a_cell_too_noisy_to_gate() -> None:
    quiet = compare([0.001 * (-1) ** i for i in range(10)], alpha=0.01, delta=0.01)
    noisy = compare([0.03 * (-1) ** i for i in range(10)], alpha=0.01, delta=0.01)
    assert not floor_exceeds(quiet, 0.01) and floor_exceeds(noisy, 0.01)
    assert floor_exceeds(Comparison(Word.INCOMPARABLE, "no_pair"), 0.01)


# -- simulated machines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", simulate.MACHINES)
def test_false_alarms_after_multiplicity_and_confirmation(machine: str) -> None:
    """At most 1 % of 1000 cells of identical code on every kind of noisy machine."""
    same, _ = simulate.suite_rates(
        simulate.MACHINES[machine],
        suites=5,
        cells=200,
        slowed=0,
        slowdown=0.0,
        seed=11,
        rule=Rule(looks=(10, 20), confirm=10),
    )
    assert same.cells == 1000 and same.slower + same.faster <= 10


def test_a_wrong_statistic_is_caught_by_the_same_count() -> None:
    """Control: blocks of one pair taken for replicates raise many false alarms where processes differ."""
    random = np.random.default_rng(5)
    times, _ = simulate.observe(simulate.MACHINES["process"], 300, 1, 0.0, random)
    within = 0.002 / math.sqrt(simulate.BLOCK_SAMPLES) * random.standard_normal((300, 10))
    words = [compare(row, alpha=0.01, delta=0.01).word for row in (times + within).tolist()]
    assert sum(w in (Word.SLOWER, Word.FASTER) for w in words) > 60


def test_interleaving_is_what_takes_out_the_drift() -> None:
    """Control: the same drift with A first and then B is much more noise."""
    noise = simulate.Noise(sample=0.001, drift=0.02, correlation=0.995)
    abba, _ = simulate.observe(noise, 200, 10, 0.0, np.random.default_rng(6))
    aabb, _ = simulate.observe(noise, 200, 10, 0.0, np.random.default_rng(6), order=(0, 0, 1, 1))
    assert float(aabb.std()) > 1.5 * float(abba.std())


def test_power_at_two_percent() -> None:
    """At least 90 % with 10 pairs at 1 % noise a side before multiplicity, with 20 pairs after it over 200 cells."""
    noise = simulate.Noise(process=0.01, sample=0.0)
    alone = simulate.cell_rates(noise, cells=1000, pairs=10, slowdown=0.02, seed=1, rule=simulate.CELL_RULE)
    assert alone.slower >= 900 and alone.faster == 0
    assert alone.same <= 10, "a slowdown of 2 % is not certified as the same"
    _, slowed = simulate.suite_rates(
        noise, suites=6, cells=200, slowed=5, slowdown=0.02, seed=2, rule=simulate.SUITE_RULE
    )
    assert slowed.slower >= 27
    # control: without a slowdown the same count finds none
    none = simulate.cell_rates(noise, cells=1000, pairs=10, slowdown=0.0, seed=3, rule=simulate.CELL_RULE)
    assert none.slower + none.faster <= 30 and none.same >= 700


def test_a_throttled_clock_on_one_side_only_is_no_slowdown() -> None:
    noise = simulate.Noise(process=0.002, throttle=0.9, throttle_step=0.3)
    truth = {f"c{i}": 0.0 for i in range(50)}
    measure = simulate.measurer(noise, truth, np.random.default_rng(4), clocks=True)
    judged = judge_cells(measure, list(truth), Rule(looks=(6,), q=0.99, alpha=0.2, confirm=0))
    assert all(one.word not in (Word.SLOWER, Word.FASTER) for one in judged.cells.values())
    reasons = [one.reason for one in judged.cells.values()]
    assert "clock" in reasons, "control: without cycles some would have been called changed"


def test_the_simulator_is_what_it_says() -> None:
    random = np.random.default_rng(0)
    times, cycles = simulate.observe(simulate.Noise(process=0.01, sample=0.0), 500, 20, 0.03, random)
    assert times.mean() == pytest.approx(math.log(1.03), abs=4 * 0.01414 / 100)
    assert times.std() == pytest.approx(0.01414, rel=0.05)
    assert (times == cycles).all(), "no throttling: cycles are times"


def test_the_published_rates_are_reproduced() -> None:
    small = simulate.records(run="r", cells=40, suites=1, machines=["throttle"])
    again = simulate.records(run="r", cells=40, suites=1, machines=["throttle"])
    assert [r.to_json() for r in small] == [r.to_json() for r in again]
    assert len(small) == 2 * (1 + len(simulate.SLOWDOWNS))
    other = simulate.records(run="r", seed=1, cells=40, suites=1, machines=["throttle"])
    assert [r.metrics for r in other] != [r.metrics for r in small], "control: the seed is used"
    assert all(r.sources for r in small) and len({r.id for r in small}) == len(small)


def test_selftest_prints_and_stores_the_rates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = simulate.records
    monkeypatch.setattr(simulate, "records", lambda **k: full(**k, cells=20, suites=1, machines=["process"]))
    assert main(["selftest", "--aa", "--simulated", "--seed", "3", "--out", str(tmp_path)]) == 0
    (stored,) = tmp_path.glob("*/records.jsonl")
    assert len(read_records(stored)) == 8
    out = capsys.readouterr().out
    assert "| process | suite | 20 |" in out and "of 200" in out and str(stored) in out
    assert main(["selftest", "--aa", "--simulated", "--seed", "3", "--out", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 8


def test_published_rates_are_stale_where_the_statistics_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    record = simulate.records(run="r", cells=20, suites=1, machines=["process"])[0]
    (line,) = [row for row in rates_table([record], "simulator") if "process" in row]
    assert "of 20" in line
    (line,) = [row for row in rates_table([record], "simulator", "", lambda r: "sha256:other") if "process" in row]
    assert "STALE" in line
    assert rates_table([record], "nobody") == ["NOT_RUN (no_records)"]
