"""decoder_block: the budget admits honest compositions and nothing else; every backend; second opinions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from vbench.backend import DeclaredBackend
from vbench.errors import Unsupported
from vbench.kernels.peers.torch_native import BACKEND as TORCH_NATIVE
from vbench.kernels.triton import block as triton_block
from vbench.kernels.triton.backend import BACKEND as TRITON
from vbench.kernels.triton.packing import GROUPS
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference import block, uncertain
from vbench.reference.backend import BACKEND as REFERENCE
from vbench.reference.fp4 import decode_float64
from vbench.reference.ops.block import DECODER_BLOCK
from vbench.reference.uncertain import Uncertain
from vbench.spec import Case, Numerics, resolve
from vbench.suites.model import SUITE
from vbench.worker import Worker

CASES = [c for c in SUITE.checks if c.op == DECODER_BLOCK.name and DECODER_BLOCK.reject(c) is None]
BF16 = Numerics("fp32", probabilities="bf16", stores=("bf16",))


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


# Every second one: the suite runs them all, and the interpreter takes a second or two for each.
@pytest.mark.parametrize("case", CASES[::2], ids=lambda c: c.id)
@pytest.mark.parametrize("backend", [REFERENCE, TRITON, TORCH_NATIVE], ids=lambda b: b.name)
def test_every_backend_is_inside_the_budget_it_declares(worker: Worker, backend: DeclaredBackend, case: Case) -> None:
    for variant in backend.variants.get("decoder_block", ("",)):
        try:
            kernel = resolve(backend.ops["decoder_block"])(case, variant, "cpu")
        except Unsupported as refused:
            if backend is TRITON and case.text("fmt") not in ("dense", *GROUPS):
                assert refused.rule == "format"
            else:
                assert case.text("fmt") == "dense" and refused.rule in ("dense_weights", "nothing_to_decode")
            continue
        result = worker._measure(DECODER_BLOCK, case, kernel, timed=False, role="own")
        assert result.outcome is Outcome.PASSED, result.detail
        assert result.error is not None and result.error["worst_over_budget"] <= 1


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_trivial_kernels_are_caught(worker: Worker, case: Case) -> None:
    assert worker.battery(DECODER_BLOCK, case).outcome is Outcome.PASSED


# --- the oracle against torch's own layers in float64 -----------------------------------------------------------------


def plain_float64(case: Case, inputs: Mapping[str, Any], fault: str = "") -> torch.Tensor:
    """The block by torch's own layers on float64 tensors; ``fault`` breaks one step."""
    b, s, hq, hk = (case.axis(name) for name in ("b", "s", "hq", "hk"))
    t = {name: v.double() for name, v in inputs.items() if v.dtype.is_floating_point}
    x = t["x"]

    def linear(name: str, h: torch.Tensor) -> torch.Tensor:
        weight = t.get(f"{name}.weight")
        if weight is None:
            fields = {field: inputs[f"{name}.{field}"] for field in block.FIELDS}
            weight = decode_float64(case.text("fmt"), fields)
        return F.linear(h, weight, t.get(f"{name}.bias"))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (h.reshape(b, s, -1, q.shape[-1] // hq).transpose(1, 2) for h in (q, k, v))
        causal = fault != "no_mask"
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=hk != hq)
        return y.transpose(1, 2).reshape(b * s, -1)

    def turn(h: torch.Tensor, count: int) -> torch.Tensor:
        # As complex numbers, which the half-split form is in another order.
        h = h.reshape(b, s, count, -1)
        first, second = (h[..., 0::2], h[..., 1::2]) if fault == "interleaved" else h.chunk(2, dim=-1)
        pairs = torch.complex(first, second)
        d = 2 * pairs.shape[-1]
        theta = float(case.axis("theta")) * (2 if fault == "theta" else 1)
        angle = torch.arange(s, dtype=torch.float64)[:, None] * theta ** (-torch.arange(0, d, 2).double() / d)
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((pairs.real, pairs.imag), dim=-1).reshape(b * s, -1)

    gain = {name: t[f"{name}.weight"] for name in ("norm_1", "norm_2")}
    if case.text("family") == "gpt2":
        h = F.layer_norm(x, x.shape[1:], gain["norm_1"], t["norm_1.bias"], block.EPS)
        r = linear("c_proj", attend(*linear("c_attn", h).chunk(3, dim=1))) + (0 if fault == "residual" else x)
        h = F.layer_norm(r, x.shape[1:], gain["norm_2"], t["norm_2.bias"], block.EPS)
        form = "none" if fault == "erf" else "tanh"
        return r + linear("mlp_c_proj", F.gelu(linear("mlp_c_fc", h), approximate=form))
    h = F.rms_norm(x, x.shape[1:], gain["norm_1"], block.EPS)
    q, k = turn(linear("q_proj", h), hq), turn(linear("k_proj", h), hk)
    r = linear("o_proj", attend(q, k, linear("v_proj", h))) + (0 if fault == "residual" else x)
    h = F.rms_norm(r, x.shape[1:], gain["norm_2"], block.EPS)
    if fault == "swapped_gate":
        return r + linear("down_proj", F.silu(linear("up_proj", h)) * linear("gate_proj", h))
    return r + linear("down_proj", F.silu(linear("gate_proj", h)) * linear("up_proj", h))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_oracle_is_what_torch_s_layers_compute_in_float64(case: Case) -> None:
    inputs = block.block_inputs(case, "cpu")
    # The float32 tables of cosines are the input; the second opinion turns by the exact angle.
    atol = 1e-12 if case.text("family") == "gpt2" else 1e-6
    torch.testing.assert_close(block.block_float64(case, inputs), plain_float64(case, inputs), rtol=0, atol=atol)


def larger(family: str, x: str = "bf16") -> Case:
    theta = 0 if family == "gpt2" else 10000
    hk = 4 if family == "gpt2" else 2
    return DECODER_BLOCK.case(family=family, fmt="nvfp4", x=x, theta=theta, s=32, hidden=64, hq=4, hk=hk, inner=128)


def over_budget(case: Case, y: torch.Tensor, inputs: dict[str, Any], numerics: Numerics) -> float:
    want = block.block_oracle(case, inputs, numerics, None)["y"]
    return float(((y.double() - want.value).abs() / want.budget).max())


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("gpt2", "residual"),
        ("gpt2", "no_mask"),
        ("llama", "residual"),
        ("llama", "theta"),
        ("llama", "interleaved"),
        ("llama", "swapped_gate"),
    ],
)
def test_control_a_wrong_step_is_caught_even_with_bfloat16_stores(family: str, fault: str) -> None:
    case = larger(family)
    inputs = block.block_inputs(case, "cpu")
    assert over_budget(case, plain_float64(case, inputs), inputs, BF16) <= 1
    assert over_budget(case, plain_float64(case, inputs, fault).to(torch.bfloat16), inputs, BF16) > 1


