"""The comparison: each outcome is reached by the fault it names, and honest outputs reach none."""

from __future__ import annotations

import math

import pytest
import torch

from vbench import check
from vbench.controls.planted import CASES
from vbench.record import Outcome
from vbench.reference.ops import OPS
from vbench.spec import Case, Expected, Numerics, Op, resolve


def expected(value: torch.Tensor, budget: float | None, dtype: torch.dtype = torch.float32) -> dict[str, Expected]:
    b = None if budget is None else torch.full(value.shape, budget, dtype=torch.float64)
    v = value.to(dtype) if budget is None else value.double()
    return {"y": Expected(v, b, dtype, tuple(value.shape))}


def test_outcomes() -> None:
    value = torch.tensor([1.0, 2.0, 3.0])
    want = expected(value, 1e-3)

    def outcome(y: torch.Tensor | None) -> Outcome:
        return check.judge_outputs({} if y is None else {"y": y}, want, ("y",)).outcome

    assert outcome(value) is Outcome.PASSED
    assert outcome(value + 0.9e-3) is Outcome.PASSED
    assert outcome(value + 2e-3) is Outcome.WRONG_VALUE
    assert outcome(None) is Outcome.WRONG_SHAPE
    assert outcome(value[:2]) is Outcome.WRONG_SHAPE
    assert outcome(value.double()) is Outcome.WRONG_DTYPE
    assert outcome(torch.tensor([1.0, math.nan, 3.0])) is Outcome.NONFINITE
    assert outcome(torch.nn.Parameter(value)) is Outcome.WRONG_SHAPE  # a subclass could put its work off


def test_reference_infinities_must_be_met_exactly() -> None:
    value = torch.tensor([-math.inf, 1.0])
    want = expected(value, 1e-3)
    assert check.judge_outputs({"y": value.clone()}, want, ("y",)).outcome is Outcome.PASSED
    for wrong in (-1e30, math.inf, math.nan):
        y = torch.tensor([wrong, 1.0])
        assert check.judge_outputs({"y": y}, want, ("y",)).outcome is not Outcome.PASSED


def test_nan_is_no_wildcard_and_reference_nan_must_be_met() -> None:
    want = expected(torch.tensor([math.nan, 1.0]), None)
    assert check.judge_outputs({"y": torch.tensor([math.nan, 1.0])}, want, ("y",)).outcome is Outcome.PASSED
    assert check.judge_outputs({"y": torch.tensor([0.0, 1.0])}, want, ("y",)).outcome is Outcome.WRONG_VALUE
    assert check.judge_outputs({"y": torch.tensor([math.nan, math.nan])}, want, ("y",)).outcome is Outcome.NONFINITE


def test_packed_bytes_tell_minus_zero_from_zero() -> None:
    want = expected(torch.tensor([0x80, 0x01], dtype=torch.uint8), None, torch.uint8)
    wrong = torch.tensor([0x00, 0x01], dtype=torch.uint8)
    judged = check.judge_outputs({"y": wrong}, want, ("y",))
    assert judged.outcome is Outcome.WRONG_VALUE
    assert judged.error is not None and judged.error.at == (0,) and judged.error.wrong == 1


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int64, torch.float8_e4m3fn]
)
def test_poison_is_wrong_everywhere(dtype: torch.dtype) -> None:
    value = torch.arange(6).to(torch.float32).to(dtype)
    want = {"y": Expected(value, None, dtype, (6,))}
    out = check.poisoned(want, "cpu")
    judged = check.judge_outputs(out, want, ("y",))
    assert judged.error is not None and judged.error.wrong == 6


def test_error_statistics() -> None:
    value = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    want = {"y": Expected(value, torch.full_like(value, 2.0**-8), torch.bfloat16, (4,))}
    y = torch.tensor([1.0, 1.0, 1.0, 1.0 - 2.0**-8], dtype=torch.bfloat16)
    error = check.judge_outputs({"y": y}, want, ("y",)).error
    assert error is not None
    assert error.worst_over_budget == 1.0 and error.at == (3,)
    assert error.max_ulp == 0.5  # in units of the spacing at the oracle's value, 2^-7
    assert error.correctly_rounded == 0.75


