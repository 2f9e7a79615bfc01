"""Machines whose noise is known, so that the statistics can be tested against the truth. Seeded; numpy on use.

One simulated pair measures a cell like a real one: two fresh processes, blocks of samples in ABBA or BAAB order, who
leads drawn at random, one median a block. What differs from the truth is drawn from a ``Noise``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vbench import intervals
from vbench.comparison import Measure, Observation, Rule, Word, compare, judge_cells
from vbench.record import Outcome, Record
from vbench.sources import digest

#: Blocks of one cell in one pair, and samples a block.
BLOCKS = 4
BLOCK_SAMPLES = 10
ABBA = (0, 1, 1, 0)

BACKEND = "simulator"
#: What the published rates rest on; with other sources they are STALE.
SOURCES = ("vbench.simulate",)


@dataclass(frozen=True, slots=True)
class Noise:
    """A noisy machine. All sizes are standard deviations of, or steps in, the logarithm of time.

    Args:
        process: effect of each process on a cell, drawn anew for each process.
        sample: white noise of each sample.
        drift, correlation: stationary AR(1) over the samples in time order, the same for both sides.
        throttle, throttle_step: probability that the clock falls by ``throttle_step`` somewhere in a cell's blocks, to
            rise again at a later sample.
        outliers, outlier_step: probability of a sample that is longer, and the mean of how much (exponential).
    """

    process: float = 0.0
    sample: float = 0.005
    drift: float = 0.0
    correlation: float = 0.0
    throttle: float = 0.0
    throttle_step: float = 0.0
    outliers: float = 0.0
    outlier_step: float = 0.0


#: One a kind of noise, and all together. 1 % between processes is what one cell of ours is asked to stand.
MACHINES: Mapping[str, Noise] = {
    "process": Noise(process=0.01, sample=0.002),
    "drift": Noise(process=0.005, drift=0.02, correlation=0.99),
    "throttle": Noise(process=0.005, throttle=0.1, throttle_step=0.1),
    "outliers": Noise(process=0.005, outliers=0.1, outlier_step=0.5),
    "everything": Noise(0.007, 0.005, 0.01, 0.99, 0.1, 0.1, 0.05, 0.5),
}


def observe(
    noise: Noise, cells: int, pairs: int, slowdown: float, random: Any, order: Sequence[int] = ABBA
) -> tuple[Any, Any]:
    """Log ratios B over A of block medians.

    Args:
        slowdown: B takes 1 + slowdown times as long as A.
        random: a ``numpy.random.Generator``.
        order: side (0: A, 1: B) of each of the BLOCKS blocks where A leads.

    Returns:
        (times, cycles), float64 arrays of shape (cells, pairs). Cycles are times but for the throttling.
    """
    import numpy as np

    shape = (cells, pairs)
    samples = BLOCKS * BLOCK_SAMPLES
    log = noise.sample * random.standard_normal((*shape, samples))
    if noise.drift:
        state = random.standard_normal(shape)
        fresh = (1 - noise.correlation**2) ** 0.5
        for i in range(samples):
            log[..., i] += noise.drift * state
            state = noise.correlation * state + fresh * random.standard_normal(shape)
    if noise.outliers:
        hit = random.random(log.shape) < noise.outliers
        log += hit * noise.outlier_step * random.standard_exponential(log.shape)
    process = noise.process * random.standard_normal((*shape, 2))
    leader = random.integers(0, 2, shape)
    # Side of each block: as ordered where A leads, turned where B does.
    side = np.array(order)[None, None, :] ^ leader[..., None]
    blocks = log.reshape(*shape, BLOCKS, BLOCK_SAMPLES)
    blocks += np.take_along_axis(process, side, axis=-1)[..., None]
    blocks += (np.log1p(slowdown) * side)[..., None]
    cycles = np.median(blocks, axis=-1)
    if noise.throttle:
        begin = random.integers(0, samples, shape)[..., None]
        end = begin + random.integers(1, samples, shape)[..., None]
        at = np.arange(samples)
        slow = (at >= begin) & (at < end) & (random.random(shape) < noise.throttle)[..., None]
        blocks += noise.throttle_step * slow.reshape(blocks.shape)
    times = np.median(blocks, axis=-1)
    weight = side - 0.5
    return (times * weight).sum(axis=-1), (cycles * weight).sum(axis=-1)


def measurer(noise: Noise, slowdowns: Mapping[str, float], random: Any, *, clocks: bool = False) -> Measure:
    """A ``Measure`` of cells whose true slowdowns are given; cycles are reported where ``clocks``."""
    numbers = iter(range(1 << 30))

    def measure(pairs: int, cells: Sequence[str]) -> dict[str, list[Observation]]:
        ids = [next(numbers) for _ in range(pairs)]
        found: dict[str, list[Observation]] = {}
        for slowdown in sorted({slowdowns[c] for c in cells}):
            group = [c for c in cells if slowdowns[c] == slowdown]
            times, cycles = observe(noise, len(group), pairs, slowdown, random)
            for cell, row, row_cycles in zip(group, times.tolist(), cycles.tolist(), strict=True):
                both = zip(ids, row, row_cycles, strict=True)
                found[cell] = [Observation(i, t, c if clocks else None) for i, t, c in both]
        return found

    return measure


@dataclass(frozen=True, slots=True)
class Rates:
    """How often a rule said what. Counts of cells."""

    cells: int
    slower: int
    faster: int
    same: int
    inconclusive: int


def count(words: Sequence[Word]) -> Rates:
    """Words of cells, counted."""
    slower, faster, same = (sum(w is word for w in words) for word in (Word.SLOWER, Word.FASTER, Word.SAME))
    return Rates(len(words), slower, faster, same, len(words) - slower - faster - same)


def cell_rates(noise: Noise, *, cells: int, pairs: int, slowdown: float, seed: int, rule: Rule) -> Rates:
    """Each cell by itself at ``rule.alpha`` after ``pairs`` pairs: before multiplicity and confirmation."""
    import numpy as np

    times, _ = observe(noise, cells, pairs, slowdown, np.random.default_rng(seed))
    return count([compare(row, alpha=rule.alpha, delta=rule.delta, method=rule.method).word for row in times.tolist()])


def suite_rates(
    noise: Noise, *, suites: int, cells: int, slowed: int, slowdown: float, seed: int, rule: Rule, clocks: bool = False
) -> tuple[Rates, Rates]:
    """Suites of ``cells`` cells of which ``slowed`` are slower by ``slowdown``, the whole way of ``judge_cells``.

    Returns:
        rates of the cells that are the same on both sides, and of the slowed ones, over all suites.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    same: list[Word] = []
    other: list[Word] = []
    for _ in range(suites):
        truth = {f"c{i}": slowdown if i < slowed else 0.0 for i in range(cells)}
        judged = judge_cells(measurer(noise, truth, random, clocks=clocks), list(truth), rule)
        for cell, one in judged.cells.items():
            (other if truth[cell] else same).append(one.word)
    return count(same), count(other)