def test_control_the_erf_form_of_gelu_is_caught_in_float32() -> None:
    """The two forms differ by up to 5e-4, less than bfloat16 rounds: only float32 tells them apart."""
    case = larger("gpt2", "fp32")
    inputs = block.block_inputs(case, "cpu")
    numerics = Numerics("fp32", stores=("fp32",))
    assert over_budget(case, plain_float64(case, inputs), inputs, numerics) <= 1
    assert over_budget(case, plain_float64(case, inputs, "erf").float(), inputs, numerics) > 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("x", ["bf16", "fp32"])
def test_the_budget_is_a_small_multiple_of_what_honest_rounding_does(family: str, x: str) -> None:
    """Neither vacuous nor accusing: an eager composition uses between 1/100 (fp32 sums are bounded in any order) or
    1/12 (bf16 stores) and 1/1.5 of it, over seeds; twice the budget is over it everywhere."""
    low = 1 / 12 if x == "bf16" else 1 / 100
    for seed in range(2):
        values = dict(larger(family, x).params)
        case = DECODER_BLOCK.case(seed=seed, **values)
        inputs = block.block_inputs(case, "cpu")
        kernel = resolve(TORCH_NATIVE.ops["decoder_block"])(case, "cublas", "cpu")
        one_store = replace(kernel.numerics, stores=(x,))
        y = kernel.bind(inputs, {})()["y"]
        assert low <= over_budget(case, y, inputs, one_store) <= 1 / 1.5
        want = block.block_oracle(case, inputs, one_store, None)["y"]
        assert want.budget is not None and bool((want.budget > 0).all())
        assert over_budget(case, want.value + 2 * want.budget, inputs, one_store) > 1


def test_bfloat16_stores_are_over_a_budget_that_declares_none() -> None:
    case = larger("llama")
    inputs = block.block_inputs(case, "cpu")
    y = resolve(TORCH_NATIVE.ops["decoder_block"])(case, "cublas", "cpu").bind(inputs, {})()["y"]
    assert over_budget(case, y, inputs, Numerics("fp32")) > 1


