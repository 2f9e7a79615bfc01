"""offload_pass on every backend through the worker's own checks; what it refuses, counts and keeps; and controls."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vbench.backend import DeclaredBackend
from vbench.errors import Unsupported
from vbench.kernels.peers.torch_native import BACKEND as TORCH_NATIVE
from vbench.kernels.tiers import offload
from vbench.kernels.tiers.backend import BACKEND as TIERS
from vbench.kernels.tiers.errors import TierError
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.backend import BACKEND as REFERENCE
from vbench.reference.offload import GRADIENTS, Weights, offload_inputs, offload_pass
from vbench.reference.ops.offload import OFFLOAD_PASS, weight_bytes
from vbench.spec import Case, Numerics, resolve
from vbench.suites.tier import SUITE
from vbench.worker import Worker

CASES = [c for c in SUITE.checks if c.op == "offload_pass" and OFFLOAD_PASS.reject(c) is None]
BACKENDS: tuple[DeclaredBackend, ...] = (REFERENCE, TIERS, TORCH_NATIVE)
STREAMED = OFFLOAD_PASS.case(layers=7, width=32, tokens=3, gpu_bytes=5 * 2048)


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_every_backend_gives_the_layers_one_by_one_bit_for_bit(
    worker: Worker, backend: DeclaredBackend, case: Case
) -> None:
    for variant in backend.variants.get("offload_pass", ("",)):
        try:
            kernel = resolve(backend.ops["offload_pass"])(case, variant, "cpu")
        except Unsupported as refused:
            assert (variant, refused.rule) in {("double_buffer", "forward_only"), ("fsdp2", "over_budget")}
            assert variant != "fsdp2" or case.axis("gpu_bytes") < 3 * case.axis("width") ** 2 * 2
            continue
        result = worker._measure(OFFLOAD_PASS, case, kernel, timed=False, role="own")
        assert result.outcome is Outcome.PASSED, result.detail


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_trivial_kernels_are_caught(worker: Worker, case: Case) -> None:
    result = worker.battery(OFFLOAD_PASS, case)
    assert result.outcome is Outcome.PASSED and not result.reason, result.detail


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_the_oracle_is_what_autograd_gives_for_the_whole_stack(mode: str) -> None:
    case = OFFLOAD_PASS.case(mode=mode, layers=4, width=16, tokens=5, gpu_bytes=1)
    inputs = offload_inputs(case, "cpu")
    weights = [inputs["weights"].make(i).double().requires_grad_() for i in range(4)]
    x = inputs["x"].double().requires_grad_()
    y = x
    for i, weight in enumerate(weights):
        y = y @ weight.T if i == 3 else (y @ weight.T).clamp(min=0)
    found = offload_pass(case, inputs)
    torch.testing.assert_close(found["y"].double(), y.detach(), rtol=0.05, atol=0.1)
    if mode == "forward":
        assert all(found[name].shape == (0, 0) for name in GRADIENTS)
        return
    torch.autograd.backward(y, inputs["dy"].double())
    for name, leaf in zip(GRADIENTS, (x, weights[0], weights[2], weights[3]), strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(found[name].double(), leaf.grad, rtol=0.05, atol=0.3)


def test_weights_are_drawn_by_stack_and_not_by_case() -> None:
    cases = [OFFLOAD_PASS.case(layers=2, width=8, tokens=t, gpu_bytes=g) for t, g in ((1, 256), (4, 1024))]
    first, second = (offload_inputs(case, "cpu")["weights"] for case in cases)
    assert torch.equal(first.make(1), second.make(1)) and not torch.equal(first.make(0), first.make(1))
    assert not torch.equal(first.make(0), Weights(2, 8, 1, "cpu").make(0))


def test_traffic_is_counted_in_steady_state(worker: Worker) -> None:
    result = worker._measure(
        OFFLOAD_PASS, STREAMED, resolve(TIERS.ops["offload_pass"])(STREAMED, "", "cpu"), timed=True, role="own"
    )
    told = dict(result.metrics or {})
    assert result.outcome is Outcome.PASSED and [m["quantity"] for m in result.measurements] == ["wall"]
    # Three of seven layers of 2 KiB stay, beside two slots.
    assert told["held_bytes"] == STREAMED.axis("gpu_bytes") and told["held_over_budget"] == 1
    assert (told["resident"], told["to_device_bytes"]) == (3, 4 * 2048)
    assert told["timely"] + told["late"] + told["miss"] == 4 and told["miss"] <= 1
    assert told["weight_bytes"] == weight_bytes(STREAMED)


def test_too_small_a_budget_is_refused_by_its_name() -> None:
    case = OFFLOAD_PASS.case(layers=3, width=32, tokens=1, gpu_bytes=2048)
    inputs = offload_inputs(case, "cpu")
    out = {name: torch.empty(0, 0) for name in GRADIENTS}
    with pytest.raises(Unsupported, match="2048 short") as refused:
        resolve(TIERS.ops["offload_pass"])(case, "", "cpu").bind(inputs, out)
    assert refused.value.rule == "over_budget"
    with pytest.raises(Unsupported, match="2048 short") as refused:
        resolve(TORCH_NATIVE.ops["offload_pass"])(case, "double_buffer", "cpu")
    assert refused.value.rule == "over_budget"
    with pytest.raises(Unsupported, match="3 layers take 6144 bytes") as refused:
        resolve(TORCH_NATIVE.ops["offload_pass"])(case, "fsdp2", "cpu")
    assert refused.value.rule == "over_budget"
    for backend in (TIERS, TORCH_NATIVE):
        with pytest.raises(Unsupported) as refused:
            resolve(backend.ops["offload_pass"])(case, "nonsense", "cpu")
        assert refused.value.rule == "unknown_variant"


def test_a_stack_is_kept_for_other_tokens_and_let_go_for_another_budget() -> None:
    def bound(**values: Any) -> Any:
        case = OFFLOAD_PASS.case(**{"layers": 4, "width": 32, "tokens": 2, "gpu_bytes": 6144, **values})
        out = {name: torch.empty(0, 0) for name in GRADIENTS}
        return offload.make(case, "", "cpu").bind(offload_inputs(case, "cpu"), out)

    first, same = bound(), bound(tokens=9)
    assert first._handle is same._handle
    other = bound(gpu_bytes=8192)
    assert other._handle is not first._handle
    with pytest.raises(TierError, match="bound later"):
        first()


class Spoiling:
    """A kernel that is right once and then has changed the weights it keeps on the host."""

    numerics = Numerics()
    produces = ("y", *GRADIENTS)
    deterministic = False

    def __init__(self, case: Case) -> None:
        self.case = case

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
        kept = [inputs["weights"].make(i) for i in range(inputs["weights"].layers)]

        def launch() -> Mapping[str, Any]:
            x: Tensor = inputs["x"]
            for i, weight in enumerate(kept):
                y = torch.nn.functional.linear(x, weight)
                x = y if i == len(kept) - 1 else torch.relu(y)
            kept[0].mul_(1.5)
            return {**{name: out[name] for name in GRADIENTS}, "y": x}

        return launch


def test_spoiled_weights_are_caught_by_the_second_launch(worker: Worker) -> None:
    result = worker._measure(OFFLOAD_PASS, STREAMED, Spoiling(STREAMED), timed=False, role="own")
    assert (result.outcome, result.reason) == (Outcome.WRONG_VALUE, "second_run")


def test_the_large_model_script_finds_nothing_and_finds_a_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(__file__).parents[1] / "docs" / "tuning" / "tier_54gb.py"
    spec = importlib.util.spec_from_file_location("tier_54gb", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = {"--device": "cpu", "--layers": "9", "--width": "32", "--tokens": "4", "--pinned": "1MB"}
    sizes = [text for pair in (small | {"--gpu": "30KiB", "--activations": "0"}).items() for text in pair]
    assert script.main([*sizes, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "tier_54gb.json").read_text(encoding="utf-8"))
    assert report["verdict"] == "EQUAL" and 0 < report["resident_layers"] < 9

    def spoilt(*given: Any) -> tuple[Tensor, Tensor]:
        y, dx = right(*given)
        given[0].layers[4].weight.grad[3, 3] += 1
        return y, dx

    right = script.step
    monkeypatch.setattr(script, "step", spoilt)
    assert script.main([*sizes, "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "tier_54gb.json").read_text(encoding="utf-8"))
    assert report["different"] == ["gradient of layers.4.weight"]