@pytest.mark.parametrize("a", [0.0, -0.0, math.nan])
def test_same_bits(a: float) -> None:
    t = torch.tensor([a, 1.0])
    assert check.same_bits(t, t.clone())
    assert not check.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_trivial_kernels_fail_every_op(op: Op) -> None:
    case = op.case(**CASES[op.name])  # type: ignore[arg-type]  # seed is not among them
    other = Case(case.op, case.params, case.seed + 1)
    widest = Numerics("tensor_core", ("bf16",), "bf16")
    inputs = resolve(op.inputs)(case, "cpu")
    want = resolve(op.oracle)(case, inputs, widest, None)
    previous = resolve(op.oracle)(other, resolve(op.inputs)(other, "cpu"), widest, None)
    assert check.trivial_survivors(inputs, want, previous) == ([], {})


def test_a_budget_as_wide_as_the_output_lets_zeros_through() -> None:
    """Control of the battery: with a constant tolerance of 1 the zeros survive, and are reported."""
    value = torch.tensor([0.5, -0.25])
    want = expected(value, 1.0)
    inputs = {"x": torch.tensor([100.0, 200.0])}
    survivors, excused = check.trivial_survivors(inputs, want, expected(-value, 1.0))
    assert "zeros" in survivors and "half" in survivors and not excused
    tagged = {"y": Expected(want["y"].value, want["y"].budget, torch.float32, (2,), None, "on purpose")}
    survivors, excused = check.trivial_survivors(inputs, tagged, expected(-value, 1.0))
    assert "zeros" in excused and not survivors


#: Answers a trivial kernel gives too, and which: the same whatever the budget.
TRULY = [
    (torch.tensor([0.5, 0.5, 0.5]), torch.bfloat16, {"mean"}),
    (torch.tensor([1e-30, -2e-30]), torch.float16, {"zeros", "mean", "half"}),
    # Below float32's normal numbers, which kernels may flush.
    (torch.tensor([1e-39, 2e-39]), torch.float32, {"zeros", "mean", "half"}),
    (torch.tensor([0.5, 0.5 + 2.0**-9]), torch.bfloat16, {"mean"}),
]


@pytest.mark.parametrize(("value", "dtype", "right"), TRULY)
@pytest.mark.parametrize("budget", [2.0**-8, 1e9])
def test_a_trivial_kernel_is_excused_where_its_answer_is_the_true_one(
    value: torch.Tensor, dtype: torch.dtype, right: set[str], budget: float
) -> None:
    """However wide the budget: the others that it lets through are accused."""
    wide = value.double()
    want = {"y": Expected(wide, torch.full_like(wide, budget), dtype, tuple(value.shape))}
    other = {"y": Expected(wide + 64, want["y"].budget, dtype, tuple(value.shape))}
    survivors, excused = check.trivial_survivors({"x": torch.full((8,), 3.0)}, want, other)
    let_through = {"zeros", "mean", "half"} if budget > 1 else right
    assert set(excused) == right and all(excused.values())
    assert {"zeros", "mean", "half"} & set(survivors) == let_through - right


@pytest.mark.parametrize("value", [[0.5, 0.51], [1e-3, -1e-3], [3.0, 4.0]])
def test_a_wide_budget_is_no_excuse(value: list[float]) -> None:
    wide = torch.tensor(value, dtype=torch.float64)
    want = {"y": Expected(wide, torch.full_like(wide, 100.0), torch.float32, (2,))}
    survivors, excused = check.trivial_survivors({"x": torch.zeros(2)}, want, want)
    assert set(survivors) == set(check.TRIVIAL_KERNELS) and not excused


def test_the_same_draw_twice_is_no_excuse_but_for_zeros() -> None:
    """A generator that forgets its seed makes the answer to the other draw right."""
    for value, excused in (([1.0, 2.0], set()), ([0.0, 0.0], set(check.TRIVIAL_KERNELS))):
        exact = torch.tensor(value)
        want = {"y": Expected(exact, None, torch.float32, (2,))}
        found = check.trivial_survivors({"x": torch.zeros(2)}, want, want)
        assert set(found[1]) == excused and ("previous" in found[0]) == (not excused)


def test_one_degenerate_output_does_not_excuse_the_others() -> None:
    wide = torch.tensor([0.0, 0.0], dtype=torch.float64)
    tagged = Expected(wide, torch.ones_like(wide), torch.float32, (2,), None, "on purpose")
    lax = Expected(wide + torch.tensor([0.25, 0.75]), torch.ones_like(wide), torch.float32, (2,))
    inputs = {"x": torch.zeros(2)}
    assert check.trivial_survivors(inputs, {"a": tagged, "b": lax}, {"a": tagged, "b": lax})[0]
    assert not check.trivial_survivors(inputs, {"a": tagged}, {"a": tagged})[0]
