"""A against B: from log ratios, one a process pair, to a word. Pure; standard library only.

The unit of replication is a fresh pair of processes; its observation is the difference of the logarithms of the block
medians, B minus A, so that exp of it is how many times as long B takes.

Rule for one cell, at one-sided confidence 1 - alpha and margin delta
    SLOWER        the lower bound of the ratio is above 1 and the estimate at least 1 + delta
    FASTER        its mirror
    SAME          neither, and the whole interval lies inside (1 / (1 + 2 delta), 1 + 2 delta)
    INCONCLUSIVE  else: more pairs, up to a cap
Over the cells of a suite a SLOWER or FASTER counts only where Benjamini & Hochberg (1995) reject at ``q``, and where
other processes confirm it (``judge_cells``), in time and, where clocks are known, in cycles.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Literal

from vbench import intervals, student
from vbench.errors import DataError


class Word(StrEnum):
    """How a comparison ended."""

    SLOWER = "SLOWER"
    FASTER = "FASTER"
    SAME = "SAME"
    INCONCLUSIVE = "INCONCLUSIVE"
    INCOMPARABLE = "INCOMPARABLE"
    INVALID = "INVALID"


Method = Literal["student", "sign_flip"]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a comparison is held to, fixed before anything is measured.

    Args:
        delta: smallest change of the ratio that counts.
        alpha: one-sided error probability of a cell, over all its looks together.
        looks: numbers of pairs after which a cell is looked at, ascending; the last is the cap.
        q: false discovery rate over the cells.
        confirm: pairs of other processes that must agree; 0: none asked.
        method: of the interval.

    Raises:
        DataError: a value that makes no rule.
    """

    delta: float = 0.01
    alpha: float = 0.01
    looks: tuple[int, ...] = (10, 15, 20)
    q: float = 0.05
    confirm: int = 10
    method: Method = "student"

    def __post_init__(self) -> None:
        if not (0 < self.delta < 1 and 0 < self.alpha < 0.5 and 0 < self.q < 1):
            raise DataError(f"rule: delta {self.delta}, alpha {self.alpha} and q {self.q} must lie between 0 and 1")
        if list(self.looks) != sorted(set(self.looks)) or not self.looks or self.looks[0] < 2:
            raise DataError(f"rule: looks {self.looks} must ascend from at least 2 pairs")
        if self.confirm < 0 or self.confirm == 1:
            raise DataError("rule: a confirmation needs at least 2 pairs, or 0 for none")


