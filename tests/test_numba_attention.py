"""Attention forward of numba_cuda in the simulator: budgets, strides, masks, invariants, and controls that must fail.

Its machine code is looked at by the ahead-of-time gate (``vbench run --suite compile``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # numba reads it once, when first imported

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbench.errors import Unsupported
from vbench.kernels.numba_cuda import attention_kernels as programs
from vbench.kernels.numba_cuda.attention import SIMULATED_PRODUCTS, AttentionKernel, attention
from vbench.kernels.numba_cuda.dialect import SIMULATED
from vbench.reference.attention import attention_inputs, attention_oracle
from vbench.reference.ops.attention import ATTENTION, LAYOUTS
from vbench.spec import Case

pytestmark = pytest.mark.skipif(
    not SIMULATED, reason="numba was imported without NUMBA_ENABLE_CUDASIM=1 before this module"
)

MASKS = ("none", "top_left", "bottom_right")
DTYPES = ("bf16", "fp16", "fp32")


def run(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs into poisoned tensors in the middle of guarded buffers; guards and inputs must stay as they are."""
    kernel = attention(case, "", "cpu")
    want = attention_oracle(case, inputs, kernel.numerics, None)
    before = {name: t.clone() for name, t in inputs.items()}
    buffers = {name: torch.full((w.value.numel() + 64,), 113.0, dtype=w.dtype) for name, w in want.items()}
    out = {name: buffers[name][32:-32].view(want[name].shape) for name in want}
    assert kernel.bind(inputs, out)() is None
    for name, t in inputs.items():
        assert torch.equal(t, before[name]), f"{name} was changed"
    for name, buffer in buffers.items():
        assert bool((buffer[:32] == 113).all()) and bool((buffer[-32:] == 113).all()), f"wrote around {name}"
    return out


def worst(case: Case, inputs: dict[str, Any], got: dict[str, Tensor]) -> float:
    """Largest |error| / budget of both outputs; infinite where a value is NaN, or finite where it must not be."""
    ratios = []
    for name, want in attention_oracle(case, inputs, attention(case, "", "cpu").numerics, None).items():
        error = torch.where(got[name].double() == want.value, 0.0, (got[name].double() - want.value).abs())
        assert want.budget is not None
        ratio = torch.where(error == 0, 0.0, error / want.budget)
        ratios.append(float(ratio.nan_to_num(nan=torch.inf).max()))
    return max(ratios)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    hk = draw(st.integers(1, 2))
    return ATTENTION.case(
        dtype=draw(st.sampled_from(DTYPES)),
        causal=draw(st.sampled_from(MASKS)),
        dist=draw(st.sampled_from(("normal", "large_logits", "equal_keys", "constant_v"))),
        layout=draw(st.sampled_from(LAYOUTS)),
        b=draw(st.integers(1, 2)),
        hq=hk * draw(st.integers(1, 2)),
        hk=hk,
        sq=draw(st.integers(1, 10)),
        sk=draw(st.integers(1, 10)),
        d=draw(st.integers(1, 9)),
    )


@settings(max_examples=10)
@given(cases())
def test_small_cases_stay_within_the_budget(case: Case) -> None:
    inputs = attention_inputs(case, "cpu")
    assert worst(case, inputs, run(case, inputs)) <= 1


@pytest.mark.parametrize("d", [17, 40])
@pytest.mark.parametrize("causal", MASKS)
def test_several_tiles_of_keys_and_chunks_of_the_head_dimension(d: int, causal: str) -> None:
    case = ATTENTION.case(dtype="fp32", causal=causal, hq=1, hk=1, sq=6, sk=17, d=d)
    inputs = attention_inputs(case, "cpu")
    assert worst(case, inputs, run(case, inputs)) <= 1