#: The rules whose rates are published: one look each, as the issue that asked for the rates names them.
CELL_RULE = Rule(looks=(10,), confirm=0)
SUITE_RULE = Rule(looks=(20,), confirm=20)
#: Cells of a simulated suite, and how many of them are slowed in rows with a slowdown.
SUITE_CELLS = 200
SUITE_SLOWED = 10
SLOWDOWNS = (0.01, 0.02, 0.05)


def records(
    *, run: str, seed: int = 0, cells: int = 2000, suites: int = 10, machines: Sequence[str] = tuple(MACHINES)
) -> list[Record]:
    """The published table: one record a machine, stage and injected slowdown.

    Args:
        cells: of each row of stage ``cell``.
        suites: of SUITE_CELLS cells, in each row of stage ``suite``.
        machines: names of MACHINES.
    """
    import numpy as np

    found: list[Record] = []

    def row(machine: str, stage: str, slowdown: float, rates: Rates) -> None:
        rule = CELL_RULE if stage == "cell" else SUITE_RULE
        case = f"selftest[machine={machine},stage={stage},pairs={rule.looks[-1]},injected={slowdown * 100:g}%]"
        metrics = rate_metrics(rates, slowdown)
        found.append(
            Record(
                case,
                BACKEND,
                "selftest",
                Outcome.PASSED,
                run,
                role="harness",
                metrics=metrics,
                environment={"numpy": np.__version__},
                sources=digest(SOURCES),
            )
        )

    for machine in machines:
        number, noise = list(MACHINES).index(machine), MACHINES[machine]
        for slowdown in (0.0, *SLOWDOWNS):
            at = [seed, number, round(slowdown * 1000)]
            rates = cell_rates(noise, cells=cells, pairs=10, slowdown=slowdown, seed=_seed(at), rule=CELL_RULE)
            row(machine, "cell", slowdown, rates)
        for slowdown in (0.0, *SLOWDOWNS):
            at = [seed, number, round(slowdown * 1000), 1]
            same, other = suite_rates(
                noise,
                suites=suites,
                cells=SUITE_CELLS,
                slowed=SUITE_SLOWED if slowdown else 0,
                slowdown=slowdown,
                seed=_seed(at),
                rule=SUITE_RULE,
            )
            row(machine, "suite", slowdown, other if slowdown else same)
    return found


def _seed(words: Sequence[int]) -> int:
    import numpy as np

    return int(np.random.SeedSequence(words).generate_state(1)[0])


def rate_metrics(rates: Rates, slowdown: float) -> dict[str, float]:
    """Counts, and a rate with its 95 % interval: of SLOWER or FASTER where nothing was slowed, else of SLOWER."""
    hits = rates.slower if slowdown else rates.slower + rates.faster
    rate = intervals.rate(hits, rates.cells)
    return {
        "cells": float(rates.cells),
        "slower": float(rates.slower),
        "faster": float(rates.faster),
        "same": float(rates.same),
        "inconclusive": float(rates.inconclusive),
        "injected": slowdown,
        "rate": rate.value,
        "low": rate.low,
        "high": rate.high,
    }
