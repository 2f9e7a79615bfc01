"""The oracle of ``attention_backward``: it is the gradient; its budget admits honest arithmetic and no wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from vbench import check
from vbench.backend import refuse_beyond
from vbench.errors import Unsupported
from vbench.reference.attention import ScoreRule, attention_inputs, lay_out
from vbench.reference.attention_backward import backward_float64, backward_inputs, backward_oracle
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD, LAYOUTS, forward_flops
from vbench.spec import Case, Numerics
from vbench.suites.strategies import attention_backward_cases

FP32 = Numerics("fp32", (), "fp32", own_forward=True)
GRADIENTS = ("dq", "dk", "dv")


def autograd(case: Case, inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients by torch's autograd through a softmax written out, all in ``dtype``."""
    q, k, v = (inputs[name].to(dtype).clone().requires_grad_() for name in "qkv")
    group, sq, sk = case.axis("hq") // case.axis("hk"), case.axis("sq"), case.axis("sk")
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = ScoreRule.of(case).seen(torch.arange(sq), sq, sk)
    alive = seen.any(dim=1)
    z = q @ keys.transpose(-1, -2) * case.axis("d") ** -0.5
    if case.axis("softcap"):
        z = case.axis("softcap") * torch.tanh(z / case.axis("softcap"))
    z = z.masked_fill(~seen, -torch.inf)[:, :, alive]
    loss = ((torch.softmax(z, dim=-1) @ values) * inputs["dout"][:, :, alive].to(dtype)).sum()
    if "dlse" in inputs:
        loss = loss + (torch.logsumexp(z, dim=-1) * inputs["dlse"][:, :, alive].to(dtype)).sum()
    return dict(zip(GRADIENTS, torch.autograd.grad(loss, (q, k, v)), strict=True))


def over_budget(case: Case, inputs: dict[str, Any], got: dict[str, Tensor], numerics: Numerics) -> float:
    """Worst error / budget of gradients rounded once to the outputs' dtype."""
    expected = backward_oracle(case, inputs, numerics, None)
    rounded = {name: got[name].to(expected[name].dtype) for name in GRADIENTS}
    error = check.judge_outputs(rounded, expected, GRADIENTS).error
    assert error is not None
    return error.worst_over_budget


@settings(max_examples=60)
@given(case=attention_backward_cases())
def test_oracle_is_the_gradient_and_admits_fp32(case: Case) -> None:
    assume(ATTENTION_BACKWARD.reject(case) is None)
    inputs = backward_inputs(case, "cpu")
    exact = autograd(case, inputs, torch.float64)
    mine = backward_float64(ScoreRule.of(case), inputs)
    for name, want in backward_oracle(case, inputs, FP32, None).items():
        torch.testing.assert_close(mine[name], want.value, rtol=1e-10, atol=1e-12)
    # out and lse are rounded, for which FP32's own_forward allows.
    assert over_budget(case, inputs, exact, FP32) <= 1
    assert over_budget(case, inputs, autograd(case, inputs, torch.float32), FP32) <= 1


BASE = ATTENTION_BACKWARD.case(dtype="bf16", causal="bottom_right", dlse=1, hq=4, hk=2, sq=70, sk=90, d=32)


