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


class Rotated:
    """A kernel bound to so many copies of all its buffers that together they exceed L2; on a CPU to one.

    Args:
        inputs: of one case, on the device.
        free_bytes: device memory that may be thought of as free.
    """

    def __init__(
        self,
        kernel: Kernel,
        inputs: Mapping[str, Any],
        expected: Mapping[str, Expected],
        device: Device,
        free_bytes: int,
    ) -> None:
        import torch

        self._kernel, self._expected = kernel, expected
        size = sum(t.numel() * t.element_size() for t in check.tensors_of(inputs))
        size += sum(torch.Size(w.shape).numel() * w.dtype.itemsize for w in expected.values())
        copies = 1
        if device == "cuda" and getattr(kernel, "graph_safe", True):
            l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
            copies = timing.copies_needed(size, l2_bytes, free_bytes)
        self.rotated_bytes = copies * size if device == "cuda" else 0
        self._bound: list[tuple[dict[str, Any], Launch]] = []
        for _ in range(copies):
            some = {k: check.copied(v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            out = check.poisoned(expected, device)
            self._bound.append((out, kernel.bind(some, out)))

    @property
    def launches(self) -> list[Launch]:
        return [launch for _, launch in self._bound]

    def verify(self, synchronize: Callable[[], None], sampler: timing.Sampler | None = None) -> check.Judgement | None:
        """Run once more into poisoned outputs and compare those of a random copy with the oracle.

        Args:
            sampler: run what its samples ran (every replayed graph is the one that was timed); a plain launch if
                ``None``.

        Returns:
            ``None`` where a sampler's kernel gives tensors of its own instead of writing into ours, which nobody sees.
        """
        # Of copies that a sample does not reach nothing could be said.
        reached = len(self._bound) if sampler is None else min(len(self._bound), sampler.launches)
        out, launch = self._bound[random.SystemRandom().randrange(reached)]
        for t in out.values():
            check.poison(t)
        if sampler is None:
            returned = launch()
        else:
            # Asked anew: which of the two a kernel does may depend on the case.
            if launch() is not None:
                return None
            for t in out.values():
                check.poison(t)
            sampler.warm()
            returned = None
        synchronize()
        return check.judge_outputs(out if returned is None else dict(returned), self._expected, self._kernel.produces)


class OpenCell:
    """One case bound by one kernel, ready to be sampled.

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
        self._monitor, self._synchronize = monitor, synchronize
        self._samplers: dict[float, timing.Sampler] = {}
        inputs = resolve(op.inputs)(case, device)
        expected: Mapping[str, Expected] = resolve(op.oracle)(case, inputs, kernel.numerics, rows)
        self._graph = device == "cuda" and getattr(kernel, "graph_safe", True)
        # The other side of the pair has its buffers on the same device.
        self._bound = Rotated(kernel, inputs, expected, device, _free_bytes() // 2 if self._graph else 0)

    def verify(self) -> check.Judgement | None:
        """See ``Rotated.verify``: by what was sampled, if anything was."""
        return self._bound.verify(self._synchronize, next(iter(self._samplers.values()), None))

    def launches(self, multiple: int) -> tuple[int, float]:
        """How many launches one sample should average over on this side, a multiple of ``multiple``.

        Returns:
            that number, and about how many seconds such a sample takes.
        """
        run = self._bound.launches
        if self._graph:
            estimate_s = timing.graph_estimate_s(run)
            least = timing.launches_of(estimate_s, timing.MIN_REPLAY_S, multiple, MAX_GRAPH_LAUNCHES)
            # Every copy is launched, or what is reached might fit L2.
            count = max(least, -(-len(run) // multiple) * multiple)
            return count, count * estimate_s
        for _ in range(2):
            run[0]()
        self._synchronize()
        before = time.perf_counter()
        for _ in range(3):
            run[0]()
        self._synchronize()
        estimate_s = (time.perf_counter() - before) / 3
        count = timing.launches_of(estimate_s, MIN_WALL_S, multiple, MAX_WALL_LAUNCHES)
        return count, count * estimate_s

    def arm(self, launches: int, slowdown: float) -> None:
        """Make ready to sample ``launches`` a sample, slowed by a known part."""
        if slowdown in self._samplers:
            return
        run = self._bound.launches
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
        return asdict(timing.measurement(sampler, taken, self._bound.rotated_bytes))


def _free_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


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
        launches, sample_s = (request["launches"], 0.0) if request["launches"] else cell.launches(request["multiple"])
        for slowdown in request["slowdowns"]:
            cell.arm(launches, slowdown)
        return {"outcome": Outcome.PASSED, "metrics": {"launches": float(launches), "sample_s": sample_s}}
    if request["kind"] == "block":
        return {
            "outcome": Outcome.PASSED,
            "measurements": (cell.block(request["slowdown"], request["samples"]),),
        }
    judged = cell.verify()
    if judged is None:
        return {"outcome": Outcome.PASSED, "absent": {"after_timing": "outputs_not_ours"}}
    error = asdict(judged.error) if judged.error is not None else None
    return {"outcome": judged.outcome, "reason": judged.reason, "detail": judged.detail, "error": error}
