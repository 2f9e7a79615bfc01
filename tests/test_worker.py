"""The worker's phases and the typed absence of what it could not measure; faults are in test_runner.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_monitor import FakeNvml, monitor
from vbench import registry, timing
from vbench.backend import Availability
from vbench.monitor import NoMonitor
from vbench.plan import BATTERY
from vbench.record import Outcome
from vbench.reference.ops.attention import ATTENTION
from vbench.reference.ops.fp4 import FP4_DEQUANTIZE
from vbench.spec import Numerics, resolve
from vbench.worker import Result, Worker, choice_of

CASE = FP4_DEQUANTIZE.case(fmt="absmax7_row", n=4, k=16, y="fp32")
SLEEP_S = 0.3


class Kernel:
    """The oracle's answer, with a sleep in one phase."""

    numerics = Numerics("fp32")
    produces = ("weight",)
    deterministic = True

    def __init__(self, slow: str) -> None:
        self.slow = slow

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Callable[[], None]:
        right = resolve(FP4_DEQUANTIZE.oracle)(CASE, inputs, self.numerics, None)["weight"].value
        calls = 0
        if self.slow == "prepare":
            time.sleep(SLEEP_S)

        def launch() -> None:
            nonlocal calls
            calls += 1
            if (self.slow == "compile" and calls == 1) or (self.slow == "steady" and calls <= 2):
                time.sleep(SLEEP_S)
            out["weight"].copy_(right * 2 if self.slow == "wrong" else right)

        return launch


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(BATTERY, "vbench-kernels", "cpu")


@pytest.mark.parametrize("slow", ["nothing", "prepare", "compile", "steady"])
def test_each_phase_is_charged_to_itself(worker: Worker, slow: str) -> None:
    result = worker._measure(FP4_DEQUANTIZE, CASE, Kernel(slow), timed=False, role="own")
    assert result.outcome is Outcome.PASSED, result.detail
    assert result.prepare_s is not None and result.first_launch_s is not None and result.steady_launch_s is not None
    compile_s = result.first_launch_s - result.steady_launch_s
    phases = {"prepare": result.prepare_s, "compile": compile_s, "steady": result.steady_launch_s}
    for name, seconds in phases.items():
        assert (seconds > SLEEP_S * 0.8) == (name == slow), phases


def test_a_wrong_first_launch_has_no_steady_phase(worker: Worker) -> None:
    result = worker._measure(FP4_DEQUANTIZE, CASE, Kernel("wrong"), timed=False, role="own")
    assert result.outcome is Outcome.WRONG_VALUE
    assert result.first_launch_s is not None and result.steady_launch_s is None


@pytest.mark.parametrize(("role", "kept"), [("own", 0), ("peer", 1)])
def test_a_kernel_found_wrong_after_timing_has_no_time_if_it_is_ours(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, role: str, kept: int
) -> None:
    def timed_and_wrong(*arguments: Any) -> None:
        result: Result = arguments[-1]
        result.measurements = ({"quantity": "graph", "samples_s": (1e-6,)},)
        result.outcome, result.reason = Outcome.WRONG_VALUE, "after_timing"

    monkeypatch.setattr(worker, "_time", timed_and_wrong)
    result = worker._measure(FP4_DEQUANTIZE, CASE, Kernel("nothing"), timed=True, role=role)
    assert (result.outcome, len(result.measurements)) == (Outcome.WRONG_VALUE, kept)


def test_timing_on_a_cpu_says_that_there_is_no_gpu_to_watch(worker: Worker) -> None:
    result = worker._measure(FP4_DEQUANTIZE, CASE, Kernel("nothing"), timed=True, role="own")
    (measured,) = result.measurements
    assert (measured["quantity"], measured["states"], measured["states_absent"]) == ("wall", (), "no_gpu")
    assert result.peak_bytes is None and result.peak_device_bytes is None


