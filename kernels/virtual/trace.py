"""Bytes that any module holds in a training step, seen operation by operation, with no GPU and no memory of its size.

The module runs under ``FakeTensorMode``: shapes and lifetimes are real, contents are not. A dispatch mode sees every
tensor an operation makes and when its storage dies. What it cannot see is memory inside a kernel (workspaces).
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vbench.errors import UsageError
from vbench.kernels.virtual.estimate import OPTIMIZERS, Memory, state_bytes
from vbench.kernels.virtual.hardware import Card
from vbench.kernels.virtual.tape import GRANULE_BYTES


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make while it is active, until each dies.

    Args:
        granule_bytes: each storage is rounded up to it.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self, granule_bytes: int = GRANULE_BYTES) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._granule_bytes = granule_bytes
        self._known: dict[int, weakref.ref[Any]] = {}
        self._born: dict[int, int] = {}
        #: bytes live after each allocation
        self._history: list[int] = []

    def ignore(self, tensors: Iterator[Tensor] | list[Tensor]) -> None:
        """Never count the storages of ``tensors``."""
        for tensor in tensors:
            self._note(tensor, counted=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf, counted=True)
        return out

    def _note(self, tensor: Tensor, *, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known and self._known[key]() is not None:
            return
        size = -(-storage.nbytes() // self._granule_bytes) * self._granule_bytes if counted else 0

        def died(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, died)
        self._born[key] = len(self._history)
        self.now += size
        self._history.append(self.now)
        self.peak = max(self.peak, self.now)

    def without(self, tensors: list[Tensor]) -> tuple[int, int]:
        """Given tensors that live now: their bytes that lived at the peak, and the peak of everything else."""
        births: dict[int, int] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            size = -(-storage.nbytes() // self._granule_bytes) * self._granule_bytes
            born = self._born[storage._cdata]
            births[born] = births.get(born, 0) + size
        then = others = alive = 0
        found = False
        for index, now in enumerate(self._history):
            alive += births.get(index, 0)
            others = max(others, now - alive)
            if now == self.peak and not found:
                then, found = alive, True
        return then, others


@dataclass(frozen=True, slots=True)
class Traced:
    """What a training step of a module holds, in bytes.

    Args:
        parameters, buffers: of the module; tied ones once.
        gradients: of the parameters that get one; ``gradients_at_peak``: of those, what existed at the peak.
        saved: distinct storages saved for the backward, parameters, buffers and inputs left out.
        peak: the most that was live at once beside parameters, buffers and inputs, gradients included.
        working: the same, gradients of parameters left out (not always at the peak's moment).
    """

    parameter_elements: int
    parameters: int
    buffers: int
    gradients: int
    gradients_at_peak: int
    saved: int
    peak: int
    working: int


@contextmanager
def _saved_storages(known: set[int]) -> Iterator[dict[int, int]]:
    """Storages saved for backward while active: key -> bytes, ``known`` ones left out."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            seen[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


def trace_step(
    module: nn.Module, step: Callable[[nn.Module], Tensor], inputs: list[Tensor], granule_bytes: int = GRANULE_BYTES
) -> Traced:
    """Run ``step(module)`` and the backward of its result, and count.

    Args:
        module: on any device but with gradients clear; real or fake tensors.
        step: returns a scalar that needs a gradient.
        inputs: tensors that ``step`` uses and that are not to be counted.
    """
    gc.collect()
    parameters = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in module.parameters()}
    elements = {id(p): p.numel() for p in module.parameters()}
    buffers = {b.untyped_storage()._cdata: b.untyped_storage().nbytes() for b in module.buffers()}
    known = set(parameters) | set(buffers) | {t.untyped_storage()._cdata for t in inputs}
    live = LiveBytes(granule_bytes)
    live.ignore([*module.parameters(), *module.buffers(), *inputs])
    with live:
        with _saved_storages(known) as saved:
            loss = step(module)
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
    gradients = {p.grad.untyped_storage()._cdata: p.grad for p in module.parameters() if p.grad is not None}
    at_peak, working = live.without(list(gradients.values()))
    return Traced(
        sum(elements.values()),
        sum(parameters.values()),
        sum(buffers.values()),
        sum(g.untyped_storage().nbytes() for g in gradients.values()),
        at_peak,
        sum(saved.values()),
        live.peak,
        working,
    )


def trace_module(module: nn.Module, step: Callable[..., Tensor], inputs: list[Tensor]) -> Traced:
    """Count a training step of any module, which may be on the meta device, with no memory of its size.

    Args:
        module: left as it is; its copy's tensors are fake ones on the CPU, tied ones still tied. The CPU's fused
            attention saves what the GPU's does.
        step: ``step(module, *inputs)`` returns a scalar loss.
        inputs: shapes and dtypes matter, contents do not, and no operation may depend on them.
    """
    copied = copy.deepcopy(module)
    with FakeTensorMode():
        made: dict[int, Any] = {}

        def fake(tensor: Tensor) -> Any:
            if id(tensor) not in made:
                empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                made[id(tensor)] = empty
            return made[id(tensor)]

        for owner in copied.modules():
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = fake(tensor)
        faked = [fake(t) for t in inputs]
        return trace_step(copied, lambda m: step(m, *faked), faked)


def estimate_module(
    module: nn.Module, step: Callable[..., Tensor], inputs: list[Tensor], *, optimizer: str = "adamw", card: Card
) -> Memory:
    """The memory of one training step of any module on ``card``, with a fused optimizer, as ``estimate`` gives it.

    Output layer and loss are not told apart here: they count as activations. Memory inside kernels other than cuBLAS's
    workspaces is not seen.

    Args:
        module, step, inputs: as ``trace_module`` takes them.

    Raises:
        UsageError: unknown optimizer.
    """
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"unknown optimizer {optimizer!r}: one of {', '.join(OPTIMIZERS)}")
    traced = trace_module(module, step, inputs)
    trained = {id(p): p for p in module.parameters() if p.requires_grad}.values()
    states = sum(state_bytes(p.numel(), p.element_size(), optimizer) for p in trained)
    fixed, blas = traced.parameters + traced.buffers, card.matrix_workspace_bytes
    rest = traced.peak - traced.gradients_at_peak
    activations = min(traced.saved, rest)
    working = traced.working + blas + card.context_bytes
    running = Memory(
        fixed, traced.gradients_at_peak, states, activations, 0, rest - activations + blas, card.context_bytes,
        "forward and backward", working,
    )  # fmt: skip
    stepping = Memory(fixed, traced.gradients, states, 0, 0, blas, card.context_bytes, "optimizer step", working)
    return max(running, stepping, key=lambda m: m.total)
