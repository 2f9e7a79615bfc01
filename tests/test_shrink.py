"""Shrinking: whatever the failure, what comes out fails, is smaller, and no single step smaller does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vbench.reference.ops.attention import ATTENTION
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE, FP4_LINEAR
from vbench.shrink import Shrunk, candidates, measure, shrink
from vbench.spec import Case, Op
from vbench.suites.strategies import attention_cases, fp4_linear_cases

OPS = {op.name: op for op in (FP4_DEQUANTIZE, FP4_LINEAR, ATTENTION)}


def by(op: Op, case: Case, bad: Callable[[Case], bool], *, most: int = 10_000, limit_s: float = 1e9) -> Shrunk:
    def fails(cases: Sequence[Case]) -> list[bool]:
        return [bad(c) for c in cases]

    return shrink(op, case, fails, width=3, most=most, limit_s=limit_s)


@settings(max_examples=60)
@given(st.one_of(fp4_linear_cases(), attention_cases()))
def test_candidates_have_a_meaning_and_are_smaller(case: Case) -> None:
    op = OPS[case.op]
    if op.reject(case) is not None:
        return
    found = candidates(op, case)
    assert len({c.id for c in found}) == len(found)
    for smaller in found:
        assert op.reject(smaller) is None and measure(op, smaller) < measure(op, case)
        assert op.parse(smaller.id) == smaller


@settings(max_examples=60)
@given(attention_cases(), st.integers(1, 24), st.integers(1, 24), st.booleans())
def test_what_comes_out_fails_and_no_step_smaller_does(case: Case, sq: int, d: int, causal: bool) -> None:
    def bad(c: Case) -> bool:
        return c.axis("sq") >= sq and c.axis("d") >= d and (not causal or c.text("causal") != "none")

    if ATTENTION.reject(case) is not None or not bad(case):
        return
    small = by(ATTENTION, case, bad)
    assert small.whole and bad(small.case) and not any(bad(c) for c in candidates(ATTENTION, small.case))
    assert {n: small.case.axis(n) for n in ("b", "hq", "hk", "sq", "sk", "d")} == {
        "b": 1, "hq": 1, "hk": 1, "sq": sq, "sk": 1, "d": d,
    }  # fmt: skip
    assert (small.case.text("dist"), small.case.seed, small.case.axis("window")) == ("normal", 0, 0)


def test_sizes_that_a_rule_ties_together_shrink_together() -> None:
    case = ATTENTION.case(b=2, hq=6, hk=2, sq=40, sk=40, d=32, causal="bottom_right", softcap=30)
    small = by(ATTENTION, case, lambda c: c.axis("hq") > c.axis("hk"))
    assert (small.case.axis("hq"), small.case.axis("hk")) == (2, 1)


def test_a_tail_keeps_its_remainder_and_a_block_its_multiple() -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", m=45, n=64, k=512, seed=5)
    small = by(FP4_LINEAR, case, lambda c: c.axis("m") % 16 == 13 and c.axis("k") % 32 == 0)
    assert {n: small.case.axis(n) for n in ("m", "n")} == {"m": 13, "n": 1}
    assert small.case.axis("k") <= 32 and small.case.text("fmt") == "absmax7_tensor"


@pytest.mark.parametrize(("most", "limit_s"), [(5, 1e9), (10_000, 0.0)])
def test_limits_end_the_search_with_the_smallest_found(most: int, limit_s: float) -> None:
    case = FP4_DEQUANTIZE.case(fmt="nvfp4", n=64, k=64)
    small = by(FP4_DEQUANTIZE, case, lambda c: c.axis("n") >= 3, most=most, limit_s=limit_s)
    assert not small.whole and small.attempts <= most
    assert measure(FP4_DEQUANTIZE, small.case) <= measure(FP4_DEQUANTIZE, case) and small.case.axis("n") >= 3


def test_a_failure_that_does_not_come_again_is_kept_as_it_was_found() -> None:
    case = FP4_DEQUANTIZE.case(fmt="nvfp4", n=64, k=64)
    small = by(FP4_DEQUANTIZE, case, lambda c: False)
    assert small.case == case and small.whole and small.attempts == len(candidates(FP4_DEQUANTIZE, case))