def test_head_dim_256_uses_the_narrow_tile() -> None:
    assert programs.rows_of(programs.columns_of(256)) == 2 and programs.rows_of(programs.columns_of(128)) == 4
    case = ATTENTION.case(dtype="fp16", hq=1, hk=1, sq=3, sk=3, d=256)
    inputs = attention_inputs(case, "cpu")
    assert worst(case, inputs, run(case, inputs)) <= 1


@pytest.fixture
def gpu_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The block sizes of a GPU; index arithmetic depends on them."""
    programs.forward.cache_clear()
    sizes = {"TX": 16, "TY": 16, "THREADS": 256, "BLOCK_N": 32, "ROW_PITCH": 33, "SCRATCH": 256}
    for name, value in {**sizes, "LOAD_LANES": 32, "LOAD_LINES": 8}.items():
        monkeypatch.setattr(programs, name, value)
    yield
    programs.forward.cache_clear()


@pytest.mark.usefixtures("gpu_sizes")
def test_with_the_block_sizes_of_a_gpu() -> None:
    """Two tiles of keys, the second short, and a head dim beyond one chunk."""
    assert [programs.columns_of(d) for d in (1, 16, 17, 128, 129, 256)] == [1, 1, 2, 8, 16, 16]
    case = ATTENTION.case(dtype="bf16", causal="bottom_right", hq=1, hk=1, sq=3, sk=35, d=34)
    inputs = attention_inputs(case, "cpu")
    assert worst(case, inputs, run(case, inputs)) <= 1


def test_rows_with_nothing_to_attend_to_give_zero_and_minus_infinity() -> None:
    case = ATTENTION.case(dtype="bf16", causal="bottom_right", hq=1, hk=1, sq=11, sk=2, d=4)
    out = run(case, attention_inputs(case, "cpu"))
    assert bool((out["out"][0, 0, :9] == 0).all()) and bool((out["lse"][0, 0, :9] == -torch.inf).all())
    assert bool(out["lse"][0, 0, 9:].isfinite().all()) and bool((out["out"][0, 0, 9:] != 0).all())


def test_a_causal_prefix_does_not_see_what_follows_and_batching_changes_nothing() -> None:
    case = ATTENTION.case(dtype="fp32", causal="top_left", hq=2, hk=1, sq=6, sk=6, d=5)
    inputs = attention_inputs(case, "cpu")
    out = run(case, inputs)
    later = {name: t.clone() for name, t in inputs.items()}
    for name in "kv":
        later[name][:, :, 3:] = 1000.0
    changed = run(case, later)
    assert torch.equal(changed["out"][:, :, :3], out["out"][:, :, :3])
    assert torch.equal(changed["lse"][:, :, :3], out["lse"][:, :, :3])
    assert not torch.equal(changed["out"][:, :, 3:], out["out"][:, :, 3:])
    alone = ATTENTION.case(dtype="fp32", causal="top_left", hq=1, hk=1, sq=6, sk=6, d=5)
    second = run(alone, {**inputs, "q": inputs["q"][:, 1:].clone()})
    assert torch.equal(second["out"][:, 0], out["out"][:, 1])


def test_every_layout_gives_the_same_bits() -> None:
    outputs = []
    for layout in LAYOUTS:
        case = ATTENTION.case(dtype="bf16", layout=layout, b=2, hq=2, hk=2, sq=3, sk=4, d=4)
        contiguous = attention_inputs(ATTENTION.case(dtype="bf16", b=2, hq=2, hk=2, sq=3, sk=4, d=4), "cpu")
        inputs = attention_inputs(case, "cpu")
        assert inputs["k"].is_contiguous() == (layout == "bhsd")
        for name, t in inputs.items():
            t.copy_(contiguous[name])
        outputs.append(run(case, inputs))
    for other in outputs[1:]:
        assert torch.equal(other["out"], outputs[0]["out"]) and torch.equal(other["lse"], outputs[0]["lse"])


def swap_heads(i: dict[str, Any]) -> None:
    i["v"] = i["v"].flip(1)


def shift_keys(i: dict[str, Any]) -> None:
    i["k"] = i["k"].roll(1, dims=2)


def drop_last_column(i: dict[str, Any]) -> None:
    i["q"] = i["q"].clone()
    i["q"][..., -1] = 0


def round_to_eight_bits(i: dict[str, Any]) -> None:
    i["k"] = i["k"].bfloat16().float()


@pytest.mark.parametrize("wrong", [swap_heads, shift_keys, drop_last_column, round_to_eight_bits])
def test_the_budget_catches_wrong_kernels(wrong: Callable[[dict[str, Any]], None]) -> None:
    case = ATTENTION.case(dtype="fp32", causal="top_left", hq=2, hk=2, sq=5, sk=9, d=6)
    inputs = attention_inputs(case, "cpu")
    spoiled = dict(inputs)
    wrong(spoiled)
    assert worst(case, inputs, run(case, spoiled)) > 1


def test_the_wrong_alignment_is_caught() -> None:
    case = ATTENTION.case(dtype="bf16", causal="bottom_right", hq=1, hk=1, sq=4, sk=7, d=6)
    other = ATTENTION.case(dtype="bf16", causal="top_left", hq=1, hk=1, sq=4, sk=7, d=6)
    inputs = attention_inputs(case, "cpu")
    assert worst(case, inputs, run(other, inputs)) > 1


def test_a_maximum_that_the_threads_of_a_row_do_not_share_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: each thread then weighs its keys by a scale of its own."""
    case = ATTENTION.case(dtype="fp32", hq=1, hk=1, sq=2, sk=20, d=6)
    inputs = attention_inputs(case, "cpu")
    programs.forward.cache_clear()
    monkeypatch.setattr(programs, "row_max", lambda buffer, value: value)
    spoiled = run(case, inputs)
    programs.forward.cache_clear()
    assert worst(case, inputs, spoiled) > 1


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("zero_size", {"sq": 0}),
        ("zero_size", {"hk": 0}),
        ("heads_not_multiple", {"hq": 3, "hk": 2}),
        ("head_dim_above_256", {"d": 257}),
        ("too_large_for_simulator", {"sq": 64, "sk": 64}),
    ],
)
def test_cases_it_does_not_take_are_refused_by_type(rule: str, values: dict[str, Any]) -> None:
    case = ATTENTION.case(**{"hq": 1, "hk": 1, "sq": 2, "sk": 2, "d": 2, **values})
    with pytest.raises(Unsupported) as caught:
        attention(case, "", "cpu")
    assert caught.value.rule == rule


