"""How bytes travel between levels, and what may overlap with what.

Two orders of work exist: the *compute* stream (whichever stream is current when a value is handed out) and one *copy*
stream of the stack's own. Copies run in the order they were issued. The rules the stack keeps with them:
    a block is written only after every read of the bytes before it (``Block.fence``) is over;
    a value is read on the compute stream only after its copy is over (copy-done event);
    a block handed out is overwritten only after the compute issued on it is over (compute-done event).
A test double that runs both orders as late and as oddly as the rules allow checks that they are enough.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from vbench.kernels.tiers.marks import Mark, Marks


class Links(Protocol):
    """Copies of uint8 vectors of equal length, on the stack's copy stream unless said otherwise."""

    def copy(self, to: Tensor, source: Tensor, after: Marks) -> Marks:
        """Copy on the copy stream once ``after`` is over; the marks say when it is done."""
        ...

    def compute_stream(self) -> Any:
        """The stream on which the caller computes now."""
        ...

    def compute_mark(self, stream: Any) -> Marks:
        """Everything issued so far on a compute stream."""
        ...

    def compute_wait(self, marks: Marks) -> None:
        """Later work on the current compute stream starts after ``marks``."""
        ...

    def compute_copy(self, to: Tensor, source: Tensor) -> None:
        """Copy on the current compute stream: what a consumer of a value does."""
        ...

    def beside(self, work: Callable[[], None], after: Marks) -> Marks:
        """Run ``work``, which launches on the current stream, beside copies and compute once ``after`` is over."""
        ...

    def host_wait(self, marks: Marks) -> None:
        """Block the calling thread until ``marks`` are over."""
        ...

    def over(self, marks: Marks) -> bool:
        """Are ``marks`` over? Asks, never waits."""
        ...

    def drain(self) -> None:
        """Block the calling thread until copies, and what ran beside, are over."""
        ...


class HostLinks:
    """Levels 0 and 1 both in plain memory: a copy is over when it returns."""

    def copy(self, to: Tensor, source: Tensor, after: Marks) -> Marks:
        to.copy_(source)
        return ()

    def compute_stream(self) -> Any:
        return None

    def compute_mark(self, stream: Any) -> Marks:
        return ()

    def compute_wait(self, marks: Marks) -> None:
        return None

    def compute_copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source)

    def beside(self, work: Callable[[], None], after: Marks) -> Marks:
        work()
        return ()

    def host_wait(self, marks: Marks) -> None:
        return None

    def over(self, marks: Marks) -> bool:
        return True

    def drain(self) -> None:
        return None


class CudaLinks:
    """Level 0 on a CUDA device, copies on a side stream.

    Nothing here or above relies on ``Tensor.record_stream``: slabs outlive every copy (``TierStack.close`` drains), and
    the one tensor that does not (a fresh tensor for a value too large for level 0) is waited for on the compute stream,
    so the caching allocator may reuse its memory in stream order.
    """

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda  # its constructors carry no types
        self._side = cuda.Stream(device=device)
        self._beside = cuda.Stream(device=device)
        self._new_event = cuda.Event
        self._device = device
        self._sequence = 0

    def _mark(self, stream: torch.cuda.Stream) -> Marks:
        self._sequence += 1
        event = self._new_event()
        event.record(stream)
        return (Mark(stream.cuda_stream, self._sequence, event),)

    def copy(self, to: Tensor, source: Tensor, after: Marks) -> Marks:
        for mark in after:
            if mark.stream != self._side.cuda_stream:  # its own order is kept by the stream itself
                self._side.wait_event(mark.event)
        with torch.cuda.stream(self._side):
            to.copy_(source, non_blocking=True)
        return self._mark(self._side)

    def compute_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def compute_mark(self, stream: torch.cuda.Stream) -> Marks:
        return self._mark(stream)

    def compute_wait(self, marks: Marks) -> None:
        stream = self.compute_stream()
        for mark in marks:
            if mark.stream != stream.cuda_stream:
                stream.wait_event(mark.event)

    def compute_copy(self, to: Tensor, source: Tensor) -> None:
        to.copy_(source, non_blocking=True)

    def beside(self, work: Callable[[], None], after: Marks) -> Marks:
        for mark in after:
            if mark.stream != self._beside.cuda_stream:
                self._beside.wait_event(mark.event)
        with torch.cuda.stream(self._beside):
            work()
        return self._mark(self._beside)

    def host_wait(self, marks: Marks) -> None:
        for mark in marks:
            mark.event.synchronize()

    def over(self, marks: Marks) -> bool:
        return all(mark.event.query() for mark in marks)

    def drain(self) -> None:
        self._side.synchronize()
        self._beside.synchronize()