def test_sampled_rows_agree_with_all_rows() -> None:
    case = DECODER_BLOCK.case(family="llama", fmt="nvfp4", b=2, s=12, hidden=32, hq=2, hk=1, inner=48)
    inputs = block.block_inputs(case, "cpu")
    full = block.block_oracle(case, inputs, BF16, None)["y"]
    some = block.block_oracle(case, inputs, BF16, 9)["y"]
    assert some.take is not None and some.value.shape == (9, 32)
    torch.testing.assert_close(some.take(full.value), some.value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(some.take(full.budget), some.budget, rtol=1e-9, atol=0)


# --- the calculus of uncertain numbers against sampled errors ---------------------------------------------------------


X: Uncertain = Uncertain(
    torch.randn(3, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64),
    torch.rand(3, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * 1e-6,
)


def sampled_variance(step: Callable[[torch.Tensor], torch.Tensor], x: Uncertain) -> torch.Tensor:
    """Variance of step(x + e) over 4000 draws of independent e with the proxy's variance, a normal's."""
    gen = torch.Generator().manual_seed(0)
    errors = torch.randn(4000, *x.value.shape, generator=gen, dtype=torch.float64) * x.variance.sqrt()
    return step(x.value + errors).var(dim=0)


def turn_by_angles(v: torch.Tensor) -> torch.Tensor:
    c, s = ANGLES.cos(), ANGLES.sin()
    return torch.cat((v[..., :4] * c - v[..., 4:] * s, v[..., 4:] * c + v[..., :4] * s), dim=-1)


def turn_uncertain(u: Uncertain) -> Uncertain:
    turned = uncertain.rotate(Uncertain(u.value[:, None], u.variance[:, None]), ANGLES.cos(), ANGLES.sin())
    return Uncertain(turned.value[:, 0], turned.variance[:, 0])


WEIGHT = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
GAIN = 1 + torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 10
ANGLES = torch.randn(3, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
KEYS = torch.randn(5, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
ROWS = torch.tensor([1, 3, 4])


def softmax_of(q: torch.Tensor, values: torch.Tensor = KEYS) -> torch.Tensor:
    z = (q @ KEYS.T) * 8**-0.5
    z = z.masked_fill(torch.arange(5)[None] > ROWS[:, None], -math.inf)
    return torch.softmax(z, dim=-1) @ values


STEPS: dict[str, tuple[Callable[[Uncertain], Uncertain], Callable[[torch.Tensor], torch.Tensor]]] = {
    "product": (lambda u: uncertain.product(u, WEIGHT, Numerics("fp64")), lambda v: v @ WEIGHT.T),
    "layer_norm": (
        lambda u: uncertain.normalise(u, GAIN, GAIN - 1, 1e-5),
        lambda v: F.layer_norm(v, (8,), GAIN, GAIN - 1, 1e-5),
    ),
    "rms_norm": (lambda u: uncertain.normalise(u, GAIN, None, 1e-5), lambda v: F.rms_norm(v, (8,), GAIN, 1e-5)),
    "rotate": (turn_uncertain, turn_by_angles),
    "silu": (uncertain.silu, F.silu),
    "gelu_tanh": (uncertain.gelu_tanh, lambda v: F.gelu(v, approximate="tanh")),
    "square": (lambda u: uncertain.multiply(u, Uncertain.exact(u.value)), lambda v: v * X.value),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_carries_an_error_as_sampling_shows(name: str) -> None:
    ours, plain = STEPS[name]
    got = ours(X)
    torch.testing.assert_close(got.value, plain(X.value), rtol=1e-12, atol=1e-12)
    want = sampled_variance(plain, X)
    # 4000 draws: 5 standard deviations of a sampled variance are 11 %. Where a slope is all but zero, the second order
    # and the evaluation's own error are what is left.
    left = (3 * float(X.variance.max())) ** 2 + 1e-12
    assert bool((got.variance > 0.88 * want).all())
    assert bool((got.variance < 1.12 * want + left).all())
    assert left < 0.02 * float(want.max())


def test_attention_carries_an_error_of_its_queries_keys_and_values() -> None:
    """Errors of a query reach all its scores, which the rules take as independent: right on average, not by element."""
    exact = Uncertain.exact(KEYS)
    numerics = Numerics("fp64", probabilities="fp64")
    of_queries = uncertain.attend(X, exact, exact, ROWS, numerics)
    torch.testing.assert_close(of_queries.value, softmax_of(X.value), rtol=1e-12, atol=1e-12)
    ratio = of_queries.variance.mean() / sampled_variance(softmax_of, X).mean()
    assert 1 / 4 < float(ratio) < 4
    noisy = Uncertain(KEYS, torch.full_like(KEYS, 1e-6))
    of_values = uncertain.attend(Uncertain.exact(X.value), exact, noisy, ROWS, numerics)
    weights = torch.softmax(
        ((X.value @ KEYS.T) * 8**-0.5).masked_fill(torch.arange(5)[None] > ROWS[:, None], -math.inf), 1
    )
    want = weights.square().sum(dim=1, keepdim=True) * 1e-6
    assert bool((of_values.variance >= want).all()) and bool((of_values.variance <= 1.2 * want + 1e-12).all())


def test_unsupported_inputs_are_refused_before_any_launch() -> None:
    case = DECODER_BLOCK.case(family="llama", fmt="nvfp4", s=3, hidden=32, hq=2, hk=1, inner=32)
    inputs = block.block_inputs(case, "cpu")
    kernel = triton_block.make(case, "", "cpu")
    out = {"y": torch.empty(case.axis("s"), case.axis("hidden"), dtype=torch.bfloat16)}
    for rule, change in (
        ("x_shape", {"x": inputs["x"][:-1]}),
        ("x_dtype", {"cos": inputs["cos"].double()}),
        ("not_contiguous", {"norm_1.weight": inputs["norm_1.weight"].repeat(2)[::2]}),
        ("weight_shape", {"q_proj.codes": inputs["q_proj.codes"][:-1]}),
    ):
        with pytest.raises(Unsupported) as refused:
            kernel.bind({**inputs, **change}, out)
        assert refused.value.rule == rule
    with pytest.raises(Unsupported, match="unknown_variant"):
        triton_block.make(case, "gluon", "cpu")
