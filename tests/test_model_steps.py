"""``train_step`` and ``generate`` on every backend through the worker's own checks; the oracle's laws; refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vbench.backend import DeclaredBackend
from vbench.errors import Unsupported
from vbench.kernels.peers.accelerate_offload import BACKEND as ACCELERATE
from vbench.kernels.peers.torch_native import BACKEND as TORCH_NATIVE
from vbench.kernels.virtual import steps
from vbench.kernels.virtual.backend import BACKEND as VIRTUAL
from vbench.kernels.virtual.virtualize import virtualize
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.backend import BACKEND as REFERENCE
from vbench.reference.model import (
    SAMPLED,
    flow_variance,
    generate,
    generate_inputs,
    generate_oracle,
    train_inputs,
    train_oracle,
    train_step,
    watched_step,
)
from vbench.reference.ops.model import GENERATE, TRAIN_STEP, parameters
from vbench.spec import Case, Numerics, Op, resolve
from vbench.suites.model import SUITE, WHOLE
from vbench.worker import Worker

OPS: dict[str, Op] = {op.name: op for op in (TRAIN_STEP, GENERATE)}
CASES = [c for c in SUITE.checks if c.op in OPS and OPS[c.op].reject(c) is None]
BACKENDS: tuple[DeclaredBackend, ...] = (REFERENCE, VIRTUAL, TORCH_NATIVE)
SMALL: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2, "inner": 32, "vocab": 24, "batch": 2, "seq": 4}


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_backend_computes_what_eager_torch_does_bit_for_bit(
    worker: Worker, backend: DeclaredBackend, case: Case
) -> None:
    for variant in backend.variants.get(case.op, ("",)):
        try:
            kernel = resolve(backend.ops[case.op])(case, variant, "cpu")
            result = worker._measure(OPS[case.op], case, kernel, timed=False, role="own")
        except Unsupported as refused:
            small = case.axis("gpu_bytes") == 1000
            assert (variant, refused.rule) in {("torch_compile", "needs_cuda"), ("fsdp2", "codec")} | (
                {("", "over_budget")} if small else set()
            )
            continue
        assert result.outcome is Outcome.PASSED, (variant, result.detail)


def streamed(case: Case) -> bool:
    """Whether ``virtual`` moves weights in this case."""
    inputs = (train_inputs if case.op == "train_step" else generate_inputs)(case, "cpu")
    seen: list[dict[str, Any]] = []

    def spy(*given: Any, **named: Any) -> Any:
        handle = virtualize(*given, **named)
        seen.append(handle.tiers.plan() if handle.tiers is not None else {"streamed_bytes_per_pass": 0})
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vbench.kernels.virtual.steps.virtualize", spy)
        steps.make(case, "", "cpu").bind(inputs, {})
    return bool(seen[0]["streamed_bytes_per_pass"])


def test_the_check_cases_with_a_budget_stream() -> None:
    """Or the comparison above would be of eager with eager."""
    budgeted = [case for case in CASES if case.axis("gpu_bytes") > 1000]
    assert sum(streamed(case) for case in budgeted) >= 0.7 * len(budgeted) > 0


@pytest.mark.parametrize("case", CASES[::5], ids=lambda c: c.id)
def test_trivial_kernels_are_caught(worker: Worker, case: Case) -> None:
    result = worker.battery(OPS[case.op], case)
    assert result.outcome is Outcome.PASSED and not result.reason, result.detail


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_count_of_parameters_is_the_models(family: str) -> None:
    for op, extra in ((TRAIN_STEP, {}), (GENERATE, {"new": 3})):
        case = op.case(family=family, **SMALL, **extra)
        recipe = (train_inputs if op is TRAIN_STEP else generate_inputs)(case, "cpu")["model"]
        assert sum(p.numel() for p in recipe.make("cpu").parameters()) == parameters(case)
    gpt2, llama = (sizes for name, _, sizes in WHOLE if name.startswith(("GPT-2 small", "LLaMA-7B")))
    assert parameters(TRAIN_STEP.case(**gpt2, batch=1, seq=1024)) == 124_439_808  # as the released model has
    assert parameters(TRAIN_STEP.case(**llama, batch=1, seq=1)) == 6_738_415_616


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_no_position_sees_a_later_one_and_generation_reads_the_given_tokens(family: str) -> None:
    case = GENERATE.case(family=family, dtype="fp32", **SMALL, new=3)
    inputs = generate_inputs(case, "cpu")
    model = inputs["model"].make("cpu")
    with torch.no_grad():
        whole = model(torch.cat((inputs["ids"], inputs["given"]), 1))
    found = generate(model, inputs)["logits"]
    torch.testing.assert_close(found, whole[:, 3:6], rtol=1e-4, atol=1e-4)
    # The last given token is appended and never read.
    changed = inputs["given"].clone()
    changed[:, -1] = (changed[:, -1] + 1) % 24
    assert torch.equal(generate(model, {**inputs, "given": changed})["logits"], found)
    changed[:, 0] = (changed[:, 0] + 1) % 24
    assert not torch.equal(generate(model, {**inputs, "given": changed})["logits"], found)


def test_a_kernel_that_orders_sums_otherwise_is_held_to_what_eager_errs_by() -> None:
    """Products in float64, rounded to float32 once each, pass; a wrong scale of the scores does not."""
    case = TRAIN_STEP.case(family="llama", dtype="fp32", **SMALL)
    inputs = train_inputs(case, "cpu")
    recipe = inputs["model"]
    expected = train_oracle(case, inputs, Numerics("tensor_core", stores=("fp32",)), None)
    right = train_step(recipe.make("cpu"), recipe, inputs)
    model = recipe.make("cpu").double()
    exact = train_step(model, recipe, inputs)
    wrong = recipe.make("cpu")
    for block in wrong.blocks:
        block.q.weight.data *= 1.001
    off = train_step(wrong, recipe, inputs)

    def beyond(outputs: dict[str, Tensor]) -> set[str]:
        return {
            name
            for name, want in expected.items()
            if want.budget is None or bool(((outputs[name].double() - want.value).abs() > want.budget).any())
        }

    assert beyond(right) == beyond(exact) == set() and {"losses", "grad_first"} <= beyond(off)
    assert set(expected) == {"losses", *SAMPLED}
    given = GENERATE.case(family="gpt", dtype="bf16", **SMALL, new=2)
    assert generate_oracle(given, generate_inputs(given, "cpu"), Numerics(), None)["logits"].budget is None


def autocast_step(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Weights and products in bf16, everything between in float32: the fewer roundings of a compiler that fuses."""
    recipe = inputs["model"]
    model = recipe.make("cpu").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = train_step(model, recipe, inputs)
    return {name: t if name == "losses" else t.bfloat16() for name, t in found.items()}


