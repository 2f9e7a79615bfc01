"""The ``offload_pass`` kernel: a stack of linear layers run through ``tier(module)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vbench.backend import Device, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.errors import TierError
from vbench.kernels.tiers.tiered import Tiered, tier
from vbench.kernels.tiers.units import ALIGN_BYTES, Packing, aligned
from vbench.spec import Case, Numerics

GRADIENTS = ("dx", "dw_first", "dw_middle", "dw_last")
COUNTED = ("to_device_bytes", "to_host_bytes", "resident", "timely", "late", "miss")
PARAMETERS = ("mode", "layers", "width", "tokens", "gpu_bytes", "codec")
#: The op is judged bitwise.
EXACT = Numerics()


class Weights(Protocol):
    """How the op's inputs describe the weights: made one at a time, [width, width] bf16 on the device."""

    @property
    def layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def codec(self) -> str: ...

    def make(self, layer: int) -> Tensor: ...


class LinearStack(nn.Module):
    """Linear layers without bias, relu between them."""

    def __init__(self, weights: Weights, *, trainable: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(weights.layers):
            layer = nn.Linear(weights.width, weights.width, bias=False, device="meta")
            layer.weight = nn.Parameter(weights.make(i), requires_grad=trainable)
            self.layers.append(layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        y: Tensor = self.layers[-1](x)
        return y


def make(case: Case, variant: str, device: Device) -> OffloadKernel:
    """Factory of the ``offload_pass`` kernel.

    Raises:
        Unsupported: ``unknown_variant``; ``parameter_not_taken``.
    """
    if variant:
        raise Unsupported("unknown_variant", f"offload_pass has no variant {variant!r}; leave it out")
    refuse_beyond(case, PARAMETERS)
    return OffloadKernel(case)


@dataclass(frozen=True, slots=True)
class _Held:
    """A stack that is tiered now, by what decides its placement."""

    weights: Weights
    gpu_bytes: int
    train: bool
    handle: Tiered
    held_bytes: int


#: The last stack: page-locking several GB takes seconds, and cases of one stack differ in their tokens only.
_last: _Held | None = None


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _tiered(weights: Weights, gpu_bytes: int, train: bool, device: torch.device) -> _Held:
    """The stack under its budget: the one made last if it is the same, which is closed otherwise.

    Raises:
        Unsupported: ``over_budget``.
    """
    global _last
    if _last is not None:
        if (_last.weights, _last.gpu_bytes, _last.train) == (weights, gpu_bytes, train):
            return _last
        _last.handle.close()
        _last = None
    before = _allocated(device)
    stack = LinearStack(weights, trainable=train)
    packed = Packing(weights.width, weights.width).size_bytes
    room = weights.layers * (aligned(weights.width**2 * 2) if weights.codec == "raw" else packed)
    # Activations lie beside the budget of the op, so none are set aside.
    budget = Budget(gpu=gpu_bytes, pinned=(2 if train else 1) * room + ALIGN_BYTES, activations=0)
    try:
        handle = tier(stack, budget=budget, device=device, codec=weights.codec)
    except BudgetError as error:
        raise Unsupported("over_budget", f"gpu_bytes={gpu_bytes}: {error}") from error
    held = _allocated(device) - before if device.type == "cuda" else int(handle.plan()["device_bytes"])
    _last = _Held(weights, gpu_bytes, train, handle, held)
    return _last


@dataclass(frozen=True, slots=True)
class OffloadKernel:
    """Bitwise the same as with every weight (decoded, where a codec is named) on the device."""

    case: Case
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("y", *GRADIENTS)
    deterministic: bool = True
    graph_safe: bool = False

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Moves the weights to the host and runs the pass once, so that its order is on record.

        Args:
            inputs: ``x``, ``weights``, in mode train ``dy``.
            out: taken are only the empty gradients of mode forward; the launch returns tensors of its own.

        Raises:
            Unsupported: ``over_budget``.
        """
        x: Tensor = inputs["x"]
        train = self.case.text("mode") == "train"
        held = _tiered(inputs["weights"], self.case.axis("gpu_bytes"), train, x.device)
        launch = Pass(held.handle, x, inputs.get("dy"), {name: out[name] for name in GRADIENTS}, held.held_bytes)
        launch.run()
        launch.watch()
        return launch


class Pass:
    """The launch. The first after ``watch`` tells its traffic and memory; to ask costs a synchronisation."""

    def __init__(
        self, handle: Tiered, x: Tensor, dy: Tensor | None, empty: Mapping[str, Tensor], held_bytes: int
    ) -> None:
        self._handle = handle
        self._x = x
        self._dy = dy
        self._empty = empty
        self._held_bytes = held_bytes
        self._traffic: dict[str, int] = {}
        self._before: dict[str, int] | None = None
        self._base_bytes = 0

    def watch(self) -> None:
        """Count from here on."""
        if self._x.is_cuda:
            torch.cuda.synchronize(self._x.device)
            torch.cuda.reset_peak_memory_stats(self._x.device)
            self._base_bytes = _allocated(self._x.device) - self._held_bytes
        self._before = self._handle.stats()

    def run(self) -> dict[str, Any]:
        """Outputs by name. Gradients of streamed weights lie on the host, where an optimizer would find them."""
        stack = self._handle.module
        if self._handle.closed:
            raise TierError("this launch's stack was closed for one bound later; bind it again")
        if self._dy is None:
            with torch.no_grad():
                return {**self._empty, "y": stack(self._x)}
        stack.zero_grad(set_to_none=True)
        x = self._x.detach().requires_grad_()
        y = stack(x)
        torch.autograd.backward(y, self._dy)
        weights = [p.grad for p in stack.parameters()]
        return {
            "y": y.detach(),
            "dx": x.grad,
            "dw_first": weights[0],
            "dw_middle": weights[len(weights) // 2],
            "dw_last": weights[-1],
        }

    def __call__(self) -> Mapping[str, Any]:
        outputs = self.run()
        if self._before is not None:
            after = self._handle.stats()
            self._traffic = {name: after[name] - self._before[name] for name in COUNTED}
            self._traffic["held_bytes"] = self._held_bytes
            if self._x.is_cuda:
                torch.cuda.synchronize(self._x.device)
                peak = torch.cuda.max_memory_allocated(self._x.device)
                self._traffic["peak_bytes"] = peak - self._base_bytes
            self._before = None
        return {**outputs, "traffic": self._traffic}
