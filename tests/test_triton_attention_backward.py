"""Triton attention backward: meaning (interpreted, against the oracle), laws and refusals.

As in test_triton_attention.py, what needs Triton runs in a child process. What the compiler makes of the kernels is
judged by the ahead-of-time gate (kernels/triton/attention_backward_aot.py).
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vbench import check
from vbench.errors import Unsupported
from vbench.kernels.triton import attention_backward_tiles
from vbench.kernels.triton.attention import Shape
from vbench.kernels.triton.attention_backward import PlainBackward, check_gradient_tensors, make
from vbench.reference.attention_backward import backward_inputs, backward_oracle
from vbench.reference.ops.attention import ATTENTION_BACKWARD
from vbench.spec import Case, ParamValue

GRADIENTS = ("dq", "dk", "dv")

# --- in the interpreting child ---------------------------------------------------------------------------------------


def kernel_of(case: Case) -> PlainBackward:
    kernel = make(case, "", "cpu")
    assert isinstance(kernel, PlainBackward)
    return kernel


def gradients(case: Case, inputs: dict[str, Any], *, descriptors: bool | None = None) -> dict[str, Tensor]:
    """What the kernel writes into poisoned outputs; ``descriptors`` None: as the kernel plans."""
    kernel = kernel_of(case)
    out = check.poisoned(backward_oracle(case, inputs, kernel.numerics, 1), "cpu")
    tiles, planned = kernel.plan(inputs)
    kernel.bind_tiles(inputs, out, tiles, planned if descriptors is None else descriptors)()
    return out


def worst_of(case_id: str) -> float:
    """Worst error / budget of one case; the inputs must be unchanged."""
    case = ATTENTION_BACKWARD.parse(case_id)
    inputs = backward_inputs(case, "cpu")
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    out = gradients(case, inputs)
    assert all(check.same_bits(inputs[name], before[name]) for name in inputs), "an input was changed"
    return over_budget(case, inputs, out)


def over_budget(case: Case, inputs: dict[str, Any], out: dict[str, Tensor]) -> float:
    error = check.judge_outputs(out, backward_oracle(case, inputs, kernel_of(case).numerics, None), GRADIENTS).error
    assert error is not None
    return error.worst_over_budget


def variant_of(case: Case, **changes: ParamValue) -> Case:
    values: dict[str, Any] = dict(case.params) | changes
    return ATTENTION_BACKWARD.case(**values)


SMALL = ATTENTION_BACKWARD.case(dtype="fp16", causal="top_left", dlse=1, b=2, hq=4, hk=2, sq=40, sk=40, d=16)


def law(name: str) -> bool:
    """Exact laws, bit for bit."""
    inputs = backward_inputs(SMALL, "cpu")
    whole = gradients(SMALL, inputs)
    if name == "two runs agree":
        again = gradients(SMALL, inputs)
        return all(torch.equal(whole[key], again[key]) for key in GRADIENTS)
    if name == "descriptors and pointers agree":
        planned = kernel_of(SMALL).plan(inputs)[1]
        pointers = gradients(SMALL, inputs, descriptors=False)
        return planned and all(torch.equal(whole[key], pointers[key]) for key in GRADIENTS)
    if name == "no gradient in, none out":
        zero = {key: torch.zeros_like(inputs[key]) for key in ("dout", "dlse")}
        return all(not bool(t.any()) for t in gradients(SMALL, inputs | zero).values())
    if name == "a head alone is the head in a batch":
        alone = variant_of(SMALL, b=1, hq=2, hk=1)
        one = {key: t[1:, 1:] if key in "kv" else t[1:, 2:] for key, t in inputs.items()}
        got = gradients(alone, one)
        return torch.equal(whole["dq"][1:, 2:], got["dq"]) and all(
            torch.equal(whole[key][1:, 1:], got[key]) for key in ("dk", "dv")
        )
    if name == "twice the gradient in, twice out":
        double = {key: inputs[key] * 2 for key in ("dout", "dlse")}
        got = gradients(SMALL, inputs | double)
        # dv alone: score gradients may be subnormal in fp16, and lose a bit that their doubles keep.
        normal = whole["dv"].abs() > 2.0**-12
        return bool(normal.any()) and torch.equal(whole["dv"][normal] * 2, got["dv"][normal])
    if name == "a row's gradient stays in its row of dq":
        cut = {key: inputs[key].clone() for key in ("dout", "dlse")}
        for t in cut.values():
            t[:, :, 39] = 0
        got = gradients(SMALL, inputs | cut)
        return (
            torch.equal(got["dq"][:, :, :39], whole["dq"][:, :, :39])
            and not bool(got["dq"][:, :, 39].any())
            and not torch.equal(got["dk"], whole["dk"])
        )
    raise AssertionError(name)


def wrong_inputs(fault: str) -> float:
    """Worst error / budget where the kernel is bound to what differs from what the oracle reads."""
    case = ATTENTION_BACKWARD.case(dtype="bf16", causal="bottom_right", dlse=1, hq=2, hk=1, sq=40, sk=50, d=32)
    inputs = backward_inputs(case, "cpu")
    bound, told = inputs, case
    if fault == "other diagonal":
        told = variant_of(case, causal="top_left")
    elif fault == "dlse ignored":
        bound = {name: t for name, t in inputs.items() if name != "dlse"}
    elif fault == "base-2 lse":
        bound = inputs | {"lse": inputs["lse"] / 0.6931471805599453}
    elif fault == "out of another row":
        bound = inputs | {"out": inputs["out"].roll(1, 2)}
    elif fault != "none":
        raise AssertionError(fault)
    return over_budget(case, inputs, gradients(told, bound))


# --- here ------------------------------------------------------------------------------------------------------------

LENGTHS = st.sampled_from((1, 2, 15, 17, 32, 33, 48, 65))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Lengths around the interpreted tiles' 16 and 32, head dims around powers of two, all masks and layouts."""
    group, hk = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return ATTENTION_BACKWARD.case(
        dtype=draw(st.sampled_from(("bf16", "fp16", "fp32"))),
        causal=draw(st.sampled_from(("none", "top_left", "bottom_right"))),
        dist=draw(st.sampled_from(("normal", "uniform", "grid", "constant_v", "large_logits", "equal_keys"))),
        layout=draw(st.sampled_from(("bhsd", "bshd", "padded"))),
        dlse=draw(st.integers(0, 1)),
        window=draw(st.sampled_from((0, 0, 1, 20, 40))),
        softcap=draw(st.sampled_from((0, 0, 3))),
        hq=group * hk,
        hk=hk,
        sq=draw(LENGTHS),
        sk=draw(LENGTHS),
        d=draw(st.sampled_from((1, 3, 8, 16, 17, 40, 64, 80))),
    )


