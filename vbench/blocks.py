"""The worker's half of a process pair: a cell is opened, armed, gives blocks of samples when asked, and is closed.

The parent alternates between two such workers, so that what drifts on the machine hits both sides alike. One cell is
open at a time. Answers are ``vbench.worker.Result``s; a block's samples are its one measurement.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from vbench import check, timing
from vbench.backend import Device, Kernel, Launch
from vbench.errors import VbenchError
from vbench.monitor import Monitor, NoMonitor
from vbench.record import Outcome
from vbench.spec import Case, Expected, Op, resolve

#: A sample lasts at least this long where it is taken by wall clock, so that the clock's own cost is below 0.1 %.
MIN_WALL_S = 2e-3
MAX_WALL_LAUNCHES = 20_000
MAX_GRAPH_LAUNCHES = 2_000


class OpenCell:
    """One case bound by one kernel, in as many copies as exceed L2 on a GPU.

    Args:
        rows: how many sampled rows of the outputs are compared with the oracle, before and after the blocks.
        synchronize: waits for the device.
    """

    def __init__(
        self,
        op: Op,
        case: Case,
        kernel: Kernel,
        device: Device,
        rows: int | None,
        monitor: Monitor | NoMonitor,
        synchronize: Callable[[], None],
    ) -> None:
        self._kernel, self._device, self._monitor, self._synchronize = kernel, device, monitor, synchronize
        self._samplers: dict[float, timing.Sampler] = {}
        inputs = resolve(op.inputs)(case, device)
        self._expected: Mapping[str, Expected] = resolve(op.oracle)(case, inputs, kernel.numerics, rows)
        self._bound: list[tuple[dict[str, Any], Launch]] = []
        self.rotated_bytes = 0
        self._graph = device == "cuda" and getattr(kernel, "graph_safe", True)
        copies = self._copies(inputs) if self._graph else 1
        for _ in range(copies):
            some = (
                {k: check.copied(v) if check.tensors_of(v) else v for k, v in inputs.items()} if copies > 1 else inputs
            )
            out = check.poisoned(self._expected, device)
            self._bound.append((out, kernel.bind(some, out)))

    def _copies(self, inputs: Mapping[str, Any]) -> int:
        """Copies of all buffers that together exceed L2; sets ``rotated_bytes``."""
        import torch

        size = sum(t.numel() * t.element_size() for t in check.tensors_of(inputs))
        size += sum(torch.Size(w.shape).numel() * w.dtype.itemsize for w in self._expected.values())
        free_bytes, _ = torch.cuda.mem_get_info()
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        # The other side of the pair has its buffers on the same device.
        copies = timing.copies_needed(size, l2, free_bytes // 2)
        self.rotated_bytes = copies * size
        return copies

    def verify(self) -> check.Judgement:
        """Compare a random copy's output with the oracle after running it once more."""
        out, launch = self._bound[random.SystemRandom().randrange(len(self._bound))]
        for t in out.values():
            check.poison(t)
        returned = launch()
        self._synchronize()
        return check.judge_outputs(out if returned is None else dict(returned), self._expected, self._kernel.produces)

    def launches(self, multiple: int) -> int:
        """How many launches one sample should average over on this side, a multiple of ``multiple``."""
        run = [launch for _, launch in self._bound]
        if self._graph:
            estimate_s = timing.graph_estimate_s(run)
            return timing.launches_of(estimate_s, timing.MIN_REPLAY_S, multiple, MAX_GRAPH_LAUNCHES)
        for _ in range(2):
            run[0]()
        self._synchronize()
        before = time.perf_counter()
        for _ in range(3):
            run[0]()
        self._synchronize()
        estimate_s = (time.perf_counter() - before) / 3
        return timing.launches_of(estimate_s, MIN_WALL_S, multiple, MAX_WALL_LAUNCHES)

    def arm(self, launches: int, slowdown: float) -> None:
        """Make ready to sample ``launches`` a sample, slowed by a known part."""
        if slowdown in self._samplers:
            return
        run = [launch for _, launch in self._bound]
        if self._graph:
            sampler = timing.graph_sampler(run, launches, slowdown)
        else:
            sampler = timing.wall_sampler(run[0], self._synchronize, launches, slowdown)
        sampler.warm()
        self._synchronize()
        self._samplers[slowdown] = sampler

    def block(self, slowdown: float, samples: int) -> dict[str, Any]:
        """One block of samples, as the dict of a Measurement."""
        sampler = self._samplers[slowdown]
        taken = timing.take_blocks(
            sampler.sample, self._monitor, count=samples, least=samples, limit_s=float("inf"), warm=sampler.warm
        )
        return asdict(timing.measurement(sampler, taken, self.rotated_bytes))


class OutOfTurn(VbenchError):
    """A block was asked of a cell that is not open."""


def answer(cell: OpenCell | None, request: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the worker's Result for the requests ``arm``, ``block`` and ``close``.

    Raises:
        OutOfTurn: no cell is open.
    """
    if cell is None:
        raise OutOfTurn(f"{request['kind']}: no cell is open")
    if request["kind"] == "arm":
        launches = request["launches"] or cell.launches(request["multiple"])
        for slowdown in request["slowdowns"]:
            cell.arm(launches, slowdown)
        return {"outcome": Outcome.PASSED, "metrics": {"launches": float(launches)}}
    if request["kind"] == "block":
        return {
            "outcome": Outcome.PASSED,
            "measurements": (cell.block(request["slowdown"], request["samples"]),),
        }
    judged = cell.verify()
    error = asdict(judged.error) if judged.error is not None else None
    return {"outcome": judged.outcome, "reason": judged.reason, "detail": judged.detail, "error": error}