def rounding(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def as_a_kernel(inputs: dict[str, Any], fault: str = "") -> dict[str, Tensor]:
    """BASE as a tensor-core kernel computes it (fp32, weights and score gradients in bf16), or with one fault."""
    q, k, v, out, lse, dout, dlse = (
        inputs[name].float() for name in ("q", "k", "v", "out", "lse", "dout", "dlse")
    )  # fmt: skip
    k2, v2 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    if fault == "key heads interleaved":
        k2, v2 = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
    scale = 32**-0.5
    alignment = "top_left" if fault == "other diagonal" else "bottom_right"
    seen = ScoreRule(alignment).seen(torch.arange(70), 70, 90)
    if fault == "last key dropped":
        seen[:, 89] = False
    p = torch.where(seen, torch.exp(q @ k2.transpose(-1, -2) * scale - lse[..., None]), 0.0)
    delta = (out * dout).sum(-1)
    if fault == "delta left out":
        delta = delta * 0
    delta = delta + dlse if fault == "dlse added to delta" else delta if fault == "dlse left out" else delta - dlse
    ds = p * (dout @ v2.transpose(-1, -2) - delta[..., None])
    if fault == "weights in 4 bits":
        p = p * 1.03125
    p, ds = rounding(p), rounding(ds)
    dk, dv = ds.transpose(-1, -2) @ q * scale, p.transpose(-1, -2) @ dout

    def summed(t: Tensor) -> Tensor:
        return t.view(1, 2, 2, 90, 32)[:, :, 0] if fault == "one head of a group" else t.view(1, 2, 2, 90, 32).sum(2)

    dq = ds @ k2 * (1.0 if fault == "dq not scaled" else scale)
    if fault == "block of 16 queries dropped":
        dk, dv = dk - ds[:, :, 32:48].transpose(-1, -2) @ q[:, :, 32:48] * scale, dv
    return {"dq": dq, "dk": summed(dk), "dv": summed(dv)}


def test_budget_admits_an_honest_kernel() -> None:
    inputs = backward_inputs(BASE, "cpu")
    assert 0.05 < over_budget(BASE, inputs, as_a_kernel(inputs), Numerics("tensor_core", (), "bf16")) <= 1


@pytest.mark.parametrize(
    "fault",
    [
        "other diagonal",
        "key heads interleaved",
        "last key dropped",
        "delta left out",
        "dlse added to delta",
        "dlse left out",
        "weights in 4 bits",
        "one head of a group",
        "dq not scaled",
        "block of 16 queries dropped",
    ],
)
def test_control_is_caught(fault: str) -> None:
    inputs = backward_inputs(BASE, "cpu")
    widest = Numerics("tensor_core", ("bf16",), "bf16")
    assert over_budget(BASE, inputs, as_a_kernel(inputs, fault), widest) > 1


@pytest.mark.parametrize("dist", ["normal", "equal_keys"])
def test_equal_roundings_are_allowed_for_only_where_they_occur(dist: str) -> None:
    """Weights all rounded up by half a unit, as equal ones are: 256 alike add up, 256 independent ones do not."""
    case = ATTENTION_BACKWARD.case(dtype="bf16", dist=dist, hq=1, hk=1, sq=256, sk=64, d=16)
    inputs = backward_inputs(case, "cpu")
    inputs["dout"] = inputs["dout"].abs()
    pushed = backward_float64(ScoreRule("none"), inputs)
    pushed["dv"] = pushed["dv"] * (1 + 2.0**-8)
    worst = over_budget(case, inputs, pushed, Numerics("tensor_core", (), "bf16"))
    assert (worst > 1) == (dist == "normal")


def test_own_forward_widens_the_budget() -> None:
    inputs = backward_inputs(BASE, "cpu")
    given_ones = backward_oracle(BASE, inputs, Numerics(), None)
    own_ones = backward_oracle(BASE, inputs, FP32, None)
    for name in GRADIENTS:
        narrow, wide = given_ones[name].budget, own_ones[name].budget
        assert narrow is not None and wide is not None and bool((wide >= narrow).all())
    # The gradient by a forward of its own differs from the one by the given out, which bf16 rounded, by more than fp32.
    apart = autograd(BASE, inputs, torch.float64)["dq"] - given_ones["dq"].value
    assert float(apart.abs().max()) > 1e-3 * float(given_ones["dq"].value.abs().max())


def test_sampled_rows_agree_with_all_rows() -> None:
    inputs = backward_inputs(BASE, "cpu")
    full = backward_oracle(BASE, inputs, Numerics(), None)
    some = backward_oracle(BASE, inputs, Numerics(), 7)
    for name in GRADIENTS:
        take = some[name].take
        assert take is not None and some[name].value.shape[2] == 7
        torch.testing.assert_close(take(full[name].value), some[name].value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(take(full[name].budget), some[name].budget, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_moves_values_and_changes_none(layout: str) -> None:
    t = torch.randn(2, 3, 5, 20, generator=torch.Generator().manual_seed(0))
    laid = lay_out(t, layout)
    assert torch.equal(laid, t) and laid.stride(3) == 1
    assert laid.is_contiguous() == (layout == "bhsd")
    if layout == "padded":
        assert laid.stride(2) == 32 and laid.storage_offset() == 8
        assert bool(laid.as_strided((2, 3, 5, 12), (480, 160, 32, 1), 28).isnan().all())
    copy = check.copied(laid)
    assert torch.equal(copy, laid) and copy.stride() == laid.stride() and copy.storage_offset() == laid.storage_offset()


def test_layout_is_left_out_of_the_id_where_it_was_always_so() -> None:
    plain = ATTENTION.case(hq=1, hk=1, sq=2, sk=3, d=4)
    moved = ATTENTION.case(layout="bshd", hq=1, hk=1, sq=2, sk=3, d=4)
    assert plain.id == "attention[dtype=bf16,causal=none,dist=normal,b=1,hq=1,hk=1,sq=2,sk=3,d=4]"
    assert "layout=bshd" in moved.id and plain.text("layout") == "bhsd"
    assert all(ATTENTION.parse(case.id) == case for case in (plain, moved))
    assert attention_inputs(plain, "cpu")["q"].is_contiguous()


@pytest.mark.parametrize(("window", "softcap"), [(7, 0), (0, 3)])
def test_a_kernel_without_the_window_or_the_cap_is_caught(window: int, softcap: int) -> None:
    case = ATTENTION_BACKWARD.case(dtype="bf16", window=window, softcap=softcap, hq=1, hk=1, sq=40, sk=40, d=16)
    inputs = backward_inputs(case, "cpu")
    plain = backward_float64(ScoreRule("none"), inputs)
    assert over_budget(case, inputs, plain, Numerics("tensor_core", ("bf16",), "bf16")) > 1


def test_a_cap_whose_slope_is_forgotten_is_caught() -> None:
    case = ATTENTION_BACKWARD.case(dtype="bf16", softcap=2, hq=1, hk=1, sq=40, sk=40, d=16)
    inputs = backward_inputs(case, "cpu")

    class Flat(ScoreRule):
        def slope(self, z: Tensor) -> Tensor:
            return torch.ones_like(z)

    wrong = backward_float64(Flat("none", softcap=2), inputs)
    assert over_budget(case, inputs, wrong, Numerics("tensor_core", ("bf16",), "bf16")) > 1


def test_unknown_parameters_are_refused_unless_at_their_default() -> None:
    """The control of ``refuse_beyond``: a kernel that knows no window must not take one."""
    case = ATTENTION.case(hq=1, hk=1, sq=4, sk=4, d=8)
    known = ("dtype", "causal", "dist", "b", "hq", "hk", "sq", "sk", "d")
    refuse_beyond(case, known)
    with pytest.raises(Unsupported) as caught:
        refuse_beyond(ATTENTION.case(window=2, hq=1, hk=1, sq=4, sk=4, d=8), known)
    assert caught.value.rule == "parameter_not_taken" and "window=2" in caught.value.message


def test_flops_are_two_and_a_half_forwards() -> None:
    backward = ATTENTION_BACKWARD.flops
    assert backward is not None and 2 * backward(BASE) == 5 * forward_flops(BASE)