@settings(max_examples=10)
@given(case=cases())
def test_within_budget(interpreter: ProcessPoolExecutor, case: Case) -> None:
    assert interpreter.submit(worst_of, case.id).result(timeout=60) <= 1


@pytest.mark.parametrize(
    "params",
    [
        {"causal": "bottom_right", "sq": 70, "sk": 20, "d": 16},  # the first 50 rows see nothing
        {"causal": "top_left", "sq": 20, "sk": 70, "d": 16},  # the last 50 keys are seen by nothing
        {"causal": "bottom_right", "sq": 40, "sk": 1, "d": 16},
        {"causal": "top_left", "window": 40, "sq": 129, "sk": 97, "d": 8},  # edges on both sides of whole blocks
        {"window": 33, "layout": "padded", "sq": 97, "sk": 100, "d": 7},
        {"dtype": "fp32", "sq": 5, "sk": 17, "d": 256},
        {"dist": "large_logits", "dtype": "fp16", "sq": 40, "sk": 50, "d": 128, "layout": "padded"},
        {"b": 2, "hq": 3, "hk": 1, "sq": 33, "sk": 17, "d": 8, "dlse": 1},
    ],
    ids=lambda params: "-".join(f"{key}{value}" for key, value in params.items()),
)
def test_awkward_shapes(interpreter: ProcessPoolExecutor, params: dict[str, Any]) -> None:
    case = ATTENTION_BACKWARD.case(**({"hq": 2, "hk": 1} | params))
    assert interpreter.submit(worst_of, case.id).result(timeout=60) <= 1