@pytest.mark.parametrize(
    "sizes",
    [
        {"family": "gpt", "layers": 2, "width": 112, "heads": 7, "inner": 448, "vocab": 256, "batch": 1, "seq": 128},
        {"family": "llama", "layers": 2, "width": 128, "heads": 4, "inner": 384, "vocab": 256, "batch": 1, "seq": 64},
        {"family": "llama", "layers": 3, "width": 32, "heads": 2, "inner": 64, "vocab": 40, "batch": 2, "seq": 5},
    ],
    ids=lambda sizes: f"{sizes['family']}-{sizes['width']}",
)
def test_a_gradients_errors_spread_as_the_propagated_variance_says(sizes: dict[str, Any]) -> None:
    """Of eager's and of a fused step's errors, over it, the mean square is 1 and few are beyond 4.

    The control is one variance for the whole tensor: rows then err by several times as much as others.
    """
    case = TRAIN_STEP.case(**sizes, dtype="bf16")
    inputs = train_inputs(case, "cpu")
    recipe = inputs["model"]
    eager, flows = watched_step(recipe.make("cpu"), recipe, inputs)
    assert all(torch.equal(t, eager[name]) for name, t in train_step(recipe.make("cpu"), recipe, inputs).items())
    exact, exact_flows = watched_step(recipe.make("cpu").double(), recipe, inputs)
    fused = autocast_step(case, inputs)
    spread = 0.0
    for name in ("grad_first", "grad_last"):
        variance = flow_variance(flows[name], exact_flows[name], exact[name].shape)
        for found in (eager, fused):
            over = (found[name].double() - exact[name]).square() / variance
            assert 0.5 < float(over.mean()) < 1.5
            assert float((over > 16).double().mean()) < (1e-3 if variance.numel() > 10_000 else 2e-2)
        square = (eager[name].double() - exact[name]).square()
        spread = max(spread, float(square.mean(1).max() / square.mean()), float(square.mean(0).max() / square.mean()))
    assert spread > 2
    expected = train_oracle(case, inputs, Numerics("tensor_core", stores=("bf16",)), None)
    for name, want in expected.items():
        assert want.budget is not None
        assert bool(((fused[name].double() - want.value).abs() <= want.budget).all()), name
    # An error that no rounding makes is still one: half as much again of the largest row.
    bent = fused["grad_first"].double()
    bent[bent.square().mean(1).argmax()] *= 1.5
    budget = expected["grad_first"].budget
    assert budget is not None and bool(((bent - exact["grad_first"]).abs() > budget).any())