def test_cold_without_room_for_the_flush_is_absent_with_a_reason(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        L2_cache_size = 1 << 20

    def no_room(*_: object) -> None:
        raise torch.OutOfMemoryError("any words")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(timing, "time_cold", no_room)
    result = Result(Outcome.PASSED)
    assert worker._time_cold(lambda: None, NoMonitor("no_gpu"), result) == []
    assert result.absent == {"cold": "no_memory_for_flush"}
    # control: another error is no absence
    monkeypatch.setattr(timing, "time_cold", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        worker._time_cold(lambda: None, NoMonitor("no_gpu"), result)


@pytest.mark.parametrize(
    ("watch", "peak", "absent"),
    [
        (monitor(FakeNvml()), 0, {}),
        (monitor(FakeNvml({"nvmlDeviceGetMemoryInfo": 4})), None, {"peak_device_bytes": "no_permission"}),
        (NoMonitor("pynvml_not_installed"), None, {"peak_device_bytes": "pynvml_not_installed"}),
    ],
)
def test_nvml_peak_or_its_reason(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, watch: Any, peak: int | None, absent: dict[str, str]
) -> None:
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 164)
    result = Result(Outcome.PASSED)
    out = {"y": torch.zeros(4, dtype=torch.float32)}
    worker._peaks(lambda: None, out, watch, result)
    assert (result.peak_bytes, result.peak_device_bytes, result.absent) == (64 + 16, peak, absent)
    # A launch that returns new tensors has them in the allocator's count already.
    worker._peaks(lambda: out, out, watch, result)
    assert result.peak_bytes == 64


@dataclass(frozen=True)
class Plan:
    """A kernel's choice."""

    tile: int = 64
    path: str = "fused"


class Planned(Kernel):
    """Makes up its mind when it is bound."""

    plan = Plan()

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Callable[[], None]:
        self.plan = replace(self.plan, tile=128)
        return super().bind(inputs, out)


def planned(case: Any, variant: str, device: str) -> Kernel:
    return Planned("nothing") if variant else Kernel("nothing")


def test_what_a_kernel_chose_is_recorded_with_its_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Worker(BATTERY, "vbench-kernels", "cpu")
    monkeypatch.setattr(one, "backend", SimpleNamespace(ops={"fp4_dequantize": "tests.test_worker:planned"}))
    monkeypatch.setattr(one, "_available", Availability(True))

    def choice(variant: str, kind: str = "check") -> Any:
        request = {
            "kind": kind,
            "op": "fp4_dequantize",
            "case": CASE.id,
            "variant": variant,
            "role": "own",
            "rows": None,
        }
        result = one.run(request)
        assert result.outcome is Outcome.PASSED, result.detail
        return result.choice

    found = choice("tiled")
    assert found == {"digest": found["digest"], "tile": 128, "path": "fused"}, "as it was bound, not as it began"
    assert found["digest"].startswith("sha256:") and choice("tiled", "open") == found
    assert choice("") == {}, "a kernel that does not say"
    other = Planned("nothing")
    other.plan = Plan(tile=64)
    assert choice_of(other)["digest"] != found["digest"], "control: another choice has another digest"


def test_our_fp4_linear_says_what_it_chose() -> None:
    case = registry.ops()["fp4_linear"].parse(
        "fp4_linear[fmt=nvfp4,x=bf16,act=none,bias=0,dist=normal,m=16,n=64,k=256]"
    )
    kernel = resolve(registry.backends()["triton"].ops["fp4_linear"])(case, "", "cpu")
    assert {"digest", "path", "warps", "stages", "bm", "bn"} <= set(choice_of(kernel))


def test_small_oracles_of_a_gpus_checks_run_on_the_host() -> None:
    """The same answer from copies; large cases, and inputs that are no tensors, stay where they are."""
    worker = Worker(BATTERY, "vbench-kernels", "cpu")
    small, large = (ATTENTION.case(b=1, hq=2, hk=2, sq=n, sk=n, d=64) for n in (16, 600))
    inputs = resolve(ATTENTION.inputs)(small, "cpu")
    assert worker._for_oracle(ATTENTION, small, inputs) is inputs
    worker.device = "cuda"
    copied = worker._for_oracle(ATTENTION, small, inputs)
    assert copied is not inputs and all(torch.equal(copied[n], t) for n, t in inputs.items())
    assert worker._for_oracle(ATTENTION, large, inputs) is inputs
    traced = {"trace": [1]}
    assert worker._for_oracle(ATTENTION, small, traced) is traced
    # An op that counts no operations is judged by its elements.
    for n, there in ((4, False), (1 << 12, True)):
        case = FP4_DEQUANTIZE.case(fmt="absmax7_row", n=n, k=1 << 10, y="fp32")
        weight = resolve(FP4_DEQUANTIZE.inputs)(case, "cpu")
        assert (worker._for_oracle(FP4_DEQUANTIZE, case, weight) is weight) == there
