"""Live bytes of a training step, operation by operation, as autograd would hold them. Standard library only.

A program runs on a ``Tape`` as eager PyTorch would: operations allocate outputs and save tensors for their backward,
local names die, and ``backward`` walks the operations in reverse. Storages are counted by reference, as the allocator
sees them; views share one. What is counted follows from three rules of autograd (PyTorch notes, "Autograd mechanics"):
an operation's saved tensors live until its own backward has run; a gradient lives until its consumer has run; a
parameter's gradient lives until the optimizer's step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: Kinds of live memory: what operations made, what the output layer and the loss made (their gradients too), gradients
#: of the rest, gradients of parameters, and memory inside one operation.
KINDS = ("activations", "logits", "activation_gradients", "parameter_gradients", "workspace")

#: What the allocator rounds each block up to (c10 CUDACachingAllocator: kMinBlockSize).
GRANULE_BYTES = 512


class Allocator(Protocol):
    """Who gives the bytes out; what ``allocate`` returns, ``free`` takes."""

    def allocate(self, size_bytes: int) -> Any: ...

    def free(self, block: Any) -> None: ...


@dataclass(eq=False, slots=True)
class Storage:
    """A block of memory. ``references``: local names, savers and gradient buffers that hold it.

    ``block``: what the tape's allocator gave for it.
    """

    size_bytes: int
    what: str
    kind: str = "activations"
    references: int = 0
    #: parameters, buffers and inputs: counted elsewhere
    outside: bool = False
    block: Any = None


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the program: a storage and the bytes of its gradient (0: needs none)."""

    storage: Storage
    grad_bytes: int


@dataclass(eq=False, slots=True)
class _Step:
    name: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    saved: tuple[Storage, ...]
    weight_grads: tuple[WeightGrad, ...]
    workspace_bytes: int
    passes_gradient: bool
    recompute: Callable[[Tape, Value], Value] | None


@dataclass(frozen=True, slots=True)
class WeightGrad:
    """What an operation's backward leaves for a parameter.

    Args:
        name: parameter; a second gradient of one name is added to the first.
        size_bytes: of the gradient that stays.
        computed_bytes: of the gradient as the operation computes it, when that is another tensor (mixed precision: 16
            bits, then copied to 32); 0 when it is the same.
        is_view: it is a view of what was computed, so that autograd adds a later one into a third tensor, not in place.
    """

    name: str
    size_bytes: int
    computed_bytes: int = 0
    is_view: bool = False


@dataclass(slots=True)
class Peak:
    """The largest number of live bytes, when it was reached, and what was live by kind (``KINDS``)."""

    size_bytes: int = 0
    when: str = ""
    by_kind: dict[str, int] = field(default_factory=dict)


