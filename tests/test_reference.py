"""Laws of the oracles, against second opinions: ml_dtypes, exact rationals, plain float64 softmax."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbench.errors import CaseError, Unsupported
from vbench.reference import attention, fp4, linear, tiers
from vbench.reference.budget import LAMBDA, UNIT_ROUNDOFF, sum_factor
from vbench.reference.ops import OPS
from vbench.reference.ops.attention import ATTENTION, attended_pairs
from vbench.reference.ops.fp4 import FORMATS, FP4_LINEAR, FP4_QUANTIZE
from vbench.reference.ops.tiers import TIER_STACK
from vbench.spec import Numerics, Op, resolve


def test_e2m1_agrees_with_ml_dtypes_on_ties_neighbours_and_normals() -> None:
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float32)
    points = np.concatenate(
        [
            midpoints,
            np.nextafter(midpoints, np.float32(9)),
            np.nextafter(midpoints, np.float32(0)),
            np.array(fp4.E2M1_MAGNITUDES, dtype=np.float32),
            np.array([0.0, 7.0, 100.0, 1e30], dtype=np.float32),
            np.random.default_rng(0).normal(size=20000).astype(np.float32) * 3,
        ]
    )
    points = np.concatenate([points, -points])
    want = points.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    got = fp4.e2m1_codes(torch.from_numpy(points)).numpy()
    assert (got == want).all()


def test_decode_table_is_ml_dtypes_table() -> None:
    codes = np.arange(16, dtype=np.uint8)
    assert list(codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)) == list(fp4.table("nvfp4"))


def test_nvfp4_agrees_with_ml_dtypes() -> None:
    w = np.random.default_rng(1).normal(size=(32, 64)).astype(np.float32) * 0.02
    f32 = np.float32
    g = np.abs(w).max() / f32(2688)
    blocks = w.reshape(32, 4, 16)
    s = np.clip(np.abs(blocks).max(-1) / f32(6) / g, f32(2**-6), f32(448)).astype(ml_dtypes.float8_e4m3fn)
    codes = (blocks / (s.astype(f32) * g)[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    got = fp4.quantize("nvfp4", torch.from_numpy(w))
    assert (fp4.unpack(got["codes"]).numpy() == codes.reshape(32, 64)).all()
    assert (got["scale"].view(torch.uint8).numpy() == s.view(np.uint8)).all()
    assert float(got["global_scale"]) == g


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=2).filter(lambda v: max(map(abs, v)) > 1e-30))
@settings(max_examples=200)
def test_absmax7_error_is_at_most_half_a_step_in_exact_rationals(values: list[float]) -> None:
    q = fp4.quantize("absmax7_row", torch.tensor([values], dtype=torch.float32))
    scale = Fraction(float(q["scale"][0]))
    for code, value in zip(fp4.unpack(q["codes"])[0].tolist(), values, strict=True):
        # The quotient is rounded to float32 before it is rounded to an integer: 8 u of a quotient up to 7 at most.
        assert abs((code - 8) * scale - Fraction(value)) <= scale * (Fraction(1, 2) + Fraction(8, 2**24))
        assert 1 <= code <= 15


@pytest.mark.parametrize("fmt", FORMATS)
def test_zero_and_bad_weights(fmt: str) -> None:
    q = fp4.quantize(fmt, torch.zeros(2, 128))
    assert bool((fp4.dequantize(fmt, q, torch.float32) == 0).all())
    for bad in (float("nan"), float("inf")):
        w = torch.zeros(2, 128)
        w[1, 3] = bad
        with pytest.raises(Unsupported) as info:
            fp4.quantize(fmt, w)
        assert info.value.rule == "nonfinite_weight"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("x", ["fp32", "bf16"])
def test_one_hot_rows_give_decoded_columns(fmt: str, x: str) -> None:
    case = FP4_LINEAR.case(fmt=fmt, x=x, m=128, n=5, k=128)
    inputs = linear.linear_inputs(case, "cpu")
    inputs["x"] = torch.eye(128, dtype=inputs["x"].dtype)
    want = linear.linear_oracle(case, inputs, Numerics(), None)["y"]
    assert torch.equal(want.value, fp4.decode_float64(fmt, inputs).T)


@pytest.mark.parametrize("act", ["none", "relu", "gelu", "silu"])
@pytest.mark.parametrize("x", ["fp32", "fp16", "bf16"])
def test_linear_budget_passes_fp32_and_fails_twice_the_budget(act: str, x: str) -> None:
    case = FP4_LINEAR.case(fmt="absmax7_g128", x=x, act=act, bias=1, m=4, n=16, k=512)
    inputs = linear.linear_inputs(case, "cpu")
    want = linear.linear_oracle(case, inputs, Numerics("fp32"), None)["y"]
    w = fp4.decode_float64("absmax7_g128", inputs).float()
    y = linear.activate(act, inputs["x"].float() @ w.T + inputs["bias"].float()).to(want.dtype)
    ratio = (y.double() - want.value).abs() / want.budget
    assert float(ratio.max()) <= 1
    assert want.budget is not None and bool((want.budget > 0).all())
    # control: bf16 accumulation of K = 512 must not fit a float32 budget
    if x == "fp32":
        low = (inputs["x"].bfloat16() @ w.bfloat16().T).double() + inputs["bias"].double()
        assert float(((linear.activate(act, low) - want.value).abs() / want.budget).max()) > 1


def test_grid_catches_reduced_precision_and_admits_any_order() -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="fp32", dist="grid", m=8, n=16, k=256)
    inputs = linear.linear_inputs(case, "cpu")
    want = linear.linear_oracle(case, inputs, Numerics(), None)["y"]
    assert want.budget is None
    w = fp4.dequantize("nvfp4", inputs, torch.float32)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(inputs["x"][:, order] @ w[:, order].T, want.value)
    # control: operands rounded to TF32's 11 significant bits
    tf32 = inputs["x"].half().float()
    assert not torch.equal(tf32 @ w.T, want.value)


@given(
    sq=st.integers(1, 12),
    sk=st.integers(1, 12),
    d=st.integers(1, 20),
    group=st.sampled_from([1, 2]),
    causal=st.sampled_from(["none", "top_left", "bottom_right"]),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    dist=st.sampled_from(["normal", "large_logits", "equal_keys", "constant_v"]),
)
@settings(max_examples=60)
def test_attention_oracle_is_softmax_and_admits_fp32(
    sq: int, sk: int, d: int, group: int, causal: str, dtype: str, dist: str
) -> None:
    case = ATTENTION.case(dtype=dtype, causal=causal, dist=dist, b=2, hq=2 * group, hk=2, sq=sq, sk=sk, d=d)
    inputs = attention.attention_inputs(case, "cpu")
    probabilities = "fp32"
    want = attention.attention_oracle(case, inputs, Numerics("fp32", (), probabilities), None)
    q, k, v = (inputs[n].double() for n in "qkv")
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = attention.visible(causal, torch.arange(sq), sq, sk)
    z = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~mask, -torch.inf)
    lse = torch.logsumexp(z, -1)
    out = torch.softmax(z, -1).nan_to_num(0.0) @ v
    torch.testing.assert_close(want["out"].value, out, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(want["lse"].value, lse, rtol=1e-9, atol=1e-12)
    assert int(mask.sum()) == attended_pairs(causal, sq, sk)
    for window in (1, 3, 30):
        near = attention.visible(causal, torch.arange(sq), sq, sk, window)
        assert int(near.sum()) == attended_pairs(causal, sq, sk, window)
        assert not bool((near & ~mask).any()) and (window < sq + sk or torch.equal(near, mask))
    z32 = (inputs["q"].float() @ k.float().transpose(-1, -2) * d**-0.5).masked_fill(~mask, -torch.inf)
    got = (torch.softmax(z32, -1).nan_to_num(0.0) @ v.float()).to(want["out"].dtype)
    error = (got.double() - want["out"].value).abs()
    assert bool((error <= want["out"].budget).all())
    lse_error = (torch.logsumexp(z32, -1).double() - want["lse"].value).nan_to_num(0.0).abs()
    assert bool((lse_error <= want["lse"].budget).all())


def test_attention_budget_refuses_the_wrong_alignment_and_base_two_lse() -> None:
    case = ATTENTION.case(dtype="bf16", causal="bottom_right", hq=1, hk=1, sq=6, sk=9, d=16)
    other = ATTENTION.case(dtype="bf16", causal="top_left", hq=1, hk=1, sq=6, sk=9, d=16)
    inputs = attention.attention_inputs(case, "cpu")
    widest = Numerics("tensor_core", ("bf16",), "bf16")
    want = attention.attention_oracle(case, inputs, widest, None)
    wrong = attention.attention_oracle(other, inputs, widest, None)
    assert bool(((wrong["out"].value - want["out"].value).abs() > want["out"].budget).any())
    base_two = want["lse"].value / np.log(2)
    assert bool(((base_two - want["lse"].value).abs() > want["lse"].budget).any())


def test_sampled_rows_agree_with_all_rows() -> None:
    case = ATTENTION.case(dtype="fp16", causal="bottom_right", hq=2, hk=1, sq=40, sk=33, d=8)
    inputs = attention.attention_inputs(case, "cpu")
    full = attention.attention_oracle(case, inputs, Numerics(), None)
    some = attention.attention_oracle(case, inputs, Numerics(), 7)
    for name in ("out", "lse"):
        take = some[name].take
        assert take is not None
        assert some[name].value.shape[2] == 7
        # A matrix product of other shape may add in another order.
        torch.testing.assert_close(take(full[name].value), some[name].value, rtol=1e-13, atol=1e-13)


def test_tier_rules_by_hand() -> None:
    def item(n: int) -> torch.Tensor:
        return torch.full((n,), n, dtype=torch.uint8)

    stack = tiers.DictStack((10, 20, 100))
    for key, size in (("a", 4), ("b", 5), ("c", 4)):  # c pushes a (least recent) down
        stack.put(key, item(size))
    assert [stack.find(k) for k in "abc"] == [1, 0, 0]
    assert stack.access("a").numel() == 4  # a comes back, b goes down
    assert [stack.find(k) for k in "abc"] == [0, 1, 0]
    stack.spill("c")
    assert [stack.find(k) for k in "abc"] == [0, 1, 2]
    stack.evict("a")
    assert stack.find("a") == 1 and stack.used(1) == 9
    stack.put("big", item(15))  # larger than level 0: passes it by; level 1 has room for 20 - 9 = 11: b goes down
    assert [stack.find(k) for k in ("a", "b", "big")] == [1, 2, 1]


@pytest.mark.parametrize("trace", ["mixed", "cyclic", "palindrome", "resident"])
def test_tier_trace_is_deterministic_and_within_capacity(trace: str) -> None:
    case = TIER_STACK.case(
        trace=trace, keys=6, item_bytes=100, steps=60, gpu_bytes=250, host_bytes=300, file_bytes=10000
    )
    inputs = tiers.tier_inputs(case, "cpu")
    first, second = tiers.replay(inputs), tiers.replay(tiers.tier_inputs(case, "cpu"))
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert bool((first["level_bytes"] <= torch.tensor(inputs["capacities_bytes"])).all())


def test_a_cyclic_scan_defeats_lru() -> None:
    case = TIER_STACK.case(
        trace="cyclic", keys=8, item_bytes=64, steps=72, gpu_bytes=256, host_bytes=512, file_bytes=4096
    )
    assert int(tiers.replay(tiers.tier_inputs(case, "cpu"))["hits"][0]) == 0


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_case_ids_round_trip_and_bad_values_are_named(op: Op) -> None:
    sample = {p.name: p.default if p.default is not None else (p.choices[0] if p.choices else 16) for p in op.params}
    case = op.case(seed=3, **sample)
    assert op.parse(case.id) == case
    with pytest.raises(CaseError, match="no parameter 'nonsense'"):
        op.case(nonsense=1)
    first = op.params[0]
    with pytest.raises(CaseError, match=first.name):
        op.case(**{**sample, first.name: "no such value"})  # type: ignore[arg-type]
    assert callable(resolve(op.inputs)) and callable(resolve(op.oracle))


def test_quantize_metrics_of_a_known_case() -> None:
    case = FP4_QUANTIZE.case(fmt="absmax7_tensor", w="fp32", n=2, k=16, dist="normal")
    inputs = fp4.quantize_inputs(case, "cpu")
    outputs = fp4.quantize("absmax7_tensor", inputs["w"])
    metrics = fp4.quantize_metrics(case, inputs, outputs, {})
    assert metrics["bits_per_weight"] == 8 * (16 + 4) / 32
    assert metrics["saving_over_fp32"] == 1 - metrics["bits_per_weight"] / 32
    relative = metrics["rel_frobenius"]
    assert 0 < relative < 0.3
    assert metrics["sqnr_db"] == pytest.approx(-20 * np.log10(relative))


def test_unit_roundoffs_are_the_types_own() -> None:
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert UNIT_ROUNDOFF[name] == torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("k", [128, 14336])
def test_the_budget_of_a_sum_in_any_order_is_within_a_factor_of_what_an_order_needs(k: int) -> None:
    """docs/adr/0025: an ascending order needs a tenth of it at any length, a blocked one ever less.

    The control is the sharper budget for orders that know nothing of the terms: it accuses the ascending order of
    long sums.
    """
    generator = torch.Generator().manual_seed(k)
    terms = torch.randn(256, k, generator=generator) * torch.randn(256, k, generator=generator)
    exact, u = terms.double().sum(dim=1), UNIT_ROUNDOFF["fp32"]

    def over(total: torch.Tensor, budget: torch.Tensor) -> float:
        return float(((total.double() - exact).abs() / budget).max())

    ascending = torch.zeros(256)
    for term in terms.sort(dim=1).values.unbind(dim=1):
        ascending = ascending + term
    budget = sum_factor(k, "fp32") * terms.double().abs().sum(dim=1)
    assert 0.05 < over(ascending, budget) < 0.5
    assert over(terms.sum(dim=1), budget) < 0.05
    sharper = LAMBDA**2 * math.sqrt(k) * u * terms.double().norm(dim=1)
    assert (over(ascending, sharper) > 1) == (k > 128)
