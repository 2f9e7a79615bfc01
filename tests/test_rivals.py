"""int8_linear, svd and elementwise_chain: oracles against second opinions, budgets with controls, every peer here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Literal

import pytest
import torch

from vbench.backend import DeclaredBackend
from vbench.errors import Unsupported
from vbench.kernels.peers import dense_linear, int8_bitsandbytes, int8_torchao
from vbench.kernels.peers.compiled_linear import CompiledLinear
from vbench.kernels.peers.torch_native import BACKEND as TORCH_NATIVE
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference import insight, int8, linear
from vbench.reference.backend import BACKEND as REFERENCE
from vbench.reference.fp4 import decode_float64
from vbench.reference.ops import OPS
from vbench.reference.ops.fp4 import FORMATS, FP4_LINEAR
from vbench.reference.ops.insight import CHAIN, SVD
from vbench.reference.ops.int8 import ACT_QUANTS, INT8_LINEAR
from vbench.roofline import DATASHEETS, floor_s
from vbench.spec import Case, Numerics, resolve
from vbench.suites.rivals import SUITE
from vbench.worker import Worker

BY_NAME = {op.name: op for op in OPS}
CASES = [c for c in SUITE.checks if BY_NAME[c.op].reject(c) is None]


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


def run(worker: Worker, backend: DeclaredBackend, case: Case) -> list[str]:
    """Rules of the variants that refuse the case; the others must pass, at least one of them."""
    refusals = []
    variants = backend.variants.get(case.op, ("",))
    for variant in variants:
        try:
            kernel = resolve(backend.ops[case.op])(case, variant, "cpu")
        except Unsupported as refused:
            refusals.append(refused.rule)
            continue
        result = worker._measure(BY_NAME[case.op], case, kernel, timed=False, role="own")
        assert result.outcome is Outcome.PASSED, (variant, result.detail, result.error)
    return refusals


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_reference_and_plain_torch_are_inside_their_budgets(worker: Worker, case: Case) -> None:
    assert run(worker, REFERENCE, case) == []
    refusals = run(worker, TORCH_NATIVE, case)
    assert refusals == (["act_quant_not_of_variant"] if case.op == "int8_linear" else [])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_trivial_kernels_are_caught(worker: Worker, case: Case) -> None:
    assert worker.battery(BY_NAME[case.op], case).outcome is Outcome.PASSED


@pytest.mark.parametrize("peer", [int8_bitsandbytes, int8_torchao], ids=lambda m: m.BACKEND.name)
def test_an_optional_peer_runs_where_installed_and_says_what_to_install_elsewhere(
    worker: Worker, peer: ModuleType
) -> None:
    backend: DeclaredBackend = peer.BACKEND
    available = backend.probe("cpu")
    assert available.usable == (importlib.util.find_spec(backend.name) is not None)
    if not available.usable:
        assert "pip install 'vbench-kernels[peers]'" in available.reason
        return
    taken = 0
    for case in CASES:
        if case.op == "int8_linear":
            taken += not run(worker, backend, case)
    assert taken >= 2


@pytest.mark.parametrize(("peer", "quant"), [(int8_bitsandbytes, "row127h"), (int8_torchao, "row127")])
def test_a_peer_is_not_asked_for_a_rounding_it_does_not_document(peer: ModuleType, quant: str) -> None:
    with pytest.raises(Unsupported, match="act_quant_not_of_peer"):
        peer.make(INT8_LINEAR.case(x="fp16", act_quant=quant, m=2, n=8, k=8), "", "cpu")


# --- int8_linear ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", ["row127", "row127h"])
def test_rounding_of_x_is_the_formula_row_by_row(quant: str) -> None:
    case = INT8_LINEAR.case(x="bf16", act_quant=quant, m=6, n=8, k=40)
    x = int8.int8_inputs(case, "cpu")["x"]
    got, slack = int8.operand(case, x)
    steps, lowest = ACT_QUANTS[quant]
    for row, got_row, tie_row in zip(x.tolist(), got.tolist(), slack.tolist(), strict=True):
        scale = float(torch.tensor(max(map(abs, row)), dtype=torch.float32) / torch.tensor(steps))
        if quant == "row127h":
            scale = float(torch.tensor(scale).bfloat16())
        for value, found, tie in zip(row, got_row, tie_row, strict=True):
            assert abs(found - max(lowest, min(127, round(value / scale))) * scale) <= tie + 1e-12
    error = (got - x.double()).abs().amax(dim=1)
    assert bool((error <= x.double().abs().amax(dim=1) / steps * 0.52).all())


@pytest.mark.parametrize("quant", ["none", "row127"])
@pytest.mark.parametrize("fault", ["scale", "unrounded", "token_scale", "saturated"])
def test_control_wrong_int8_layers_are_caught(quant: str, fault: str) -> None:
    case = INT8_LINEAR.case(x="bf16", act_quant=quant, m=4, n=32, k=256)
    inputs = int8.int8_inputs(case, "cpu")
    want = int8.int8_oracle(case, inputs, Numerics("tensor_core"), None)["y"]
    w, x = int8.weight_float64(inputs), int8.operand(case, inputs["x"])[0]
    if fault == "scale":  # one scale for all rows, as a per-tensor quantiser has
        y = x @ (inputs["codes"].double() * inputs["scale"].double().mean()).T
    elif fault == "unrounded":
        if quant == "none":
            rounded = INT8_LINEAR.case(x="bf16", act_quant="row127", m=4, n=32, k=256)
            x = int8.operand(rounded, inputs["x"])[0]
        else:
            x = inputs["x"].double()
        y = x @ w.T
    elif fault == "token_scale":
        y = x.roll(1, dims=0) @ w.T
    else:  # sums that saturate at 16 bits
        y = (x @ w.T).clamp(-0.3, 0.3)
    assert bool(((y - want.value).abs() > want.budget).any())


def test_a_code_on_a_tie_may_go_either_way_and_no_other() -> None:
    case = INT8_LINEAR.case(x="fp32", act_quant="row127", m=1, n=1, k=3)
    inputs: dict[str, Any] = {
        "x": torch.tensor([[127.0, 2.5, 2.4]]),
        "codes": torch.ones(1, 3, dtype=torch.int8),
        "scale": torch.ones(1),
    }
    want = int8.int8_oracle(case, inputs, Numerics("int32"), None)["y"]
    assert float(want.value) == 127 + 2 + 2
    assert want.budget is not None and 1 <= float(want.budget) < 1.001
    inputs["x"] = torch.tensor([[127.0, 2.4, 2.4]])
    want = int8.int8_oracle(case, inputs, Numerics("int32"), None)["y"]
    assert want.budget is not None and float(want.budget) < 0.001


def test_int8_metrics_are_those_of_the_weight_and_of_the_product() -> None:
    case = INT8_LINEAR.case(x="fp32", m=64, n=64, k=512)
    inputs = int8.int8_inputs(case, "cpu")
    outputs = {"y": int8.int8_float64(case, inputs)}
    metrics = int8.int8_metrics(case, inputs, outputs, {})
    # A step of absmax/127 with absmax about 3.1 sigma: rms error step / sqrt(12).
    assert metrics["rel_frobenius"] == pytest.approx(3.1 / 127 / 12**0.5, rel=0.1)
    assert metrics["output_rel_frobenius"] == pytest.approx(metrics["rel_frobenius"], rel=0.2)
    assert metrics["one_minus_rel_frobenius"] == 1 - metrics["rel_frobenius"]


def test_integer_products_have_the_integer_rate_as_floor() -> None:
    for gpu in DATASHEETS:
        assert floor_s(gpu, 0, 10**15, 0, INT8_LINEAR.operands) == floor_s(gpu, 0, 10**15, 0, FP4_LINEAR.operands) / 2


# --- roundings between the steps of an op -----------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_a_stored_sum_is_inside_the_budget_that_declares_it_and_only_there(act: str) -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="bf16", act=act, bias=1, m=16, n=64, k=256)
    inputs = linear.linear_inputs(case, "cpu")
    exact = inputs["x"].double() @ decode_float64("nvfp4", inputs).T + inputs["bias"].double()
    y = linear.activate(act, exact.to(torch.bfloat16).float()).to(torch.bfloat16).double()

    def over(stores: tuple[str, ...]) -> float:
        want = linear.linear_oracle(case, inputs, Numerics("fp32", stores=stores), None)["y"]
        return float(((y - want.value).abs() / want.budget).max())

    assert over(("bf16",)) <= 1 < over(())


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_layer_given_to_the_compiler_is_one_graph_and_right(fmt: str) -> None:
    """Traced without code generation, so that it runs where there is neither a GPU nor time for one."""
    case = FP4_LINEAR.case(fmt=fmt, x="bf16", act="silu", bias=1, m=5, n=12, k=128)
    inputs = linear.linear_inputs(case, "cpu")
    run = torch.compile(dense_linear.whole_layer(fmt, "silu", torch.bfloat16), backend="eager", fullgraph=True)
    numerics = Numerics("fp32", ("fp32", "bf16"), stores=("bf16",))
    want = linear.linear_oracle(case, inputs, numerics, None)["y"]
    y = CompiledLinear(run, numerics).bind(inputs, {})()
    assert y is not None and bool(((y["y"].double() - want.value).abs() <= want.budget).all())


@pytest.mark.parametrize(
    ("rule", "device", "n", "path"),
    [("needs_cuda", "cpu", 2048, "/"), ("too_small_to_compile", "cuda", 64, "/"), ("needs_compiler", "cuda", 2048, "")],
)
def test_what_cannot_or_need_not_be_compiled_is_refused_first(
    monkeypatch: pytest.MonkeyPatch, rule: str, device: Literal["cpu", "cuda"], n: int, path: str
) -> None:
    monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(Unsupported, match=rule):
        dense_linear.make(FP4_LINEAR.case(fmt="nvfp4", m=1, n=n, k=1024), "torch_compile", device)


# --- insight ----------------------------------------------------------------------------------------------------------


def test_singular_values_square_to_the_eigenvalues_of_the_gram_matrix() -> None:
    case = SVD.case(m=12, n=7)
    inputs = insight.svd_inputs(case, "cpu")
    want = insight.svd_oracle(case, inputs, Numerics(), None)["values"]
    a = inputs["a"].double()
    torch.testing.assert_close(want.value.square(), torch.linalg.eigvalsh(a.T @ a).flip(0), rtol=1e-10, atol=1e-10)
    budget = want.budget
    assert budget is not None
    # control: the values of a matrix rounded to bfloat16 are not those of the matrix
    rounded = torch.linalg.svdvals(inputs["a"].bfloat16().double())
    assert bool(((rounded - want.value).abs() > budget).any())


def test_the_chain_is_a_geometric_series() -> None:
    case = CHAIN.case(n=50, steps=12)
    inputs = insight.chain_inputs(case, "cpu")
    want = insight.chain_oracle(case, inputs, Numerics(), None)["y"]
    assert want.budget is not None
    torch.testing.assert_close(want.value, inputs["x"].double() * (2 - 0.5**12), rtol=1e-15, atol=0)
    fewer = inputs["x"].double() * (2 - 0.5**11)  # control: one step dropped
    assert bool(((fewer - want.value).abs() > want.budget).any())


@pytest.mark.parametrize("op", ["svd", "elementwise_chain"])
def test_unknown_variants_are_refused(op: str) -> None:
    values: Mapping[str, int] = {"m": 3, "n": 3} if op == "svd" else {"n": 3, "steps": 2}
    with pytest.raises(Unsupported, match="unknown_variant"):
        resolve(TORCH_NATIVE.ops[op])(BY_NAME[op].case(**values), "faster", "cpu")
