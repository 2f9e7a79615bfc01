"""Gradients of streamed parameters: copied to the host as they appear, ``p.grad`` there when ``backward`` returns.

Autograd adds a new gradient to ``p.grad`` on the device the graph ran on, while at rest the parameter and its gradient
are on the host. So an existing gradient steps aside before autograd looks (a hook that runs ahead of accumulation), and
the sum is made on the host, in the same precision.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vbench.errors import Unsupported
from vbench.kernels.tiers.budget import BudgetError
from vbench.kernels.tiers.links import Links
from vbench.kernels.tiers.marks import Marks
from vbench.kernels.tiers.slab import Slab

#: Device gradients whose copy may be under way at once; more would pile up on the device, fewer would serialise.
IN_FLIGHT = 2


class Counts(Protocol):
    """Where the copied bytes are counted."""

    to_host_bytes: int


@dataclass(slots=True)
class _Copy:
    """A gradient on its way; the device tensor lives until it is over."""

    parameter: nn.Parameter
    on_device: Tensor
    home: Tensor
    done: Marks


class HostGradients:
    """Homes of the gradients and the copies to them.

    The tensor hooks made here know their parameter weakly: torch holds hooks where Python's garbage collector does not
    look, so a parameter that its own hook refers to would never be freed.

    Args:
        links: from the device to the host.
        room_bytes: of host memory for homes.
        make_slab: makes host memory.
        counts: gets the bytes copied.
    """

    def __init__(self, links: Links, room_bytes: int, make_slab: Callable[[int], Slab], counts: Counts) -> None:
        self._links = links
        self._room_bytes = room_bytes
        self._make_slab = make_slab
        self._counts = counts
        self._lock = threading.RLock()
        self._slabs: list[Slab] = []
        self._homes: dict[int, Tensor] = {}
        self._aside: dict[int, Tensor] = {}
        self._tasks: dict[int, list[_Copy]] = {}
        self.held_bytes = 0

    def before(self, parameter: nn.Parameter, streamed: Callable[[], bool]) -> Callable[[Tensor], None]:
        """A tensor hook: take an existing gradient out of autograd's way, and be told when this backward ends."""
        known = weakref.ref(parameter)

        def hook(gradient: Tensor) -> None:
            parameter = known()
            if parameter is None or not streamed():
                return
            with self._lock:
                task = _graph_task()
                if task not in self._tasks:
                    self._tasks[task] = []
                    engine: Any = torch.autograd.Variable._execution_engine
                    engine.queue_callback(lambda: self._finish(task))
                if parameter.grad is not None:
                    self._aside[id(parameter)] = parameter.grad
                    parameter.grad = None

        return hook

    def after(self, parameter: nn.Parameter, streamed: Callable[[], bool]) -> Callable[[Tensor], None]:
        """A post-accumulation hook: begin the copy home."""
        known = weakref.ref(parameter)

        def hook(_: Tensor) -> None:
            parameter = known()
            if parameter is None or not streamed():
                return
            gradient = parameter.grad
            assert gradient is not None, "the hook runs right after accumulation"
            parameter.grad = None
            if gradient.layout is not torch.strided:
                raise Unsupported("sparse_gradient", "a streamed parameter has a sparse gradient; use sparse=False")
            with self._lock:
                earlier = self._aside.pop(id(parameter), None)
                home = self._home(parameter)
                copies = self._tasks[_graph_task()]
                self._counts.to_host_bytes += gradient.numel() * gradient.element_size()
                mark = self._links.compute_mark(self._links.compute_stream())
                if earlier is None:
                    copies.append(_Copy(parameter, gradient, home, self._links.copy(home, gradient, mark)))
                    if len([c for c in copies if c.done]) > IN_FLIGHT:
                        self._settle(next(c for c in copies if c.done))
                    return
                if earlier.data_ptr() != home.data_ptr():
                    home.copy_(earlier)
                arrived = torch.empty_like(home)
                self._links.host_wait(self._links.copy(arrived, gradient, mark))
                home.add_(arrived)
                copies.append(_Copy(parameter, home, home, ()))

        return hook

    def close(self) -> None:
        """Unlock the homes' memory; gradients stay valid tensors."""
        for slab in self._slabs:
            slab.close()
        self._slabs.clear()
        self._homes.clear()

    def _settle(self, copy: _Copy) -> None:
        self._links.host_wait(copy.done)
        copy.on_device = copy.home
        copy.done = ()

    def _finish(self, task: int) -> None:
        with self._lock:
            for copy in self._tasks.pop(task):
                self._settle(copy)
                copy.parameter.grad = copy.home

    def _home(self, parameter: nn.Parameter) -> Tensor:
        home = self._homes.get(id(parameter))
        if home is None:
            size_bytes = parameter.numel() * parameter.element_size()
            if self.held_bytes + size_bytes > self._room_bytes:
                raise BudgetError(
                    f"gradients need {self.held_bytes + size_bytes} bytes of host memory beside the weights so far, "
                    f"{self._room_bytes} are left of pinned: {self.held_bytes + size_bytes - self._room_bytes} short "
                    "with this one; raise pinned, or freeze parameters"
                )
            slab = self._make_slab(size_bytes)
            self._slabs.append(slab)
            self.held_bytes += size_bytes
            home = slab.memory_u8.view(parameter.dtype).view(parameter.shape)
            self._homes[id(parameter)] = home
        return home


def _graph_task() -> int:
    """Which backward is running, on this thread."""
    return int(torch._C._current_graph_task_id())