@pytest.mark.parametrize(
    "name",
    [
        "two runs agree",
        "descriptors and pointers agree",
        "no gradient in, none out",
        "a head alone is the head in a batch",
        "twice the gradient in, twice out",
        "a row's gradient stays in its row of dq",
    ],
)
def test_law(interpreter: ProcessPoolExecutor, name: str) -> None:
    assert interpreter.submit(law, name).result(timeout=60)


@pytest.mark.parametrize("fault", ["none", "other diagonal", "dlse ignored", "base-2 lse", "out of another row"])
def test_control_is_caught(interpreter: ProcessPoolExecutor, fault: str) -> None:
    assert (interpreter.submit(wrong_inputs, fault).result(timeout=60) > 1) == (fault != "none")


def refused(call: Any) -> str:
    with pytest.raises(Unsupported) as caught:
        call()
    return caught.value.rule


@pytest.mark.parametrize(
    ("rule", "params", "variant"),
    [
        ("head_dim_above_256", {"d": 257}, ""),
        ("zero_size", {"sq": 0}, ""),
        ("heads_not_multiple", {"hq": 3}, ""),
        ("unknown_variant", {}, "cutlass"),
        ("interpreter_off", {}, ""),
        ("gluon_needs_cuda", {}, "gluon"),
        ("gluon_needs_cuda", {}, "gluon_deterministic"),
    ],
)
def test_refuses_case(monkeypatch: pytest.MonkeyPatch, rule: str, params: dict[str, Any], variant: str) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = variant_of(SMALL, **params)
    assert refused(lambda: make(case, variant, "cpu")) == rule


@pytest.mark.parametrize(
    ("rule", "name", "change"),
    [
        ("wrong_shape", "dout", lambda t: t[:, :, :-1]),
        ("wrong_shape", "dlse", lambda t: t[..., None]),
        ("wrong_shape", "dk", lambda t: t[:, :1]),
        ("wrong_dtype", "out", lambda t: t.to(torch.bfloat16)),
        ("wrong_dtype", "lse", lambda t: t.to(torch.float64)),
        ("wrong_device", "v", lambda t: t.to("meta")),
        ("overlapping_output", "dv", lambda t: t[:, :1].expand_as(t)),
    ],
)
def test_refuses_tensor(rule: str, name: str, change: Any) -> None:
    inputs = backward_inputs(SMALL, "cpu")
    out = {key: torch.empty_like(inputs[key[1:]]) for key in GRADIENTS}
    shape = Shape.of(SMALL)
    check_gradient_tensors(shape, inputs, out, "cpu")
    (inputs if name in inputs else out)[name] = change(inputs[name] if name in inputs else out[name])
    assert refused(lambda: check_gradient_tensors(shape, inputs, out, "cpu")) == rule


def test_rows_are_padded_for_every_block() -> None:
    """exponent and delta are read without a mask: whole blocks of rows must end inside the padding."""
    tables = [
        attention_backward_tiles.table(dtype, descriptors=descriptors, shared_227kb=large, edges=edges)
        for dtype in ("bf16", "fp32")
        for descriptors in (False, True)
        for large in (False, True)
        for edges in (False, True)
    ]
    tiles = [tiles for table in tables for tiles in table.values()] + [attention_backward_tiles.INTERPRETED]
    heights = {tile.block_m for pair in tiles for tile in (pair.queries, pair.keys)}
    heights.add(attention_backward_tiles.PREPARE_ROWS)
    assert all(attention_backward_tiles.ROW_PADDING % height == 0 for height in heights)
