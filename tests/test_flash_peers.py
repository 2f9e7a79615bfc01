"""FlashAttention-3 and -4 as peers: what is asked of their interfaces, against the oracle through stand-ins.

That the packages themselves are right is for a run on a GPU to say; here a wrong layout, window, scale or sink shows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import flash_fakes
from vbench import check
from vbench.errors import Unsupported
from vbench.kernels.peers import flash, flash_attn_3, flash_attn_4
from vbench.record import Outcome
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.reference.ops.attention_extended import ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD
from vbench.spec import Case, Op, resolve

OPS = {op.name: op for op in (ATTENTION, ATTENTION_BACKWARD, ATTENTION_EXTENDED, ATTENTION_EXTENDED_BACKWARD)}
SHAPE = {"dtype": "bf16", "hq": 4, "hk": 2, "sq": 20, "sk": 33, "d": 16}
Factory = Callable[..., Any]
MAKE: dict[tuple[int, bool], Factory] = {
    (3, False): flash.make_3,
    (3, True): flash.make_3_backward,
    (4, False): flash.make_4,
    (4, True): flash.make_4_backward,
}

FEATURES: tuple[dict[str, int | str], ...] = (
    {"causal": "none", "b": 2},
    {"causal": "bottom_right", "layout": "bshd", "b": 2, "dtype": "fp16"},
    # Rows with nothing to attend to.
    {"causal": "bottom_right", "sq": 33, "sk": 20},
    {"causal": "top_left", "sq": 24, "sk": 24, "layout": "padded"},
    {"causal": "none", "window": 5, "sq": 24, "sk": 24},
    {"causal": "bottom_right", "window": 5, "softcap": 2},
)
EXTENDED_FEATURES: tuple[dict[str, int | str], ...] = (
    {"packed": 3, "causal": "bottom_right", "window": 7},
    {"packed": 4, "causal": "none"},
)
SINKS: tuple[dict[str, int | str], ...] = (
    {"sinks": 1, "b": 2, "causal": "bottom_right"},
    {"sinks": 1, "packed": 3, "causal": "bottom_right", "softcap": 2},
)


def case_of(op: Op, features: dict[str, int | str]) -> Case:
    merged: dict[str, Any] = {**SHAPE, **features}
    return op.case(**merged)


def judged(case: Case, kernel: Any) -> check.Judgement:
    op = OPS[case.op]
    inputs = resolve(op.inputs)(case, "cpu")
    expected = resolve(op.oracle)(case, inputs, kernel.numerics, None)
    before = {name: t.clone() for name, t in inputs.items()}
    found = kernel.bind(inputs, check.poisoned(expected, "cpu"))()
    assert all(check.same_bits(inputs[name], before[name]) for name in inputs), "an input was changed"
    return check.judge_outputs(found, expected, kernel.produces)


def kernel_of(number: int, backward: bool, features: dict[str, int | str]) -> tuple[Case, Any]:
    extended = "packed" in features or "sinks" in features
    if backward:
        op = ATTENTION_EXTENDED_BACKWARD if extended else ATTENTION_BACKWARD
        case = case_of(op, {**features, "dlse": int(number == 4)})
    else:
        case = case_of(ATTENTION_EXTENDED if extended else ATTENTION, features)
    return case, MAKE[number, backward](case, "default" if backward else "", "cuda")


@pytest.mark.parametrize("backward", (False, True), ids=("forward", "backward"))
@pytest.mark.parametrize(
    ("number", "features"),
    [(n, f) for n in (3, 4) for f in FEATURES + EXTENDED_FEATURES] + [(4, f) for f in SINKS],
    ids=str,
)
def test_what_is_asked_for_is_the_op(
    monkeypatch: pytest.MonkeyPatch, number: int, features: dict[str, int | str], backward: bool
) -> None:
    flash_fakes.install(monkeypatch)
    case, kernel = kernel_of(number, backward, features)
    found = judged(case, kernel)
    assert found.outcome is Outcome.PASSED, found


WINDOWED: dict[str, int | str] = {"causal": "bottom_right", "window": 5, "softcap": 2}


def forgetful(function: Factory, name: str, value: Any) -> Factory:
    """``function``, which takes ``name`` and goes by ``value`` instead."""

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        return function(*args, **{**named, name: value})

    return call


@pytest.mark.parametrize(
    ("number", "own", "name", "value"),
    [
        (4, "four_func", "window_size", (None, None)),
        (4, "four_func", "softcap", 0.0),
        (4, "four_func", "softmax_scale", 1.0),
        (4, "four_bwd", "window_size_left", None),
        (4, "four_bwd", "dlse", None),
        (3, "three_func", "window_size", (-1, -1)),
        (3, "three_bwd", "window_size_left", -1),
        (3, "three_bwd", "softcap", 0.0),
    ],
)  # fmt: skip
def test_an_argument_lost_on_the_way_is_found(
    monkeypatch: pytest.MonkeyPatch, number: int, own: str, name: str, value: Any
) -> None:
    flash_fakes.install(monkeypatch, **{own: forgetful(getattr(flash_fakes, own), name, value)})
    assert judged(*kernel_of(number, own.endswith("bwd"), WINDOWED)).outcome is Outcome.WRONG_VALUE


@pytest.mark.parametrize("number", (3, 4))
def test_heads_where_positions_belong_trip_the_stand_in(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    flash_fakes.install(monkeypatch)
    monkeypatch.setattr(flash, "_theirs", lambda t, packed: t[0] if packed else t)
    with pytest.raises(AssertionError):
        judged(*kernel_of(number, False, {"causal": "none", "b": 2}))


def test_another_release_is_refused_before_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False) -> Any:
        raise AssertionError("called")

    flash_fakes.install(monkeypatch, four_func=older, three_func=older)
    for number in (3, 4):
        case, kernel = kernel_of(number, False, {"causal": "none"})
        with pytest.raises(Unsupported, match="interface_differs"):
            kernel.bind(resolve(OPS[case.op].inputs)(case, "cpu"), {})


def rule_of(number: int, op: Op, features: dict[str, int | str], variant: str = "", device: str = "cuda") -> str:
    with pytest.raises(Unsupported) as refused:
        MAKE[number, op.name.endswith("backward")](case_of(op, features), variant, device)
    return refused.value.rule


@pytest.mark.parametrize("number", (3, 4))
def test_what_is_refused(number: int) -> None:
    assert rule_of(number, ATTENTION, {"dtype": "fp32"}) == "dtype"
    assert rule_of(number, ATTENTION, {"d": 20}) == "head_dim"
    assert rule_of(number, ATTENTION, {"d": 264}) == "head_dim"
    assert rule_of(number, ATTENTION, {"causal": "top_left"}) == "alignment_not_offered"
    assert rule_of(number, ATTENTION, {"window": 4}) == "alignment_not_offered"
    assert rule_of(number, ATTENTION, {}, device="cpu") == "needs_cuda"
    assert rule_of(number, ATTENTION, {}, variant="fast") == "unknown_variant"
    assert rule_of(number, ATTENTION_EXTENDED, {"alibi": 1}) == "no_alibi"
    assert rule_of(number, ATTENTION_EXTENDED, {"mask": "normal"}) == "no_mask"
    assert (
        rule_of(number, ATTENTION_EXTENDED, {"packed": 2, "causal": "top_left", "sq": 8, "sk": 8})
        == "alignment_not_offered"
    )
    if number == 3:
        assert rule_of(3, ATTENTION_EXTENDED, {"sinks": 1}) == "no_sinks"
        assert rule_of(3, ATTENTION_BACKWARD, {"dlse": 1}) == "no_lse_gradient"


def test_a_deterministic_backward_is_asked_for_and_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    @functools.wraps(flash_fakes.four_bwd)
    def spy(*args: Any, **named: Any) -> Any:
        asked.append(named["deterministic"])
        return flash_fakes.four_bwd(*args, **named)

    flash_fakes.install(monkeypatch, four_bwd=spy)
    case = case_of(ATTENTION_BACKWARD, {})
    for variant in ("default", "deterministic"):
        kernel = flash.make_4_backward(case, variant, "cuda")
        assert judged(case, kernel).outcome is Outcome.PASSED
        assert kernel.deterministic is (variant == "deterministic")
    assert asked == [False, True]


def test_absent_and_misplaced_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    four, three = flash_attn_4.probe("cuda"), flash_attn_3.probe("cuda")
    assert not four.usable and "vbench-kernels[flash4]" in four.reason
    assert not three.usable and "flash-attn-3" in three.reason
    flash_fakes.install(monkeypatch)
    assert "compute capability 9.0" in flash_attn_4.probe("cpu").reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "this device has 8.0" in flash_attn_3.probe("cuda").reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert flash_attn_4.probe("cuda").usable
