"""The worker's half of a pair, with real kernels on a CPU: samples, known slowdowns, and what was timed is verified."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

from vbench import blocks, registry
from vbench.backend import Launch
from vbench.monitor import NoMonitor
from vbench.record import Measurement, Outcome
from vbench.spec import Numerics, resolve

CASE = "fp4_dequantize[fmt=nvfp4,y=bf16,dist=normal,n=16,k=32]"
OP = registry.ops()["fp4_dequantize"]


class Kernel:
    """Right as long as ``right`` launches; after that it writes nothing, as a cache of results would."""

    numerics = Numerics("fp32")
    produces = ("weight",)
    deterministic = True

    def __init__(self, right: float, own_tensors: bool = False, seconds: float = 0.0) -> None:
        self.right, self.own_tensors, self.seconds, self.launched = right, own_tensors, seconds, 0

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        expected = resolve(OP.oracle)(OP.parse(CASE), inputs, self.numerics, None)["weight"]

        def launch() -> Mapping[str, Any] | None:
            self.launched += 1
            if self.seconds:
                time.sleep(self.seconds)
            if self.launched > self.right:
                return None
            if self.own_tensors:
                return {"weight": expected.value.to(out["weight"].dtype)}
            out["weight"].copy_(expected.value)
            return None

        return launch


def opened(kernel: Kernel) -> blocks.OpenCell:
    return blocks.OpenCell(OP, OP.parse(CASE), kernel, "cpu", 8, NoMonitor("no_gpu"), lambda: None)


def test_a_cell_gives_blocks_and_is_verified_by_what_was_sampled() -> None:
    kernel = Kernel(float("inf"))
    cell = opened(kernel)
    first = cell.verify()
    assert first is not None and first.outcome is Outcome.PASSED
    launches, sample_s = cell.launches(100)
    assert sample_s > 0
    assert launches % 100 == 0
    cell.arm(launches, 0.0)
    cell.arm(launches, 0.02)
    before = kernel.launched
    block = Measurement.from_dict(cell.block(0.02, 5))
    assert (block.quantity, len(block.samples_s), block.launches_per_sample) == ("wall", 5, launches)
    # Five samples and a warm-up, each 2 % longer than it says.
    assert kernel.launched - before == 6 * (launches + launches // 50)
    last = cell.verify()
    assert last is not None and last.outcome is Outcome.PASSED


def test_a_kernel_that_stops_computing_once_timed_is_caught() -> None:
    """The control of verification after timing: right when first checked, a replay of nothing later."""
    kernel = Kernel(right=3)
    cell = opened(kernel)
    first = cell.verify()
    assert first is not None and first.outcome is Outcome.PASSED
    cell.arm(2, 0.0)
    cell.block(0.0, 5)
    last = cell.verify()
    assert last is not None and last.outcome is Outcome.NONFINITE


def test_tensors_of_the_kernels_own_are_said_to_be_unseen() -> None:
    cell = opened(Kernel(float("inf"), own_tensors=True))
    assert cell.verify() is not None, "a plain launch hands them over"
    cell.arm(2, 0.0)
    assert cell.verify() is None
    assert blocks.answer(cell, {"kind": "close"})["absent"] == {"after_timing": "outputs_not_ours"}


def test_a_known_slowdown_takes_as_much_longer_as_it_says() -> None:
    cell = opened(Kernel(float("inf"), seconds=0.002))
    cell.arm(4, 0.0)
    cell.arm(4, 0.5)
    plain, slowed = (statistics.median(cell.block(s, 3)["samples_s"]) for s in (0.0, 0.5))
    # A sleep is never shorter than asked: 4 launches, 6 launches, both over 4.
    assert plain >= 0.002 and slowed >= 0.003