class Tape:
    """Runs a program forward and backward.

    Args:
        saving: False for a forward without autograd, as checkpointing runs it.
        granule_bytes: storages are rounded up to it.
        allocator: is asked for every storage in the order in which they come, and may refuse.
        leaving: parameters whose gradients leave the device once complete (streamed ones); ``in_flight`` of these
            copies may be under way while the next gradient is made.
    """

    def __init__(
        self,
        *,
        saving: bool = True,
        granule_bytes: int = GRANULE_BYTES,
        allocator: Allocator | None = None,
        leaving: Container[str] = (),
        in_flight: int = 0,
    ) -> None:
        self.saving = saving
        self._granule_bytes = granule_bytes
        self._allocator = allocator
        self._leaving = leaving
        self._in_flight = in_flight
        self._on_the_way: deque[Storage] = deque()
        self._steps: list[_Step] = []
        self._live = dict.fromkeys(KINDS, 0)
        self._live_bytes = 0
        self._gradients: dict[str, Storage] = {}
        self._views: set[Storage] = set()
        self._stage = "forward"
        self.peak = Peak()
        #: the most that was live at once, gradients of parameters left out
        self.working_peak_bytes = 0

    # --- forward ----------------------------------------------------------------------------------------------------

    def outside(self, what: str) -> Value:
        """A parameter, buffer or input: never counted, never freed."""
        return Value(Storage(0, what, references=1, outside=True), 0)

    def constant(self, what: str, size_bytes: int) -> Value:
        """A tensor without gradient, made in the step and held by a local name (a mask)."""
        storage = self._allocate(size_bytes, what)
        storage.references += 1
        self._look(what)
        return Value(storage, 0)

    def op(
        self,
        name: str,
        inputs: Sequence[Value],
        size_bytes: int,
        *,
        saves: Sequence[Value] = (),
        saves_output: bool = False,
        saves_new: Sequence[tuple[str, int]] = (),
        weight_grads: Sequence[WeightGrad] = (),
        workspace_bytes: int = 0,
        temporary_bytes: int = 0,
        passes_gradient: bool = False,
        differentiable: bool = True,
        frees: Sequence[Value] = (),
    ) -> Value:
        """Run one operation and return its output, held by one local name.

        Args:
            name: as reports show it.
            inputs: those that get a gradient, if they need one.
            size_bytes: of the output.
            saves: tensors kept for the backward; ``saves_output``: the output too; ``saves_new``: further ones, made
                here (masks, statistics), as (what, bytes).
            weight_grads: for each parameter that gets a gradient here.
            workspace_bytes: extra memory while the backward runs; ``temporary_bytes``: while the forward runs.
            passes_gradient: the input's gradient is the output's own tensor (addition).
            differentiable: whether the output needs a gradient.
            frees: local names that end with this operation.
        """
        output = self._output(name, size_bytes, differentiable)
        made = [self._allocate(size, f"{name}.{what}") for what, size in saves_new]
        self._look(name, temporary_bytes)
        saved = [v.storage for v in saves] + made
        if saves_output:
            saved.append(output.storage)
        self._record(
            _Step(
                name,
                tuple(v for v in inputs if v.grad_bytes),
                (output,),
                tuple(saved),
                tuple(weight_grads),
                workspace_bytes,
                passes_gradient,
                None,
            )
        )
        for storage in made:
            if not storage.references:
                self._free(storage)
        self.free(*frees)
        return output

    def split(self, name: str, value: Value, parts: int) -> tuple[Value, ...]:
        """Views of equal parts of ``value``, one local name each; their gradients are joined in a new tensor.

        ``value``'s local name ends here.
        """
        views = tuple(Value(value.storage, value.grad_bytes // parts) for _ in range(parts))
        value.storage.references += parts
        self._record(_Step(name, (value,), views, (), (), 0, False, None))
        self.free(value)
        return views

    def free(self, *values: Value) -> None:
        """Local names end."""
        for value in values:
            self._release(value.storage)

    def checkpoint(self, name: str, run: Callable[[Tape, Value], Value], x: Value) -> Value:
        """Run ``run`` without saving; its backward runs it again, saving (torch.utils.checkpoint, non-reentrant).

        Args:
            run: takes the tape and the block's input, of which it must end no local name; returns the output.
            x: saved; its local name ends here.
        """
        was, self.saving = self.saving, False
        output = run(self, x)
        self.saving = was
        self._record(_Step(name, (x,), (output,), (x.storage,), (), 0, False, run))
        self.free(x)
        return output

    # --- backward ---------------------------------------------------------------------------------------------------

    def backward(self, loss: Value) -> None:
        """Walk the steps in reverse, with a gradient of ``loss``; the local name ``loss`` lives on."""
        self._stage = "backward"
        start = self._allocate(loss.grad_bytes, "loss", "logits")
        start.references += 1
        self._walk({loss: start})
        while self._on_the_way:
            self._release(self._on_the_way.popleft())

    def drop_gradients(self) -> None:
        """What the optimizer does once it has stepped: parameters' gradients are let go of."""
        for storage in self._gradients.values():
            self._release(storage)
        self._gradients.clear()
        self._views.clear()

    def _walk(self, gradients: dict[Value, Storage]) -> None:
        while self._steps:
            step = self._steps.pop()
            incoming = [gradients.pop(o) for o in step.outputs if o in gradients]
            if not incoming:
                self._drop_saved(step)
                continue
            if step.recompute is not None:
                self._recompute(step, incoming[0], gradients)
                continue
            made = []
            for value in step.inputs:
                # A sum passes its gradient on as it is, unless it must be narrowed first.
                passed = step.passes_gradient and value.grad_bytes == step.outputs[0].grad_bytes
                storage = incoming[0] if passed else self._allocate(value.grad_bytes, step.name, _gradient_kind(value))
                storage.references += 1
                made.append((value, storage))
            computed = [
                self._allocate(g.computed_bytes or g.size_bytes, g.name, "parameter_gradients")
                for g in step.weight_grads
            ]
            self._look(step.name, step.workspace_bytes)
            for storage in incoming:
                self._release(storage)
            self._drop_saved(step)
            for grad, storage in zip(step.weight_grads, computed, strict=True):
                self._keep_gradient(grad, storage)
                self._send_home(grad.name)
            for value, storage in made:
                self._add_gradient(gradients, value, storage)

    def _recompute(self, step: _Step, incoming: Storage, gradients: dict[Value, Storage]) -> None:
        assert step.recompute is not None
        (x,) = step.inputs
        outer, self._steps = self._steps, []
        x.storage.references += 1
        output = step.recompute(self, x)
        self.free(output)
        inner = {output: incoming}
        self._walk(inner)
        self._steps = outer
        self._drop_saved(step)
        storage = inner.pop(x)
        self.free(x)
        self._add_gradient(gradients, x, storage)

    def _keep_gradient(self, grad: WeightGrad, storage: Storage) -> None:
        if grad.computed_bytes:
            copied = self._allocate(grad.size_bytes, grad.name, "parameter_gradients")
            self._look(f"{grad.name}.copy")
            self._free(storage)
            storage = copied
        storage.references += 1
        known = self._gradients.get(grad.name)
        if known is None:
            self._gradients[grad.name] = storage
            if grad.is_view:
                self._views.add(storage)
            return
        if known in self._views:
            total = self._allocate(grad.size_bytes, grad.name, "parameter_gradients")
            total.references += 1
            self._look(f"{grad.name}.add")
            self._release(known)
            self._gradients[grad.name] = total
        self._release(storage)

    def _send_home(self, name: str) -> None:
        """A complete gradient that leaves: gone once ``in_flight`` others are on their way after it."""
        # One that a later operation adds to (a tied table's) is not complete.
        if name not in self._leaving or any(g.name == name for step in self._steps for g in step.weight_grads):
            return
        storage = self._gradients.pop(name)
        self._views.discard(storage)
        self._on_the_way.append(storage)
        if len(self._on_the_way) > self._in_flight:
            self._release(self._on_the_way.popleft())

    def _add_gradient(self, gradients: dict[Value, Storage], value: Value, storage: Storage) -> None:
        if value in gradients:
            self._release(storage)  # added in place to the first
        else:
            gradients[value] = storage

    def _drop_saved(self, step: _Step) -> None:
        for storage in step.saved:
            self._release(storage)

    # --- accounts ---------------------------------------------------------------------------------------------------

    @property
    def saved_bytes(self) -> int:
        """Bytes of the distinct storages saved for backward now, each rounded up; parameters and inputs left out."""
        distinct = {s for step in self._steps for s in step.saved if not s.outside}
        return sum(s.size_bytes for s in distinct)

    @property
    def live_bytes(self) -> int:
        """Bytes live now."""
        return self._live_bytes

    def _output(self, name: str, size_bytes: int, differentiable: bool) -> Value:
        storage = self._allocate(size_bytes, name)
        storage.references += 1
        return Value(storage, size_bytes if differentiable else 0)

    def _record(self, step: _Step) -> None:
        if not self.saving:
            return
        for storage in step.saved:
            storage.references += 1
        self._steps.append(step)

    def _allocate(self, size_bytes: int, what: str, kind: str = "") -> Storage:
        rounded = -(-size_bytes // self._granule_bytes) * self._granule_bytes
        block = self._allocator.allocate(rounded) if self._allocator is not None else None
        storage = Storage(rounded, what, kind or _forward_kind(what), block=block)
        self._live[storage.kind] += rounded
        self._live_bytes += rounded
        return storage

    def _release(self, storage: Storage) -> None:
        if storage.outside:
            return
        assert storage.references > 0, storage.what
        storage.references -= 1
        if not storage.references:
            self._free(storage)

    def _free(self, storage: Storage) -> None:
        self._live[storage.kind] -= storage.size_bytes
        self._live_bytes -= storage.size_bytes
        if self._allocator is not None:
            self._allocator.free(storage.block)

    def _look(self, when: str, workspace_bytes: int = 0) -> None:
        if self._allocator is not None and workspace_bytes:
            self._allocator.free(self._allocator.allocate(workspace_bytes))
        now = self._live_bytes + workspace_bytes
        self.working_peak_bytes = max(self.working_peak_bytes, now - self._live["parameter_gradients"])
        if now > self.peak.size_bytes:
            self.peak = Peak(now, f"{self._stage}: {when}", {**self._live, "workspace": workspace_bytes})


def _forward_kind(what: str) -> str:
    return "logits" if what.startswith(("head", "loss")) else "activations"


def _gradient_kind(value: Value) -> str:
    return "logits" if value.storage.kind == "logits" else "activation_gradients"
