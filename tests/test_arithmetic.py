"""The restricted expression language against Python's own arithmetic, and everything it must refuse."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vbench.arithmetic import MAX_LENGTH, evaluate, names, parse
from vbench.errors import DataError

PYTHON: dict[str, Callable[..., object]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
}

leaves = st.one_of(
    st.integers(0, 50).map(str), st.floats(0, 50, allow_nan=False, width=32).map(repr), st.sampled_from(["a", "b"])
)


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "%"]), inner).map(
        lambda t: f"({t[0]} {t[1]} {t[2]})"
    )
    power = st.tuples(inner, st.integers(-3, 3)).map(lambda t: f"({t[0]} ** {t[1]})")
    one = st.tuples(st.sampled_from(["abs", "ceil", "floor", "round"]), inner).map(lambda t: f"{t[0]}({t[1]})")
    two = st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})")
    return st.one_of(binary, power, one, two, inner.map(lambda e: f"-{e}"))


numbers = st.recursive(leaves, grown, max_leaves=8)
comparisons = st.tuples(numbers, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), numbers).map(" ".join)
truths = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda e: f"(not ({e}))"),
    ),
    max_leaves=4,
)
BINDINGS = {"a": 2.57, "b": 8.0}


@given(st.one_of(numbers, truths))
def test_agrees_with_python(expression: str) -> None:
    try:
        want = eval(expression, {"__builtins__": {}}, {**PYTHON, **BINDINGS})
    except (ZeroDivisionError, OverflowError):
        with pytest.raises(DataError):
            evaluate(expression, BINDINGS)
        return
    if isinstance(want, complex):
        with pytest.raises(DataError):
            evaluate(expression, BINDINGS)
        return
    # A later part of and/or may divide by zero where Python stops early: ours evaluates every part.
    try:
        got = evaluate(expression, BINDINGS)
    except DataError as error:
        assert " and " in expression or " or " in expression, error
        return
    assert type(got) is type(want) and (got == want or (got != got and want != want))


def test_chained_comparison_and_names() -> None:
    assert evaluate("1 < 2 < 3") is True
    assert evaluate("1 < 3 < 2") is False
    assert names("abs(x / y - 2) < z and max(x, 1) > 0") == {"x", "y", "z"}
    assert evaluate("abs(61.98 / 24.09 - 2.57) < 0.005") is True
    assert evaluate("abs(61.98 / 24.09 - 2.67) < 0.005") is False


@pytest.mark.parametrize(
    ("expression", "column"),
    [
        ("1 + x.real", 5),
        ("2 * [1][0]", 5),
        ("__import__('os')", 1),
        ("1 + 'a'", 5),
        ("1 + True", 5),
        ("True", 1),
        ("2 > 1 and True", 11),
        ("(lambda: 1)()", 1),
        ("abs", 1),
        ("3 + abs()", 5),
        ("abs(1, 2)", 1),
        ("min(1)", 1),
        ("round(1, ndigits=0)", 1),
        ("1 if 2 > 1 else 0", 1),
        ("1 // 2", 1),
        ("1 in 2", 1),
        ("~1", 1),
        ("1 +", 4),
        ("", 1),
        ("a = 1", 3),
        ("2 + 1j", 5),
        ("f'{1}'", 1),
        ("1 and 2 > 1", 1),
        ("1 + (2 > 1)", 6),
        ("4 + 1 / 0", 5),
        ("7 % (1 - 1)", 1),
        ("2.0 ** 1e9", 1),
        ("((9 ** 999) ** 999) ** 999", 2),
        ("(-8) ** 0.5", 1),
        ("1e308 * 10 - missing", 14),
        ("round(2.5, 1.0)", 1),
    ],
)
def test_refuses_with_the_column(expression: str, column: int) -> None:
    with pytest.raises(DataError, match=rf"^column {column}\b"):
        evaluate(expression)


def test_refuses_ceil_of_infinity_and_long_texts() -> None:
    with pytest.raises(DataError, match="not finite"):
        evaluate("ceil(1e308 * 10)")
    with pytest.raises(DataError, match="longer than"):
        parse("1 + " * MAX_LENGTH + "1")


@given(st.text(max_size=40))
def test_any_text_is_a_value_or_a_data_error(text: str) -> None:
    try:
        value = evaluate(text)
    except DataError:
        return
    assert isinstance(value, bool | int | float)
