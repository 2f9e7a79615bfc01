"""Triton attention forward: meaning (interpreted, against the oracle), laws, refusals.

Everything that needs Triton runs in child processes: the interpreter is switched on by an environment variable that
must be set before Triton's import. What the kernels compile to is the business of suite ``compile``.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbench.errors import Unsupported
from vbench.kernels.triton import attention_tiles
from vbench.kernels.triton.attention import (
    Shape,
    check_spans,
    check_tensors,
    descriptor_strides,
    make,
    takes_descriptor,
)
from vbench.reference.attention import attention_inputs, attention_oracle
from vbench.reference.laws import attention_laws
from vbench.reference.ops.attention import ATTENTION
from vbench.reference.sampling import torch_dtype
from vbench.spec import Case, Numerics, ParamValue

# --- in the interpreting child ---------------------------------------------------------------------------------------


def variant_of(case: Case, **changes: ParamValue) -> Case:
    """The case with some parameters changed."""
    values: dict[str, Any] = dict(case.params) | changes
    return ATTENTION.case(**values)


def _outputs(case: Case) -> dict[str, torch.Tensor]:
    """Poisoned outputs."""
    b, hq, sq, d = (case.axis(name) for name in ("b", "hq", "sq", "d"))
    out = torch.full((b, hq, sq, d), float("nan"), dtype=torch_dtype(case.text("dtype")))
    return {"out": out, "lse": torch.full((b, hq, sq), float("nan"))}


def _run(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    outputs = _outputs(case)
    assert make(case, "", "cpu").bind(inputs, outputs)() is None
    return outputs


def _over_budget(case: Case, inputs: dict[str, Any], outputs: dict[str, torch.Tensor], numerics: Numerics) -> float:
    """Worst error / budget over both outputs; inf for a NaN."""
    worst = 0.0
    for name, expected in attention_oracle(case, inputs, numerics, None).items():
        got = outputs[name].double()
        assert expected.budget is not None
        ratio = (got - expected.value).abs() / expected.budget.clamp(min=1e-300)
        ratio = torch.where(got == expected.value, 0.0, ratio)
        worst = max(worst, float(torch.nan_to_num(ratio, nan=torch.inf).max()))
    return worst


def worst_of(case_id: str, layout: str = "bhsd") -> float:
    """Check one case: value against the oracle, inputs unchanged, a second run bitwise equal."""
    case = ATTENTION.parse(case_id)
    inputs = _laid_out(attention_inputs(case, "cpu"), layout)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    outputs = _run(case, inputs)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs), "an input was changed"
    again = _run(case, inputs)
    assert all(torch.equal(outputs[name], again[name]) for name in outputs), "two runs differ"
    return _over_budget(case, inputs, outputs, make(case, "", "cpu").numerics)


def _laid_out(inputs: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """The same values with other strides: another order of axes, or a base that is not 16-byte aligned."""
    if layout == "offset":
        moved = {}
        for name, tensor in inputs.items():
            storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            moved[name] = storage[1:].view(tensor.shape).copy_(tensor)
        return moved
    if layout == "expanded":  # every head of K and V is one head, stride 0
        shared = {name: inputs[name][:, :1].expand_as(inputs[name]) for name in ("k", "v")}
        return {"q": inputs["q"], **shared}
    order = ["bhsd".index(axis) for axis in layout]
    back = [layout.index(axis) for axis in "bhsd"]
    return {name: tensor.permute(order).contiguous().permute(back) for name, tensor in inputs.items()}


def wrong_kernel(fault: str) -> float:
    """Worst error / budget of an output that is wrong on purpose."""
    case = ATTENTION.case(dtype="bf16", causal="bottom_right", hq=2, hk=1, sq=40, sk=70, d=32)
    inputs = attention_inputs(case, "cpu")
    numerics = make(case, "", "cpu").numerics
    outputs = _run(case, inputs)
    assert _over_budget(case, inputs, outputs, numerics) <= 1
    if fault == "other diagonal":
        outputs = _run(variant_of(case, causal="top_left"), inputs)
    elif fault == "other key head":
        doubled = {name: inputs[name].expand(1, 2, 70, 32).clone() for name in ("k", "v")}
        doubled["v"][:, 1] = doubled["v"][:, 1].roll(1, 0 + 1)
        outputs = _run(variant_of(case, hk=2), {"q": inputs["q"], **doubled})
    elif fault == "last key dropped":
        short = variant_of(case, sk=69, sq=39)
        shorter = _run(short, {"q": inputs["q"][:, :, 1:], "k": inputs["k"][:, :, :69], "v": inputs["v"][:, :, :69]})
        outputs["out"][:, :, 1:] = shorter["out"]
    elif fault == "base-2 lse":
        outputs["lse"] = outputs["lse"] / 0.6931471805599453
    elif fault == "scale":
        outputs = _run(case, inputs | {"q": inputs["q"] * 1.0625})
    elif fault == "row unwritten":
        outputs["out"][0, 1, 39] = float("nan")
    else:
        raise AssertionError(fault)
    return _over_budget(case, inputs, outputs, numerics)


def bf16_without_emulation() -> float:
    """The kernel as a GPU would compile it, interpreted: Triton's interpreter cannot do bf16 arithmetic."""
    import warnings

    from vbench.kernels.triton.attention import PlainForward

    case = ATTENTION.case(dtype="bf16", hq=1, hk=1, sq=32, sk=32, d=32)
    inputs, outputs = attention_inputs(case, "cpu"), _outputs(case)
    kernel = make(case, "", "cpu")
    assert isinstance(kernel, PlainForward)
    launch = PlainForward(kernel.shape, "cpu", False, False, kernel.numerics).bind_tile(
        inputs, outputs, attention_tiles.INTERPRETED, False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow inside the garbage
        launch()
    return _over_budget(case, inputs, outputs, kernel.numerics)


def law(name: str) -> bool:
    """Exact laws, bit for bit."""
    from vbench.kernels.triton.attention import PlainForward

    case = ATTENTION.case(dtype="fp16", causal="top_left", b=2, hq=4, hk=2, sq=70, sk=70, d=24)
    inputs = attention_inputs(case, "cpu")
    whole = _run(case, inputs)
    if name == "future keys do not matter":
        changed = {key: tensor.clone() for key, tensor in inputs.items()}
        changed["k"][:, :, 50:] = 7
        changed["v"][:, :, 50:] = -3
        other = _run(case, changed)
        same_past = all(torch.equal(whole[key][:, :, :50], other[key][:, :, :50]) for key in whole)
        return same_past and not torch.equal(whole["out"], other["out"])
    if name == "a head alone is the head in a batch":
        alone = variant_of(case, b=1, hq=1, hk=1)
        one = _run(alone, {"q": inputs["q"][1:, 3:], "k": inputs["k"][1:, 1:], "v": inputs["v"][1:, 1:]})
        return all(torch.equal(whole[key][1:, 3:], one[key]) for key in whole)
    if name == "half the batch alone gives the same bits":
        kernel = make(case, "", "cpu")
        assert isinstance(kernel, PlainForward) and kernel.batch_invariant
        (found,) = (law for law in attention_laws(case, inputs) if law.declared == "batch_invariant")
        assert found.case.axis("b") == 1 and found.broken is not None
        narrow = attention_tiles.Tile(block_m=32, block_n=16, warps=4, stages=1)
        control = _outputs(found.case)
        half = make(found.case, "", "cpu")
        assert isinstance(half, PlainForward)
        half.bind_tile(found.inputs, control, narrow, False)()
        return found.broken(whole, _run(found.case, found.inputs)) == "" and found.broken(whole, control) != ""
    if name == "grouped heads are repeated heads":
        repeated = {key: inputs[key].repeat_interleave(2, dim=1) for key in ("k", "v")}
        other = _run(variant_of(case, hk=4), {"q": inputs["q"], **repeated})
        return all(torch.equal(whole[key], other[key]) for key in whole)
    if name == "v doubled doubles out":
        other = _run(case, inputs | {"v": inputs["v"] * 2})
        return torch.equal(whole["out"] * 2, other["out"]) and torch.equal(whole["lse"], other["lse"])
    if name == "descriptors and pointers agree":
        kernel = make(case, "", "cpu")
        assert isinstance(kernel, PlainForward)
        both = []
        for descriptors in (False, True):
            outputs = _outputs(case)
            kernel.bind_tile(inputs, outputs, attention_tiles.INTERPRETED, descriptors)()
            both.append(outputs)
        chosen = kernel.plan(inputs["k"], inputs["v"])[1]
        return chosen and all(torch.equal(both[0][key], both[1][key]) for key in whole)
    raise AssertionError(name)


# --- here ------------------------------------------------------------------------------------------------------------


LENGTHS = st.sampled_from((1, 2, 15, 31, 32, 33, 63, 64, 65, 97))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Lengths around the interpreted tile's 32, head dims around powers of two, every mask, dtype and distribution."""
    group, hk = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    return ATTENTION.case(
        dtype=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        causal=draw(st.sampled_from(("none", "top_left", "bottom_right"))),
        dist=draw(st.sampled_from(("normal", "uniform", "grid", "constant_v", "large_logits", "equal_keys"))),
        window=draw(st.sampled_from((0, 0, 1, 20, 40, 70))),
        softcap=draw(st.sampled_from((0, 0, 3, 50))),
        b=draw(st.integers(1, 2)),
        hq=group * hk,
        hk=hk,
        sq=draw(LENGTHS),
        sk=draw(LENGTHS),
        d=draw(st.sampled_from((1, 3, 8, 16, 17, 40, 64, 80, 128))),
    )


@settings(max_examples=30)
@given(case=cases(), layout=st.sampled_from(("bhsd", "bshd", "bhds", "offset", "expanded")))
def test_within_budget(interpreter: ProcessPoolExecutor, case: Case, layout: str) -> None:
    assert interpreter.submit(worst_of, case.id, layout).result(timeout=60) <= 1


@pytest.mark.parametrize(
    "params",
    [
        {"causal": "bottom_right", "sq": 70, "sk": 20, "d": 16},  # the first 50 rows see nothing
        {"causal": "bottom_right", "sq": 64, "sk": 1, "d": 16},
        {"causal": "top_left", "sq": 1, "sk": 200, "d": 16},
        {"dtype": "fp32", "sq": 33, "sk": 40, "d": 256},
        {"dist": "large_logits", "dtype": "fp16", "sq": 40, "sk": 70, "d": 128},
        {"dist": "large_logits", "dtype": "fp32", "sq": 40, "sk": 70, "d": 64},
        {"b": 3, "hq": 6, "hk": 1, "sq": 33, "sk": 33, "d": 8},
        {"causal": "bottom_right", "window": 33, "sq": 97, "sk": 129, "d": 16},  # edges on both sides of whole blocks
        {"dist": "large_logits", "softcap": 50, "dtype": "fp32", "sq": 33, "sk": 40, "d": 16},
    ],
    ids=lambda params: "-".join(f"{key}{value}" for key, value in params.items()),
)
def test_awkward_shapes(interpreter: ProcessPoolExecutor, params: dict[str, Any]) -> None:
    case = ATTENTION.case(**({"hq": 2, "hk": 1} | params))
    assert interpreter.submit(worst_of, case.id).result(timeout=60) <= 1


@pytest.mark.parametrize(
    "fault", ["other diagonal", "other key head", "last key dropped", "base-2 lse", "scale", "row unwritten"]
)
def test_control_is_caught(interpreter: ProcessPoolExecutor, fault: str) -> None:
    assert interpreter.submit(wrong_kernel, fault).result(timeout=60) > 1


def test_interpreter_still_cannot_do_bf16(interpreter: ProcessPoolExecutor) -> None:
    """The reason for EMULATE. When this fails, the interpreter has learnt bf16 and EMULATE can go."""
    assert interpreter.submit(bf16_without_emulation).result(timeout=60) > 1


@pytest.mark.parametrize(
    "name",
    [
        "future keys do not matter",
        "a head alone is the head in a batch",
        "half the batch alone gives the same bits",
        "grouped heads are repeated heads",
        "v doubled doubles out",
        "descriptors and pointers agree",
    ],
)
def test_law(interpreter: ProcessPoolExecutor, name: str) -> None:
    assert interpreter.submit(law, name).result(timeout=60)


SMALL = ATTENTION.case(dtype="fp16", hq=2, hk=1, sq=8, sk=8, d=64)


def refused(call: Any) -> str:
    with pytest.raises(Unsupported) as caught:
        call()
    return caught.value.rule


@pytest.mark.parametrize(
    ("rule", "params", "variant", "device"),
    [
        ("head_dim_above_256", {"d": 257}, "", "cpu"),
        ("zero_size", {"sk": 0}, "", "cpu"),
        ("heads_not_multiple", {"hq": 3, "hk": 2}, "", "cpu"),
        ("unknown_variant", {}, "cutlass", "cpu"),
        ("interpreter_off", {}, "", "cpu"),
        ("gluon_needs_cuda", {}, "gluon", "cpu"),
        ("gluon_dtype", {"dtype": "fp32"}, "gluon", "cuda"),
        ("gluon_head_dim", {"d": 80}, "gluon", "cuda"),
        ("parameter_not_taken", {"window": 4}, "gluon", "cuda"),
        ("parameter_not_taken", {"softcap": 4}, "gluon", "cuda"),
    ],
)
def test_refuses_case(
    monkeypatch: pytest.MonkeyPatch, rule: str, params: dict[str, Any], variant: str, device: Any
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = variant_of(SMALL, **params)
    assert refused(lambda: make(case, variant, device)) == rule


@pytest.mark.parametrize(
    ("rule", "name", "change"),
    [
        ("wrong_shape", "k", lambda t: t[:, :, :-1]),
        ("wrong_shape", "lse", lambda t: t[..., None]),
        ("wrong_dtype", "v", lambda t: t.to(torch.bfloat16)),
        ("wrong_dtype", "lse", lambda t: t.to(torch.float64)),
        ("wrong_device", "q", lambda t: t.to("meta")),
        ("overlapping_output", "out", lambda t: t[:, :1].expand_as(t)),
    ],
)
def test_refuses_tensor(rule: str, name: str, change: Any) -> None:
    shape = Shape.of(SMALL)
    inputs, out = attention_inputs(SMALL, "cpu"), _outputs(SMALL)
    check_tensors(shape, inputs, out, "cpu")
    (inputs if name in inputs else out)[name] = change(inputs[name] if name in inputs else out[name])
    assert refused(lambda: check_tensors(shape, inputs, out, "cpu")) == rule


@pytest.mark.parametrize(("name", "stride", "fits"), [("k", 2**25, True), ("k", 2**26, False), ("q", 2**30, True)])
def test_refuses_block_of_more_than_32_bits(name: str, stride: int, fits: bool) -> None:
    """Meta tensors: no memory has to exist for strides this large."""
    small = torch.empty(1, 1, 4, 16, device="meta")
    far = torch.empty_strided((1, 1, 4, 16), (4 * stride, 4 * stride, stride, 1), device="meta")
    tensors = dict.fromkeys(("q", "k", "v", "out"), small) | {name: far}
    if fits:
        check_spans(tensors, 32, 16, walked=("k", "v"))
    else:
        assert refused(lambda: check_spans(tensors, 32, 16, walked=("k", "v"))) == "block_span"


def test_descriptor_rule() -> None:
    base = torch.empty(2, 3, 8, 64, dtype=torch.float16)
    assert takes_descriptor(base)
    assert takes_descriptor(base.transpose(1, 2).contiguous().transpose(1, 2))
    assert not takes_descriptor(base.transpose(2, 3))
    assert not takes_descriptor(base[..., 1:])
    assert not takes_descriptor(base[:, :1].expand_as(base))
    assert not takes_descriptor(torch.empty(1, 1, 8, 4, dtype=torch.float16))
    assert not takes_descriptor(torch.empty(2 * 8 * 64 + 1, dtype=torch.float16)[1:].view(1, 2, 8, 64))
    odd = torch.empty(1, 1, 8, 64, dtype=torch.float16).as_strided((1, 1, 8, 64), (7, 7, 64, 1))
    assert takes_descriptor(odd)
    assert descriptor_strides(odd) == [64, 64, 64, 1]


@given(
    d=st.integers(1, 256),
    lengths=st.tuples(st.integers(1, 1 << 17), st.integers(1, 1 << 17)),
    dtype=st.sampled_from(("bf16", "fp16", "fp32")),
    causal=st.booleans(),
    machine=st.sampled_from(((False, False), (False, True), (True, True))),
)
def test_every_choice_is_compiled_ahead(
    d: int, lengths: tuple[int, int], dtype: str, causal: bool, machine: tuple[bool, bool]
) -> None:
    """What the compile check walks holds whatever ``choose`` returns."""
    descriptors, large = machine
    tile = attention_tiles.choose(dtype, d, *lengths, causal=causal, descriptors=descriptors, shared_227kb=large)
    walked = attention_tiles.plain_tiles(dtype, descriptors=descriptors, shared_227kb=large)
    assert tile in walked[attention_tiles.padded_head_dim(d)]
    if d in (64, 128):
        chosen = attention_tiles.choose_gluon(d, lengths[1], causal=causal)
        assert chosen in attention_tiles.gluon_tiles(d, causal=causal)


@given(heads=st.integers(1, 600), per_kv=st.integers(1, 16), sk=st.integers(1, 1 << 17), d=st.integers(1, 256))
def test_group_of_heads_fits_the_cache(heads: int, per_kv: int, sk: int, d: int) -> None:
    group = attention_tiles.heads_per_group(heads * per_kv, per_kv, sk, d, 2)
    kv_heads = -(-group // per_kv)
    assert 1 <= group <= heads * per_kv and group % per_kv == 0
    assert kv_heads == 1 or kv_heads * 4 * sk * d <= attention_tiles.L2_WORKING_SET_BYTES
