"""The kept draw of timed cases: the same values as a fresh one, made once, and dropped when somebody wrote to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vbench.draws import LastDraw
from vbench.reference.ops.attention import ATTENTION
from vbench.reference.ops.tiers import TIER_STACK
from vbench.spec import Numerics, resolve
from vbench.suites.tier import SUITE

CASE = ATTENTION.case(dtype="bf16", hq=2, hk=1, sq=9, sk=7, d=4)
NUMERICS = Numerics("fp32")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ``LastDraw`` resolves, in order."""
    names: list[str] = []

    def counted(path: str) -> Any:
        names.append(path)
        return resolve(path)

    monkeypatch.setattr("vbench.draws.resolve", counted)
    return names


def test_one_draw_serves_variants_and_each_numerics_its_own_budget(drawn: list[str]) -> None:
    last = LastDraw("cpu")
    first, wide = last.take(ATTENTION, CASE, NUMERICS, 4)
    second, same = last.take(ATTENTION, CASE, NUMERICS, 4)
    third, other = last.take(ATTENTION, CASE, replace(NUMERICS, probabilities="bf16"), 4)
    assert drawn == [ATTENTION.inputs, ATTENTION.oracle, ATTENTION.oracle]
    fresh = resolve(ATTENTION.inputs)(CASE, "cpu")
    for inputs in (first, second, third):
        assert inputs.keys() == fresh.keys()
        assert all(torch.equal(inputs[name], fresh[name]) for name in fresh)
    assert wide["out"] is same["out"]
    assert other["out"].budget is not None and wide["out"].budget is not None
    assert bool((other["out"].budget > wide["out"].budget).any())


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_changed_input_is_drawn_anew(drawn: list[str], name: str) -> None:
    last = LastDraw("cpu")
    inputs, _ = last.take(ATTENTION, CASE, NUMERICS, 4)
    right = inputs[name].clone()
    inputs[name].view(torch.int16)[0, 0, 3, 1] ^= 1
    again, _ = last.take(ATTENTION, CASE, NUMERICS, 4)
    assert torch.equal(again[name], right)
    assert drawn.count(ATTENTION.inputs) == 2


def test_another_case_and_inputs_that_are_no_tensors_are_not_kept(drawn: list[str]) -> None:
    last = LastDraw("cpu")
    a, _ = last.take(ATTENTION, CASE, NUMERICS, 4)
    b, _ = last.take(ATTENTION, replace(CASE, seed=1), NUMERICS, 4)
    assert not torch.equal(a["q"], b["q"])
    trace = SUITE.checks[0]
    assert trace.op == TIER_STACK.name
    for _ in range(2):
        last.take(TIER_STACK, trace, NUMERICS, None)
    assert drawn.count(TIER_STACK.inputs) == 2


def test_a_caller_may_drop_what_it_was_given() -> None:
    last = LastDraw("cpu")
    inputs, expected = last.take(ATTENTION, CASE, NUMERICS, 4)
    inputs.clear()
    expected.clear()
    again, answer = last.take(ATTENTION, CASE, NUMERICS, 4)
    assert "q" in again and "out" in answer