def test_refusals_by_name() -> None:
    case = TRAIN_STEP.case(family="gpt", **SMALL)
    for backend in (VIRTUAL, TORCH_NATIVE, REFERENCE, ACCELERATE):
        with pytest.raises(Unsupported) as refused:
            resolve(backend.ops["train_step"])(case, "nonsense", "cpu")
        assert refused.value.rule == "unknown_variant"
    small = TRAIN_STEP.case(family="gpt", **SMALL, gpu_bytes=100)
    with pytest.raises(Unsupported, match="short") as refused:
        steps.make(small, "", "cpu").bind(train_inputs(small, "cpu"), {})
    assert refused.value.rule == "over_budget"
    coded = GENERATE.case(family="gpt", **SMALL, new=1, codec="nvfp4")
    with pytest.raises(Unsupported) as refused:
        resolve(ACCELERATE.ops["generate"])(coded, "", "cpu")
    assert refused.value.rule == "codec"


def test_accelerate_generates_and_loses_gradients(worker: Worker) -> None:
    pytest.importorskip("accelerate", reason="pip install 'vbench-kernels[peers]'")
    case = GENERATE.case(family="gpt", **SMALL, new=2)
    kernel = resolve(ACCELERATE.ops["generate"])(case, "", "cpu")
    result = worker._measure(GENERATE, case, kernel, timed=False, role="peer")
    assert result.outcome is Outcome.PASSED, result.detail
    case = TRAIN_STEP.case(family="gpt", **SMALL)
    with pytest.raises(Unsupported) as refused:
        resolve(ACCELERATE.ops["train_step"])(case, "", "cpu").bind(train_inputs(case, "cpu"), {})
    assert refused.value.rule == "no_gradients"


def test_accelerate_says_how_to_install_it_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "accelerate", None)
    found = ACCELERATE.probe("cpu")
    assert not found.usable and "pip install 'vbench-kernels[peers]'" in found.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_a_budget_is_the_allocators_and_running_out_is_typed() -> None:
    """Eager torch runs out where the virtualised model computes the same bits."""
    sizes: dict[str, Any] = {"family": "llama", "layers": 8, "width": 1024, "heads": 8, "inner": 2048, "vocab": 1024}
    case = TRAIN_STEP.case(**sizes, batch=1, seq=64, gpu_bytes=120_000_000)
    inputs = train_inputs(case, "cuda")
    with pytest.raises(torch.OutOfMemoryError):
        resolve(TORCH_NATIVE.ops["train_step"])(case, "eager", "cuda").bind(inputs, {})
    torch.cuda.empty_cache()
    expected = train_oracle(case, inputs, Numerics(), None)
    launch = steps.make(case, "", "cuda").bind(inputs, {})
    for _ in range(2):
        found = launch()
        assert found is not None
        for name, want in expected.items():
            assert torch.equal(found[name].to("cuda"), want.value), name