def looks_between(first: int, cap: int) -> tuple[int, ...]:
    """Looks at ``first`` pairs, at each half of that more, and at ``cap``."""
    step = max(1, (first + 1) // 2)
    return (*range(first, cap, step), cap)


@dataclass(frozen=True, slots=True)
class Observation:
    """One pair's log ratio B over A of time, and of cycles where the clock is known; ``pair`` numbers process pairs."""

    pair: int
    log_time: float
    log_cycles: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """What became of one cell.

    Args:
        word, reason: the latter a stable code for anything but SLOWER, FASTER and SAME.
        ratio, low, high: times B over A with its bounds, ``None`` where nothing was observed.
        pairs: how many pairs it rests on, the confirming ones left out.
        p_slower, p_faster: one-sided, valid over all looks.
        floor: standard error of the log ratio at this number of pairs.
        confirmed: the ratio in the confirming pairs.
    """

    word: Word
    reason: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    pairs: int = 0
    p_slower: float = 1.0
    p_faster: float = 1.0
    floor: float | None = None
    confirmed: float | None = None

    @property
    def label(self) -> str:
        return f"{self.word.value}({self.reason})" if self.reason else self.word.value


def compare(logs: Sequence[float], *, alpha: float, delta: float, method: Method = "student") -> Comparison:
    """The rule for one cell at one look.

    Args:
        logs: log ratios B over A, one a pair, finite.
        alpha: one-sided error probability of this look.
    """
    if len(logs) < 2:
        return Comparison(Word.INCONCLUSIVE, "too_few_pairs", pairs=len(logs))
    if any(not math.isfinite(x) for x in logs):
        return Comparison(Word.INVALID, "not_finite", pairs=len(logs))
    bounds = (intervals.student if method == "student" else intervals.sign_flip)(logs, 1 - alpha)
    margin, reach = math.log1p(delta), math.log1p(2 * delta)
    # A margin met but for the last bit is met.
    least = margin - 1e-12
    if bounds.low > 0 and bounds.value >= least:
        word, reason = Word.SLOWER, ""
    elif bounds.high < 0 and bounds.value <= -least:
        word, reason = Word.FASTER, ""
    elif -reach < bounds.low and bounds.high < reach:
        word, reason = Word.SAME, ""
    else:
        word, reason = Word.INCONCLUSIVE, "interval"
    error = intervals.standard_error(logs)
    return Comparison(
        word,
        reason,
        math.exp(bounds.value),
        _exp(bounds.low),
        _exp(bounds.high),
        len(logs),
        p_above(logs),
        p_above([-x for x in logs]),
        error,
    )


def _exp(value: float) -> float:
    return math.exp(max(-700.0, min(700.0, value)))


def p_above(logs: Sequence[float]) -> float:
    """One-sided p of Student's t for the hypothesis that the centre is not above zero."""
    mean, error = statistics.fmean(logs), intervals.standard_error(logs)
    if error == 0:
        # Replicates equal to the last bit: nothing to estimate noise from but the grid they stand on.
        return 1.0 if mean <= 0 else 0.0
    return student.upper_tail(mean / error, len(logs) - 1)


def spend(alpha: float, looks: Sequence[int]) -> tuple[float, ...]:
    """What each look may spend of ``alpha``: in proportion to the pairs that are new in it.

    The sum is ``alpha``, so that by the union bound the probability of a false alarm at any look stays below it,
    whatever the dependence between looks (a Lan & DeMets 1983 spending function, linear in information, without
    their credit for the looks' correlation).
    """
    return tuple(alpha * (now - before) / looks[-1] for before, now in zip((0, *looks), looks, strict=False))


def over_looks(p: Sequence[float], shares: Sequence[float], alpha: float) -> float:
    """One p for all looks so far: P(min over looks of p * alpha / share <= a) <= a, by the union bound."""
    return min(1.0, *(value * alpha / share for value, share in zip(p, shares, strict=False)))


def benjamini_hochberg(p: Sequence[float], q: float) -> tuple[bool, ...]:
    """Which hypotheses are rejected at false discovery rate ``q`` (Benjamini & Hochberg 1995, JRSS B 57)."""
    order = sorted(range(len(p)), key=p.__getitem__)
    last = max((rank for rank, i in enumerate(order, start=1) if p[i] <= q * rank / len(p)), default=0)
    passed = set(order[:last])
    return tuple(i in passed for i in range(len(p)))


#: ``(pairs, cells) -> per cell the observations of that many fresh process pairs``; a cell may lack some or all.
Measure = Callable[[int, Sequence[str]], Mapping[str, Sequence[Observation]]]


@dataclass(frozen=True, slots=True)
class Judged:
    """All cells of one comparison.

    Args:
        cells: by name.
        geomean: of the ratios over all cells, one number a pair; the one suite statistic, declared beforehand.
        observations: by cell, the confirming pairs left out.
    """

    cells: Mapping[str, Comparison]
    geomean: Comparison
    observations: Mapping[str, Sequence[Observation]] = field(default_factory=dict)


def judge_cells(
    measure: Measure, cells: Sequence[str], rule: Rule, floors: Mapping[str, float] | None = None
) -> Judged:
    """Measure and decide, look by look, then over the suite, then confirm in other processes.

    A cell whose noise floor (standard error of the log ratio of identical code) is in ``floors`` and above delta / 2
    is not gated: INCONCLUSIVE(noisy_cell) where it would be SLOWER or FASTER.

    A cell that is decided at a look is measured no further. ``measure`` is called with ascending looks' new pairs and
    the cells still open; once more, with ``rule.confirm`` pairs, for those that are to be confirmed.
    """
    seen: dict[str, list[Observation]] = {cell: [] for cell in cells}
    p_slower: dict[str, list[float]] = {cell: [] for cell in cells}
    p_faster: dict[str, list[float]] = {cell: [] for cell in cells}
    found: dict[str, Comparison] = {}
    shares = spend(rule.alpha, rule.looks)
    open_cells = list(cells)
    before = 0
    for look, share in zip(rule.looks, shares, strict=True):
        for cell, observations in measure(look - before, open_cells).items():
            seen[cell] += observations
        before = look
        for cell in open_cells:
            one = compare([o.log_time for o in seen[cell]], alpha=share, delta=rule.delta, method=rule.method)
            p_slower[cell].append(one.p_slower)
            p_faster[cell].append(one.p_faster)
            found[cell] = replace(
                one,
                p_slower=over_looks(p_slower[cell], shares, rule.alpha),
                p_faster=over_looks(p_faster[cell], shares, rule.alpha),
            )
        open_cells = [c for c in open_cells if seen[c] and found[c].word is Word.INCONCLUSIVE]
        if not open_cells:
            break
    for cell in cells:
        if not seen[cell]:
            found[cell] = Comparison(Word.INCOMPARABLE, "no_pair")
    for cell, floor in (floors or {}).items():
        if cell in found and found[cell].word in _CHANGED and floor > rule.delta / 2:
            found[cell] = replace(found[cell], word=Word.INCONCLUSIVE, reason="noisy_cell")
    _over_suite(found, rule)
    for cell, one in found.items():
        if one.word in _CHANGED:
            found[cell] = in_cycles(one, seen[cell], alpha=rule.alpha, delta=rule.delta, method=rule.method)
    _confirm(measure, found, rule)
    return Judged(found, geometric_mean(seen, rule), seen)


_CHANGED = (Word.SLOWER, Word.FASTER)


def _over_suite(found: dict[str, Comparison], rule: Rule) -> None:
    """Take back what does not stand beside so many others."""
    tested = [c for c, one in found.items() if one.ratio is not None]
    for word, p in (
        (Word.SLOWER, [found[c].p_slower for c in tested]),
        (Word.FASTER, [found[c].p_faster for c in tested]),
    ):
        for cell, rejected in zip(tested, benjamini_hochberg(p, rule.q), strict=True):
            if found[cell].word is word and not rejected:
                found[cell] = replace(found[cell], word=Word.INCONCLUSIVE, reason="multiplicity")


def in_cycles(
    one: Comparison, observations: Sequence[Observation], *, alpha: float, delta: float, method: Method = "student"
) -> Comparison:
    """A change of time at equal cycles is a change of the clock, not of the code: INCONCLUSIVE(clock)."""
    cycles = [o.log_cycles for o in observations if o.log_cycles is not None]
    if len(cycles) < len(observations) or one.word not in _CHANGED:
        return one
    if compare(cycles, alpha=alpha, delta=delta, method=method).word is one.word:
        return one
    return replace(one, word=Word.INCONCLUSIVE, reason="clock")


def _confirm(measure: Measure, found: dict[str, Comparison], rule: Rule) -> None:
    changed = [cell for cell, one in found.items() if one.word in _CHANGED]
    if not changed or rule.confirm == 0:
        return
    again = measure(rule.confirm, changed)
    for cell in changed:
        observations = again.get(cell, ())
        second = compare([o.log_time for o in observations], alpha=rule.alpha, delta=rule.delta, method=rule.method)
        second = in_cycles(second, observations, alpha=rule.alpha, delta=rule.delta, method=rule.method)
        one = replace(found[cell], confirmed=second.ratio)
        if second.word is not one.word:
            one = replace(one, word=Word.INCONCLUSIVE, reason="clock" if second.reason == "clock" else "not_confirmed")
        found[cell] = one


def geometric_mean(observations: Mapping[str, Sequence[Observation]], rule: Rule) -> Comparison:
    """The rule on the mean log ratio over all cells, one number a pair.

    A pair is one replicate of every cell, so that cells of one pair are not counted as independent. Only pairs that
    every cell has are used: a decided cell is measured no further.
    """
    series = [{o.pair: o.log_time for o in seen} for seen in observations.values() if seen]
    if not series:
        return Comparison(Word.INCOMPARABLE, "no_pair")
    common = sorted(set.intersection(*(set(s) for s in series)))
    means = [statistics.fmean(s[pair] for s in series) for pair in common]
    return compare(means, alpha=rule.alpha, delta=rule.delta, method=rule.method)


def floor_exceeds(one: Comparison, delta: float) -> bool:
    """Whether a cell's noise floor, measured on identical code, is too high for it to be gated."""
    return one.floor is None or one.floor > delta / 2