def test_the_gpu_takes_what_the_simulator_refuses() -> None:
    case = ATTENTION.case(hq=1, hk=1, sq=64, sk=64, d=64)
    assert SIMULATED_PRODUCTS < 2 * 64**3
    assert isinstance(attention(case, "", "cuda"), AttentionKernel)


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("wrong_dtype", lambda i, o: i.update(q=i["q"].float())),
        ("wrong_shape", lambda i, o: i.update(k=i["k"][:, :, :1])),
        ("wrong_device", lambda i, o: i.update(v=i["v"].to("meta"))),
        ("missing_tensor", lambda i, o: i.pop("v")),
        ("missing_tensor", lambda i, o: o.pop("lse")),
        ("not_contiguous", lambda i, o: o.update(out=torch.empty(1, 4, 2, 3, dtype=torch.bfloat16).transpose(1, 2))),
    ],
)
def test_bad_tensors_are_refused_by_type(rule: str, spoil: Callable[..., object]) -> None:
    case = ATTENTION.case(dtype="bf16", hq=2, hk=2, sq=4, sk=4, d=3)
    inputs = attention_inputs(case, "cpu")
    out = {"out": torch.empty(1, 2, 4, 3, dtype=torch.bfloat16), "lse": torch.empty(1, 2, 4)}
    spoil(inputs, out)
    with pytest.raises(Unsupported) as caught:
        attention(case, "", "cpu").bind(inputs, out)
    assert caught.value.rule == rule
